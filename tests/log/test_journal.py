from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from kit.damage import without_second_copies

from ckpt.backends.base import Buffer, Capabilities, Stat
from ckpt.backends.memory import MemoryBackend
from ckpt.errors import (
    CommitUnknownError,
    ConflictError,
    FencedError,
    FormatVersionError,
    IntegrityError,
    NewerSnapshotError,
    NotFoundError,
    StoreFullError,
    UnavailableError,
    UsageError,
)
from ckpt.format import keys
from ckpt.format.canonical import digest_hex
from ckpt.format.manifest import Manifest, PartRef
from ckpt.format.part import Part, StoredShard, encode_part
from ckpt.format.records import Commit, Open, Tag, make_record
from ckpt.format.store import JobRecord
from ckpt.log import journal
from ckpt.log import stored_fold as folds
from ckpt.log.catalog import load_index, snapshots
from ckpt.log.journal import Journal
from ckpt.log.reader import read_start
from ckpt.log.select import ResumeChoice
from ckpt.log.sequencers import PUT_TRIES_MAX
from ckpt.values import Box, ChunkLocation, Codec, Leaf, LeafKind, SnapshotId, SnapshotInfo

WRITER = keys.writer_name("node", "0123456789abcdef")


class FaultyBackend:
    """A store whose puts go wrong as a script says: each entry is for one put, then all is well."""

    def __init__(self, inner: MemoryBackend, *, create_only: bool = True) -> None:
        self.inner = inner
        self.script: list[str] = []
        self.only = ""
        self._create_only = create_only

    @property
    def url(self) -> str:
        return self.inner.url

    def capabilities(self) -> Capabilities:
        return Capabilities(
            create_only=self._create_only, read_bytes_best=1 << 16, concurrency_best=2
        )

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        if create_only and not self._create_only:
            raise UsageError("this store does not create a key only once")
        fault = self.script.pop(0) if self.script and key.startswith(self.only) else "ok"
        if fault == "down":
            raise UnavailableError("no route")
        if fault == "full":
            raise StoreFullError("no space")
        self.inner.put(key, data, create_only=create_only)
        if fault == "lost":
            raise UnavailableError("reply lost")

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        self.inner.read_into(key, out, offset_bytes=offset_bytes)

    def stat(self, key: str) -> Stat | None:
        return self.inner.stat(key)

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        return self.inner.list(prefix, after=after)

    def delete(self, key: str) -> None:
        self.inner.delete(key)

    def close(self) -> None:
        self.inner.close()


def store_part(backend: MemoryBackend | FaultyBackend, pair: SnapshotId) -> PartRef:
    leaf = Leaf(name="model/w", kind=LeafKind.TENSOR, dtype="float32", shape=(3,))
    place = ChunkLocation(keys.pack_key(pair, WRITER, pair.step), 0, 12, 12, Codec.RAW)
    shard = StoredShard(
        leaf=leaf, box=Box.whole((3,)), size_bytes=12, digests=(b"d" * 16,), locations=(place,)
    )
    data = encode_part(Part(snapshot=pair, writer=WRITER, rank=0, world_size=1, shards=(shard,)))
    key = keys.part_key(pair, WRITER)
    backend.put(key, [data])
    return PartRef(key=key, digest=digest_hex(data), size_bytes=len(data), rank=0)


def manifest(
    backend: MemoryBackend | FaultyBackend,
    epoch: int,
    step: int,
    *,
    base: SnapshotId | None = None,
    note: str = "",
) -> Manifest:
    pair = SnapshotId(epoch, step)
    return Manifest(
        job="run-a",
        snapshot=pair,
        world_size=1,
        base=base,
        parts=(store_part(backend, pair),),
        size_bytes=12,
        new_bytes=12,
        created_unix_s=1.5,
        metadata={"note": note},
    )


def commit(
    log: Journal, backend: MemoryBackend | FaultyBackend, epoch: int, step: int
) -> SnapshotInfo:
    return log.commit(manifest(backend, epoch, step), epoch=epoch)


@pytest.fixture
def store() -> MemoryBackend:
    return MemoryBackend()


@pytest.fixture
def log(store: MemoryBackend) -> Journal:
    return Journal.open(store, job="run-a", create=True)


def test_an_empty_store_is_not_found_unless_it_may_be_made(store: MemoryBackend) -> None:
    with pytest.raises(NotFoundError, match="no ckpt store here"):
        Journal.open(store)
    made = Journal.open(store, job="run-a", create=True)
    again = Journal.open(store, job="run-a", create=True)
    assert (made.job, made.log_id) == (again.job, again.log_id)
    with pytest.raises(UsageError, match="another job"):
        Journal.open(store, job="run-b", create=True)
    with pytest.raises(UsageError, match="needs its job's name"):
        Journal.open(MemoryBackend(), create=True)


