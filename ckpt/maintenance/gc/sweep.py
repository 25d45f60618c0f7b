"""What a sweep has to know first: what each snapshot refers to, and which were dropped a short
while ago."""

from __future__ import annotations

import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ckpt.backends.base import Backend, Stat
from ckpt.backends.checked import Check, read_alone, read_object, stores_of, write_quorum_of
from ckpt.errors import (
    CkptError,
    FormatVersionError,
    IntegrityError,
    NotFoundError,
    UnavailableError,
)
from ckpt.events import Emit, Event, Fact
from ckpt.format import keys
from ckpt.format.canonical import digest_hex
from ckpt.format.manifest import MANIFEST_BYTES_MAX, PART_STORED_BYTES_MAX, Manifest, PartRef
from ckpt.format.part import decode_part
from ckpt.format.records import RECORD_BYTES_MAX, Commit, Drop, Record, decode_record
from ckpt.format.store import JOB_BYTES_MAX, JobRecord
from ckpt.log.reader import read_all
from ckpt.log.state import LogState
from ckpt.maintenance.gc.plan import PREFIXES, GarbageClassifier, ObjectStatus, SnapshotReferences
from ckpt.values import SnapshotId

WINDOW = 1024
"""How many records are listed and read at once while the log is walked back through the grace."""


@dataclass(frozen=True, slots=True)
class ReachableStore:
    """One store that answers: alone, and what its own clock says now."""

    store: Backend
    now_unix_s: float


def snapshot_references(backend: Backend, state: LogState) -> list[SnapshotReferences]:
    """What each snapshot of ``state`` refers to, in log order. Reads every manifest and part,
    several at once.

    Records that can't be read from any copy are told in ``problem``. Raises UnavailableError where
    a store that may have one does not answer.
    """
    wanted = [(entry.snapshot, entry.manifest_digest) for entry in state.snapshots]
    return read_all(wanted, lambda one: _referred(backend, state.job, *one))


def dropped_within(
    backend: Backend,
    state: LogState,
    answering: Sequence[ReachableStore],
    *,
    grace_s: float,
    write_quorum: int,
) -> list[SnapshotReferences]:
    """What snapshots refer to that were dropped less than ``grace_s`` ago by the stores' clocks, as
    far as it is still there.

    Walks the log back from its head, along the digests, to the first record that is old enough: one
    list and one read a record. The age of a record is that by which a write quorum had it, so that
    a copy made late does not make it young.
    """
    drops: set[SnapshotId] = set()
    digests: dict[SnapshotId, str] = {}
    expected, top = state.head_digest, state.next_seq - 1
    while top >= 0:
        low = max(0, top - WINDOW + 1)
        young = _young(answering, low, top, grace_s=grace_s, write_quorum=write_quorum)
        for record in _chain(answering, young, expected):
            expected = record.prev
            match record.body:
                case Drop(snapshots, _):
                    drops.update(snapshots)
                case Commit(snapshot, digest, _):
                    digests.setdefault(snapshot, digest)
                case _:
                    pass
        if len(young) < top - low + 1:
            break
        top = low - 1
    exist = {entry.snapshot for entry in state.snapshots}  # a drop that did not count took nothing
    gone = sorted(drops - exist)
    return [_dropped(backend, state.job, answering, pair, digests.get(pair)) for pair in gone]


def _referred(
    backend: Backend, job: str, snapshot: SnapshotId, digest: str, *, exists: bool = True
) -> SnapshotReferences:
    """What one snapshot refers to. Of one that does not exist any more, what is missing was swept,
    with a shorter grace."""
    key = keys.manifest_key(snapshot, digest)
    try:
        data = read_object(backend, key, _is(digest), bytes_max=MANIFEST_BYTES_MAX)
        manifest = Manifest.decode(data)
        if (manifest.job, manifest.snapshot) != (job, snapshot):
            raise IntegrityError(f"manifest of another job or snapshot. key={key}")
    except NotFoundError as error:
        return SnapshotReferences(snapshot, frozenset((key,)), str(error) if exists else "")
    except (IntegrityError, FormatVersionError) as error:
        return SnapshotReferences(snapshot, frozenset((key,)), str(error))
    found = {key, *(ref.key for ref in manifest.parts)}
    for ref in manifest.parts:
        try:
            found |= _packs(backend, ref)
        except NotFoundError as error:
            if exists:
                return SnapshotReferences(snapshot, frozenset(found), str(error))
        except (IntegrityError, FormatVersionError) as error:
            return SnapshotReferences(snapshot, frozenset(found), str(error))
    return SnapshotReferences(snapshot, frozenset(found))


