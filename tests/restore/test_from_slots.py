"""Slots of all ranks read like a store: every byte verified, and nothing that was overwritten
meanwhile is believed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from ckpt.capture.leaves import World
from ckpt.capture.plan import CapturePlan
from ckpt.errors import IntegrityError, NotFoundError, UsageError
from ckpt.format.canonical import digest
from ckpt.restore.apply.apply import apply
from ckpt.restore.fetch import Fetcher, fetch
from ckpt.restore.from_slots import SLOT_PREFIX, SlotStore, slot_key, staged_index
from ckpt.restore.plan import Want, plan_reads
from ckpt.staging.copy import CopyPlan, CopySource
from ckpt.staging.slot import Slot, SlotPool
from ckpt.values import CHUNK_BYTES, Box, Leaf, LeafKind, SnapshotId, StagedIndex, StagedShard

SNAPSHOT = SnapshotId(2, 7)
HEADER = 64 << 10
BIG = CHUNK_BYTES + 100
ROWS = Leaf(name="model/rows", kind=LeafKind.TENSOR, dtype="uint8", shape=(2 * BIG,))
SMALL = tuple(
    Leaf(name="rng", kind=LeafKind.OBJECT, dtype="uint8", shape=(5,), rank=rank)
    for rank in range(2)
)


def chunks(data: bytes) -> tuple[bytes, ...]:
    return tuple(digest(data[at : at + CHUNK_BYTES]) for at in range(0, len(data), CHUNK_BYTES))


def half(rank: int) -> bytes:
    return bytes([rank + 1]) * CHUNK_BYTES + bytes(range(100))


def small(rank: int) -> bytes:
    return b"rank%d" % rank


def write(slot: Slot, rank: int, snapshot: SnapshotId = SNAPSHOT) -> StagedIndex:
    """This rank's half of the rows, and an object of its own."""
    slot.begin()
    at = 2 * CHUNK_BYTES
    slot.data[:BIG] = half(rank)
    slot.data[at : at + 5] = small(rank)
    rows = StagedShard(
        leaf=ROWS,
        box=Box((rank * BIG,), (BIG,)),
        offset_bytes=0,
        size_bytes=BIG,
        digests=chunks(half(rank)),
    )
    own = StagedShard(
        leaf=SMALL[rank],
        box=Box.whole((5,)),
        offset_bytes=at,
        size_bytes=5,
        digests=chunks(small(rank)),
    )
    index = StagedIndex(
        snapshot=snapshot, rank=rank, world_size=2, shards=(rows, own), metadata={"loss": 0.5}
    )
    slot.seal(index)
    return index


def acquire(pool: SlotPool) -> Slot:
    slot = pool.acquire()
    assert slot is not None
    return slot


@pytest.fixture
def pools() -> Iterator[list[SlotPool]]:
    made = [
        SlotPool(count=2, data_bytes=3 * CHUNK_BYTES, header_bytes=HEADER, prefault=False)
        for _ in range(2)
    ]
    yield made
    for pool in made:
        pool.close()


@pytest.fixture
def slots(pools: list[SlotPool]) -> list[Slot]:
    found = [acquire(pool) for pool in pools]
    for rank, slot in enumerate(found):
        write(slot, rank)
    return found


def store_of(slots: Sequence[Slot]) -> SlotStore:
    return SlotStore(SNAPSHOT, {rank: slot.memory for rank, slot in enumerate(slots)})


def read(store: SlotStore, *wants: Want) -> list[bytes]:
    index = staged_index(store.indexes, job="job")
    plan = plan_reads(index, wants, coalesce_bytes=store.capabilities().read_bytes_best)
    outputs = [bytearray(size) for size in plan.output_bytes]
    fetch(store, plan, [memoryview(one) for one in outputs])
    return [bytes(one) for one in outputs]


def test_shards_of_all_ranks_are_read_as_one_tensor(slots: list[Slot]) -> None:
    store = store_of(slots)
    middle = Want("model/rows", None, Box((BIG - 10,), (20,)))
    found = read(
        store,
        Want("model/rows", None, Box.whole(ROWS.shape)),
        middle,
        Want("rng", 1, Box.whole((5,))),
    )
    assert found == [half(0) + half(1), half(0)[-10:] + half(1)[:10], small(1)]
    assert store.unchanged()


def test_index_says_what_a_stored_one_would(slots: list[Slot]) -> None:
    index = staged_index(tuple(reversed(store_of(slots).indexes)), job="job")
    manifest = index.manifest
    assert (manifest.job, manifest.snapshot, manifest.world_size) == ("job", SNAPSHOT, 2)
    assert (manifest.size_bytes, manifest.new_bytes, manifest.metadata) == (
        2 * BIG + 10,
        0,
        {"loss": 0.5},
    )
    assert index.packs() == {slot_key(0), slot_key(1)}
    assert all(key.startswith(SLOT_PREFIX) for key in index.packs())


