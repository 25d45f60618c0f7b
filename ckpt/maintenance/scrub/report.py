"""The shared context of a scrub: its stores and their roles, its findings and its report.

``ScrubContext.put`` is the only place where a scrub writes objects.
"""

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

PROBLEMS_MAX = 10_000
"""Problems that a report names at most; all are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrubProblem:
    """One wrong copy of an object at one store.

    ``offsets``: those of a pack's wrong chunks; none for other objects and for a missing copy.
    ``lost``: no store has a right copy of the object, or of one of its chunks. ``repaired``: a
    right copy was written since.
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
    """One store's counts. ``orphans``: objects that nothing refers to, such as uploads in progress.

    ``role``: ``ready``; ``headless``: its ``ckpt.json`` is missing or damaged; ``empty``: it holds
    nothing; ``away``: it did not answer, at the start or SILENCES_MAX times in a row. Stores that
    are ``away`` or ``empty`` are not compared, unless an empty one is to be filled.
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

    def count(self, status: CopyStatus, copies: int = 1) -> None:
        """Count copies that were checked."""
        self.objects += copies
        match status:
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
    """The result of a scrub. ``complete`` False: it was stopped, and the same scrub can continue.

    ``under_replicated``: objects on fewer stores than the write quorum when they were checked.
    ``lost``: objects that no store has a right copy of. ``unrepaired``: wrong copies that remain,
    of objects that some store has. ``hole``: the position from which the log cannot be read.
    ``untraced``: snapshots with a lost manifest or part, so that their references are not all
    known.

    Over the limit of attributes: the document that ``--json`` prints, one attribute a figure.
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

    @property
    def ok(self) -> bool:
        """Whether every store holds everything now, as far as it was compared."""
        return (
            self.complete and self.hole is None and not (self.lost or self.unrepaired or self.away)
        )

    @property
    def away(self) -> int:
        """How many stores did not answer, or hold nothing."""
        return sum(store.role in ("away", "empty") for store in self.stores)

    @property
    def has_findings(self) -> bool:
        """Whether anything was wrong, repaired since or not."""
        return bool(self.problems_total or self.hole or self.away)


@dataclass(slots=True)
class ScrubFindings:
    """The findings of a scrub in progress. Only the scrub's own thread changes it."""

    stores: list[StoreStatistics]
    write_quorum: int
    problems: list[ScrubProblem] = field(default_factory=list)
    total: int = 0
    under_replicated: int = 0
    lost: int = 0
    unrepaired: int = 0

    def add(self, problem: ScrubProblem) -> None:
        """Add a problem. The caller counts lost and unrepaired objects."""
        self.total += 1
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append(problem)


# ---- StoreRole: which stores take part in a scrub, by their ``ckpt.json``

READY = "ready"
HEADLESS = "headless"
EMPTY = "empty"
AWAY = "away"


@dataclass(frozen=True, slots=True)
class StoreRole:
    """One store's role in a scrub (see ``StoreStatistics``), its job record, and its problem."""

    role: str
    record: JobRecord | None = None
    problem: str = ""
    damaged: bool = False
    """Its ``ckpt.json`` exists and cannot be read; False if it is missing."""
    newer: FormatVersionError | None = None
    """Its ``ckpt.json`` names a newer format. Believed only if no other store's can be read."""


def store_roles(stores: Sequence[Backend]) -> list[StoreRole]:
    """Read each store's role. Raises FormatVersionError if all are of a newer release."""
    roles = read_all(list(stores), _role)
    newer = next((role.newer for role in roles if role.newer is not None), None)
    if newer is not None and not any(role.role == READY for role in roles):
        raise newer
    return roles


def common_record(stores: Sequence[Backend], roles: Sequence[StoreRole]) -> JobRecord | None:
    """The job record that the stores share, apart from their own ids; None if none is readable.

    Raises UsageError if they belong to different jobs or hold different logs, or if one store is
    named twice.
    """
    number_of_id: dict[str, int] = {}
    first: tuple[int, JobRecord] | None = None
    for number, role in enumerate(roles):
        if role.record is None:
            continue
        if role.record.store_id in number_of_id:
            other = stores[number_of_id[role.record.store_id]].url
            raise UsageError(
                f"two of the stores are one and the same, or one is a plain copy of the other. "
                f"one={other} other={stores[number].url} store_id={role.record.store_id} name each "
                "store once; make replicas with ckpt sync, not by copying files"
            )
        number_of_id[role.record.store_id] = number
        if first is None:
            first = (number, role.record)
        elif (first[1].job, first[1].log_id) != (role.record.job, role.record.log_id):
            raise UsageError(
                f"the stores do not hold one log. one={stores[first[0]].url} "
                f"its_job={first[1].job!r} other={stores[number].url} "
                f"its_job={role.record.job!r} "
                f"same_job_other_log={first[1].job == role.record.job} leave one out"
            )
    return None if first is None else first[1]


