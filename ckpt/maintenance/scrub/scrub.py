"""Reading everything everywhere, and mending what is not as it should be: on one store, or on all
that hold one log.

The order is what makes it safe to stop, or to die, anywhere: first the log is only read. Then
manifests, parts and packs are compared and mended. Only then do stores get log records that they
lack, in order; then folds; and last a lost ``ckpt.json``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

from ckpt.backends.base import Backend
from ckpt.backends.checked import read_alone
from ckpt.errors import FormatVersionError, IntegrityError, NotFoundError, UnavailableError
from ckpt.events import Emit, Event
from ckpt.format import keys
from ckpt.format.records import RECORD_BYTES_MAX, decode_record
from ckpt.format.store import JobRecord
from ckpt.log.reader import read_new
from ckpt.log.state import LogState
from ckpt.maintenance.copies import CopyCheck, CopyStatus
from ckpt.maintenance.copy_io import MaintenancePace, Stopped
from ckpt.maintenance.replica import claim_replica
from ckpt.maintenance.scrub.log import CountedRecord, LogFindings, compare_logs
from ckpt.maintenance.scrub.objects import ObjectScrub
from ckpt.maintenance.scrub.repair import repair_folds, repair_job, repair_log
from ckpt.maintenance.scrub.report import (
    AWAY,
    EMPTY,
    HEADLESS,
    READY,
    DropCheck,
    PendingNotes,
    ScrubContext,
    ScrubFindings,
    ScrubReport,
    StoreRole,
    StoreStatistics,
    common_record,
    lost_id,
    store_roles,
)
from ckpt.values import SnapshotId

# How a scrub begins: who is there, whose log it is, and what every store holds of it.

RECORDS_TRIED_MAX = 100
"""How many records of a store without ``ckpt.json`` are tried for the job's name."""


@dataclass(frozen=True, slots=True)
class ScrubStart:
    """What a scrub knows once all logs are read. ``common``: what the stores' records agree in;
    None where none can be read."""

    bench: ScrubContext
    roles: Sequence[StoreRole]
    common: JobRecord | None
    log: LogFindings
    notes: PendingNotes


def start_scrub(
    stores: Sequence[Backend],
    write_quorum: int,
    *,
    repair: bool,
    fill_empty: bool,
    counted_record: CountedRecord | None,
    emit: Emit,
    pace: MaintenancePace,
) -> ScrubStart:
    """Read everything but objects. Writes at most the ``ckpt.json`` of empty stores that are to be
    filled.

    Raises UsageError where the stores do not belong together, NotFoundError where none is a store,
    FormatVersionError, UnavailableError where none answers, and Stopped.
    """
    seats = store_roles(stores)
    common = common_record(stores, seats)
    job = common.job if common is not None else _job_without_head(stores, seats)
    fresh: list[int] = []
    for number, seat in enumerate(seats):
        if seat.role == EMPTY and repair and fill_empty and common is not None:
            seats[number] = StoreRole(
                READY, claim_replica(stores[number], common), "it was empty, and is a replica now"
            )
            fresh.append(number)
    writable = {
        number for number, seat in enumerate(seats) if repair and seat.role in (READY, HEADLESS)
    }
    findings = ScrubFindings(
        [_tally(store, seat) for store, seat in zip(stores, seats, strict=True)], write_quorum
    )
    bench = ScrubContext(tuple(stores), findings, writable, emit, pace)
    # A replica that was made just now holds nothing, so it has no say in what counts.
    ids = {
        n: seat.record.store_id if seat.record else f"headless-{n}" for n, seat in enumerate(seats)
    }
    ids |= dict.fromkeys(fresh, "")
    log, noted = _compare(bench, ids, job, counted_record)
    known = _known_heads(seats, log)
    if known:
        # Now it is known which of the log's stores a headless one is, so it counts like any other.
        log, noted = _compare(bench, ids | known, job, counted_record)
    for number, why in log.silent.items():
        bench.mark_away(number, why)
    if not bench.active:
        raise UnavailableError(
            f"no store answers. stores={[store.url for store in stores]} repeat later"
        )
    return ScrubStart(bench, seats, common, log, noted)


def _compare(
    bench: ScrubContext, ids: dict[int, str], job: str, truth: CountedRecord | None
) -> tuple[LogFindings, PendingNotes]:
    noted = PendingNotes()
    stores = {number: bench.stores[number] for number in bench.active}
    return compare_logs(
        stores, ids, job, observe=noted, pace=bench.pace, counted_record=truth
    ), noted


