"""Sweeps: deleting, store by store, the objects that no snapshot needs.

A sweep may die at any moment, run twice, run late or beside another one: it deletes only what is
garbage in the log's state, and garbage stays garbage.
"""

from __future__ import annotations

import re
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from ckpt.backends.base import Backend, Stat
from ckpt.backends.checked import Check, read_object, stores_of, write_quorum_of
from ckpt.errors import (
    CkptError,
    FormatVersionError,
    IntegrityError,
    NotFoundError,
    StoreFullError,
    UnavailableError,
)
from ckpt.events import Emit, Event, Fact
from ckpt.format import keys
from ckpt.format.canonical import digest_hex
from ckpt.format.manifest import MANIFEST_BYTES_MAX, PART_STORED_BYTES_MAX, Manifest, PartRef
from ckpt.format.part import decode_part
from ckpt.format.records import Commit, Drop
from ckpt.log.reader import log_objects, read_all, read_job_record, records_back
from ckpt.log.state import LogState
from ckpt.maintenance.gc.plan import PREFIXES, GarbageClassifier, ObjectStatus, SnapshotReferences
from ckpt.values import SnapshotId

WINDOW = 1024
"""Records listed and read at once while the log is walked back through the grace."""


@dataclass(frozen=True, slots=True)
class ReachableStore:
    """A store that answers, and the time by its own clock."""

    store: Backend
    now_unix_s: float


# ---- what snapshots refer to


CACHED_KEYS_MAX = 200_000
"""Keys that a ``ReferenceCache`` holds: about 40 MB. One snapshot of 1,000 ranks refers to 2,000
and more."""


class ReferenceCache:
    """What snapshots refer to, kept from one sweep to the next. For one thread.

    It never changes: the log names a manifest by its digest, and the manifest names its parts so.
    Only what was read completely is kept, up to ``keys_max`` keys; what does not fit is read again.
    """

    def __init__(self, *, keys_max: int = CACHED_KEYS_MAX) -> None:
        self._left = keys_max
        self._known: dict[SnapshotId, tuple[str, SnapshotReferences]] = {}

    def find(self, snapshot: SnapshotId, digest: str | None = None) -> SnapshotReferences | None:
        """What ``snapshot`` refers to, if that is known of the manifest with ``digest`` (None: of
        the one that was committed)."""
        committed, references = self._known.get(snapshot, ("", None))
        return references if digest in (None, committed) else None

    def add(self, digest: str, references: SnapshotReferences) -> None:
        """Keep the references of a committed manifest, if they are all known and fit."""
        size = len(references.keys)
        if not references.problem and references.snapshot not in self._known and size <= self._left:
            self._known[references.snapshot] = digest, references
            self._left -= size

    def retain(self, snapshots: Collection[SnapshotId]) -> None:
        """Forget all other snapshots."""
        for snapshot in self._known.keys() - set(snapshots):
            self._left += len(self._known.pop(snapshot)[1].keys)


def snapshot_references(
    backend: Backend, state: LogState, cache: ReferenceCache | None = None
) -> list[SnapshotReferences]:
    """What each snapshot of ``state`` refers to, in log order.

    Reads every manifest and part of those that are not in ``cache``, several at once. A record that
    no copy has right is named in ``problem``. Raises UnavailableError if a store that may have the
    record does not answer.
    """
    cache = cache or ReferenceCache()
    wanted = [(entry.snapshot, entry.manifest_digest) for entry in state.snapshots]
    missing = [one for one in wanted if cache.find(*one) is None]
    read = read_all(missing, lambda one: _references(backend, state.job, *one))
    found = dict(zip(missing, read, strict=True))
    for (_, digest), references in found.items():
        cache.add(digest, references)
    known = [found.get(one) or cache.find(*one) for one in wanted]
    return [references for references in known if references is not None]