def test_a_store_without_create_only_is_read_but_gives_out_no_places(
    store: MemoryBackend, log: Journal
) -> None:
    log.open_epoch(resume=None)
    commit(log, store, 1, 10)
    weak = FaultyBackend(store, create_only=False)
    reading = Journal.open(weak)
    assert reading.refresh().newest() == SnapshotId(1, 10)
    with pytest.raises(UsageError, match="create a key only once"):
        reading.open_epoch(resume=None)
    with pytest.raises(UsageError, match="create-if-absent"):
        Journal.open(FaultyBackend(MemoryBackend(), create_only=False), job="run-a", create=True)


def test_a_log_whose_places_another_sequencer_gives_is_only_read(store: MemoryBackend) -> None:
    store.put(keys.JOB_KEY, [JobRecord(job="run-a", store_id="0" * 32, sequencer="etcd").encode()])
    log = Journal.open(store)
    assert log.refresh().newest() is None
    with pytest.raises(UsageError, match="sequencer='etcd'"):
        log.open_epoch(resume=None)


def test_a_log_without_its_job_record_is_damage_not_an_empty_store(
    store: MemoryBackend, log: Journal
) -> None:
    log.open_epoch(resume=None)
    store.delete(keys.JOB_KEY)
    with pytest.raises(IntegrityError, match=r"a log but no ckpt\.json"):
        Journal.open(store, job="run-a", create=True)


def test_a_snapshot_exists_once_its_record_is_there(store: MemoryBackend, log: Journal) -> None:
    assert log.open_epoch(resume=None) == 1
    info = commit(log, store, 1, 10)
    assert info.id == SnapshotId(1, 10) and info.metadata == {"note": ""} and not info.maybe_stale
    seen = Journal.open(store).refresh()
    assert seen.newest() == SnapshotId(1, 10)
    assert [leaf.name for leaf in load_index(store, seen, SnapshotId(1, 10)).leaves()] == [
        "model/w"
    ]


def test_a_manifest_without_a_record_counts_for_nothing(store: MemoryBackend, log: Journal) -> None:
    log.open_epoch(resume=None)
    dead = manifest(store, 1, 10, note="dead writer")
    store.put(keys.manifest_key(dead.snapshot, dead.digest), [dead.encode()])
    assert log.refresh().newest() is None
    assert commit(log, store, 1, 10).metadata == {"note": ""}


def test_committing_the_same_manifest_again_is_harmless_also_from_another_epoch(
    store: MemoryBackend, log: Journal
) -> None:
    log.open_epoch(resume=None)
    first = manifest(store, 1, 10)
    info = log.commit(first, epoch=1)
    log.open_epoch(resume=SnapshotId(1, 10))
    before = log.refresh().next_seq
    assert log.commit(first, epoch=1) == info == log.commit(first, epoch=2)
    assert log.refresh().next_seq == before


def test_another_manifest_for_a_committed_pair_is_a_conflict(
    store: MemoryBackend, log: Journal
) -> None:
    log.open_epoch(resume=None)
    commit(log, store, 1, 10)
    with pytest.raises(ConflictError, match="another manifest"):
        log.commit(manifest(store, 1, 10, note="other"), epoch=1)


def test_a_writer_of_an_older_epoch_is_fenced_and_leaves_nothing(
    store: MemoryBackend, log: Journal
) -> None:
    zombie = Journal.open(store)
    zombie.open_epoch(resume=None)
    zombie.refresh()
    log.open_epoch(resume=None)
    late = manifest(store, 1, 10)
    before = [stat.key for stat in store.list("")]
    with pytest.raises(FencedError, match="stop this writer"):
        zombie.commit(late, epoch=1)
    with pytest.raises(FencedError):
        zombie.append(Commit(SnapshotId(1, 10), late.digest, None), epoch=1)
    assert [stat.key for stat in store.list("")] == before
    assert log.commit(late, epoch=2).id == SnapshotId(1, 10), (
        "its snapshot is committed by the epoch that is open"
    )


def test_a_lost_reply_is_settled_by_repeating(store: MemoryBackend) -> None:
    faulty = FaultyBackend(store)
    log = Journal.open(faulty, job="run-a", create=True)
    faulty.script = ["lost"]
    assert log.open_epoch(resume=None) == 1
    faulty.script = ["down", "down", "lost"]
    assert commit(log, store, 1, 10).step == 10
    state = Journal.open(store).refresh()
    assert (state.next_seq, state.voids) == (2, ())