def _known_heads(seats: Sequence[StoreRole], log: LogFindings) -> dict[int, str]:
    members = log.state.stores
    if members is None:
        return {}
    found = {
        n: lost_id(members.ids, seats, n) for n, seat in enumerate(seats) if seat.role == HEADLESS
    }
    return {number: known for number, known in found.items() if known}


def _tally(store: Backend, seat: StoreRole) -> StoreStatistics:
    return StoreStatistics(
        url=store.url,
        role=seat.role,
        store_id=seat.record.store_id if seat.record else "",
        problem=seat.problem,
    )


def _job_without_head(stores: Sequence[Backend], seats: Sequence[StoreRole]) -> str:
    """The job that the log itself names, where no store has a ``ckpt.json`` that can be read."""
    for store, seat in zip(stores, seats, strict=True):
        if seat.role != HEADLESS:
            continue
        for stat in islice(store.list(keys.LOG), RECORDS_TRIED_MAX):
            try:
                return decode_record(read_alone(store, stat.key, bytes_max=RECORD_BYTES_MAX)).job
            except (IntegrityError, FormatVersionError, NotFoundError):
                continue
    if all(seat.role == AWAY for seat in seats):
        raise UnavailableError(
            f"no store answers. why={[seat.problem for seat in seats]} repeat later"
        )
    raise NotFoundError(
        f"no ckpt store here. why={[seat.problem for seat in seats]} check the addresses"
    )


BUDGET_BYTES = 256 << 20
"""Memory for what is referred to, when the caller names no limit; a pack that is mended takes its
own size besides."""


def scrub(  # noqa: PLR0913  all but two are keywords
    stores: Sequence[Backend],
    write_quorum: int,
    *,
    counted_record: CountedRecord | None = None,
    repair: bool = True,
    fill_empty: bool = False,
    rate_bytes_per_s: float | None = None,
    threads: int = 1,
    emit: Emit | None = None,
    stop: threading.Event | None = None,
) -> ScrubReport | None:
    """One scrub from beginning to end, or until ``stop`` is set. See ``Scrub``."""
    whole = Scrub(
        stores,
        write_quorum,
        counted_record=counted_record,
        repair=repair,
        fill_empty=fill_empty,
        rate_bytes_per_s=rate_bytes_per_s,
        emit=emit,
    )
    return whole.run(stop, threads=threads)