def dropped_within(
    backend: Backend,
    state: LogState,
    answering: Sequence[ReachableStore],
    *,
    grace_s: float,
    write_quorum: int,
    cache: ReferenceCache | None = None,
) -> list[SnapshotReferences]:
    """The remaining references of snapshots that were dropped less than ``grace_s`` ago, or all of
    them from ``cache``.

    Walks the log back from its head along the digests, to the first record that is old enough: one
    list, and one read for each record. Ages are by the stores' clocks. A record is as old as the
    moment when a write quorum had it, so a copy that was made late does not make it young.
    """
    drops: set[SnapshotId] = set()
    digests: dict[SnapshotId, str] = {}
    void = {entry.seq for entry in state.voids}
    expected, top = state.head_digest, state.next_seq - 1
    while top >= 0:
        low = max(0, top - WINDOW + 1)
        young = _young(answering, low, top, grace_s=grace_s, write_quorum=write_quorum)
        stores = [reachable.store for reachable in answering]
        for record in records_back(stores, young, expected):
            expected = record.prev
            match record.body:
                case Drop(snapshots, _):
                    drops.update(snapshots)
                # A void one may name another manifest than the one that was committed.
                case Commit(snapshot, digest, _) if record.seq not in void:
                    digests.setdefault(snapshot, digest)
                case _:
                    pass
        if len(young) < top - low + 1:
            break
        top = low - 1
    # A void drop dropped nothing: the snapshots that it names still exist.
    existing = {entry.snapshot for entry in state.snapshots}
    dropped = sorted(drops - existing)
    return [
        (cache and cache.find(snapshot))
        or _dropped_references(backend, state.job, answering, snapshot, digests.get(snapshot))
        for snapshot in dropped
    ]


def _references(
    backend: Backend, job: str, snapshot: SnapshotId, digest: str, *, exists: bool = True
) -> SnapshotReferences:
    """What one snapshot refers to.

    If it was dropped, missing records are no problem: a sweep with a shorter grace deleted them.
    """
    key = keys.manifest_key(snapshot, digest)
    try:
        data = read_object(backend, key, _matches(digest), bytes_max=MANIFEST_BYTES_MAX)
        manifest = Manifest.decode(data)
        if (manifest.job, manifest.snapshot) != (job, snapshot):
            raise IntegrityError(f"manifest of another job or snapshot. key={key}")
    except NotFoundError as error:
        return SnapshotReferences(snapshot, frozenset((key,)), str(error) if exists else "")
    except (IntegrityError, FormatVersionError) as error:
        return SnapshotReferences(snapshot, frozenset((key,)), str(error))
    needed = {key, *(ref.key for ref in manifest.parts)}
    for ref in manifest.parts:
        try:
            needed |= _packs(backend, ref)
        except NotFoundError as error:
            if exists:
                return SnapshotReferences(snapshot, frozenset(needed), str(error))
        except (IntegrityError, FormatVersionError) as error:
            return SnapshotReferences(snapshot, frozenset(needed), str(error))
    return SnapshotReferences(snapshot, frozenset(needed))


def _packs(backend: Backend, ref: PartRef) -> set[str]:
    data = read_object(backend, ref.key, _matches(ref.digest), bytes_max=PART_STORED_BYTES_MAX)
    return {at.pack for shard in decode_part(data).shards for at in shard.locations}


def _matches(digest: str) -> Check:
    return lambda data: None if digest_hex(data) == digest else "the bytes differ from their digest"


def _dropped_references(
    backend: Backend,
    job: str,
    answering: Sequence[ReachableStore],
    snapshot: SnapshotId,
    digest: str | None,
) -> SnapshotReferences:
    """What a dropped snapshot refers to.

    If its commit is older than the records that were read, its digest is unknown: then every
    manifest stored for the snapshot counts.
    """
    digests = {digest} if digest is not None else _manifest_digests(answering, snapshot)
    references = [
        _references(backend, job, snapshot, candidate, exists=False)
        for candidate in sorted(digests)
    ]
    problems = [entry.problem for entry in references if entry.problem]
    return SnapshotReferences(
        snapshot,
        frozenset(key for entry in references for key in entry.keys),
        problems[0] if problems else "",
    )


def _manifest_digests(answering: Sequence[ReachableStore], snapshot: SnapshotId) -> set[str]:
    prefix = f"{keys.MANIFESTS}{snapshot.key}-"
    parsed = [
        keys.parse_manifest_key(stat.key)
        for reachable in answering
        for stat in reachable.store.list(prefix)
    ]
    return {entry[1] for entry in parsed if entry is not None}


# ---- which records are within the grace


