"""Drops: deciding which snapshots a policy drops, and recording it. Bytes are left to ``sweep``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from ckpt.backends.base import Backend
from ckpt.backends.checked import stores_of
from ckpt.errors import (
    CommitUnknownError,
    ConflictError,
    FencedError,
    FormatVersionError,
    IntegrityError,
    NotFoundError,
    StoreDeniedError,
    StoreFullError,
    UnavailableError,
)
from ckpt.format import keys
from ckpt.format.records import DROPS_MAX, Commit, Drop, Record
from ckpt.log.access import LogAccess
from ckpt.log.catalog import load_index, snapshots
from ckpt.log.journal import Journal
from ckpt.log.reader import RECORDS_AT_ONCE, LogNote, fold_seqs, read_all, records_back
from ckpt.log.sequencers import Appended, KeyTaken, WriteUnknown
from ckpt.log.state import Committed, LogState
from ckpt.maintenance.gc.plan import GcPlan, plan_gc, restore_order
from ckpt.maintenance.gc.sweep import (
    GRACE_S,
    full_stores,
    probed_clock,
    require_known,
    sweep,
    take_reserves,
)
from ckpt.maintenance.retention import KeepPolicy
from ckpt.maintenance.scrub.history import last_record
from ckpt.values import SnapshotId

RACES_MAX = 8
"""How often a plan is remade because the log changed, before the conflict is raised."""


CLOCKS_APART_S = 3600.0
"""A store's clock and this machine's that differ by more: one of them is wrong, and a wrong clock
makes everything look old."""


def preview(
    backend: Backend,
    state: LogState,
    policy: KeepPolicy | None,
    *,
    now_unix_s: float,
    asks_clocks: bool = False,
) -> GcPlan:
    """The plan for the snapshots of ``state`` under ``policy`` (None: keep all). Changes nothing.

    ``now_unix_s`` is this machine's time. Ages are by the stores' clocks, which stamped the
    manifests: asked for with a small object if ``asks_clocks``, else taken for this machine's. If
    they disagree, nothing is dropped for its age, and the plan's ``problems`` says so.

    Raises IntegrityError or UnavailableError if the newest snapshot cannot be known. Cost: reads
    every manifest; for the newest snapshot (and older ones, until one is complete) also the parts,
    and one request for each pack.
    """
    require_known(state)
    infos = snapshots(backend, state)
    intact = newest_intact(backend, state)
    verified = newest_verified(backend, state)
    ages_s: Mapping[SnapshotId, float] = {}
    problems: tuple[str, ...] = ()
    if policy is not None and policy.by_age:
        ages_s, problems = _ages(backend, state, now_unix_s, asks_clocks=asks_clocks)
    return plan_gc(
        state, infos, policy, ages_s=ages_s, intact=intact, verified=verified, problems=problems
    )


def _ages(
    backend: Backend, state: LogState, now_unix_s: float, *, asks_clocks: bool
) -> tuple[Mapping[SnapshotId, float], tuple[str, ...]]:
    """The age of each snapshot, and why ages are not known (then none is).

    A store's own stamps and clock, so that no machine's clock matters; of several stores the
    youngest, because a copy may have been made late. A store that does not answer has no say.
    """
    digests = {entry.snapshot: entry.manifest_digest for entry in state.snapshots}
    ages_s: dict[SnapshotId, float] = {}
    silent: list[UnavailableError] = []
    stores = stores_of(backend)
    for store in stores:
        try:
            stamps = {
                parsed[0]: stat.modified_unix_s
                for stat in store.list(keys.MANIFESTS)
                if (parsed := keys.parse_manifest_key(stat.key)) is not None
                and digests.get(parsed[0]) == parsed[1]
            }
            # No stamp is later than the store's time. A store that can't be asked is taken to be
            # at the last one: then nothing looks older than it is.
            newest_s = max(stamps.values(), default=now_unix_s)
            store_unix_s, apart_s = now_unix_s, newest_s - now_unix_s
            if asks_clocks:
                try:
                    store_unix_s = probed_clock(store)
                    apart_s = abs(store_unix_s - now_unix_s)
                except (StoreFullError, StoreDeniedError):
                    store_unix_s = newest_s
        except UnavailableError as error:
            silent.append(error)
            continue
        if apart_s > CLOCKS_APART_S:
            return {}, (
                "the clocks of this machine and of a store differ, so nothing is dropped for its "
                f"age. store={store.url} apart_s={apart_s:.0f} store_unix_s={store_unix_s:.0f} "
                f"here_unix_s={now_unix_s:.0f}; set the wrong one right",
            )
        for snapshot, stamp_s in stamps.items():
            age_s = max(0.0, store_unix_s - stamp_s)
            ages_s[snapshot] = min(age_s, ages_s.get(snapshot, age_s))
    if len(silent) == len(stores):
        raise silent[0]
    return ages_s, ()


def drop(
    backend: Backend,
    journal: Journal,
    policy: KeepPolicy | None,
    *,
    now_unix_s: float,
    approved: GcPlan | None = None,
    grace_s: float = GRACE_S,
) -> tuple[GcPlan, LogState]:
    """Record the drops of a new plan; the recorded plan and the state after it.

    ``approved``: a plan that the user confirmed; nothing is dropped that it does not drop. A
    snapshot that was tagged or became the newest meanwhile stays. A store that is too full for the
    record is swept first, with ``grace_s``. Raises as ``preview`` and ``Journal.append``.
    """
    rooms = iter((_sweep_garbage, _take_reserves, _free_copies))
    for races in range(RACES_MAX + 1):
        state: LogState | None = None
        plan = GcPlan((), None)
        try:
            require_known(journal.refresh())
            # The plan rests on confirmed records only. Otherwise a commit that is later overruled
            # could take one of the places of "last 2", and the snapshot it pushed out would be
            # lost.
            state = journal.refresh_confirmed()
            plan = preview(backend, state, policy, now_unix_s=now_unix_s, asks_clocks=True)
            plan = plan if approved is None else plan.restricted_to(approved.drops)
            return plan, _record(journal, state, plan.drops, plan.floor)
        except FencedError:
            raise
        except (StoreFullError, CommitUnknownError):
            # Of several stores it is not known that they are full, only that too few took it.
            if races == RACES_MAX or not any(make(backend, state, plan, grace_s) for make in rooms):
                raise
        except ConflictError:
            if races == RACES_MAX:
                raise
    raise AssertionError("the last race is raised")


# Ways to free space in full stores for one small record. Each returns whether it freed any. The
# state is None if its last record may not count; then nothing may be swept by it.


def _sweep_garbage(backend: Backend, state: LogState | None, _: GcPlan, grace_s: float) -> bool:
    if state is None or next(full_stores(backend), None) is None:
        return False
    report = sweep(backend, state, grace_s=grace_s)
    return any(store.deleted for store in report.stores)


def _take_reserves(backend: Backend, _: LogState | None, __: GcPlan, ___: float) -> bool:
    return take_reserves(backend)


def _free_copies(backend: Backend, _: LogState | None, plan: GcPlan, __: float) -> bool:
    """What is held twice goes: older folds, and second copies of records of the snapshots that are
    about to be dropped."""
    freed = False
    for store in full_stores(backend):
        twice = [keys.fold_key(seq) for seq in fold_seqs(store)[:-1]]
        for snapshot in plan.drops:
            for prefix in (f"{keys.PARTS}{snapshot.key}/", f"{keys.MANIFESTS}{snapshot.key}-"):
                twice += [stat.key for stat in store.list(keys.copy_key(prefix))]
        for key in twice:
            store.delete(key)
            freed = True
    return freed


def with_dropped(
    backend: Backend, state: LogState, *, step: int, epoch: int | None
) -> tuple[LogState, SnapshotId]:
    """``state`` with a snapshot that was dropped since, and that snapshot: to read what is left.

    The last one of that ``step`` (of ``epoch``, if given). Raises NotFoundError if none was
    committed and dropped; UnavailableError. Cost: reads the log back to its commit.
    """
    named: set[SnapshotId] = set()
    digest, top = state.head_digest, state.next_seq
    while top > 0:
        seqs = range(top - 1, max(0, top - RECORDS_AT_ONCE) - 1, -1)
        for record in records_back(stores_of(backend), seqs, digest):
            digest = record.prev
            if state.void_at(record.seq) is not None:
                continue
            match record.body:
                case Drop(snapshots, _):
                    named.update(snapshots)
                case Commit(snapshot, manifest_digest, base) if (
                    snapshot.step == step
                    and epoch in (None, snapshot.epoch)
                    and snapshot in named
                    and state.find(snapshot) is None
                ):
                    entry = Committed(snapshot, manifest_digest, base, record.seq, record.epoch)
                    return replace(state, snapshots=(*state.snapshots, entry)), snapshot
                case _:
                    pass
        top = seqs[-1]
    raise NotFoundError(
        f"no snapshot of that step was dropped. step={step} epoch={epoch or 'any'} "
        f"job={state.job!r}"
    )


def newest_intact(backend: Backend, state: LogState) -> SnapshotId | None:
    """The first snapshot in restore order whose records are readable and packs complete; or None.

    Packs are checked for existence and length: their bytes are known by ``newest_verified``. Raises
    UnavailableError.
    """
    return next(
        (snapshot for snapshot in restore_order(state) if _intact(backend, state, snapshot)), None
    )


def newest_verified(backend: Backend, state: LogState) -> SnapshotId | None:
    """The first snapshot in restore order whose every byte the last scrub found right, and that is
    still complete; None if the stores know of none.

    Raises UnavailableError if no store answers.
    """
    stores = stores_of(backend)
    record = last_record(stores)
    if record is None:
        return None
    digests = {entry.snapshot: entry.manifest_digest for entry in state.snapshots}
    return next(
        (
            snapshot
            for snapshot in restore_order(state)
            if (snapshot, digests[snapshot]) in record.verified
            and _intact(backend, state, snapshot)
        ),
        None,
    )


def _record(
    journal: Journal, state: LogState, drops: tuple[SnapshotId, ...], floor: SnapshotId | None
) -> LogState:
    # One record holds at most DROPS_MAX drops; the last one carries the floor.
    for start in range(0, len(drops), DROPS_MAX):
        last = start + DROPS_MAX >= len(drops)
        state = journal.drop(drops[start : start + DROPS_MAX], floor=floor if last else None)
    return journal.drop((), floor=floor) if not drops and floor is not None else state


def _intact(backend: Backend, state: LogState, snapshot: SnapshotId) -> bool:
    try:
        index = load_index(backend, state, snapshot)
    except (IntegrityError, FormatVersionError, NotFoundError):
        return False
    ends: dict[str, int] = {}
    for part in index.parts:
        for shard in part.shards:
            for at in shard.locations:
                ends[at.pack] = max(ends.get(at.pack, 0), at.offset_bytes + at.stored_bytes)
    return all(read_all(sorted(ends.items()), _pack_complete(backend)))


def _pack_complete(backend: Backend) -> Callable[[tuple[str, int]], bool]:
    def is_complete(pack_end: tuple[str, int]) -> bool:
        key, end_bytes = pack_end
        try:
            stat = backend.stat(key)
        except IntegrityError:  # an encrypted object of an impossible length
            return False
        return stat is not None and stat.size_bytes >= end_bytes

    return is_complete


def fenced_journal(backend: Backend, epoch: Callable[[], int]) -> Journal:
    """The log behind ``backend`` for a writer whose epoch is ``epoch()``.

    Each append raises FencedError if a newer epoch is open, so a job that was replaced drops
    nothing. Raises as ``Journal.open``.
    """
    journal = Journal.open(backend)
    return Journal(FencedLogAccess(journal.access, epoch), backend.url, journal.mark)


class FencedLogAccess:
    """A ``LogAccess`` that refuses to append for a writer whose epoch is not the newest.

    The epoch is checked in the very state that the record follows, and each seq is given out once.
    So no epoch can be opened between the check and the record: its ``open`` would take that seq.
    """

    __slots__ = ("_epoch", "_inner")

    def __init__(self, inner: LogAccess, epoch: Callable[[], int]) -> None:
        self._inner = inner
        self._epoch = epoch

    def append(self, state: LogState, record: Record) -> Appended | KeyTaken | WriteUnknown:
        require_newest_epoch(state, self._epoch())
        return self._inner.append(state, record)

    # The rest is passed on unchanged.

    @property
    def job(self) -> str:
        return self._inner.job

    @property
    def log_id(self) -> str:
        return self._inner.log_id

    def read_start(self) -> tuple[LogState, tuple[LogNote, ...]]:
        return self._inner.read_start()

    def read_new(self, state: LogState) -> LogState:
        return self._inner.read_new(state)

    def record_at(self, seq: int) -> bytes:
        return self._inner.record_at(seq)

    def look_at_stores(self, state: LogState) -> tuple[LogState, int]:
        return self._inner.look_at_stores(state)

    def prove_stores(self, state: LogState, since: int) -> tuple[LogState, tuple[str, ...]]:
        return self._inner.prove_stores(state, since)

    def members(self, state: LogState) -> tuple[tuple[str, ...], int]:
        return self._inner.members(state)

    def require_sequencer(self, state: LogState) -> None:
        self._inner.require_sequencer(state)

    def confirm_last(self, state: LogState) -> KeyTaken | WriteUnknown | None:
        return self._inner.confirm_last(state)

    def put_fold(self, key: str, data: bytes) -> Appended | KeyTaken | WriteUnknown:
        return self._inner.put_fold(key, data)

    def prune_folds(self) -> None:
        self._inner.prune_folds()

    def put_manifest(self, key: str, data: bytes) -> Appended | KeyTaken | WriteUnknown:
        return self._inner.put_manifest(key, data)


def require_newest_epoch(state: LogState, epoch: int) -> None:
    """Raises FencedError if ``state`` has a newer epoch than ``epoch``."""
    if state.epoch > epoch:
        raise FencedError(
            f"a newer epoch is open. writer={epoch} newest={state.epoch} its writer decides what "
            "to keep"
        )
