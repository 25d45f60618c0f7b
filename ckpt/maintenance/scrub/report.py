"""What all of a scrub's work shares: the stores, what was found, how fast, whom to tell, and the
only ``put``."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from ckpt.backends.base import Backend
from ckpt.backends.checked import read_alone
from ckpt.errors import (
    FormatVersionError,
    IntegrityError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from ckpt.events import Emit, Event, Fact
from ckpt.format import keys
from ckpt.format.store import JOB_BYTES_MAX, JobRecord
from ckpt.log.quorum import is_placeholder
from ckpt.log.reader import read_all
from ckpt.log.state import Committed, Hole, LogState
from ckpt.maintenance.copies import ChunkRef, CopyCheck, CopyStatus
from ckpt.maintenance.copy_io import MaintenancePace
from ckpt.maintenance.scrub.log import LogFindings
from ckpt.values import SnapshotId

# What a scrub found and did, as it is told to people and programs.

PROBLEMS_MAX = 10_000
"""How many troubles a report names; all are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrubProblem:
    """One object that is not as it should be at one store.

    ``offsets`` are those of a pack's chunks that are not right there, none for other objects and
    for a copy that is gone. ``lost``: no store has the object (or one of its chunks) rightly.
    ``mended``: a right copy was written since.
    """

    key: str
    store: int
    status: CopyStatus
    message: str
    offsets: tuple[int, ...] = ()
    lost: bool = False
    repaired: bool = False


@dataclass(slots=True)
class StoreStatistics:
    """One store in numbers. ``strays`` are objects that nothing refers to: uploads under way, or
    what a sweep will delete.

    ``role``: ``ready``; ``headless``: its ``ckpt.json`` is gone or damaged; ``empty``: nothing is
    there; ``away``: it did not answer, then or too often later. ``away`` and ``empty`` ones are not
    compared, unless an empty one is to be filled.
    """

    url: str
    role: str
    store_id: str = ""
    problem: str = ""
    objects: int = 0
    ok: int = 0
    missing: int = 0
    damaged: int = 0
    unreadable: int = 0
    repaired: int = 0
    orphans: int = 0
    orphan_bytes: int = 0

    def count(self, what: CopyStatus, copies: int = 1) -> None:
        """So many copies were looked at, and are ``what``."""
        self.objects += copies
        match what:
            case CopyStatus.OK:
                self.ok += copies
            case CopyStatus.MISSING:
                self.missing += copies
            case CopyStatus.DAMAGED:
                self.damaged += copies
            case CopyStatus.UNREADABLE:
                self.unreadable += copies


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrubReport:
    """Everything that was found. ``complete`` is False where the scrub was stopped: the same scrub
    goes on from there.

    ``thin``: objects on fewer stores than the write quorum when they were looked at. ``lost``:
    objects that no store has rightly. ``unmended``: copies that still are not right, of objects
    that some store has. ``hole``: the log can't be read on.
    """

    complete: bool
    job: str
    snapshots: int
    records: int
    moved_bytes: int
    stores: tuple[StoreStatistics, ...]
    problems: tuple[ScrubProblem, ...]
    problems_total: int
    under_replicated: int
    lost: int
    unrepaired: int
    hole: Hole | None
    untraced: tuple[SnapshotId, ...]
    """Snapshots of which a manifest or part is lost, so that what they refer to can't all be
    found."""

    @property
    def ok(self) -> bool:
        """Whether every store that is to hold everything now does, as far as it was compared."""
        return (
            self.complete and self.hole is None and not (self.lost or self.unrepaired or self.away)
        )

    @property
    def away(self) -> int:
        """How many stores did not answer, or hold nothing."""
        return sum(store.role in ("away", "empty") for store in self.stores)

    @property
    def has_findings(self) -> bool:
        """Whether anything was not as it should be, mended since or not."""
        return bool(self.problems_total or self.hole or self.away)


