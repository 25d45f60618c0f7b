"""Sync: making one store a full replica of another one, or of several.

Each round copies the objects that the log names, then the log's records in order. Rounds repeat
until nothing new was written meanwhile. So at every moment the replica's log names only what the
replica holds, and a sync may be stopped, killed and repeated anywhere. Two exceptions: snapshots
that a later record drops, and objects that the source itself has no right copy of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

from ckpt.backends.base import Backend
from ckpt.backends.checked import stores_of
from ckpt.errors import IntegrityError, NotFoundError, UnavailableError, UsageError
from ckpt.events import Emit, Event
from ckpt.format import keys
from ckpt.format.canonical import digest_hex
from ckpt.format.manifest import MANIFEST_BYTES_MAX, PART_STORED_BYTES_MAX, Manifest
from ckpt.format.part import Part, decode_part
from ckpt.format.store import JobRecord
from ckpt.log.catalog import read_committed
from ckpt.log.journal import Journal
from ckpt.log.state import Committed, Hole, LogState
from ckpt.maintenance.copies import CHUNK_REF_BYTES, PackReferences, WholeObject
from ckpt.maintenance.copy_io import ListingWalk, MaintenancePace, Stopped, map_in_order
from ckpt.maintenance.replica import (
    DEFAULT_LIMITS,
    MemoryBudget,
    ProgressCallback,
    SyncLimits,
    SyncReport,
    claim_replica,
)
from ckpt.maintenance.scrub.objects import manifest_key
from ckpt.maintenance.scrub.report import READY, DropCheck, store_roles
from ckpt.maintenance.sync.copy import (
    WantedObject,
    check_history,
    copy_folds,
    copy_object,
    copy_record,
    log_prefix_of,
    missing_objects,
    read_chain,
)
from ckpt.save.chunks import PACK_BYTES_MAX

PACKS_AT_ONCE = 1024
"""Packs that are compared with the replica's listing at a time."""
DAMAGED_MAX = 10_000
"""Objects without a right copy that a report names at most."""


