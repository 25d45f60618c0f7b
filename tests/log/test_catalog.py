from __future__ import annotations

from dataclasses import replace

import pytest
from kit.damage import without_second_copies

from ckpt.backends.memory import MemoryBackend
from ckpt.errors import IntegrityError, NotFoundError, UnavailableError, UsageError
from ckpt.format import keys
from ckpt.format.canonical import digest_hex
from ckpt.format.manifest import Manifest, PartRef
from ckpt.format.part import Part, encode_part
from ckpt.log.catalog import (
    ChunkPlaces,
    candidates,
    info_of,
    load_index,
    load_manifest,
    select,
    snapshots,
)
from ckpt.log.journal import Journal
from ckpt.log.state import LogState
from ckpt.values import SnapshotId

WRITER = keys.writer_name("node", "0123456789abcdef")


def commit(
    store: MemoryBackend, log: Journal, epoch: int, step: int, *, by: int | None = None
) -> Manifest:
    pair = SnapshotId(epoch, step)
    data = encode_part(Part(snapshot=pair, writer=WRITER, rank=0, world_size=1, shards=()))
    key = keys.part_key(pair, WRITER)
    store.put(key, [data])
    ref = PartRef(key=key, digest=digest_hex(data), size_bytes=len(data), rank=0)
    found = Manifest(
        job="run-a",
        snapshot=pair,
        world_size=1,
        parts=(ref,),
        size_bytes=5,
        new_bytes=3,
        created_unix_s=0.0,
    )
    log.commit(found, epoch=by or epoch)
    return found


@pytest.fixture
def store() -> MemoryBackend:
    return MemoryBackend()


@pytest.fixture
def state(store: MemoryBackend) -> LogState:
    """Epoch 1 took steps 10, 20, 30; epoch 2 went on from 20 with steps 25 and 30; "good" names
    1/30, off the line."""
    log = Journal.open(store, job="run-a", create=True)
    log.open_epoch(resume=None)
    for step in (10, 20, 30):
        commit(store, log, 1, step)
    log.open_epoch(resume=SnapshotId(1, 20))
    for step in (25, 30):
        commit(store, log, 2, step)
    return log.tag("good", SnapshotId(1, 30))


def test_selection_follows_the_line_unless_an_epoch_or_tag_is_named(state: LogState) -> None:
    assert select(state) == SnapshotId(2, 30)
    assert select(state, step=30) == SnapshotId(2, 30)
    assert select(state, step=20) == SnapshotId(1, 20)
    assert select(state, step=30, epoch=1) == SnapshotId(1, 30)
    assert select(state, epoch=1) == SnapshotId(1, 30)
    assert select(state, tag="good") == SnapshotId(1, 30)


def test_what_is_not_there_is_told_with_what_is_near(state: LogState) -> None:
    with pytest.raises(NotFoundError, match=r"step=21 nearest_steps=10, 20, 25, 30 off_lineage=1"):
        select(state, step=21)
    with pytest.raises(NotFoundError, match=r"epoch=1 step=25 nearest_steps=10, 20, 30"):
        select(state, step=25, epoch=1)
    with pytest.raises(NotFoundError, match=r"nearest_steps=none"):
        select(state, epoch=7)
    with pytest.raises(NotFoundError, match=r"tag='bad' tags='good'"):
        select(state, tag="bad")
    with pytest.raises(UsageError, match="leave out step"):
        select(state, tag="good", step=30)


@pytest.mark.parametrize(
    "asked", [{"step": 21}, {"step": 25, "epoch": 1}, {"epoch": 7}, {"tag": "bad"}]
)
def test_what_too_few_stores_know_of_is_not_said_to_be_nowhere(
    state: LogState, asked: dict[str, int]
) -> None:
    with pytest.raises(UnavailableError, match="one of three answered"):
        select(replace(state, short="one of three answered"), **asked)  # type: ignore[arg-type]
    with pytest.raises(UnavailableError):
        select(LogState(job="run-a", short="one of three answered"))