def _packs(backend: Backend, ref: PartRef) -> set[str]:
    part = decode_part(
        read_object(backend, ref.key, _is(ref.digest), bytes_max=PART_STORED_BYTES_MAX)
    )
    return {place.pack for shard in part.shards for place in shard.locations}


def _is(digest: str) -> Check:
    return lambda data: None if digest_hex(data) == digest else "the bytes differ from their digest"


def _dropped(
    backend: Backend,
    job: str,
    answering: Sequence[ReachableStore],
    snapshot: SnapshotId,
    digest: str | None,
) -> SnapshotReferences:
    """What a dropped snapshot refers to. Where its commit is older than what was read, every
    manifest of the pair counts."""
    digests = {digest} if digest is not None else _manifests(answering, snapshot)
    found = [_referred(backend, job, snapshot, one, exists=False) for one in sorted(digests)]
    problems = [one.problem for one in found if one.problem]
    return SnapshotReferences(
        snapshot,
        frozenset(key for one in found for key in one.keys),
        problems[0] if problems else "",
    )


def _manifests(answering: Sequence[ReachableStore], snapshot: SnapshotId) -> set[str]:
    prefix = f"{keys.MANIFESTS}{snapshot.key}-"
    listed = [
        keys.parse_manifest_key(stat.key) for one in answering for stat in one.store.list(prefix)
    ]
    return {parsed[1] for parsed in listed if parsed is not None}


def _young(
    answering: Sequence[ReachableStore], low: int, top: int, *, grace_s: float, write_quorum: int
) -> list[int]:
    """The seqs from ``top`` down that are younger than the grace, up to the first that is not,
    ``low`` at most."""
    ages = _ages(answering, low, top)
    young: list[int] = []
    for seq in range(top, low - 1, -1):
        found = sorted(ages.get(seq, ()), reverse=True)
        age = (
            found[min(write_quorum, len(answering)) - 1]
            if len(found) >= min(write_quorum, len(answering))
            else 0.0
        )
        if age >= grace_s:
            break
        young.append(seq)
    return young


def _ages(answering: Sequence[ReachableStore], low: int, top: int) -> Mapping[int, list[float]]:
    """How old the copies of each record are. Where writers had split the stores, the record is as
    old as its settling."""
    plain: dict[int, list[float]] = {}
    settled: dict[int, list[float]] = {}
    for one in answering:
        for stat in one.store.list(keys.LOG, after=keys.log_key(low - 1) if low else ""):
            age = max(0.0, one.now_unix_s - stat.modified_unix_s)
            if (seq := keys.parse_log_key(stat.key)) is not None:
                if seq > top:
                    break
                plain.setdefault(seq, []).append(age)
            elif (seq := keys.parse_settled_key(stat.key)) is not None:
                settled.setdefault(seq, []).append(age)
    return plain | settled


def _chain(answering: Sequence[ReachableStore], seqs: Sequence[int], expected: str) -> list[Record]:
    """The records at ``seqs``, descending, each the one that the next names; ``expected`` is the
    digest of the first."""
    found: list[Record] = []
    for guess, seq in zip(
        read_all(seqs, lambda seq: next(_copies(answering, seq), None)), seqs, strict=True
    ):
        record = guess if guess is not None and guess.digest == expected else None
        record = record or next(
            (one for one in _copies(answering, seq) if one.digest == expected), None
        )
        if record is None:
            raise IntegrityError(
                f"a record of the log can't be found again. key={keys.log_key(seq)} "
                f"digest={expected}; run this again, and "
                "look at the stores with ckpt doctor"
            )
        found.append(record)
        expected = record.prev
    return found