def test_silence_is_unknown_and_the_same_call_settles_it(store: MemoryBackend) -> None:
    faulty = FaultyBackend(store)
    log = Journal.open(faulty, job="run-a", create=True)
    log.open_epoch(resume=None)
    body = Commit(SnapshotId(1, 5), "0" * 32, None)
    for first in ("lost", "down"):
        faulty.script = [first] + ["down"] * (PUT_TRIES_MAX - 1)
        body = Commit(SnapshotId(1, body.snapshot.step + 1), "0" * 32, None)
        with pytest.raises(CommitUnknownError, match=rf"key=log/.* write_id=w-{first}"):
            log.append(body, epoch=1, write_id=f"w-{first}")
        state = log.append(body, epoch=1, write_id=f"w-{first}")
        assert state.newest() == body.snapshot
    assert log.refresh().next_seq == 3


def test_a_lost_commit_reply_then_a_repeated_commit_gives_one_snapshot(
    store: MemoryBackend,
) -> None:
    faulty = FaultyBackend(store)
    log = Journal.open(faulty, job="run-a", create=True)
    log.open_epoch(resume=None)
    found = manifest(store, 1, 10)
    faulty.only = keys.LOG
    faulty.script = ["lost"] + ["down"] * (PUT_TRIES_MAX - 1)
    with pytest.raises(CommitUnknownError):
        log.commit(found, epoch=1)
    assert log.commit(found, epoch=1).step == 10
    assert log.refresh().next_seq == 2


def test_a_full_store_is_told_at_once_and_nothing_is_committed(store: MemoryBackend) -> None:
    faulty = FaultyBackend(store)
    log = Journal.open(faulty, job="run-a", create=True)
    log.open_epoch(resume=None)
    found = manifest(store, 1, 10)
    faulty.script = ["full"]
    with pytest.raises(StoreFullError):
        log.commit(found, epoch=1)
    faulty.only, faulty.script = keys.MANIFESTS, ["down"] * PUT_TRIES_MAX
    with pytest.raises(UnavailableError, match="nothing is committed"):
        log.commit(found, epoch=1)
    assert log.refresh().newest() is None


def test_a_damaged_manifest_under_the_same_name_is_told(store: MemoryBackend, log: Journal) -> None:
    log.open_epoch(resume=None)
    found = manifest(store, 1, 10)
    store.put(keys.manifest_key(found.snapshot, found.digest), [b"rot"])
    with pytest.raises(IntegrityError, match="delete that object"):
        log.commit(found, epoch=1)


def test_a_manifest_of_another_job_is_refused(store: MemoryBackend, log: Journal) -> None:
    found = manifest(store, 1, 10)
    other = Journal.open(MemoryBackend(), job="run-b", create=True)
    with pytest.raises(UsageError, match="another job"):
        other.commit(found, epoch=1)


def test_two_writers_take_turns_without_voids(store: MemoryBackend) -> None:
    one = Journal.open(store, job="run-a", create=True)
    two = Journal.open(store)
    assert (
        one.open_epoch(resume=None),
        two.open_epoch(resume=None),
        one.open_epoch(resume=None),
    ) == (1, 2, 3)
    two.commit(manifest(store, 3, 1), epoch=3)
    one.commit(manifest(store, 3, 2), epoch=3)
    two.tag("best", SnapshotId(3, 2))
    state = one.drop([SnapshotId(3, 1)], floor=SnapshotId(3, 2))
    assert state.lineage == (SnapshotId(3, 2),) and state.tags == {"best": SnapshotId(3, 2)}
    assert two.untag("best").tags == {} and not state.voids


def test_lost_races_are_bounded(monkeypatch: pytest.MonkeyPatch, store: MemoryBackend) -> None:
    class Racing(FaultyBackend):
        busy = False

        def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
            if key.startswith(keys.LOG) and not self.busy:
                self.busy = True
                rival.open_epoch(resume=None)
                self.busy = False
            super().put(key, data, create_only=create_only)

    rival = Journal.open(store, job="run-a", create=True)
    slow = Journal.open(Racing(store))
    monkeypatch.setattr(journal, "RACES_MAX", 3)
    with pytest.raises(ConflictError, match="races=3"):
        slow.open_epoch(resume=None)
    assert rival.refresh().epoch == 3