@dataclass(slots=True)
class ScrubFindings:
    """What is being gathered while a scrub runs. Only its own thread changes it."""

    stores: list[StoreStatistics]
    write_quorum: int
    problems: list[ScrubProblem] = field(default_factory=list)
    total: int = 0
    under_replicated: int = 0
    lost: int = 0
    unrepaired: int = 0

    def add(self, trouble: ScrubProblem) -> None:
        """Note a trouble; the counts of lost and unmended objects are the caller's."""
        self.total += 1
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append(trouble)


# Which of the given stores take part in a scrub, by what their ``ckpt.json`` says.

READY = "ready"
HEADLESS = "headless"
EMPTY = "empty"
AWAY = "away"


@dataclass(frozen=True, slots=True)
class StoreRole:
    """One store's part in a scrub: its role (see ``StoreStatistics``), its record where there is
    one, and what is wrong."""

    role: str
    record: JobRecord | None = None
    problem: str = ""
    damaged: bool = False
    """Its ``ckpt.json`` is there and can't be read, rather than gone."""
    newer: FormatVersionError | None = None
    """It says that a newer release wrote it: believed only where no other store's can be read."""


def store_roles(stores: Sequence[Backend]) -> list[StoreRole]:
    """Ask each store what it is. Raises FormatVersionError where they are of a newer release."""
    seats = read_all(list(stores), _seat)
    newer = next((seat.newer for seat in seats if seat.newer is not None), None)
    if newer is not None and not any(seat.role == READY for seat in seats):
        raise newer
    return seats


def common_record(stores: Sequence[Backend], seats: Sequence[StoreRole]) -> JobRecord | None:
    """The job record that the stores agree in but for their own ids; None where none can be read.

    Raises UsageError where they are of different jobs or hold different logs, and where one store
    is named twice.
    """
    found: dict[str, int] = {}
    first: tuple[int, JobRecord] | None = None
    for number, seat in enumerate(seats):
        if seat.record is None:
            continue
        if seat.record.store_id in found:
            other = stores[found[seat.record.store_id]].url
            raise UsageError(
                f"two of the stores are one and the same, or one is a plain copy of the other. "
                f"one={other} other={stores[number].url} store_id={seat.record.store_id} name each "
                "store once; "
                "make replicas with ckpt sync, not by copying files"
            )
        found[seat.record.store_id] = number
        if first is None:
            first = (number, seat.record)
        elif (first[1].job, first[1].log_id) != (seat.record.job, seat.record.log_id):
            raise UsageError(
                f"the stores do not hold one log. one={stores[first[0]].url} "
                f"its_job={first[1].job!r} "
                f"other={stores[number].url} its_job={seat.record.job!r} "
                f"same_job_other_log={first[1].job == seat.record.job} leave one out"
            )
    return None if first is None else first[1]


def lost_id(members: Sequence[str] | None, seats: Sequence[StoreRole], number: int) -> str | None:
    """The id that the headless store ``number`` must have had: the only one of ``members`` that no
    other store has.

    Empty where it had none that counts: ``members`` is None (a log in one store names no ids), or
    all of them are others. None where that can't be known. Pure.
    """
    if members is None:
        return ""
    others = [seat for at, seat in enumerate(seats) if at != number]
    if any(seat.record is None for seat in others):
        return None
    left = {member for member in members if not is_placeholder(member)} - {
        seat.record.store_id for seat in others if seat.record is not None
    }
    return None if len(left) > 1 else left.pop() if left else ""


def _seat(store: Backend) -> StoreRole:
    try:
        return StoreRole(
            READY, JobRecord.decode(read_alone(store, keys.JOB_KEY, bytes_max=JOB_BYTES_MAX))
        )
    except UnavailableError as error:
        return StoreRole(AWAY, problem=str(error))
    except IntegrityError as error:
        return StoreRole(HEADLESS, problem=str(error), damaged=True)
    except FormatVersionError as error:
        return StoreRole(HEADLESS, problem=str(error), damaged=True, newer=error)
    except NotFoundError:
        pass
    try:
        first = next(islice(store.list(keys.LOG), 1), None)
    except UnavailableError as error:
        return StoreRole(AWAY, problem=str(error))
    if first is None:
        return StoreRole(
            EMPTY,
            problem=f"nothing is there. store={store.url} mount it, or fill it with ckpt sync",
        )
    return StoreRole(HEADLESS, problem=f"it holds a log but no {keys.JOB_KEY}")