def lost_id(members: Sequence[str] | None, roles: Sequence[StoreRole], number: int) -> str | None:
    """The id that the headless store ``number`` had: the only member id that no other store has.

    Empty if it had none that counts: ``members`` is None (a log in one store names no ids), or
    other stores have all of them. None if the id cannot be known: with two candidates a guess could
    give a store an id that another one still has.
    """
    if members is None:
        return ""
    others = [role for other, role in enumerate(roles) if other != number]
    if any(role.record is None for role in others):
        return None
    left = {member for member in members if not is_placeholder(member)} - {
        role.record.store_id for role in others if role.record is not None
    }
    return None if len(left) > 1 else left.pop() if left else ""


def _role(store: Backend) -> StoreRole:
    try:
        data = read_alone(store, keys.JOB_KEY, bytes_max=JOB_BYTES_MAX)
        return StoreRole(READY, JobRecord.decode(data))
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
        problem = f"nothing is there. store={store.url} mount it, or fill it with ckpt sync"
        return StoreRole(EMPTY, problem=problem)
    return StoreRole(HEADLESS, problem=f"it holds a log but no {keys.JOB_KEY}")


# ---- ScrubContext

SILENCES_MAX = 5
"""A store that does not answer for so many objects in a row is skipped from then on."""
ALARMS_MAX = 20
"""Objects with an alarm of their own in one scrub; the event at its end counts all."""