def test_flipped_byte_is_found_before_it_is_believed(slots: list[Slot]) -> None:
    slots[1].data[3] ^= 1
    store = store_of(slots)
    assert read(store, Want("model/rows", None, Box((0,), (BIG,)))) == [half(0)]
    with pytest.raises(IntegrityError, match=r"differ from their digest.*slot/1"):
        read(store, Want("model/rows", None, Box.whole(ROWS.shape)))


def test_slot_begun_anew_is_seen(slots: list[Slot]) -> None:
    store = store_of(slots)
    slots[1]._take()
    slots[1].begin()
    assert not store.unchanged()
    write(slots[1], 1)
    assert not store.unchanged()


def test_slot_is_found_among_those_of_its_rank(pools: list[SlotPool], slots: list[Slot]) -> None:
    other = [acquire(pool) for pool in pools]
    for rank, slot in enumerate(other):
        write(slot, rank, SnapshotId(2, 9))
    memories = {rank: [other[rank].memory, slots[rank].memory] for rank in range(2)}
    assert SlotStore.find(SNAPSHOT, memories).indexes[1].snapshot == SNAPSHOT
    assert SlotStore.find(SnapshotId(2, 9), memories).unchanged()
    with pytest.raises(
        IntegrityError, match=r"no slot of this rank holds the snapshot.*step 8 rank=0 slots=2"
    ):
        SlotStore.find(SnapshotId(2, 8), memories)


def test_damaged_header_sends_to_another_snapshot(slots: list[Slot]) -> None:
    slots[0].memory[100] ^= 1
    with pytest.raises(IntegrityError, match="no slot of this rank"):
        SlotStore.find(SNAPSHOT, {rank: [slot.memory] for rank, slot in enumerate(slots)})


@pytest.mark.parametrize("swap", [False, True])
def test_slots_of_other_snapshots_or_ranks_are_refused(slots: list[Slot], swap: bool) -> None:
    if swap:
        slots.reverse()
    with pytest.raises(IntegrityError, match="does not hold the snapshot"):
        SlotStore(
            SNAPSHOT if swap else SnapshotId(2, 8),
            {rank: slot.memory for rank, slot in enumerate(slots)},
        )


def test_missing_rank_or_mixture_makes_no_index(slots: list[Slot]) -> None:
    first, second = store_of(slots).indexes
    with pytest.raises(IntegrityError, match="not one snapshot"):
        staged_index([first], job="job")
    slots[1]._take()
    with pytest.raises(IntegrityError, match="not one snapshot"):
        staged_index([first, write(slots[1], 1, SnapshotId(2, 8))], job="job")
    with pytest.raises(IntegrityError, match="no slot"):
        staged_index([], job="job")
    assert staged_index([second, first], job="job").ranks == (0, 1)


def test_store_behaves_like_any_other_but_is_only_read(slots: list[Slot]) -> None:
    store = store_of(slots)
    size = len(slots[0].data)
    assert [(stat.key, stat.size_bytes) for stat in store.list(SLOT_PREFIX)] == [
        ("slot/0", size),
        ("slot/1", size),
    ]
    assert [stat.key for stat in store.list("slot/", after="slot/0")] == ["slot/1"]
    assert store.stat("packs/x") is None
    out = memoryview(bytearray(5))
    store.read_into("slot/1", out, offset_bytes=2 * CHUNK_BYTES)
    assert bytes(out) == small(1)
    with pytest.raises(IntegrityError, match="ends too early"):
        store.read_into("slot/1", out, offset_bytes=size - 4)
    with pytest.raises(NotFoundError, match="no such slot"):
        store.read_into("slot/2", out)
    with pytest.raises(UsageError, match="read-only"):
        store.put("slot/1", [b"x"])
    with pytest.raises(UsageError, match="read-only"):
        store.delete("slot/1")
    store.close()
    store.close()
    assert store.stat("slot/1") is None


def test_live_objects_are_filled_from_slots() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.Linear(20, 7))
    items = {"model": model, "step": {"n": 3}}
    capture = CapturePlan(items, World(0, 1)).capture()
    sources = [CopySource(leaf.leaf, leaf.box, leaf.tensor) for leaf in capture.tensors]
    objects = [
        CopySource(leaf.leaf, Box.whole(leaf.leaf.shape), leaf.data) for leaf in capture.objects
    ]
    plan = CopyPlan.build([*sources, *objects])
    pool = SlotPool(
        count=1, data_bytes=plan.data_bytes, header_bytes=plan.header_bytes, prefault=False
    )
    slot = acquire(pool)
    slot.begin()
    shards = plan.run(slot, objects=objects)
    slot.seal(StagedIndex(snapshot=SNAPSHOT, rank=0, world_size=1, shards=shards))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data.zero_()
    live: dict[str, object] = {"model": model, "step": {"n": 0}}
    store = store_of([slot])
    index = staged_index(store.indexes, job="job")
    with Fetcher(store) as fetcher:
        apply(
            live,
            index,
            world=World(0, 1),
            read=lambda wants, outs: fetcher.fetch(
                plan_reads(index, wants, coalesce_bytes=1 << 16), outs
            ),
        )
    assert store.unchanged()
    assert live["step"] == {"n": 3}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    store.close()
    pool.close()