def _young(
    answering: Sequence[ReachableStore], low: int, top: int, *, grace_s: float, write_quorum: int
) -> list[int]:
    """The seqs from ``top`` down to the first record that is as old as the grace, or to ``low``."""
    ages = _ages(answering, low, top)
    quorum = min(write_quorum, len(answering))
    young: list[int] = []
    for seq in range(top, low - 1, -1):
        # The W-th greatest age is when a quorum had the record. On fewer stores it counts as new.
        oldest_first = sorted(ages.get(seq, ()), reverse=True)
        age_s = oldest_first[quorum - 1] if len(oldest_first) >= quorum else 0.0
        if age_s >= grace_s:
            break
        young.append(seq)
    return young


def _ages(answering: Sequence[ReachableStore], low: int, top: int) -> Mapping[int, list[float]]:
    """The ages of each record's copies.

    If writers had split the stores at a position, the ages at its second, settled key count.
    """
    first: dict[int, list[float]] = {}
    settled: dict[int, list[float]] = {}
    for reachable in answering:
        for found in log_objects(reachable.store, low):
            if found.seq > top:
                break
            if found.round:
                continue  # it is at the settled key too
            age_s = max(0.0, reachable.now_unix_s - found.stat.modified_unix_s)
            ages = first if found.round is None else settled
            ages.setdefault(found.seq, []).append(age_s)
    return first | settled


# ---- a store's own clock: it stamped the objects, so only it can tell their age

CLOCK_PROBES = "probes/"
ABANDONED_PROBE_S = 3600.0
"""A probe that is older was left by a process that died."""

_PROBE_RE = re.compile(r"probes/[0-9a-f]{32}", re.ASCII)


def store_clock(store: Backend) -> float:
    """The store's time in seconds since 1970: the stamp of an object written and deleted now.

    A full store's is taken from what it stamped last: nothing looks older than it is. Raises
    UnavailableError, StoreDeniedError.
    """
    try:
        return probed_clock(store)
    except StoreFullError:
        return earliest_time(store)


def probed_clock(store: Backend) -> float:
    """As ``store_clock``, but raises StoreFullError. Also deletes probes that dead processes
    left."""
    key = f"{CLOCK_PROBES}{secrets.token_hex(16)}"
    store.put(key, [b"ckpt"])
    try:
        stat = store.stat(key)
    finally:
        store.delete(key)
    if stat is None:
        raise UnavailableError(
            f"an object written just now is not there. key={key} store={store.url} run this again"
        )
    for left in list(store.list(CLOCK_PROBES)):
        if is_probe(left.key) and stat.modified_unix_s - left.modified_unix_s > ABANDONED_PROBE_S:
            store.delete(left.key)
    return stat.modified_unix_s


def earliest_time(store: Backend) -> float:
    """A time that the store's clock has certainly passed: the newest stamp of its objects.

    For a store that takes no probe. Nothing looks older than it is. Raises UnavailableError.
    """
    return max(
        (stat.modified_unix_s for prefix in (keys.LOG, *PREFIXES) for stat in store.list(prefix)),
        default=0.0,
    )


def is_full(store: Backend) -> bool:
    """Whether the store has no room for a log record. Raises UnavailableError, StoreDeniedError.

    Writes an object of a page and deletes it.
    """
    key = f"{CLOCK_PROBES}{secrets.token_hex(16)}"
    try:
        store.put(key, [bytes(PAGE_BYTES)])
    except StoreFullError:
        return True
    store.delete(key)
    return False


def full_stores(backend: Backend) -> Iterator[Backend]:
    """The stores that have no room for a log record; not those that do not answer or refuse.

    Of several stores the others may be enough for a record: its writer finds out.
    """
    for store in stores_of(backend):
        try:
            if not is_full(store):
                continue
        except UnavailableError:
            continue
        yield store


def is_probe(key: str) -> bool:
    """Whether ``key`` is one that ``store_clock`` uses."""
    return _PROBE_RE.fullmatch(key) is not None


# ---- the reserve: room for the record of a drop in a store that is full

RESERVE_KEY = "reserve/0"
RESERVE_BYTES = 256 << 10
"""Room for some hundred records: a record of a drop takes up to 1 MiB, and usually below 4 KiB."""
PAGE_BYTES = 4096


