"""Slots tell the truth at every moment of a write, and are never given away while somebody needs
them."""

from __future__ import annotations

import mmap
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from ckpt.errors import InternalError, UsageError
from ckpt.format.canonical import digest
from ckpt.staging.memory import MemoryRoom, Region
from ckpt.staging.slot import OwnRegions, Slot, SlotPool, generation_of, read_slot
from ckpt.values import Box, Leaf, LeafKind, SnapshotId, StagedIndex, StagedShard

HEADER = 64 << 10
DATA = 256 << 10

forks = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def index(step: int, fill: bytes, *, name: str = "model/w") -> StagedIndex:
    data = fill * DATA
    leaf = Leaf(name=name, kind=LeafKind.TENSOR, dtype="uint8", shape=(DATA,))
    shard = StagedShard(
        leaf=leaf, box=Box.whole((DATA,)), offset_bytes=0, size_bytes=DATA, digests=(digest(data),)
    )
    return StagedIndex(
        snapshot=SnapshotId(1, step), rank=0, world_size=1, shards=(shard,), metadata={"loss": 0.5}
    )


def write(slot: Slot, step: int, fill: bytes) -> StagedIndex:
    slot.begin()
    slot.data[:] = fill * DATA
    staged = index(step, fill)
    slot.seal(staged)
    return staged


@pytest.fixture
def pool() -> Iterator[SlotPool]:
    made = SlotPool(count=3, data_bytes=DATA, header_bytes=HEADER)
    yield made
    made.close()


def take(pool: SlotPool) -> Slot:
    slot = pool.acquire()
    assert slot is not None
    return slot


def truthful(memory: memoryview) -> SnapshotId | None:
    """What a reader of these bytes believes; fails where the bytes belie it."""
    found = read_slot(memory)
    if found is None:
        return None
    staged, _ = found
    for shard in staged.shards:
        data = memory[HEADER + shard.offset_bytes : HEADER + shard.offset_bytes + shard.size_bytes]
        assert digest(data) == shard.digests[0]
    return staged.snapshot


def test_sealed_slot_reads_back_from_its_bytes(pool: SlotPool) -> None:
    slot = take(pool)
    staged = write(slot, 7, b"a")
    assert read_slot(slot.memory) == (staged, 1)
    assert read_slot(memoryview(bytes(slot.memory))) == (staged, 1)
    assert generation_of(slot.memory) == 1


def test_slot_reads_back_through_a_passed_descriptor(pool: SlotPool) -> None:
    slot = take(pool)
    staged = write(slot, 7, b"a")
    if slot.fd is None:
        pytest.skip("memory can't be handed on here")
    with mmap.mmap(slot.fd, slot.size_bytes, prot=mmap.PROT_READ) as other:
        assert read_slot(memoryview(other)) == (staged, 1)


def test_fresh_slot_holds_nothing(pool: SlotPool) -> None:
    slot = take(pool)
    assert read_slot(slot.memory) is None
    assert len(slot.data) == DATA
    assert slot.address % mmap.PAGESIZE == 0