@dataclass(slots=True)
class ScrubContext:
    """One scrub's stores, findings and rate limit.

    Only the scrub's own thread changes it; worker threads use ``stores`` and ``pace``.
    """

    stores: tuple[Backend, ...]
    findings: ScrubFindings
    writable: set[int]
    """The stores that copies are written to; none if the scrub only reads."""
    emit: Emit
    pace: MaintenancePace = field(default_factory=MaintenancePace)
    tainted: set[int] = field(default_factory=set)
    """Stores that still lack an object. No log record is written to them: it could name that
    object."""
    _silences: dict[int, int] = field(default_factory=dict)
    _alarms: int = 0

    @property
    def active(self) -> list[int]:
        """The stores that are compared: those that answer, and an empty one that is filled."""
        roles = enumerate(store.role for store in self.findings.stores)
        return [
            number
            for number, role in roles
            if role != AWAY and (role != EMPTY or number in self.writable)
        ]

    def is_alone(self, state: LogState) -> bool:
        """Whether the one store holds the log alone, so that it has second copies."""
        return len(self.stores) == 1 and (state.stores is None or len(state.stores.ids) == 1)

    def copy_of_each(self, copies: Mapping[int, CopyCheck]) -> list[CopyCheck]:
        """``copies`` with an entry for each store.

        A store that is not compared may hold anything, an empty one holds nothing.
        """
        unknown = CopyCheck(CopyStatus.UNREADABLE, all_bad=True)
        missing = CopyCheck(CopyStatus.MISSING, all_bad=True)
        roles = [store.role for store in self.findings.stores]
        return [
            copies.get(n) or (missing if role == EMPTY else unknown) for n, role in enumerate(roles)
        ]

    def count_silence(self, copies: Mapping[int, CopyCheck]) -> None:
        """Count the objects in a row that a store did not answer for; at the limit it is away."""
        for number, copy in copies.items():
            unreadable = copy.status is CopyStatus.UNREADABLE
            silences = self._silences.get(number, 0) + 1 if unreadable else 0
            self._silences[number] = silences
            if silences >= SILENCES_MAX:
                self.mark_away(number, copy.message)

    def mark_away(self, number: int, reason: str) -> None:
        """Skip the store for the rest of the scrub."""
        store = self.findings.stores[number]
        store.role, store.problem = AWAY, reason
        self.writable.discard(number)
        self.tainted.add(number)

    def put(self, number: int, key: str, data: bytes | memoryview) -> bool:
        """Write a verified copy; False if the store refused or did not answer, with its problem."""
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
        self.emit(Event("scrub-mended", f"a copy was repaired: {key}", facts))
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
        """Count one object, with its copies as they were before the repair.

        ``repaired``: stores that have a right copy since. ``lost``: no store has one.
        ``bad_everywhere``: the chunks to name for a copy of which all are bad.
        """
        wrong = {
            number: copy for number, copy in copies.items() if copy.status is not CopyStatus.OK
        }
        for number, copy in copies.items():
            self.findings.stores[number].count(copy.status)
        quorum = min(self.findings.write_quorum, len(self.stores))
        self.findings.under_replicated += len(copies) - len(wrong) < quorum
        self.findings.lost += lost
        for number, copy in wrong.items():
            is_repaired = number in repaired
            if not (is_repaired or lost):
                self.findings.unrepaired += 1
                self.tainted.add(number)
            chunks = bad_everywhere if copy.all_bad else copy.bad_chunks
            offsets = (
                ()
                if copy.status is CopyStatus.MISSING
                else tuple(sorted({at.offset_bytes for _, at in chunks}))
            )
            self.findings.add(
                ScrubProblem(
                    key=key,
                    store=number,
                    status=copy.status,
                    message=copy.message,
                    offsets=offsets,
                    lost=lost,
                    repaired=is_repaired,
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
        text = f"no store has a right copy of {key}" if lost else f"a copy of {key} is wrong"
        facts: dict[str, Fact] = {"key": key, "where": where, "lost": lost}
        self.emit(Event("scrub-damage", text, facts, alarm=True))


class PendingNotes:
    """The checked copies of log records and folds, kept until it is known which were repaired.

    Call it with each copy. It counts all of them and keeps the wrong ones, up to a limit.
    """

    def __init__(self) -> None:
        self._counts: Counter[tuple[int, CopyStatus]] = Counter()
        self._wrong: list[tuple[int, str, CopyStatus, str]] = []

    def __call__(self, number: int, key: str, status: CopyStatus, message: str) -> None:
        """Note one copy at the store ``number``."""
        self._counts[number, status] += 1
        if status is not CopyStatus.OK and len(self._wrong) < PROBLEMS_MAX:
            self._wrong.append((number, key, status, message))

    def report_to(self, context: ScrubContext, log: LogFindings) -> None:
        """Add the notes to the findings. What ``log`` still lists as faulty is unrepaired."""
        faulty = {
            (number, keys.log_key(seq))
            for number, faults in enumerate(log.faults)
            for seq in faults.first
        }
        faulty |= {
            (number, keys.settled_key(seq))
            for number, faults in enumerate(log.faults)
            for seq in faults.second
        }
        faulty |= {(number, keys.fold_key(fold.seq)) for fold in log.folds for number in fold.wrong}
        lost = {keys.log_key(seq) for seq in log.lost}
        context.findings.lost += len(lost)
        findings = context.findings
        unreadable = wrong = 0
        for (number, status), count in self._counts.items():
            findings.stores[number].count(status, count)
            unreadable += count if status is CopyStatus.UNREADABLE else 0
            wrong += 0 if status is CopyStatus.OK else count
        for number, key, status, message in self._wrong:
            is_repaired = (
                status is not CopyStatus.UNREADABLE
                and (number, key) not in faulty
                and key not in lost
            )
            findings.add(
                ScrubProblem(
                    key=key,
                    store=number,
                    status=status,
                    message=message,
                    lost=key in lost,
                    repaired=is_repaired,
                )
            )
        findings.total += wrong - len(self._wrong)
        findings.unrepaired += len(faulty) + unreadable
        if self._wrong:
            number, key, status, _ = self._wrong[0]
            facts = {
                "first": key,
                "store": context.stores[number].url,
                "what": status.value,
                "copies": wrong,
            }
            context.emit(
                Event("scrub-damage", "copies of log records are wrong", facts, alarm=True)
            )


FRESH_S = 60.0
"""A log that was read longer ago is read again before damage is believed. Sweeps leave hours
between a drop and the deletion, so a minute is recent enough."""


class DropCheck:
    """Tells whether snapshots were dropped while a scrub or sync was running.

    Then a sweep deleted their objects, and a missing object is no damage. ``read_new`` returns the
    state of the log after the one it is given.
    """

    def __init__(
        self,
        state: LogState,
        read_new: Callable[[LogState], LogState],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state = state
        self._read_new = read_new
        self._clock = clock
        self._read_at = clock()

    def all_dropped(self, entries: Sequence[Committed]) -> bool:
        """Whether none of these snapshots exists any more. Reads the log if it is not fresh."""
        if self._clock() - self._read_at > FRESH_S:
            self._state = self._read_new(self._state)
            self._read_at = self._clock()
        existing = set(self._state.snapshots)
        return not any(entry in existing for entry in entries)