def _copies(answering: Sequence[ReachableStore], seq: int) -> Iterator[Record]:
    for one in answering:
        for key in (keys.log_key(seq), keys.settled_key(seq)):
            try:
                record = decode_record(read_alone(one.store, key, bytes_max=RECORD_BYTES_MAX))
            except (IntegrityError, NotFoundError):
                continue
            if record.seq == seq:
                yield record


# What a store's own clock says: the age of an object is counted by the clock that stamped it, and
# by no other.

CLOCK_PROBES = "probes/"
ABANDONED_PROBE_S = 3600.0
"""A probe that is older was left by a process that died."""

_PROBE_RE = re.compile(r"probes/[0-9a-f]{32}", re.ASCII)


def store_clock(store: Backend) -> float:
    """The store's time, in seconds since 1970: that of an object written just now, which is deleted
    again.

    Also removes what dead processes left of such. Raises UnavailableError, StoreDeniedError.
    """
    key = f"{CLOCK_PROBES}{secrets.token_hex(16)}"
    store.put(key, [b"ckpt"])
    try:
        stat = store.stat(key)
    finally:
        store.delete(key)
    if stat is None:
        raise UnavailableError(
            f"an object written just now isn't there. key={key} store={store.url} run this again"
        )
    for left in list(store.list(CLOCK_PROBES)):
        if is_probe(left.key) and stat.modified_unix_s - left.modified_unix_s > ABANDONED_PROBE_S:
            store.delete(left.key)
    return stat.modified_unix_s


def is_probe(key: str) -> bool:
    """Whether ``key`` is one that ``store_clock`` uses."""
    return _PROBE_RE.fullmatch(key) is not None


# Deletes what no snapshot needs any more, store by store. A death at any moment harms nothing; a
# repeat finishes.

GRACE_S = 86400.0
"""How long dropped snapshots stay readable, by the clock of each store: longer than any restore
takes."""
DELETES_AT_ONCE = 16
BATCH = 1000
"""Objects given to the store's threads at once; the same as one request of the S3 protocol may
name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSweep:
    """What was found and done in one store. ``problem`` says why the rest was left for the next
    time; empty: it is all done.

    ``objects`` and ``size_bytes`` are by verdict, as the store was listed; ``deleted`` and
    ``deleted_bytes`` what went.
    """

    url: str
    objects: Counter[ObjectStatus] = field(default_factory=Counter)
    size_bytes: Counter[ObjectStatus] = field(default_factory=Counter)
    deleted: int = 0
    deleted_bytes: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepReport:
    """What a sweep came to. ``held`` names snapshots whose records can't be read, so that no pack
    was deleted, and why."""

    stores: tuple[StoreSweep, ...]
    held: tuple[SnapshotReferences, ...]

    @property
    def ok(self) -> bool:
        """Whether every store is as clean as it can be now."""
        return not self.held and not any(one.problem for one in self.stores)


def sweep(
    backend: Backend,
    state: LogState,
    *,
    grace_s: float = GRACE_S,
    about_to_drop: Sequence[SnapshotReferences] = (),
    dry_run: bool = False,
    clock: Callable[[Backend], float] = store_clock,
    emit: Emit = lambda _: None,
) -> SweepReport:
    """Delete the packs, parts and manifests that are garbage in ``state``, the log as it is now or
    was before.

    ``going`` are snapshots that count as just dropped, for a dry run, which deletes nothing. A
    store that does not answer, or is another log's, is left out and told. Raises IntegrityError or
    UnavailableError where the log can't be known (a hole, too few stores), or a manifest or part
    can't be asked for. Cost: all manifests and parts of existing snapshots are read, the log's
    records within the grace, and manifests, parts and packs of each store listed.
    """
    require_known(state)
    stores = [_meet(store, state, clock) for store in stores_of(backend)]
    answering = [one for one in stores if isinstance(one, ReachableStore)]
    quorum = write_quorum_of(backend)
    exist = snapshot_references(backend, state)
    dropped = (
        dropped_within(backend, state, answering, grace_s=grace_s, write_quorum=quorum)
        if grace_s > 0
        else []
    )
    judge = GarbageClassifier(
        state,
        existing=exist,
        dropped=[*dropped, *(about_to_drop if grace_s > 0 else ())],
        grace_s=grace_s,
    )
    done = tuple(
        one if isinstance(one, StoreSweep) else _sweep_store(one, judge, dry_run=dry_run)
        for one in stores
    )
    report = SweepReport(stores=done, held=tuple(one for one in (*exist, *dropped) if one.problem))
    for event in _events(report):
        emit(event)
    return report


def require_known(state: LogState) -> None:
    """Raises IntegrityError or UnavailableError where what is newest can't be known: then nothing
    may be deleted."""
    if state.hole is not None:
        raise IntegrityError(
            f"the log has a hole, so nothing is deleted. seq={state.hole.seq} "
            f"why={state.hole.reason} bring that record back "
            "from a copy of the store"
        )
    if state.short:
        raise UnavailableError(
            f"too few stores answer, so nothing is deleted. why={state.short} repeat when they do"
        )


def _meet(
    store: Backend, state: LogState, clock: Callable[[Backend], float]
) -> ReachableStore | StoreSweep:
    """Look whether the store is one of this log's and what time it has."""
    try:
        record = JobRecord.decode(read_alone(store, keys.JOB_KEY, bytes_max=JOB_BYTES_MAX))
        listed = state.stores is None or record.store_id in state.stores.ids
        if record.job != state.job or not listed:
            return StoreSweep(
                url=store.url,
                problem=f"not a store of this log. its_job={record.job!r} store_id={record.store_id}",
            )
        return ReachableStore(store, clock(store))
    except NotFoundError:
        return StoreSweep(
            url=store.url, problem=f"not a store of this log: it has no {keys.JOB_KEY}"
        )
    except (UnavailableError, IntegrityError) as error:
        return StoreSweep(url=store.url, problem=str(error))