def test_writer_killed_at_any_step_leaves_nothing_old_or_new(pool: SlotPool) -> None:
    slot = take(pool)
    write(slot, 1, b"a")
    slot._take()
    seen = [bytes(slot.memory)]
    slot.begin()
    seen.append(bytes(slot.memory))
    for start in range(0, DATA, DATA // 4):
        slot.data[start : start + DATA // 4] = b"b" * (DATA // 4)
        seen.append(bytes(slot.memory))
    slot.seal(index(2, b"b"))
    seen.append(bytes(slot.memory))
    assert [truthful(memoryview(copy)) for copy in seen] == [
        SnapshotId(1, 1),
        *[None] * 5,
        SnapshotId(1, 2),
    ]


def test_writer_killed_between_any_two_header_stores_leaves_nothing_or_the_new(
    pool: SlotPool,
) -> None:
    slot = take(pool)
    write(slot, 1, b"a")
    before = bytes(slot.memory)
    slot._take()
    slot.begin()
    begun = bytes(slot.memory)
    slot.data[:] = b"b" * DATA
    slot.seal(index(2, b"b", name="model/other"))
    after = bytes(slot.memory)
    # The words and the index in the order of their stores, the state last; each prefix is a place
    # to die.
    words = [
        slice(24, 32),
        slice(32, 40),
        slice(40, 48),
        slice(64, HEADER),
        slice(48, 56),
        slice(56, 64),
    ]
    torn = bytearray(begun)
    torn[HEADER:] = after[HEADER:]
    for word in words:
        torn[word] = after[word]
        assert truthful(memoryview(torn)) is None
    torn[16:24] = after[16:24]
    assert truthful(memoryview(torn)) == SnapshotId(1, 2)
    # A state word that came too early is not believed either: the digest covers generation and
    # index.
    early = bytearray(before)
    early[16:24] = after[16:24]
    with pytest.raises(Exception, match="contradicts itself"):
        read_slot(memoryview(early))


@forks
@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs shared memory")
@pytest.mark.parametrize("blocks", [0, 1, 5])
def test_writer_killed_in_mid_copy_leaves_an_invalid_slot(pool: SlotPool, blocks: int) -> None:
    pool.wait_prefaulted()
    slot = take(pool)
    write(slot, 1, b"a")
    slot._take()
    read, written = os.pipe()
    child = os.fork()
    if child == 0:
        slot.begin()
        for block in range(blocks):
            slot.data[block * 4096 : block * 4096 + 4096] = b"b" * 4096
        os.write(written, b"x")
        signal.pause()
    assert os.read(read, 1) == b"x"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(read)
    os.close(written)
    assert truthful(slot.memory) is None
    write(slot, 3, b"c")
    assert truthful(slot.memory) == SnapshotId(1, 3)


def test_reader_sees_that_it_was_overtaken(pool: SlotPool) -> None:
    slot = take(pool)
    write(slot, 1, b"a")
    found = read_slot(slot.memory)
    assert found is not None
    slot._take()
    slot.begin()
    assert generation_of(slot.memory) is None
    slot.seal(index(2, b"a"))
    assert generation_of(slot.memory) == found[1] + 1


def test_newest_and_pinned_slots_are_not_given_out(pool: SlotPool) -> None:
    first, second = take(pool), take(pool)
    write(first, 1, b"a")
    write(second, 2, b"b")
    third = take(pool)
    write(third, 3, b"c")
    assert take(pool) is first
    first.release()
    with first.pin():
        assert take(pool) is second
    second.release()
    with first.pin(), second.pin():
        assert pool.acquire() is None
    assert pool.newest() is third
    assert take(pool) is first


def test_slot_with_nothing_is_given_out_before_one_is_overwritten(pool: SlotPool) -> None:
    first = take(pool)
    write(first, 1, b"a")
    second = take(pool)
    second.begin()
    second.invalidate()
    assert take(pool) is second
    third = take(pool)
    assert third not in (first, second)


def test_single_slot_is_given_out_again() -> None:
    pool = SlotPool(count=1, data_bytes=DATA, header_bytes=HEADER)
    slot = take(pool)
    write(slot, 1, b"a")
    assert take(pool) is slot
    pool.close()


def test_acquire_waits_for_a_pin_to_go(pool: SlotPool) -> None:
    slots = [take(pool) for _ in range(3)]
    for step, slot in enumerate(slots):
        write(slot, step, b"a")
    pins = [slot.pin() for slot in slots]
    assert pool.acquire(wait_s=0.01) is None
    waiter = threading.Thread(target=pins[1].release)
    waiter.start()
    assert pool.acquire(wait_s=20) is slots[1]
    waiter.join()
    pins[1].release()
    assert not slots[1].pinned
    assert pool.newest() is slots[2]


def test_released_slot_keeps_what_it_held(pool: SlotPool) -> None:
    slot = take(pool)
    staged = write(slot, 1, b"a")
    slot._take()
    slot.release()
    assert read_slot(slot.memory) == (staged, 1)


def test_resized_pool_gives_larger_slots_and_frees_old_ones_once_unpinned(pool: SlotPool) -> None:
    old = [take(pool) for _ in range(2)]
    for step, slot in enumerate(old):
        write(slot, step, b"a")
    pin = old[0].pin()
    pool.resize(DATA * 2)
    fresh = take(pool)
    assert len(fresh.data) == DATA * 2
    assert {old[0], old[1]} <= set(pool.slots)
    assert truthful(old[1].memory) == SnapshotId(1, 1)
    fresh.begin()
    fresh.seal(index(9, b"a"))
    pin.release()
    take(pool).release()
    pool.wait_prefaulted()
    take(pool)
    assert not {old[0], old[1]} & set(pool.slots)
    pool.resize(DATA)
    assert pool.data_bytes == DATA * 2


@pytest.mark.parametrize(("room", "made"), [(3.0, 3), (2.5, 2), (2.0, 2), (1.9, 1)])
def test_pool_does_with_as_many_slots_as_fit_and_says_so(room: float, made: int) -> None:
    short: list[UsageError] = []
    pool = SlotPool(
        count=3,
        data_bytes=DATA,
        header_bytes=HEADER,
        room=MemoryRoom(int(room * (DATA + HEADER))),
        on_short=short.append,
    )
    try:
        assert pool.count == made
        assert len(short) == (made < 3)
    finally:
        pool.close()


@pytest.mark.parametrize(
    ("room", "fewest", "made"),
    [
        (3.4, 1, 3),
        (3.2, 1, 2),
        (2.1, 1, 1),
        (1.05, 1, 1),
        (3.4, 2, 3),
        (3.2, 2, 2),
        (2.0, 2, 2),
    ],
)
def test_pool_that_leaves_a_tenth_free_has_at_least_the_fewest_slots(
    monkeypatch, room: float, fewest: int, made: int
) -> None:
    monkeypatch.setattr(OwnRegions, "slots_min", fewest)
    short: list[UsageError] = []
    pool = SlotPool(
        count=3,
        data_bytes=DATA,
        header_bytes=HEADER,
        room=MemoryRoom(int(room * (DATA + HEADER)), free_share=0.1),
        on_short=short.append,
    )
    try:
        pool.wait_prefaulted()
        assert pool.count == len(pool.slots) == made
        assert ["10% of all memory kept free" in str(error) for error in short] == [True] * (
            made < 3
        )
    finally:
        pool.close()


def test_slot_that_the_owner_of_the_memory_refuses_is_done_without_before_it_is_needed(
    monkeypatch,
) -> None:
    def make(self: OwnRegions, number: int, size_bytes: int, *, free_share: float) -> Region:
        if free_share and number == 2:
            raise UsageError("not enough memory for another slot.")
        return Region(size_bytes)

    monkeypatch.setattr(OwnRegions, "make", make)
    short: list[UsageError] = []
    pool = SlotPool(
        count=3, data_bytes=DATA, room=MemoryRoom(free_share=0.01), on_short=short.append
    )
    try:
        pool.wait_prefaulted()
        assert (pool.count, len(pool.slots), len(short)) == (2, 2, 1)
    finally:
        pool.close()


def test_pool_without_room_for_the_fewest_slots_of_its_owner_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(OwnRegions, "slots_min", 2)
    with pytest.raises(UsageError, match="not enough memory"):
        SlotPool(
            count=3,
            data_bytes=DATA,
            header_bytes=HEADER,
            room=MemoryRoom(int(1.9 * (DATA + HEADER))),
        )


def test_too_large_pool_is_refused_before_anything_is_taken() -> None:
    with pytest.raises(UsageError, match=r"needed_bytes=\d+ available_bytes=1000"):
        SlotPool(count=3, data_bytes=DATA, room=MemoryRoom(1000))
    pool = SlotPool(count=1, data_bytes=DATA, header_bytes=HEADER, room=MemoryRoom(DATA + HEADER))
    with pytest.raises(UsageError, match="not enough memory"):
        pool.resize(100 * DATA)
    assert pool.data_bytes == DATA
    pool.close()


def test_write_by_nobody_is_refused(pool: SlotPool) -> None:
    slot = take(pool)
    write(slot, 1, b"a")
    with pytest.raises(InternalError, match="not acquired by a writer"):
        slot.begin()
    slot._take()
    with pytest.raises(InternalError, match="not begun"):
        slot.seal(index(2, b"a"))


def test_index_that_does_not_fit_is_refused(pool: SlotPool) -> None:
    slot = take(pool)
    slot.begin()
    with pytest.raises(UsageError, match="header_bytes"):
        slot.seal(index(1, b"a", name="n" * HEADER))
    assert read_slot(slot.memory) is None


def test_closed_pool_gives_its_descriptors_back() -> None:
    pool = SlotPool(count=2, data_bytes=DATA, header_bytes=HEADER)
    slot = take(pool)
    called: list[int] = []
    slot.on_free(lambda: called.append(1))
    fd = slot.fd
    pool.close()
    pool.close()
    assert called == [1]
    if fd is not None:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
