"""Scrub: reading everything on every store of a log, and repairing what is missing or wrong.

The order makes it safe to stop, or to die, at any moment. First the logs are read, and nothing is
written. Then manifests, parts and packs are compared and repaired. Only then do stores get the log
records that they lack, in order, then folds, and last a lost ``ckpt.json``.
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
from ckpt.format.scrubs import ScrubCursor
from ckpt.format.store import JobRecord
from ckpt.log.reader import read_new
from ckpt.log.state import Committed, LogState
from ckpt.maintenance.copies import CopyCheck, CopyStatus
from ckpt.maintenance.copy_io import MaintenancePace, Stopped
from ckpt.maintenance.replica import claim_replica
from ckpt.maintenance.scrub.history import ScrubCursors
from ckpt.maintenance.scrub.log import CountedRecord, LogFindings, compare_logs
from ckpt.maintenance.scrub.objects import ObjectScrub, named
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
from ckpt.maintenance.scrub.second import check_second_records, counted_alone, job_record_alone
from ckpt.values import SnapshotId

RECORDS_TRIED_MAX = 100
"""Records of a store without ``ckpt.json`` that are tried for the job's name."""


@dataclass(frozen=True, slots=True)
class ScrubStart:
    """What is known once all logs are read.

    ``common``: the job record that the stores share; None if none is readable.
    """

    context: ScrubContext
    roles: Sequence[StoreRole]
    common: JobRecord | None
    log: LogFindings
    notes: PendingNotes
    counted_record: CountedRecord | None


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
    """Read the roles and logs of all stores. Writes at most the ``ckpt.json`` of stores to fill.

    Raises UsageError if the stores do not belong together, NotFoundError if none is a store,
    FormatVersionError, UnavailableError if none answers, and Stopped.
    """
    roles = store_roles(stores)
    common = common_record(stores, roles)
    if common is None and len(stores) == 1 and roles[0].role == HEADLESS:
        common = job_record_alone(stores[0])
    job = common.job if common is not None else _job_from_records(stores, roles)
    new_replicas: list[int] = []
    for number, role in enumerate(roles):
        # Only if asked for: an empty store may be a disk that is not mounted.
        if role.role == EMPTY and repair and fill_empty and common is not None:
            record = claim_replica(stores[number], common)
            roles[number] = StoreRole(READY, record, "it was empty, and is a replica now")
            new_replicas.append(number)
    writable = {
        number for number, role in enumerate(roles) if repair and role.role in (READY, HEADLESS)
    }
    statistics = [_statistics(store, role) for store, role in zip(stores, roles, strict=True)]
    findings = ScrubFindings(statistics, write_quorum)
    context = ScrubContext(tuple(stores), findings, writable, emit, pace)
    ids = {
        number: role.record.store_id if role.record else f"headless-{number}"
        for number, role in enumerate(roles)
    }
    # A replica that was made just now holds nothing, so it has no vote on which record counts.
    ids |= dict.fromkeys(new_replicas, "")
    log, notes = _compare_logs(context, ids, job, counted_record)
    is_broken = log.hole is not None or bool(log.lost)
    if is_broken and counted_record is None and context.is_alone(log.state):
        counted_record = partial(counted_alone, stores[0])
        log, notes = _compare_logs(context, ids, job, counted_record)
    headless_ids = _headless_ids(roles, log)
    if headless_ids:
        # The log names its stores, and so the ids of headless ones: read again with their votes.
        log, notes = _compare_logs(context, ids | headless_ids, job, counted_record)
    for number, reason in log.silent.items():
        context.mark_away(number, reason)
    if not context.active:
        urls = [store.url for store in stores]
        raise UnavailableError(f"no store answers. stores={urls} repeat later")
    return ScrubStart(context, roles, common, log, notes, counted_record)


def _compare_logs(
    context: ScrubContext, ids: dict[int, str], job: str, counted_record: CountedRecord | None
) -> tuple[LogFindings, PendingNotes]:
    notes = PendingNotes()
    stores = {number: context.stores[number] for number in context.active}
    log = compare_logs(
        stores, ids, job, observe=notes, pace=context.pace, counted_record=counted_record
    )
    return log, notes


def _headless_ids(roles: Sequence[StoreRole], log: LogFindings) -> dict[int, str]:
    members = log.state.stores
    if members is None:
        return {}
    ids = {
        number: lost_id(members.ids, roles, number)
        for number, role in enumerate(roles)
        if role.role == HEADLESS
    }
    return {number: store_id for number, store_id in ids.items() if store_id}


def _statistics(store: Backend, role: StoreRole) -> StoreStatistics:
    return StoreStatistics(
        url=store.url,
        role=role.role,
        store_id=role.record.store_id if role.record else "",
        problem=role.problem,
    )