def keep_reserves(backend: Backend, state: LogState) -> None:
    """Make the reserve of each store of the log that has none.

    A store that is full, read-only or does not answer is left for the next time. Cost: two small
    requests for each store, and one write where there is no reserve.
    """
    for store in stores_of(backend):
        found = _identify(store, state, lambda _: 0.0)
        if isinstance(found, ReachableStore):
            try:
                if store.stat(RESERVE_KEY) is None:
                    # Random, because a disk that compresses would reserve nothing for zeros.
                    store.put(RESERVE_KEY, [secrets.token_bytes(RESERVE_BYTES)])
            except UnavailableError:
                continue  # nothing is lost by it; who next looks after the store tries again


def take_reserves(backend: Backend) -> bool:
    """Delete the reserves of the stores that are full; whether there was one."""
    taken = False
    for store in full_stores(backend):
        try:
            if store.stat(RESERVE_KEY) is not None:
                store.delete(RESERVE_KEY)
                taken = True
        except UnavailableError:
            continue
    return taken


# ---- the sweep

GRACE_S = 900.0
"""How long dropped snapshots stay readable, by each store's clock: longer than a restore takes.

A job makes it longer where its own restores took longer.
"""
DELETES_AT_ONCE = 16
BATCH = 1000
"""Objects given to a store's threads at once; one request of the S3 protocol names as many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSweep:
    """What a sweep found and did in one store.

    ``objects`` and ``size_bytes`` are by status, as the store was listed. ``problem``: why the rest
    was left to the next sweep; empty if the store is done.
    """

    url: str
    objects: Counter[ObjectStatus] = field(default_factory=Counter)
    size_bytes: Counter[ObjectStatus] = field(default_factory=Counter)
    deleted: int = 0
    deleted_bytes: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepReport:
    """The result. ``held``: snapshots with unreadable records, because of which no pack goes."""

    stores: tuple[StoreSweep, ...]
    held: tuple[SnapshotReferences, ...]

    @property
    def ok(self) -> bool:
        """Whether every store was swept completely."""
        return not self.held and not any(store.problem for store in self.stores)


def sweep(
    backend: Backend,
    state: LogState,
    *,
    grace_s: float = GRACE_S,
    about_to_drop: Sequence[SnapshotReferences] = (),
    dry_run: bool = False,
    clock: Callable[[Backend], float] = store_clock,
    emit: Emit = lambda _: None,
    cache: ReferenceCache | None = None,
) -> SweepReport:
    """Delete the packs, parts and manifests that are garbage in ``state``, a state of the log.

    ``about_to_drop``: for a dry run, which deletes nothing, snapshots that count as just dropped. A
    store that does not answer or belongs to another log is skipped and reported.

    Raises IntegrityError or UnavailableError if the newest snapshot cannot be known (a hole, too
    few stores), or a store that may have a manifest or part does not answer. Cost: reads all
    manifests and parts of existing snapshots, but for those in ``cache``, which learns them, and
    the log's records within the grace; lists the manifests, parts and packs of each store.
    """
    cache = cache or ReferenceCache()
    require_known(state)
    stores = [_identify(store, state, clock) for store in stores_of(backend)]
    answering = [store for store in stores if isinstance(store, ReachableStore)]
    # Before anything is deleted: raises if a store that may have a record does not answer.
    existing = snapshot_references(backend, state, cache)
    dropped: list[SnapshotReferences] = []
    if grace_s > 0 and answering:  # else nothing is deleted anywhere
        quorum = write_quorum_of(backend)
        dropped = dropped_within(
            backend, state, answering, grace_s=grace_s, write_quorum=quorum, cache=cache
        )
    cache.retain({entry.snapshot for entry in (*existing, *dropped)})
    recent = [*dropped, *(about_to_drop if grace_s > 0 else ())]
    classifier = GarbageClassifier(state, existing=existing, dropped=recent, grace_s=grace_s)
    report = SweepReport(
        stores=tuple(
            store
            if isinstance(store, StoreSweep)
            else _sweep_store(store, classifier, dry_run=dry_run)
            for store in stores
        ),
        held=tuple(entry for entry in (*existing, *dropped) if entry.problem),
    )
    for event in _events(report):
        emit(event)
    return report


def require_known(state: LogState) -> None:
    """Raises IntegrityError or UnavailableError if the newest snapshot cannot be known.

    Then nothing may be deleted: a record that did not reach a quorum may be replaced by another,
    and a drop that never counted would delete live bytes.
    """
    if state.hole is not None:
        raise IntegrityError(
            f"the log has a hole, so nothing is deleted. seq={state.hole.seq} "
            f"why={state.hole.reason} restore that record from a copy of the store"
        )
    if state.short:
        raise UnavailableError(
            f"too few stores answer, so nothing is deleted. why={state.short} repeat when they do"
        )


def _identify(
    store: Backend, state: LogState, clock: Callable[[Backend], float]
) -> ReachableStore | StoreSweep:
    """Check that the store belongs to this log, and read its clock."""
    try:
        record = read_job_record(store)
        is_member = state.stores is None or record.store_id in state.stores.ids
        # Never delete in a store of another log, even if its address was given.
        if record.job != state.job or not is_member:
            problem = f"not a store of this log. its_job={record.job!r} store_id={record.store_id}"
            return StoreSweep(url=store.url, problem=problem)
        return ReachableStore(store, clock(store))
    except NotFoundError:
        problem = f"not a store of this log: it has no {keys.JOB_KEY}"
        return StoreSweep(url=store.url, problem=problem)
    except (UnavailableError, IntegrityError) as error:
        return StoreSweep(url=store.url, problem=str(error))


def _sweep_store(
    reachable: ReachableStore, classifier: GarbageClassifier, *, dry_run: bool
) -> StoreSweep:
    objects: Counter[ObjectStatus] = Counter()
    sizes: Counter[ObjectStatus] = Counter()
    deleted = deleted_bytes = 0
    problem = ""
    try:
        for prefix in PREFIXES:
            # The prefix is listed to its end before anything below it is deleted.
            garbage: list[Stat] = []
            for stat in reachable.store.list(prefix):
                status = classifier.classify(stat, now_unix_s=reachable.now_unix_s)
                objects[status] += 1
                sizes[status] += stat.size_bytes
                if status is ObjectStatus.GARBAGE:
                    garbage.append(stat)
            if not dry_run:
                for stat in _delete(reachable.store, garbage):
                    deleted += 1
                    deleted_bytes += stat.size_bytes
    except CkptError as error:
        # This store is left to the next sweep; the other stores are swept all the same.
        problem = str(error)
    return StoreSweep(
        url=reachable.store.url,
        objects=objects,
        size_bytes=sizes,
        deleted=deleted,
        deleted_bytes=deleted_bytes,
        problem=problem,
    )


def _delete(store: Backend, garbage: Sequence[Stat]) -> Iterator[Stat]:
    """Delete the objects, several at once, and yield each deleted one. Stops at the first error."""
    width = min(DELETES_AT_ONCE, store.capabilities().concurrency_best) if garbage else 1
    if width <= 1:
        for stat in garbage:
            _remove(store, stat.key)
            yield stat
        return
    pool = ThreadPoolExecutor(max_workers=width, thread_name_prefix="ckpt-sweep")
    try:
        for start in range(0, len(garbage), BATCH):
            batch = garbage[start : start + BATCH]
            deletes = pool.map(partial(_remove, store), [stat.key for stat in batch])
            for stat, _ in zip(batch, deletes, strict=True):
                yield stat
    finally:
        pool.shutdown(cancel_futures=True)


def _remove(store: Backend, key: str) -> None:
    """Delete an object, and before it its second copy: while the object is listed, a sweep that
    was interrupted finds both again."""
    if key.startswith((keys.MANIFESTS, keys.PARTS)):
        store.delete(keys.copy_key(key))
    store.delete(key)


def _events(report: SweepReport) -> Iterator[Event]:
    for store in report.stores:
        facts: dict[str, Fact] = {
            "store": store.url,
            "deleted": store.deleted,
            "deleted_bytes": store.deleted_bytes,
        }
        if store.problem:
            text = f"a store was not swept to the end: {store.problem}"
            yield Event("sweep-stopped", text, facts, alarm=True)
        else:
            yield Event("swept", f"swept {store.url}", facts)
    for held in report.held:
        where: dict[str, Fact] = {"epoch": held.snapshot.epoch, "step": held.snapshot.step}
        text = (
            f"no pack was deleted: it is unknown which ones {held.snapshot} needs: {held.problem}"
        )
        yield Event("sweep-held", text, where, alarm=True)