def test_a_fresh_line_has_no_newest_and_says_what_lies_off_it(
    store: MemoryBackend, state: LogState
) -> None:
    log = Journal.open(store)
    log.open_epoch(resume=None)
    with pytest.raises(NotFoundError, match="off_lineage=5"):
        select(log.refresh())


def test_fallback_goes_down_the_line_newest_first(state: LogState) -> None:
    assert candidates(state) == (
        SnapshotId(2, 30),
        SnapshotId(2, 25),
        SnapshotId(1, 20),
        SnapshotId(1, 10),
    )


def test_all_snapshots_are_listed_in_log_order_also_unreadable_ones(
    store: MemoryBackend, state: LogState
) -> None:
    without_second_copies(store)
    entry = state.find(SnapshotId(1, 20))
    assert entry is not None
    store.put(keys.manifest_key(entry.snapshot, entry.manifest_digest), [b"rot"])
    found = snapshots(store, state)
    pairs = [(1, 10), (1, 20), (1, 30), (2, 25), (2, 30)]
    assert [(info.epoch, info.step) for info in found] == pairs
    assert [info.problem is None for info in found] == [True, False, True, True, True]
    assert found[1].problem is not None and "differs from what was committed" in found[1].problem
    assert found[2].tags == ("good",) and found[2].size_bytes == 5


def test_a_dropped_snapshot_is_gone_from_every_view(store: MemoryBackend, state: LogState) -> None:
    after = Journal.open(store).drop([SnapshotId(1, 10), SnapshotId(2, 25)])
    assert candidates(after) == (SnapshotId(2, 30), SnapshotId(1, 20))
    assert len(snapshots(store, after)) == 3
    with pytest.raises(NotFoundError, match="dropped"):
        load_index(store, after, SnapshotId(1, 10))


def test_records_are_checked_against_what_names_them(store: MemoryBackend, state: LogState) -> None:
    without_second_copies(store)
    pair = SnapshotId(2, 30)
    found = load_manifest(store, state, pair)
    assert info_of(found, state).id == pair
    part = found.parts[0].key
    for harm in (
        None,
        b"",
        b"x" * found.parts[0].size_bytes,
        b"x" * (found.parts[0].size_bytes + 1),
    ):
        store.delete(part)
        if harm is not None:
            store.put(part, [harm])
        with pytest.raises(IntegrityError, match="key=parts/"):
            load_index(store, state, pair)
    store.delete(keys.manifest_key(pair, found.digest))
    with pytest.raises(IntegrityError, match="committed snapshot is missing"):
        load_index(store, state, pair)


def test_a_manifest_swapped_for_another_valid_one_is_refused(
    store: MemoryBackend, state: LogState
) -> None:
    without_second_copies(store)
    one, other = (
        load_manifest(store, state, SnapshotId(2, 30)),
        load_manifest(store, state, SnapshotId(2, 25)),
    )
    store.put(keys.manifest_key(one.snapshot, one.digest), [other.encode()])
    with pytest.raises(IntegrityError, match="differs from what was committed"):
        load_manifest(store, state, SnapshotId(2, 30))


def test_a_chunk_that_no_place_has_is_looked_for_once_in_all_snapshots_together(
    store: MemoryBackend, state: LogState, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    read_into = store.read_into
    monkeypatch.setattr(
        store,
        "read_into",
        lambda key, out, **at: (reads.append(key), read_into(key, out, **at))[1],
    )
    places: ChunkPlaces | None = None
    for snapshot in candidates(state):
        index = load_index(store, state, snapshot)
        reads.clear()
        first = places is None
        places = ChunkPlaces(store, lambda: state, index, before=places)
        assert list(places(b"d" * 16)) == []
        assert bool(reads) == first
    assert list(ChunkPlaces(store, lambda: state, index)(b"d" * 16)) == [] and reads