SILENCES_MAX = 5
"""A store that does not answer for so many objects in a row is left alone for the rest of the
scrub."""
ALARMS_MAX = 20
"""How many objects one scrub raises an alarm for, each by itself; its last word counts all."""


@dataclass(slots=True)
class ScrubContext:
    """One scrub's stores and findings. Only the scrub's own thread changes it; others read through
    ``stores`` and ``pace``."""

    stores: tuple[Backend, ...]
    findings: ScrubFindings
    writable: set[int]
    """The stores that copies are written to; none where a scrub only looks."""
    emit: Emit
    pace: MaintenancePace = field(default_factory=MaintenancePace)
    tainted: set[int] = field(default_factory=set)
    """Stores that still lack what another has: no log record goes there, or it would name what
    isn't there."""
    _silences: dict[int, int] = field(default_factory=dict)
    _alarms: int = 0

    @property
    def active(self) -> list[int]:
        """The stores that are looked at: those that answer, and an empty one where it is to be
        filled."""
        roles = enumerate(tally.role for tally in self.findings.stores)
        return [
            number
            for number, role in roles
            if role != AWAY and (role != EMPTY or number in self.writable)
        ]

    def copy_of_each(self, copies: Mapping[int, CopyCheck]) -> list[CopyCheck]:
        """One entry for each store: one that is not looked at may have anything, or is known to
        have nothing."""
        unknown, nothing = (
            CopyCheck(CopyStatus.UNREADABLE, all_bad=True),
            CopyCheck(CopyStatus.MISSING, all_bad=True),
        )
        roles = [tally.role for tally in self.findings.stores]
        return [
            copies.get(n) or (nothing if role == EMPTY else unknown) for n, role in enumerate(roles)
        ]

    def count_silence(self, copies: Mapping[int, CopyCheck]) -> None:
        """Count each store's silence; at the limit it is away."""
        for number, copy in copies.items():
            silences = (
                self._silences.get(number, 0) + 1 if copy.status is CopyStatus.UNREADABLE else 0
            )
            self._silences[number] = silences
            if silences >= SILENCES_MAX:
                self.mark_away(number, copy.message)

    def mark_away(self, number: int, why: str) -> None:
        """From now on the store is away."""
        tally = self.findings.stores[number]
        tally.role, tally.problem = AWAY, why
        self.writable.discard(number)
        self.tainted.add(number)

    def put(self, number: int, key: str, data: bytes | memoryview) -> bool:
        """Write a copy that was verified. False where the store refused or did not answer: its
        tally then says why."""
        self.pace.take(len(data))
        try:
            self.stores[number].put(key, [data])
        except UnavailableError as error:
            self.tainted.add(number)
            self.findings.stores[number].problem = str(error)
            self.count_silence({number: CopyCheck(CopyStatus.UNREADABLE, str(error))})
            return False
        self.findings.stores[number].repaired += 1
        facts: dict[str, Fact] = {
            "key": key,
            "store": self.stores[number].url,
            "size_bytes": len(data),
        }
        self.emit(Event("scrub-mended", f"a copy was written anew: {key}", facts))
        return True

    def count_object(
        self,
        key: str,
        copies: Mapping[int, CopyCheck],
        *,
        repaired: Collection[int] = (),
        lost: bool = False,
        bad_everywhere: Collection[ChunkRef] = (),
    ) -> None:
        """Count one object: its copies as they were found, who has a right one by now, and whether
        nobody has one.

        ``nowhere``: the chunks to name for a copy of which all are bad.
        """
        wrong = {
            number: copy for number, copy in copies.items() if copy.status is not CopyStatus.OK
        }
        for number, copy in copies.items():
            self.findings.stores[number].count(copy.status)
        self.findings.under_replicated += len(copies) - len(wrong) < min(
            self.findings.write_quorum, len(self.stores)
        )
        self.findings.lost += lost
        for number, copy in wrong.items():
            done = number in repaired
            if not (done or lost):
                self.findings.unrepaired += 1
                self.tainted.add(number)
            places = bad_everywhere if copy.all_bad else copy.bad_chunks
            offsets = (
                ()
                if copy.status is CopyStatus.MISSING
                else tuple(sorted({at.offset_bytes for _, at in places}))
            )
            self.findings.add(
                ScrubProblem(
                    key=key,
                    store=number,
                    status=copy.status,
                    message=copy.message,
                    offsets=offsets,
                    lost=lost,
                    repaired=done,
                )
            )
        if wrong:
            self._alarm(key, wrong, lost=lost)

    def _alarm(self, key: str, wrong: Mapping[int, CopyCheck], *, lost: bool) -> None:
        self._alarms += 1
        if self._alarms > ALARMS_MAX:
            return
        where = ", ".join(
            f"{self.stores[number].url}: {copy.status.value}" for number, copy in wrong.items()
        )
        text = (
            f"no store has {key} as it should be"
            if lost
            else f"a copy of {key} is not as it should be"
        )
        self.emit(
            Event("scrub-damage", text, {"key": key, "where": where, "lost": lost}, alarm=True)
        )