class Scrub:
    """A scrub that can be stopped and gone on with; after its end, the next ``run`` begins another.

    ``stores`` are plain, each alone. ``write_quorum``: an object on fewer is counted as ``thin``.
    ``truth`` tells which record counts at a place, where the stores alone can't. ``mend`` False:
    nothing is written anywhere. A store that holds nothing may be a disk that isn't mounted, so it
    is left alone unless ``fill_empty``: then it becomes a replica with an id of its own. ``only``:
    of the objects, those of these snapshots. ``rate_bytes_per_s`` bounds what is read and written
    together. Uses about ``budget_bytes`` of memory, and a pack's size while one is mended. Not for
    several threads at once.
    """

    def __init__(  # noqa: PLR0913  all but two are keywords
        self,
        stores: Sequence[Backend],
        write_quorum: int,
        *,
        counted_record: CountedRecord | None = None,
        repair: bool = True,
        fill_empty: bool = False,
        only: frozenset[SnapshotId] | None = None,
        rate_bytes_per_s: float | None = None,
        budget_bytes: int = BUDGET_BYTES,
        emit: Emit | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stores = tuple(stores)
        self._write_quorum = write_quorum
        self._truth = counted_record
        self._mend = repair
        self._fill_empty = fill_empty
        self._only = only
        self._rate = rate_bytes_per_s
        self._budget_bytes = budget_bytes
        self._tell: Emit = emit or _to_nobody
        self._clock = clock
        self._work: _ScrubRun | None = None

    def run(self, stop: threading.Event | None = None, *, threads: int = 1) -> ScrubReport | None:
        """Go on until the end or until ``stop`` is set, and report what was found since the
        beginning.

        None where it was stopped before anything was compared. ``threads`` objects are looked at at
        once, each on all stores. Raises UsageError where the stores do not belong together,
        NotFoundError where none is a store, FormatVersionError, and UnavailableError where none
        answers.
        """
        pace = MaintenancePace(self._rate, stop=stop, clock=self._clock)
        try:
            if self._work is None:
                self._work = self._begin(pace)
            self._work.go_on(pace, threads=threads)
        except Stopped:
            return None if self._work is None else self._work.report(complete=False)
        report = self._work.report(complete=True)
        self._work = None
        self._tell(_done(report))
        return report

    def _begin(self, pace: MaintenancePace) -> _ScrubRun:
        begun = start_scrub(
            self._stores,
            self._write_quorum,
            repair=self._mend,
            fill_empty=self._fill_empty,
            counted_record=self._truth,
            emit=self._tell,
            pace=pace,
        )
        return _ScrubRun(
            begun,
            counted_record=self._truth,
            only=self._only,
            budget_bytes=self._budget_bytes,
            clock=self._clock,
        )


class _ScrubRun:
    """One scrub under way: what is left of it, and what was found."""

    def __init__(
        self,
        begun: ScrubStart,
        *,
        counted_record: CountedRecord | None,
        only: frozenset[SnapshotId] | None,
        budget_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        self._begun = begun
        self._truth = counted_record
        state = begun.log.state
        entries = [entry for entry in state.snapshots if only is None or entry.snapshot in only]
        gone = DropCheck(state, self._read_on, clock=clock)
        self._objects = ObjectScrub(
            begun.bench, entries, everything=only is None, dropped=gone, budget_bytes=budget_bytes
        )
        self._snapshots = len(entries)
        self._moved_bytes = 0
        headless = [number for number, seat in enumerate(begun.roles) if seat.role == HEADLESS]
        heads: list[Callable[[int], None]] = [
            partial(self._repair_head, number) for number in headless
        ]
        self._left = [
            *heads,
            self._tell_of_log,
            self._repair_folds,
            self._repair_log,
            self._packs,
            self._records,
        ]
        """What is still to be done, the next one last; each is called with the number of
        threads."""

    def go_on(self, pace: MaintenancePace, *, threads: int) -> None:
        """Do what is left. Raises Stopped."""
        self._begun.bench.pace = pace
        try:
            while self._left:
                self._left[-1](threads)
                self._left.pop()
        finally:
            self._moved_bytes += pace.moved_bytes

    def report(self, *, complete: bool) -> ScrubReport:
        """Everything so far."""
        findings, log = self._begun.bench.findings, self._begun.log
        return ScrubReport(
            complete=complete,
            job=log.state.job,
            snapshots=self._snapshots,
            records=log.state.next_seq,
            moved_bytes=self._moved_bytes,
            stores=tuple(replace(tally) for tally in findings.stores),
            problems=tuple(findings.problems),
            problems_total=findings.total,
            under_replicated=findings.under_replicated,
            lost=findings.lost,
            unrepaired=findings.unrepaired,
            hole=log.hole,
            untraced=tuple(entry.snapshot for entry in self._objects.untraced),
        )

    def _records(self, threads: int) -> None:
        self._objects.records(threads=threads)

    def _packs(self, threads: int) -> None:
        self._objects.packs(threads=threads)

    def _repair_log(self, threads: int) -> None:
        repair_log(self._begun.bench, self._begun.log, self._truth)

    def _repair_folds(self, threads: int) -> None:
        repair_folds(self._begun.bench, self._begun.log)

    def _tell_of_log(self, threads: int) -> None:
        self._begun.notes.report_to(self._begun.bench, self._begun.log)

    def _repair_head(self, number: int, threads: int) -> None:
        begun, seat = self._begun, self._begun.roles[number]
        tally = begun.bench.findings.stores[number]
        if tally.role != HEADLESS:
            return  # it stopped answering
        why = repair_job(begun.bench, begun.log, begun.roles, number, begun.common)
        copy = CopyCheck(
            CopyStatus.DAMAGED if seat.damaged else CopyStatus.MISSING, why or seat.problem
        )
        begun.bench.count_object(keys.JOB_KEY, {number: copy}, repaired=() if why else (number,))
        tally.problem = why or ""
        tally.role = READY if why is None else HEADLESS

    def _read_on(self, state: LogState) -> LogState:
        """The newest that any store tells: enough to know what was dropped meanwhile."""
        newest = state
        for number in self._begun.bench.active:
            try:
                found = read_new(self._begun.bench.stores[number], state)
            except (UnavailableError, FormatVersionError):
                continue
            newest = max(newest, found, key=lambda one: one.next_seq)
        return newest


def _done(report: ScrubReport) -> Event:
    facts = {
        "snapshots": report.snapshots,
        "records": report.records,
        "moved_bytes": report.moved_bytes,
        "troubles": report.problems_total,
        "mended": sum(store.repaired for store in report.stores),
        "unmended": report.unrepaired,
        "lost": report.lost,
        "away": report.away,
    }
    text = (
        "all copies were read, and all is well"
        if report.ok
        else "all copies were read, and not all is well"
    )
    return Event("scrub-done", text, facts, alarm=not report.ok)


def _to_nobody(event: Event) -> None:
    """Nobody listens."""