def test_a_hole_stops_writers_and_flags_readers(store: MemoryBackend, log: Journal) -> None:
    log.open_epoch(resume=None)
    commit(log, store, 1, 10)
    commit(log, store, 1, 20)
    commit(log, store, 1, 30)
    without_second_copies(store)
    good = read(store, keys.log_key(2))
    for harm in (
        b"",
        good[:-1],
        good.replace(b'"epoch":1', b'"epoch":2', 1),
        read(store, keys.log_key(1)),
        None,
    ):
        store.delete(keys.log_key(2))
        if harm is not None:
            store.put(keys.log_key(2), [harm])
        late = Journal.open(store)
        state = late.refresh()
        assert state.hole is not None and state.hole.seq == 2
        assert state.newest() == SnapshotId(1, 10)
        assert [info.maybe_stale for info in snapshots(store, state)] == [True]
        with pytest.raises(IntegrityError, match=r"key=log/00000000000000000002\.json"):
            late.open_epoch(resume=None)
    store.put(keys.log_key(2), [good])
    assert late.refresh().newest() == SnapshotId(1, 30), "a mended hole is read on from"


def test_a_record_of_a_newer_release_is_a_version_error(store: MemoryBackend, log: Journal) -> None:
    log.open_epoch(resume=None)
    store.put(keys.log_key(1), [b'{"v":4,"novel":true}'])
    with pytest.raises(FormatVersionError, match="found=4 known=3"):
        log.refresh()


def read(store: MemoryBackend, key: str) -> bytes:
    stat = store.stat(key)
    assert stat is not None
    out = bytearray(stat.size_bytes)
    store.read_into(key, memoryview(out))
    return bytes(out)


@pytest.fixture
def folded(monkeypatch: pytest.MonkeyPatch, store: MemoryBackend) -> Journal:
    monkeypatch.setattr(folds, "FOLD_EVERY", 4)
    log = Journal.open(store, job="run-a", create=True)
    log.open_epoch(resume=None)
    for step in range(1, 10):
        log.append(Commit(SnapshotId(1, step), "0" * 32, None), epoch=1)
    return log


def test_folds_but_the_newest_three_are_deleted(
    monkeypatch: pytest.MonkeyPatch, store: MemoryBackend
) -> None:
    monkeypatch.setattr(folds, "FOLD_EVERY", 4)
    log = Journal.open(store, job="run-a", create=True)
    log.open_epoch(resume=None)
    for step in range(1, 24):
        log.append(Commit(SnapshotId(1, step), "0" * 32, None), epoch=1)
    assert [stat.key for stat in store.list(keys.FOLDS)] == [
        keys.fold_key(seq) for seq in (15, 19, 23)
    ]
    assert Journal.open(store).refresh() == log.refresh() and log.notes == ()


def long_log(store: MemoryBackend, records: int, *, flat: bool) -> None:
    """An epoch and ``records - 1`` commits, as a writer, or one from before folders, leaves them."""
    Journal.open(store, job="run-a", create=True)
    prev = ""
    for seq in range(records):
        body = Commit(SnapshotId(1, seq), "0" * 32, None) if seq else Open(1, None)
        record = make_record(body, job="run-a", seq=seq, epoch=1, write_id=f"{seq:032x}", prev=prev)
        prev = record.digest
        key = keys.flat_log_key(seq, settled=False) if flat else keys.log_key(seq)
        store.put(key, [record.encode()])


@pytest.mark.parametrize("flat", [False, True])
def test_log_beyond_its_first_folder_is_read_and_continued(
    store: MemoryBackend, flat: bool
) -> None:
    long_log(store, 2_100, flat=flat)
    log = Journal.open(store)
    assert log.refresh().next_seq == 2_100 and log.refresh().hole is None
    log.append(Commit(SnapshotId(1, 2_100), "0" * 32, None), epoch=1)
    assert store.stat("log/00000000000000002/00000000000000002100.json") is not None
    late = Journal.open(store)
    assert late.refresh() == log.refresh() and late.refresh().next_seq == 2_101
    assert late.write_id_of(3) == f"{3:032x}" and late.write_id_of(1_050) == f"{1_050:032x}"


@pytest.mark.parametrize("lost", [500, 999, 1_000, 1_500])
def test_hole_is_seen_in_and_between_folders(store: MemoryBackend, lost: int) -> None:
    long_log(store, 2_001, flat=False)
    store.delete(keys.log_key(lost))
    state = Journal.open(store).refresh()
    assert state.next_seq == lost and state.hole is not None