def _sweep_store(one: ReachableStore, judge: GarbageClassifier, *, dry_run: bool) -> StoreSweep:
    objects: Counter[ObjectStatus] = Counter()
    sizes: Counter[ObjectStatus] = Counter()
    deleted = deleted_bytes = 0
    problem = ""
    try:
        for prefix in PREFIXES:
            garbage: list[Stat] = []
            for stat in one.store.list(prefix):
                verdict = judge.classify(stat, now_unix_s=one.now_unix_s)
                objects[verdict] += 1
                sizes[verdict] += stat.size_bytes
                if verdict is ObjectStatus.GARBAGE:
                    garbage.append(stat)
            if not dry_run:
                for stat in _delete(one.store, garbage):
                    deleted += 1
                    deleted_bytes += stat.size_bytes
    except CkptError as error:
        problem = str(error)
    return StoreSweep(
        url=one.store.url,
        objects=objects,
        size_bytes=sizes,
        deleted=deleted,
        deleted_bytes=deleted_bytes,
        problem=problem,
    )


def _delete(store: Backend, garbage: Sequence[Stat]) -> Iterator[Stat]:
    """Delete the objects, several at once, and give each when it is gone. The first error ends
    it."""
    width = min(DELETES_AT_ONCE, store.capabilities().concurrency_best) if garbage else 1
    if width <= 1:
        for stat in garbage:
            store.delete(stat.key)
            yield stat
        return
    pool = ThreadPoolExecutor(max_workers=width, thread_name_prefix="ckpt-sweep")
    try:
        for start in range(0, len(garbage), BATCH):
            batch = garbage[start : start + BATCH]
            for stat, _ in zip(
                batch, pool.map(store.delete, [stat.key for stat in batch]), strict=True
            ):
                yield stat
    finally:
        pool.shutdown(cancel_futures=True)


def _events(report: SweepReport) -> Iterator[Event]:
    for one in report.stores:
        facts: dict[str, Fact] = {
            "store": one.url,
            "deleted": one.deleted,
            "deleted_bytes": one.deleted_bytes,
        }
        if one.problem:
            yield Event(
                "sweep-stopped",
                f"a store was not swept to the end: {one.problem}",
                facts,
                alarm=True,
            )
        else:
            yield Event("swept", f"swept {one.url}", facts)
    for held in report.held:
        where: dict[str, Fact] = {"epoch": held.snapshot.epoch, "step": held.snapshot.step}
        text = f"no pack was deleted, for nobody knows which ones {held.snapshot} needs: {held.problem}"
        yield Event("sweep-held", text, where, alarm=True)