def _job_from_records(stores: Sequence[Backend], roles: Sequence[StoreRole]) -> str:
    """The job's name according to log records, if no store has a readable ``ckpt.json``."""
    for store, role in zip(stores, roles, strict=True):
        if role.role != HEADLESS:
            continue
        for stat in islice(store.list(keys.LOG), RECORDS_TRIED_MAX):
            try:
                data = read_alone(store, stat.key, bytes_max=RECORD_BYTES_MAX)
                return decode_record(data).job
            except (IntegrityError, FormatVersionError, NotFoundError):
                continue
    problems = [role.problem for role in roles]
    if all(role.role == AWAY for role in roles):
        raise UnavailableError(f"no store answers. why={problems} repeat later")
    raise NotFoundError(f"no ckpt store here. why={problems} check the addresses")


BUDGET_BYTES = 256 << 20
"""Default memory for references. A pack that is repaired takes its own size besides."""


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
    """Run one scrub to its end, or until ``stop`` is set. See ``Scrub``."""
    run = Scrub(
        stores,
        write_quorum,
        counted_record=counted_record,
        repair=repair,
        fill_empty=fill_empty,
        rate_bytes_per_s=rate_bytes_per_s,
        emit=emit,
    )
    return run.run(stop, threads=threads)


class Scrub:
    """A scrub that can be stopped and continued; after its end, ``run`` starts another.

    ``stores`` are plain stores, each by itself. An object on fewer than ``write_quorum`` of them
    counts as under-replicated. ``counted_record`` returns the record that counts at a seq, if the
    stores alone cannot tell. ``repair`` False: nothing is written. ``fill_empty``: an empty store
    becomes a replica with an id of its own; otherwise it is left alone, because it may be a disk
    that is not mounted. ``only``: check the objects of these snapshots only. ``packs`` False: no
    pack is read, so all but the state itself is checked. ``rate_bytes_per_s`` bounds the bytes read
    and written together. Uses about ``budget_bytes`` of memory, plus a pack's size while one is
    repaired. Not thread-safe.

    It has many parameters because each is one option of ``ckpt scrub``, ``ckpt verify`` or the
    caretaker.
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
        packs: bool = True,
        rate_bytes_per_s: float | None = None,
        budget_bytes: int = BUDGET_BYTES,
        emit: Emit | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stores = tuple(stores)
        self._write_quorum = write_quorum
        self._counted_record = counted_record
        self._repair = repair
        self._fill_empty = fill_empty
        self._only = only
        self._packs = packs
        self._rate_bytes_per_s = rate_bytes_per_s
        self._budget_bytes = budget_bytes
        self._emit: Emit = emit or (lambda _: None)
        self._clock = clock
        self._run: _ScrubRun | None = None

    def run(
        self,
        stop: threading.Event | None = None,
        *,
        threads: int = 1,
        on_verified: Callable[[Sequence[Committed]], None] | None = None,
        cursors: ScrubCursors | None = None,
    ) -> ScrubReport | None:
        """Continue to the end or until ``stop`` is set; the findings since the start.

        ``cursors``: go on where another process's scrub of the same stores was cut short, and note
        where this one is. Packs are read once then; manifests and parts, which say what packs hold,
        by each process.

        ``on_verified`` is called at the end of a scrub that read all packs, with the snapshots of
        which each byte was found right in some store; its errors pass through.
        None if it was stopped before anything was compared. ``threads`` objects are checked at
        once, each on all stores. Raises UsageError if the stores do not belong together,
        NotFoundError if none is a store, FormatVersionError, and UnavailableError if none answers.
        """
        pace = MaintenancePace(self._rate_bytes_per_s, stop=stop, clock=self._clock)
        try:
            if self._run is None:
                self._run = self._start(pace, cursors)
            self._run.resume(pace, threads=threads)
        except Stopped:
            return None if self._run is None else self._run.report(complete=False)
        report = self._run.report(complete=True)
        verified = self._run.verified()
        self._run = None
        self._emit(_done_event(report))
        if on_verified is not None and self._packs:
            on_verified(verified)
        return report

    def _start(self, pace: MaintenancePace, cursors: ScrubCursors | None) -> _ScrubRun:
        start = start_scrub(
            self._stores,
            self._write_quorum,
            repair=self._repair,
            fill_empty=self._fill_empty,
            counted_record=self._counted_record,
            emit=self._emit,
            pace=pace,
        )
        return _ScrubRun(
            start,
            only=self._only,
            packs=self._packs,
            budget_bytes=self._budget_bytes,
            clock=self._clock,
            cursors=cursors,
        )


class _ScrubRun:
    """One scrub in progress: the steps that are left, and the findings."""

    def __init__(
        self,
        start: ScrubStart,
        *,
        only: frozenset[SnapshotId] | None,
        packs: bool,
        budget_bytes: int,
        clock: Callable[[], float],
        cursors: ScrubCursors | None,
    ) -> None:
        self._start = start
        self._cursors = cursors
        state = start.log.state
        entries = [entry for entry in state.snapshots if only is None or entry.snapshot in only]
        drop_check = DropCheck(state, self._read_new, clock=clock)
        self._objects = ObjectScrub(
            start.context,
            entries,
            everything=only is None,
            drop_check=drop_check,
            budget_bytes=budget_bytes,
            alone=start.context.is_alone(state),
        )
        records = [start.roles[number].record for number in start.context.active]
        self._store_ids = {record.store_id if record else "" for record in records}
        cursor = cursors.read() if cursors is not None else None
        # What other stores have was not compared with these; one without an id may be another.
        if cursor is not None and self._store_ids <= set(cursor.store_ids) - {""}:
            self._objects.go_on(cursor)
        self._snapshots = len(entries)
        self._moved_bytes = 0
        headless = [number for number, role in enumerate(start.roles) if role.role == HEADLESS]
        # Done from the end. Objects come before the records that name them, records before their
        # folds, and a ``ckpt.json`` last: with it a store counts, and must have everything.
        self._left: list[Callable[[int], None]] = [
            self._second_copies,
            *(partial(self._repair_job_record, number) for number in headless),
            self._report_log,
            self._repair_folds,
            self._repair_log,
            *((self._packs,) if packs else ()),
            self._records,
        ]
        """The steps that are left, the next one last; each takes the number of threads."""

    def resume(self, pace: MaintenancePace, *, threads: int) -> None:
        """Do the steps that are left. Raises Stopped."""
        self._start.context.pace = pace
        try:
            while self._left:
                self._left[-1](threads)
                # Only after the step: a stopped one is continued by the next call.
                self._left.pop()
        finally:
            self._moved_bytes += pace.moved_bytes

    def report(self, *, complete: bool) -> ScrubReport:
        """The findings so far."""
        findings, log = self._start.context.findings, self._start.log
        return ScrubReport(
            complete=complete,
            job=log.state.job,
            snapshots=self._snapshots,
            records=log.state.next_seq,
            moved_bytes=self._moved_bytes,
            stores=tuple(replace(store) for store in findings.stores),
            problems=tuple(findings.problems),
            problems_total=findings.total,
            under_replicated=findings.under_replicated,
            lost=findings.lost,
            unrepaired=findings.unrepaired,
            hole=log.hole,
            untraced=tuple(entry.snapshot for entry in self._objects.untraced),
        )

    def verified(self) -> list[Committed]:
        """See ``ObjectScrub.verified``."""
        return self._objects.verified()

    def _records(self, threads: int) -> None:
        self._objects.records(threads=threads)

    def _packs(self, threads: int) -> None:
        kept_of = self._objects.done
        try:
            self._objects.packs(threads=threads, after_each=self._note_when_due)
        finally:
            if self._objects.done != kept_of:
                self._note_place()

    def _note_when_due(self) -> None:
        if self._cursors is not None and self._cursors.is_due():
            self._note_place()

    def _note_place(self) -> None:
        done = self._objects.done
        if self._cursors is None or not done.last_pack:
            return
        cursor = ScrubCursor(
            at_unix_ms=self._cursors.now_unix_ms(),
            last_pack=done.last_pack,
            store_ids=tuple(sorted(self._store_ids)),
            sound=frozenset(map(named, self._objects.verified())),
            lost=done.lost,
        )
        try:
            # A store that is away would have the scrub wait for it each time.
            context = self._start.context
            self._cursors.keep(cursor, among=[context.stores[n] for n in context.active])
        except UnavailableError as error:  # full stores, say
            text = f"a scrub that is cut short from now on reads more again: {error}"
            self._start.context.emit(Event("scrub-unnoted", text))

    def _repair_log(self, threads: int) -> None:
        start, end = self._start, self._objects.records_end
        repair_log(start.context, start.log, start.counted_record, end=end)

    def _repair_folds(self, threads: int) -> None:
        repair_folds(self._start.context, self._start.log)

    def _report_log(self, threads: int) -> None:
        self._start.notes.report_to(self._start.context, self._start.log)

    def _second_copies(self, threads: int) -> None:
        context = self._start.context
        if context.is_alone(self._start.log.state) and context.active:
            check_second_records(context)

    def _repair_job_record(self, number: int, threads: int) -> None:
        start, role = self._start, self._start.roles[number]
        store = start.context.findings.stores[number]
        if store.role != HEADLESS:
            return  # it stopped answering
        problem = repair_job(start.context, start.log, start.roles, number, start.common)
        status = CopyStatus.DAMAGED if role.damaged else CopyStatus.MISSING
        copy = CopyCheck(status, problem or role.problem)
        repaired = () if problem else (number,)
        start.context.count_object(keys.JOB_KEY, {number: copy}, repaired=repaired)
        store.problem = problem or ""
        store.role = READY if problem is None else HEADLESS

    def _read_new(self, state: LogState) -> LogState:
        """The newest state that any store has: enough to know which snapshots were dropped."""
        newest = state
        for number in self._start.context.active:
            try:
                read = read_new(self._start.context.stores[number], state)
            except (UnavailableError, FormatVersionError):
                continue
            newest = max(newest, read, key=lambda state: state.next_seq)
        return newest


def _done_event(report: ScrubReport) -> Event:
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
        "all copies were read and are right"
        if report.ok
        else "all copies were read, and some are wrong or missing"
    )
    return Event("scrub-done", text, facts, alarm=not report.ok)
