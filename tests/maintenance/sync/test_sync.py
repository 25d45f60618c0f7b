"""Filling a replica: what it holds afterwards, what it refuses, and what never reaches it."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from kit.damage import (
    SOAK,
    bytes_of,
    faults_of,
    flip,
    folded,
    harm,
    names_nothing_missing,
    objects_of,
    record_of,
    replicate,
    without_second_copies,
)

from ckpt.backends.base import Backend, Capabilities
from ckpt.backends.file.store import FileBackend
from ckpt.backends.memory import MemoryBackend
from ckpt.backends.replicated.open import open_stores
from ckpt.errors import (
    ConflictError,
    IntegrityError,
    NotFoundError,
    StoreFullError,
    UnavailableError,
    UsageError,
)
from ckpt.format import keys
from ckpt.format.records import Tag, decode_record, make_record
from ckpt.log.catalog import load_index
from ckpt.log.journal import Journal
from ckpt.log.state import LogState
from ckpt.maintenance.copies import Pack, WholeObject
from ckpt.maintenance.replica import MemoryBudget, SyncLimits
from ckpt.maintenance.scrub.report import ScrubReport
from ckpt.maintenance.scrub.scrub import scrub
from ckpt.maintenance.sync.copy import missing_objects
from ckpt.maintenance.sync.sync import fill, source_record, sync
from ckpt.testing.faults import CountingBackend, Fault, FaultyBackend, Harm
from ckpt.testing.sample import SampleWriter, sample_ranks, write_sample_store
from ckpt.values import ChunkLocation, Codec, SnapshotId


@pytest.fixture
def source(lone: Path, tmp_path: Path) -> FileBackend:
    return replicate(lone, tmp_path / "source", None)


def test_empty_place_becomes_a_full_replica_with_an_id_of_its_own(
    source: FileBackend, tmp_path: Path
) -> None:
    store = FileBackend(tmp_path / "new")
    report = sync(source, store)
    assert report.ok
    assert report.present_objects == 0
    assert report.next_seq == report.records == 5
    assert objects_of(store) == objects_of(source)
    mine, theirs = record_of(store), record_of(source)
    assert (mine.job, mine.log_id, mine.sequencer) == (theirs.job, theirs.log_id, theirs.sequencer)
    assert mine.store_id == report.store_id != theirs.store_id


def test_repeating_copies_nothing_and_only_what_is_new_the_next_time(
    source: FileBackend, tmp_path: Path
) -> None:
    store = CountingBackend(FileBackend(tmp_path / "new"))
    sync(source, store)
    store.forget()
    report = sync(source, store)
    assert (report.copied_objects, report.records, store.calls("put")) == (0, 0, [])
    assert not store.calls("read_into", prefix=keys.PACKS)
    writer = SampleWriter(source, _writes=100)
    writer.write(SnapshotId(1, 40), sample_ranks(40))
    report = sync(source, store)
    assert (report.records, report.next_seq) == (1, 6)
    assert objects_of(store) == objects_of(source)
    assert [call.key for call in store.calls("put")][-1] == keys.log_key(5)


def test_record_is_written_only_when_all_that_it_leads_to_is_there(
    source: FileBackend, tmp_path: Path
) -> None:
    inner = FileBackend(tmp_path / "new")

    class Watching(CountingBackend):
        """Looks at the replica before each record."""

        def put(self, key: str, data: object, *, create_only: bool = False) -> None:
            if key.startswith(keys.LOG):
                assert names_nothing_missing(inner)
            super().put(key, data, create_only=create_only)  # type: ignore[arg-type]

    store = Watching(inner)
    sync(source, store)
    records = [call.key for call in store.calls("put", prefix=keys.LOG)]
    assert records == sorted(records)
    assert len(records) == 5
    assert names_nothing_missing(inner)


@pytest.mark.parametrize("seed", range(100 if SOAK else 10))
def test_damage_of_a_source_never_reaches_the_replica(
    source: FileBackend, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    print(f"seed {seed}")
    truth = replicate(Path(source.url), tmp_path / "truth", None)
    objects = objects_of(source, keys.PACKS, keys.PARTS, keys.MANIFESTS)
    copies = bool(seed % 2)  # of manifests and parts
    if not copies:
        without_second_copies(source)
    for key in rng.sample(sorted(objects), rng.randrange(1, 6)):
        harm(source.url, key, rng)
    lost = scrub([source], 1, repair=False)
    assert lost is not None
    store = FileBackend(tmp_path / "new")
    report = sync(source, store)
    gone = {key for key, _ in report.damaged}
    found = {trouble.key for trouble in lost.problems if trouble.lost or not copies}
    assert gone <= found
    # A scrub finds what is below a manifest of which one bit is wrong: it knows which one.
    hidden = {snapshot_of(key) for key in gone if key.startswith(keys.MANIFESTS)}
    assert {snapshot_of(key) for key in found - gone} <= (set() if copies else hidden)
    assert report.ok == (not report.damaged)
    assert report.next_seq == 5
    assert not any(store.stat(key) for key in gone)
    for key in objects_of(truth if copies else store, keys.PARTS, keys.MANIFESTS):
        assert bytes_of(store, key) == bytes_of(truth, key)
    if all(key.startswith(keys.PACKS) for key in gone):
        missing = {trouble.key for trouble in scrub_of(store).problems}
        assert missing == gone


def snapshot_of(key: str) -> str:
    """The snapshot's part of an object's key."""
    return key.split("/")[1][: len("0000000001-00000000000010")]


def scrub_of(store: Backend) -> ScrubReport:
    report = scrub([store], 1, repair=False)
    assert report is not None
    return report


@pytest.mark.slow
def test_what_one_source_has_wrong_is_read_from_another(
    trio: list[FileBackend], tmp_path: Path
) -> None:
    rng = random.Random(4)
    truth = replicate(tmp_path / "0", tmp_path / "truth", None)
    for key in objects_of(trio[0], keys.PACKS, keys.PARTS, keys.MANIFESTS):
        harm(trio[rng.randrange(3)].url, key, rng)
    stores = open_stores([store.url for store in trio], emit=lambda event: None)
    store = FileBackend(tmp_path / "new")
    try:
        report = sync(stores, store)
    finally:
        stores.close()
    assert report.ok, report
    assert faults_of(store, truth) == []


def test_hole_of_the_source_ends_the_replica_there_and_is_told(
    source: FileBackend, tmp_path: Path
) -> None:
    flip(source.url, keys.log_key(3), 20)
    assert sync(source, FileBackend(tmp_path / "from second copies")).ok
    without_second_copies(source)
    store = FileBackend(tmp_path / "new")
    report = sync(source, store)
    assert report.hole is not None
    assert not report.ok
    assert report.next_seq == 3
    assert names_nothing_missing(store)


def test_source_that_is_no_store_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        sync(MemoryBackend("empty"), MemoryBackend("new"))


def test_store_of_another_job_or_another_log_is_refused_and_untouched(source: FileBackend) -> None:
    other = MemoryBackend("other")
    SampleWriter(other, job="another").open_epoch()
    before = objects_of(other)
    with pytest.raises(UsageError, match="another job"):
        sync(source, other)
    same_name = MemoryBackend("same name")
    write_sample_store(same_name)
    with pytest.raises(ConflictError, match="another log"):
        sync(source, same_name)
    with pytest.raises(UsageError, match="source itself"):
        sync(source, FileBackend(source.url))
    assert objects_of(other) == before


def test_replica_with_a_history_of_its_own_is_refused_before_anything_is_copied(
    source: FileBackend, tmp_path: Path
) -> None:
    store = FileBackend(tmp_path / "new")
    sync(source, store)
    Journal.open(store).tag("mine", SnapshotId(1, 10))
    SampleWriter(source, _writes=100).write(SnapshotId(1, 40), sample_ranks(40))
    before = objects_of(store)
    with pytest.raises(ConflictError, match="history of its own"):
        sync(source, store)
    assert objects_of(store) == before


def test_replica_that_is_further_than_its_source_is_refused(
    source: FileBackend, tmp_path: Path
) -> None:
    store = FileBackend(tmp_path / "new")
    sync(source, store)
    Journal.open(store).tag("mine", SnapshotId(1, 10))
    with pytest.raises(ConflictError, match="further"):
        sync(source, store)


def test_votes_of_a_writer_that_met_the_store_as_it_lost_everything_are_no_history(
    source: FileBackend, tmp_path: Path
) -> None:
    """The writer went on with the record that it was at; the log has no next record yet, or
    another one."""
    journal = Journal.open(source)
    held = journal.refresh()

    def emptied(name: str) -> FileBackend:
        store = FileBackend(tmp_path / name)
        record = replace(source_record(source), store_id=f"{len(name):032x}")
        store.put(keys.JOB_KEY, [record.encode()])
        return store

    def filled(store: FileBackend) -> bool:
        return fill(source, store, journal.refresh, record=source_record(source)).ok

    vote = make_record(
        Tag("late", SnapshotId(1, 10)),
        job=held.job,
        seq=held.next_seq,
        epoch=held.epoch,
        write_id="late",
        prev=held.head_digest,
    ).encode()
    store = emptied("new")
    store.put(keys.log_key(held.next_seq), [vote])
    assert filled(store)
    other = emptied("other")
    other.put(keys.log_key(held.next_seq), [vote])
    journal.tag("another", SnapshotId(1, 20))
    assert filled(other)
    assert folded(other) == folded(source)
    alien = emptied("alien")
    alien.put(keys.log_key(held.next_seq + 1), [vote])
    with pytest.raises(ConflictError, match="further"):
        filled(alien)


def test_interrupted_by_a_full_store_it_goes_on_when_there_is_room(
    source: FileBackend, tmp_path: Path
) -> None:
    inner = FileBackend(tmp_path / "new")
    for skip in range(0, 24, 3):
        store = FaultyBackend(inner, [Fault(harm=Harm.FULL, op="put", skip=skip % 5, times=None)])
        with pytest.raises(StoreFullError):
            sync(source, store)
        assert names_nothing_missing(inner)
        if skip > 12:
            break
    assert sync(source, inner).ok
    assert objects_of(inner) == objects_of(source)


@pytest.mark.parametrize("seed", range(60 if SOAK else 8))
def test_lost_requests_and_replies_end_in_an_error_or_a_full_replica(
    source: FileBackend, tmp_path: Path, seed: int
) -> None:
    print(f"seed {seed}")
    inner = FileBackend(tmp_path / "new")
    faults = [
        Fault(harm=how, times=None, chance=0.02) for how in (Harm.LOST_REQUEST, Harm.LOST_REPLY)
    ]
    for attempt in range(200):
        store = FaultyBackend(inner, faults, seed=1000 * seed + attempt)
        try:
            report = sync(source, store, limits=SyncLimits(threads=1))
        except UnavailableError:
            assert names_nothing_missing(inner)
            continue
        assert report.ok
        break
    else:
        pytest.fail("it never came through")
    assert objects_of(inner) == objects_of(source)


def test_deep_compares_what_is_there_and_writes_anew_what_is_wrong(
    source: FileBackend, tmp_path: Path
) -> None:
    store = FileBackend(tmp_path / "new")
    sync(source, store)
    rng = random.Random(2)
    for key in objects_of(store):
        path = Path(store.url) / key
        data = bytearray(path.read_bytes())
        data[rng.randrange(min(len(data), 400))] ^= 1
        path.write_bytes(data)
    assert sync(source, store, deep=True).ok
    assert faults_of(store, source) == []


@pytest.mark.slow
def test_what_comes_while_it_copies_is_copied_too(source: FileBackend, tmp_path: Path) -> None:
    writer = SampleWriter(source, _writes=100)
    steps = iter((40, 50, 60))

    class Slow(CountingBackend):
        """Whenever the last known record was copied, the source gets one more snapshot."""

        def put(self, key: str, data: object, *, create_only: bool = False) -> None:
            super().put(key, data, create_only=create_only)  # type: ignore[arg-type]
            step = next(steps, None) if key.startswith(keys.LOG) else None
            if step is not None:
                writer.write(SnapshotId(1, step), sample_ranks(step))

    store = Slow(FileBackend(tmp_path / "new"))
    report = sync(source, store)
    assert report.ok
    assert report.rounds > 1
    assert report.next_seq == 8
    assert objects_of(store) == objects_of(source)


def test_fill_returns_when_the_named_record_is_there(source: FileBackend, tmp_path: Path) -> None:
    journal = Journal.open(source)
    journal.refresh()
    writer = SampleWriter(source, _writes=100)
    asked: list[int] = []

    def log() -> LogState:
        asked.append(1)
        if len(asked) > 1:
            writer.write(SnapshotId(1, 30 + 10 * len(asked)), sample_ranks(len(asked)))
        return journal.refresh()

    store = FileBackend(tmp_path / "new")
    report = fill(source, store, log, record=source_record(source), upto_seq=4)
    assert report.ok
    assert report.rounds == 1
    assert folded(store).next_seq == 5


def test_snapshot_that_was_dropped_before_is_not_copied_and_its_record_is(
    source: FileBackend, tmp_path: Path
) -> None:
    Journal.open(source).drop([SnapshotId(1, 10)])
    store = FileBackend(tmp_path / "new")
    report = sync(source, store)
    assert report.ok
    assert report.next_seq == 6
    assert not any("0010/" in key for key in objects_of(store, keys.PARTS))
    assert names_nothing_missing(store)


def test_stopped_it_says_so_and_goes_on_later(source: FileBackend, tmp_path: Path) -> None:
    stop = threading.Event()
    store = FileBackend(tmp_path / "new")
    report = sync(
        source, store, limits=SyncLimits(threads=1, stop=stop), on_progress=lambda size: stop.set()
    )
    assert not report.complete
    assert report.copied_objects >= 1
    assert names_nothing_missing(store)
    assert sync(source, store).ok
    assert objects_of(store) == objects_of(source)


def test_store_that_does_not_create_once_can_be_a_replica(source: FileBackend) -> None:
    class Overwriting(MemoryBackend):
        """As sftp is: a put replaces what is there."""

        def capabilities(self) -> Capabilities:
            return replace(super().capabilities(), create_only=False)

        def put(self, key: str, data: object, *, create_only: bool = False) -> None:
            if create_only:
                raise UsageError("it can't")
            super().put(key, data)  # type: ignore[arg-type]

    store = Overwriting("sftp")
    assert sync(source, store).ok
    assert objects_of(store) == objects_of(source)
    assert sync(source, store).records == 0


@pytest.mark.slow
def test_long_log_is_copied_with_its_folds(tmp_path: Path) -> None:
    source = MemoryBackend("long")
    writer = SampleWriter(source, _writes=100)
    writer.open_epoch()
    writer.write(SnapshotId(1, 1), sample_ranks(1))
    for number in range(1200):
        writer.journal.tag(f"t{number % 5}", SnapshotId(1, 1))
    store = MemoryBackend("new")
    report = sync(source, store)
    assert (report.records, report.folds) == (1202, 3)
    assert objects_of(store) == objects_of(source)
    writer.journal.tag("more", SnapshotId(1, 1))
    counting = CountingBackend(source)
    assert sync(counting, store).records == 1
    assert len(counting.calls("read_into", prefix=keys.LOG)) < 400


def test_source_with_a_record_that_no_other_follows_is_believed_by_its_head_only(
    source: FileBackend,
) -> None:
    without_second_copies(source)
    state = Journal.open(source).refresh()
    other = make_record(
        Tag("x", SnapshotId(1, 10)), job=state.job, seq=2, epoch=1, write_id="z", prev="0" * 32
    )
    (Path(source.url) / keys.log_key(2)).write_bytes(other.encode())
    with pytest.raises(IntegrityError, match="nowhere right"):
        fill(source, MemoryBackend("new"), lambda: state, record=source_record(source))


def test_missing_objects_goes_by_listing_or_reads_everything(
    source: FileBackend, tmp_path: Path
) -> None:
    store = FileBackend(tmp_path / "new")
    sync(source, store)
    state = folded(source)
    wanted: list[WholeObject | Pack] = []
    places: dict[str, list[tuple[bytes, ChunkLocation]]] = {}
    for entry in state.snapshots:
        index = load_index(source, state, entry.snapshot)
        wanted += [WholeObject(ref.key, ref.digest, ref.size_bytes) for ref in index.manifest.parts]
        for part in index.parts:
            for shard in part.shards:
                for digest, at in zip(shard.digests, shard.locations, strict=True):
                    places.setdefault(at.pack, []).append((digest, at))
    wanted += [Pack(key, tuple(found)) for key, found in places.items()]
    wanted.sort(key=lambda want: want.key)
    assert missing_objects(store, wanted) == missing_objects(store, wanted, deep=True) == []
    gone, cut, flipped = wanted[0], wanted[-1], wanted[2]
    (Path(store.url) / gone.key).unlink()
    (Path(store.url) / cut.key).write_bytes(b"short")
    at = flipped.chunks[0][1].offset_bytes if isinstance(flipped, Pack) else 9
    flip(store.url, flipped.key, at)
    assert missing_objects(store, wanted) == [gone, cut]
    assert missing_objects(store, wanted, deep=True) == [gone, flipped, cut]


def test_pack_longer_than_its_chunks_needs_counts_as_there_only_where_no_length_is_known() -> None:
    store = MemoryBackend("s")
    key = "packs/one.pack"
    store.put(key, [bytes(20)])
    place = (b"d" * 16, ChunkLocation(key, 0, 10, 10, Codec.RAW))
    assert missing_objects(store, [Pack(key, (place,))]) == []
    assert missing_objects(store, [Pack(key, (place,), size_bytes=19)]) != []


def test_member_of_the_log_is_filled_from_all_of_its_stores_and_keeps_records_that_lost(
    trio: list[FileBackend], tmp_path: Path
) -> None:
    truth = replicate(tmp_path / "0", tmp_path / "truth", None)
    right = bytes_of(trio[0], keys.log_key(3))
    assert right is not None
    mine = decode_record(right)
    lost = make_record(
        Tag("x", SnapshotId(1, 10)), job=mine.job, seq=3, epoch=1, write_id="l", prev=mine.prev
    ).encode()
    (Path(trio[0].url) / keys.log_key(3)).write_bytes(lost)
    (Path(trio[0].url) / keys.log_key(4)).unlink()
    late = make_record(
        Tag("y", SnapshotId(1, 10)),
        job=mine.job,
        seq=6,
        epoch=1,
        write_id="m",
        prev=folded(truth).head_digest,
    )
    trio[0].put(keys.log_key(6), [late.encode()])
    stores = open_stores([store.url for store in trio], emit=lambda event: None)
    try:
        journal = Journal.open(stores)
        report = fill(stores, trio[0], journal.refresh, record=record_of(trio[0]))
    finally:
        stores.close()
    assert report.ok
    assert bytes_of(trio[0], keys.log_key(3)) == lost
    assert bytes_of(trio[0], keys.settled_key(3)) == right
    assert bytes_of(trio[0], keys.log_key(4)) == bytes_of(truth, keys.log_key(4))


def test_budget_is_never_exceeded_but_by_what_is_larger_alone() -> None:
    budget = MemoryBudget(100)
    used = [0]
    most = [0]
    lock = threading.Lock()

    def take(size: int) -> None:
        with budget.reserve(size):
            with lock:
                used[0] += size
                most[0] = max(most[0], used[0])
                assert used[0] <= 100 or used[0] == size
            with lock:
                used[0] -= size

    work: list[Callable[[], None]] = [
        lambda size=size: take(size) for size in (10, 60, 150, 50, 30, 99, 1) * 20
    ]
    threads = [threading.Thread(target=one) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert most[0] == 150