def test_readers_start_at_the_newest_fold(store: MemoryBackend, folded: Journal) -> None:
    assert [stat.key for stat in store.list(keys.FOLDS)] == [keys.fold_key(3), keys.fold_key(7)]
    for seq in range(7):
        store.delete(keys.log_key(seq))
    late = Journal.open(store)
    assert late.refresh() == folded.refresh()
    assert late.notes == ()


def test_a_bad_fold_is_passed_over_for_an_older_one_or_the_log(
    store: MemoryBackend, folded: Journal
) -> None:
    want = folded.refresh()
    good = read(store, keys.fold_key(7))
    lying = good.replace(b'"step":2', b'"step":3', 1)
    for harm in (b"", lying, read(store, keys.fold_key(3)), b'{"format_version":9}'):
        store.put(keys.fold_key(7), [harm])
        late = Journal.open(store)
        assert late.refresh() == want
        assert [note.key for note in late.notes] == [keys.fold_key(7)]
    store.put(keys.fold_key(3), [b"rot"])
    start, notes = read_start(store, "run-a")
    assert start.next_seq == 0 and len(notes) == 2
    assert Journal.open(store).refresh() == want


def test_a_fold_that_cannot_be_written_is_noted_and_the_append_counts(
    monkeypatch: pytest.MonkeyPatch, store: MemoryBackend
) -> None:
    monkeypatch.setattr(folds, "FOLD_EVERY", 1)
    faulty = FaultyBackend(store)
    log = Journal.open(faulty, job="run-a", create=True)
    faulty.only = keys.FOLDS
    faulty.script = ["full"] + ["down"] * PUT_TRIES_MAX
    assert log.open_epoch(resume=None) == 1
    assert log.open_epoch(resume=None) == 2
    assert [(note.event, note.key) for note in log.notes] == [
        ("fold not written", keys.fold_key(n)) for n in (0, 1)
    ]


def test_a_void_record_of_a_repeated_write_id_is_told_to_its_writer(
    store: MemoryBackend, log: Journal
) -> None:
    log.open_epoch(resume=None)
    log.append(Open(2, None), epoch=2, write_id="mine")
    assert log.append(Open(2, None), epoch=2, write_id="mine").epoch == 2
    with pytest.raises(ConflictError, match="does not exist"):
        log.append(Tag("best", SnapshotId(1, 1)), epoch=2)
    with pytest.raises(ConflictError, match="never dropped"):
        log.commit(manifest(store, 2, 1), epoch=2)
        log.drop([SnapshotId(2, 1)])


def test_epoch_that_goes_on_from_what_is_newest_no_more_is_not_opened(
    store: MemoryBackend, log: Journal
) -> None:
    log.open_epoch(resume=None)
    nothing, first, second = (
        ResumeChoice(log.refresh().newest()),
        SnapshotId(1, 10),
        SnapshotId(1, 20),
    )
    commit(log, store, 1, 10)
    successor = Journal.open(store)
    chosen = ResumeChoice(successor.refresh().newest())
    commit(log, store, 1, 20)  # by a writer that nobody has fenced yet
    for resume, when in ((first, chosen), (first, nothing), (None, nothing)):
        with pytest.raises(NewerSnapshotError, match="newest=epoch 1 step 20"):
            successor.open_epoch(resume=resume, choice=when)
    assert successor.refresh().epoch == 1, "nothing is written"
    assert successor.open_epoch(resume=second, choice=ResumeChoice(second)) == 2
    assert successor.refresh().newest() == second


def test_epoch_may_go_on_from_an_older_snapshot_that_was_chosen_knowing_the_newest(
    store: MemoryBackend, log: Journal
) -> None:
    log.open_epoch(resume=None)
    commit(log, store, 1, 10)
    commit(log, store, 1, 20)
    assert log.open_epoch(resume=SnapshotId(1, 10), choice=ResumeChoice(SnapshotId(1, 20))) == 2, (
        "the newest is damaged"
    )
    commit(log, store, 2, 11)
    assert log.open_epoch(resume=SnapshotId(1, 10)) == 3, "nobody said that it is the newest"
    assert log.open_epoch(resume=SnapshotId(1, 15), choice=ResumeChoice(None)) == 4, (
        "staged, and newer than all"
    )


def test_epoch_of_a_repeated_call_is_the_one_that_it_opened(
    store: MemoryBackend, log: Journal
) -> None:
    assert log.open_epoch(resume=None, write_id="w", choice=ResumeChoice(None)) == 1
    commit(log, store, 1, 10)
    assert log.open_epoch(resume=None, write_id="w", choice=ResumeChoice(None)) == 1
