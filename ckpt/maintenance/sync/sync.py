"""One sync under way: its rounds, and what they found. See ``sync``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

from ckpt.backends.base import Backend
from ckpt.backends.checked import read_object, stores_of
from ckpt.errors import IntegrityError, NotFoundError, UnavailableError, UsageError
from ckpt.events import Emit, Event
from ckpt.format import keys
from ckpt.format.canonical import digest_hex
from ckpt.format.manifest import MANIFEST_BYTES_MAX, PART_STORED_BYTES_MAX, Manifest
from ckpt.format.part import Part, decode_part
from ckpt.format.store import JobRecord
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
"""How many packs are looked for in the replica's listing at a time."""
DAMAGED_MAX = 10_000
"""How many objects that the source has nowhere rightly are named."""


@dataclass(slots=True)
class SyncRun:
    """One fill under way. ``pace`` goes with ``effort``; ``deep`` holds for its first round."""

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
        """Copy what the log names now; whether nothing is left to do."""
        state = self.log()
        self.hole = state.hole
        self.rounds += 1
        if state.next_seq == 0:
            return True
        prefix = log_prefix_of(self.store)
        chain = read_chain(
            self.source,
            state,
            0 if self.deep else max(0, min(prefix.length, state.next_seq) - 1),
            pace=self.pace,
        )
        member = state.stores is not None and self.store_id in state.stores.ids
        check_history(self.store, prefix, state, chain, member=member)
        self._objects(state)
        there = {*range(prefix.length), *prefix.beyond}
        for seq in range(chain.low, state.next_seq):
            self.pace.check()
            self.records += copy_record(
                self.source, self.store, seq, chain.digest(seq), listed=seq in there
            )
        self.folds += copy_folds(self.source, self.store, state.next_seq, pace=self.pace)
        self.next_seq = state.next_seq
        self.deep = False  # what was compared once isn't compared in the next round again
        if upto_seq is not None and state.next_seq > upto_seq:
            return True
        return state.hole is not None or self.log().next_seq == state.next_seq

    def report(self, *, complete: bool) -> SyncReport:
        """Everything so far."""
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
            key=lambda one: one.snapshot,
        )
        gone = DropCheck(state, lambda _: self.log())
        gathered = PackReferences(max(1, self.limits.budget_bytes // 2 // CHUNK_REF_BYTES))
        for number, entry in enumerate(entries):
            wants, parts = self._records_of(entry, gone)
            for part in parts:
                gathered.add(part, number)
            self._copy(wants, lambda _: gone.all_dropped([entry]))  # noqa: B023  done before the next one
        while True:
            sizes = ListingWalk(self.source, keys.PACKS, after=gathered.after)
            for some in _batches(gathered.packs(), PACKS_AT_ONCE):
                packs = [replace(gathered.pack(key), size_bytes=_size(sizes, key)) for key in some]
                users = gathered.users
                self._copy(
                    packs,
                    lambda want: gone.all_dropped([entries[n] for n in users(want.key)]),  # noqa: B023
                )
            if gathered.complete:
                break
            gathered = gathered.next_round()
            for number, entry in enumerate(entries):
                for part in self._records_of(entry, gone)[1]:
                    gathered.add(part, number)
        self._done.update(entries)

    def _records_of(
        self, entry: Committed, gone: DropCheck
    ) -> tuple[list[WantedObject], list[Part]]:
        """What one snapshot's manifest and parts are, and the parts that can be had."""
        want = WholeObject(manifest_key(entry), entry.manifest_digest)
        data = self._have(want, MANIFEST_BYTES_MAX, entry, gone)
        if data is None:
            return [], []
        refs = Manifest.decode(data).parts
        wants: list[WantedObject] = [replace(want, size_bytes=len(data))]
        parts: list[Part] = []
        for ref in sorted(refs, key=lambda ref: ref.key):
            part = WholeObject(ref.key, ref.digest, ref.size_bytes)
            found = self._have(part, PART_STORED_BYTES_MAX, entry, gone)
            if found is not None:
                wants.append(part)
                parts.append(decode_part(found))
        return wants, parts

    def _have(
        self, want: WholeObject, bytes_max: int, entry: Committed, gone: DropCheck
    ) -> bytes | None:
        self.pace.take(want.size_bytes or 0)
        try:
            return read_object(
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
            self._lost(want, str(error), gone.all_dropped([entry]))
            return None

    def _copy(self, wants: Sequence[WantedObject], is_gone: Callable[[WantedObject], bool]) -> None:
        missing = missing_objects(self.store, wants, deep=self.deep, pace=self.pace)
        self.present_objects += len(wants) - len(missing)
        budget = MemoryBudget(self.limits.budget_bytes)

        def copy(want: WantedObject) -> int | str:
            try:
                return copy_object(self.source, self.store, want, budget=budget, pace=self.pace)
            except (IntegrityError, NotFoundError) as error:
                return str(error)

        with closing(map_in_order(missing, copy, threads=self.limits.threads)) as copied:
            for want, size_bytes in copied:
                if isinstance(size_bytes, str):
                    self._lost(want, size_bytes, is_gone(want))
                    continue
                self.copied_objects += 1
                self.copied_bytes += size_bytes
                if self.on_progress is not None:
                    self.on_progress(size_bytes)

    def _lost(self, want: WantedObject, why: str, gone: bool) -> None:
        if gone or want.key in self.damaged:
            return
        if len(self.damaged) < DAMAGED_MAX:
            self.damaged[want.key] = why
        if self.emit is not None:
            text = f"the source has no right copy of {want.key}, so the replica lacks it too"
            self.emit(
                Event("sync-damage", text, {"key": want.key, "store": self.source.url}, alarm=True)
            )


def _size(sizes: ListingWalk, key: str) -> int | None:
    stat = sizes.take(key)
    # A length that no pack has is damage: it is no measure for the copy.
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


# Making a store a full replica of another one, or of several: objects first, then the log in
# order, then what came meanwhile.
#
# At every moment the replica's log names only what the replica holds (but for snapshots that were
# dropped further on in it, and for what the source itself has nowhere rightly). So it may be
# stopped, die, and be repeated anywhere.

ROUNDS_MAX = 100
"""How often what came meanwhile is copied before the caller is told that the source is quicker."""


def sync(
    source: Backend,
    store: Backend,
    *,
    deep: bool = False,
    limits: SyncLimits = DEFAULT_LIMITS,
    on_progress: ProgressCallback | None = None,
    emit: Emit | None = None,
) -> SyncReport:
    """Make ``store`` a full replica of ``source`` (one store or several). See ``fill``.

    Raises NotFoundError where the source is no store, UsageError or ConflictError where ``store``
    is another job's or has a history of its own, UnavailableError and StoreFullError: repeat it
    then, it goes on.
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
    """The ``ckpt.json`` of the first store of ``source`` that has one. Raises UnavailableError
    where none can be read."""
    seats = store_roles(stores_of(source))
    found = next((seat.record for seat in seats if seat.role == READY), None)
    if found is None:
        raise UnavailableError(
            f"the source's {keys.JOB_KEY} can't be read. why={[seat.problem for seat in seats]} "
            "repeat later"
        )
    return found


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
    """Copy to ``store`` what ``log`` names, until it has caught up with it, or, with ``upto_seq``,
    has all up to that record.

    ``source`` may be several stores: each object is then read from whichever has it rightly.
    ``record`` is one of theirs: a ``store`` that holds nothing becomes a replica of the same log,
    with an id of its own. ``deep``: what is there already is read and compared too, not just
    listed. Stopped, or outrun by the source for a hundred rounds, it returns with ``complete``
    False. Raises as ``sync`` does.
    """
    pace = MaintenancePace(limits.rate_bytes_per_s, stop=limits.stop)
    claimed = claim_replica(store, record)
    if claimed.store_id == record.store_id and len(stores_of(source)) == 1:
        raise UsageError(
            f"the store is the source itself, or a plain copy of it. store={store.url} "
            f"store_id={claimed.store_id} "
            f"name another place; make replicas with ckpt sync, not by copying files"
        )
    filling = SyncRun(source, store, claimed.store_id, log, deep, limits, pace, on_progress, emit)
    try:
        for _ in range(ROUNDS_MAX):
            if filling.round(upto_seq):
                return filling.report(complete=True)
    except Stopped:
        pass
    return filling.report(complete=False)