# What was seen of records and folds while the log was read, kept until it is known what of it was
# mended.


class PendingNotes:
    """Counts every copy and names those that are wrong, up to a limit. Call it with each copy as it
    was found."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[int, CopyStatus]] = Counter()
        self._wrong: list[tuple[int, str, CopyStatus, str]] = []

    def __call__(self, number: int, key: str, what: CopyStatus, message: str) -> None:
        """One copy: the store's number, the key, what it is, and why."""
        self._counts[number, what] += 1
        if what is not CopyStatus.OK and len(self._wrong) < PROBLEMS_MAX:
            self._wrong.append((number, key, what, message))

    def report_to(self, bench: ScrubContext, log: LogFindings) -> None:
        """Tell it all. What ``log`` still lists as wanting is unmended."""
        left = {
            (number, keys.log_key(seq))
            for number, faults in enumerate(log.faults)
            for seq in faults.first
        }
        left |= {
            (number, keys.settled_key(seq))
            for number, faults in enumerate(log.faults)
            for seq in faults.second
        }
        left |= {
            (number, keys.fold_key(fault.seq)) for fault in log.folds for number in fault.wrong
        }
        findings = bench.findings
        unreadable = wrong = 0
        for (number, what), count in self._counts.items():
            findings.stores[number].count(what, count)
            unreadable += count if what is CopyStatus.UNREADABLE else 0
            wrong += 0 if what is CopyStatus.OK else count
        for number, key, what, message in self._wrong:
            done = what is not CopyStatus.UNREADABLE and (number, key) not in left
            findings.add(
                ScrubProblem(key=key, store=number, status=what, message=message, repaired=done)
            )
        findings.total += wrong - len(self._wrong)
        findings.unrepaired += len(left) + unreadable
        if self._wrong:
            number, key, what, _ = self._wrong[0]
            facts = {
                "first": key,
                "store": bench.stores[number].url,
                "what": what.value,
                "copies": wrong,
            }
            bench.emit(
                Event(
                    "scrub-damage",
                    "copies of log records are not as they should be",
                    facts,
                    alarm=True,
                )
            )


# Whether what is missing was dropped while the scrub went on: then a sweep took it, and nothing
# is wrong.

FRESH_S = 60.0
"""A log that was read so long ago is read again before damage is believed: sweeps wait for hours
between drop and deletion."""


class DropCheck:
    """The log of a while ago, read on when it is asked. ``read_new`` gives the state after what it
    is given."""

    def __init__(
        self,
        state: LogState,
        read_on: Callable[[LogState], LogState],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state = state
        self._read_on = read_on
        self._clock = clock
        self._read_at = clock()

    def all_dropped(self, entries: Sequence[Committed]) -> bool:
        """Whether none of these snapshots exists any more."""
        if self._clock() - self._read_at > FRESH_S:
            self._state = self._read_on(self._state)
            self._read_at = self._clock()
        exist = set(self._state.snapshots)
        return not any(entry in exist for entry in entries)