@dataclass(slots=True)
class SyncRun:
    """One sync in progress. ``pace`` applies ``limits``; ``deep`` applies to the first round only.

    It has more fields than usual because the counters of its report are kept here.
    """

    source: Backend
    store: Backend
    store_id: str
    log: Callable[[], LogState]
    deep: bool
    limits: SyncLimits
    pace: MaintenancePace
    on_progress: ProgressCallback | None = None
    emit: Emit | None = None
    next_seq: int = 0
    rounds: int = 0
    copied_objects: int = 0
    copied_bytes: int = 0
    present_objects: int = 0
    records: int = 0
    folds: int = 0
    hole: Hole | None = None
    damaged: dict[str, str] = field(default_factory=dict)
    _done: set[Committed] = field(default_factory=set)

    def round(self, upto_seq: int | None) -> bool:
        """Copy what the log names now; whether the sync is finished."""
        state = self.log()
        self.hole = state.hole
        self.rounds += 1
        if state.next_seq == 0:
            return True
        prefix = log_prefix_of(self.store)
        # Start at the replica's last record: a replica that catches up then costs only what is new.
        low = 0 if self.deep else max(0, min(prefix.length, state.next_seq) - 1)
        chain = read_chain(self.source, state, low, pace=self.pace)
        member = state.stores is not None and self.store_id in state.stores.ids
        check_history(self.store, prefix, state, chain, member=member)
        # Objects before the records that name them.
        self._objects(state)
        listed = {*range(prefix.length), *prefix.beyond}
        for seq in range(chain.low, state.next_seq):
            self.pace.check()
            digest = chain.digest(seq)
            self.records += copy_record(self.source, self.store, seq, digest, listed=seq in listed)
        self.folds += copy_folds(self.source, self.store, state.next_seq, pace=self.pace)
        self.next_seq = state.next_seq
        self.deep = False  # everything was compared; later rounds need only what is new
        if upto_seq is not None and state.next_seq > upto_seq:
            return True
        return state.hole is not None or self.log().next_seq == state.next_seq

    def report(self, *, complete: bool) -> SyncReport:
        """What was done so far."""
        return SyncReport(
            complete=complete,
            store_id=self.store_id,
            next_seq=self.next_seq,
            rounds=self.rounds,
            copied_objects=self.copied_objects,
            copied_bytes=self.copied_bytes,
            present_objects=self.present_objects,
            records=self.records,
            folds=self.folds,
            damaged=tuple(self.damaged.items()),
            hole=self.hole,
        )

    def _objects(self, state: LogState) -> None:
        entries = sorted(
            (entry for entry in state.snapshots if entry not in self._done),
            key=lambda entry: entry.snapshot,
        )
        # An object that is missing because its snapshot was dropped meanwhile is no damage.
        drop_check = DropCheck(state, lambda _: self.log())
        references = PackReferences(max(1, self.limits.budget_bytes // 2 // CHUNK_REF_BYTES))
        for number, entry in enumerate(entries):
            wants, parts = self._records_of(entry, drop_check)
            for part in parts:
                references.add(part, number)
            self._copy(
                wants,
                lambda _: drop_check.all_dropped([entry]),  # noqa: B023  called before the next one
            )
        while True:
            sizes = ListingWalk(self.source, keys.PACKS, after=references.after)
            for batch in _batches(references.packs(), PACKS_AT_ONCE):
                packs = [
                    replace(references.pack(key), size_bytes=_size(sizes, key)) for key in batch
                ]
                users = references.users
                self._copy(
                    packs,
                    lambda want: drop_check.all_dropped(
                        [entries[n] for n in users(want.key)]  # noqa: B023
                    ),
                )
            if references.complete:
                break
            references = references.next_round()
            for number, entry in enumerate(entries):
                for part in self._records_of(entry, drop_check)[1]:
                    references.add(part, number)
        self._done.update(entries)

    def _records_of(
        self, entry: Committed, drop_check: DropCheck
    ) -> tuple[list[WantedObject], list[Part]]:
        """One snapshot's manifest and parts as objects to copy, and the parts that are readable."""
        want = WholeObject(manifest_key(entry), entry.manifest_digest)
        data = self._read(want, MANIFEST_BYTES_MAX, entry, drop_check)
        if data is None:
            return [], []
        refs = Manifest.decode(data).parts
        wants: list[WantedObject] = [replace(want, size_bytes=len(data))]
        parts: list[Part] = []
        for ref in sorted(refs, key=lambda ref: ref.key):
            part = WholeObject(ref.key, ref.digest, ref.size_bytes)
            data = self._read(part, PART_STORED_BYTES_MAX, entry, drop_check)
            if data is not None:
                wants.append(part)
                parts.append(decode_part(data))
        return wants, parts

    def _read(
        self, want: WholeObject, bytes_max: int, entry: Committed, drop_check: DropCheck
    ) -> bytes | None:
        self.pace.take(want.size_bytes or 0)
        try:
            return read_committed(
                self.source,
                want.key,
                lambda data: (
                    None
                    if digest_hex(data) == want.digest
                    else "its bytes differ from their digest"
                ),
                bytes_max=bytes_max,
            )
        except (IntegrityError, NotFoundError) as error:
            self._add_damaged(want, str(error), drop_check.all_dropped([entry]))
            return None

    def _copy(
        self, wants: Sequence[WantedObject], is_dropped: Callable[[WantedObject], bool]
    ) -> None:
        missing = missing_objects(self.store, wants, deep=self.deep, pace=self.pace)
        self.present_objects += len(wants) - len(missing)
        budget = MemoryBudget(self.limits.budget_bytes)

        def copy(want: WantedObject) -> int | str:
            try:
                return copy_object(self.source, self.store, want, budget=budget, pace=self.pace)
            except (IntegrityError, NotFoundError) as error:
                return str(error)

        with closing(map_in_order(missing, copy, threads=self.limits.threads)) as copied:
            for want, size_or_problem in copied:
                if isinstance(size_or_problem, str):
                    self._add_damaged(want, size_or_problem, is_dropped(want))
                    continue
                self.copied_objects += 1
                self.copied_bytes += size_or_problem
                if self.on_progress is not None:
                    self.on_progress(size_or_problem)

    def _add_damaged(self, want: WantedObject, reason: str, dropped: bool) -> None:
        if dropped or want.key in self.damaged:
            return
        if len(self.damaged) < DAMAGED_MAX:
            self.damaged[want.key] = reason
        if self.emit is not None:
            text = f"the source has no right copy of {want.key}, so the replica lacks it too"
            facts = {"key": want.key, "store": self.source.url}
            self.emit(Event("sync-damage", text, facts, alarm=True))


def _size(sizes: ListingWalk, key: str) -> int | None:
    stat = sizes.take(key)
    # A length above what any pack has is damage, and says nothing about the copy's length.
    return None if stat is None or stat.size_bytes > PACK_BYTES_MAX else stat.size_bytes


def _batches(items: Iterable[str], size: int) -> Iterator[list[str]]:
    batch: list[str] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


ROUNDS_MAX = 100
"""Rounds before the sync gives up: the source is written to faster than it can be copied."""


def sync(
    source: Backend,
    store: Backend,
    *,
    deep: bool = False,
    limits: SyncLimits = DEFAULT_LIMITS,
    on_progress: ProgressCallback | None = None,
    emit: Emit | None = None,
) -> SyncReport:
    """Make ``store`` a full replica of ``source`` (one store or several); see ``fill``.

    Raises NotFoundError if the source is no store, UsageError or ConflictError if ``store`` belongs
    to another job or has a history of its own, UnavailableError and StoreFullError. After the last
    two a repeated call continues where this one stopped.
    """
    journal = Journal.open(source)
    record = source_record(source)
    return fill(
        source,
        store,
        journal.refresh,
        record=record,
        deep=deep,
        limits=limits,
        on_progress=on_progress,
        emit=emit,
    )


def source_record(source: Backend) -> JobRecord:
    """The ``ckpt.json`` of the first store of ``source`` that has one.

    Raises UnavailableError if none can be read.
    """
    roles = store_roles(stores_of(source))
    record = next((role.record for role in roles if role.role == READY), None)
    if record is None:
        problems = [role.problem for role in roles]
        raise UnavailableError(
            f"the source's {keys.JOB_KEY} cannot be read. why={problems} repeat later"
        )
    return record


def fill(  # noqa: PLR0913  all but three are keywords
    source: Backend,
    store: Backend,
    log: Callable[[], LogState],
    *,
    record: JobRecord,
    upto_seq: int | None = None,
    deep: bool = True,
    limits: SyncLimits = DEFAULT_LIMITS,
    on_progress: ProgressCallback | None = None,
    emit: Emit | None = None,
) -> SyncReport:
    """Copy to ``store`` what ``log()`` names, until it has caught up or has all up to ``upto_seq``.

    ``source`` may be several stores: each object is then read from any store that has it right.
    ``record`` is the job record of one of them; an empty ``store`` becomes a replica of that log
    with an id of its own. ``deep``: objects that are there already are read and compared, instead
    of only listed. If it is stopped, or the source is written to faster for ROUNDS_MAX rounds, it
    returns with ``complete`` False. Raises as ``sync``.
    """
    pace = MaintenancePace(limits.rate_bytes_per_s, stop=limits.stop)
    # The store gets its job record before any other bytes, and a repeated sync finds it there.
    claimed = claim_replica(store, record)
    if claimed.store_id == record.store_id and len(stores_of(source)) == 1:
        raise UsageError(
            f"the store is the source itself, or a plain copy of it. store={store.url} "
            f"store_id={claimed.store_id} name another place; make replicas with ckpt sync, not by "
            "copying files"
        )
    run = SyncRun(source, store, claimed.store_id, log, deep, limits, pace, on_progress, emit)
    try:
        for _ in range(ROUNDS_MAX):
            if run.round(upto_seq):
                return run.report(complete=True)
    except Stopped:
        pass
    return run.report(complete=False)
