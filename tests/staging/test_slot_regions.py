"""Memory that others own too: what a pool asks its owner and tells it, and in which order."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest

from ckpt.errors import IntegrityError, UnavailableError, UsageError
from ckpt.staging.header import header_bytes_of
from ckpt.staging.memory import Region
from ckpt.staging.slot import Slot, SlotPool, read_slot
from ckpt.values import PAGE_BYTES, SnapshotId, StagedIndex

HEADER = 16 * PAGE_BYTES
DATA = 4 * PAGE_BYTES


class Owner:
    """Writes down what it is told; ``refuses`` are snapshots that must not be overwritten."""

    slots_min = 1
    slots_max = 4
    poll_s = 0.001

    def __init__(self, kept: Sequence[tuple[int, Region]] = ()) -> None:
        self._kept = kept
        self.told: list[str] = []
        self.refuses: set[SnapshotId] = set()
        self.short = False

    def kept(self) -> Sequence[tuple[int, Region]]:
        return self._kept

    def make(self, number: int, size_bytes: int, *, free_share: float) -> Region:
        if self.short:
            raise UnavailableError("nobody answers")
        self.told.append(f"make {number}")
        return Region(size_bytes)

    def may_overwrite(self, slot: Slot, *, spare: bool) -> bool:
        return slot.snapshot not in self.refuses

    def emptied(self, slot: Slot) -> None:
        assert not slot.valid
        self.told.append(f"emptied {slot.number}")

    def sealed(self, slot: Slot) -> None:
        assert slot.valid
        self.told.append(f"sealed {slot.number} {slot.snapshot}")

    def idle(self, slot: Slot) -> None:
        self.told.append(f"idle {slot.number}")

    def dropped(self, slot: Slot) -> None:
        assert len(slot.memory)
        self.told.append(f"dropped {slot.number}")


def make_pool(owner: Owner, *, count: int = 2, data_bytes: int = DATA) -> SlotPool:
    return SlotPool(
        count=count, data_bytes=data_bytes, header_bytes=HEADER, prefault=False, regions=owner
    )


def take(pool: SlotPool) -> Slot:
    slot = pool.acquire()
    assert slot is not None
    return slot


def stage(pool: SlotPool, step: int) -> Slot:
    slot = take(pool)
    slot.begin()
    slot.seal(StagedIndex(snapshot=SnapshotId(1, step), rank=0, world_size=1, shards=()))
    return slot


def test_owner_is_told_each_change_in_order() -> None:
    owner = Owner()
    pool = make_pool(owner)
    stage(pool, 1)
    slot = take(pool)
    with slot.pin():
        slot.begin()
        slot.invalidate()
    assert owner.told == [
        "make 0",
        "emptied 0",
        "sealed 0 epoch 1 step 1",
        "idle 0",
        "make 1",
        "emptied 1",
        "emptied 1",
        "idle 1",
    ]
    pool.close()
    assert len(owner.told) == 8


def test_owner_has_the_last_word_on_overwriting() -> None:
    owner = Owner()
    pool = make_pool(owner)
    first, second = stage(pool, 1), stage(pool, 2)
    owner.refuses = {SnapshotId(1, 1)}
    assert take(pool) is second
    assert not pool.has_room()
    assert pool.acquire(wait_s=0.01) is None
    owner.refuses.clear()
    assert pool.has_room()
    assert take(pool) is first
    pool.close()


def test_kept_memory_is_taken_over_with_what_it_holds() -> None:
    before = make_pool(Owner(), count=3)
    slots = [stage(before, step) for step in (5, 3)]
    slots.append(take(before))
    assert all(slot.fd is not None for slot in slots)
    kept = [
        (n + 1, Region.from_fd(os.dup(slot.fd or 0), slot.size_bytes))
        for n, slot in enumerate(slots)
    ]
    before.close()
    owner = Owner(kept)
    pool = make_pool(owner, count=3)
    newest = pool.newest()
    assert newest is not None
    assert (newest.number, newest.snapshot, newest.generation, newest.header_bytes) == (
        1,
        SnapshotId(1, 5),
        1,
        HEADER,
    )
    assert [take(pool).number for _ in range(3)] == [3, 2, 1]
    pool.close()
    assert owner.told == []


def test_slot_goes_on_with_the_next_generation_where_it_was_kept() -> None:
    before = make_pool(Owner(), count=1)
    slot = stage(before, 1)
    region = Region.from_fd(os.dup(slot.fd or 0), slot.size_bytes)
    before.close()
    pool = make_pool(Owner([(0, region)]), count=1)
    again = stage(pool, 2)
    found = read_slot(again.memory)
    assert found is not None
    assert (found[0].snapshot, found[1]) == (SnapshotId(1, 2), 2)
    pool.close()


def test_kept_slot_that_is_too_small_goes_when_its_owner_lets_it() -> None:
    before = make_pool(Owner(), count=1)
    slot = stage(before, 1)
    region = Region.from_fd(os.dup(slot.fd or 0), slot.size_bytes)
    before.close()
    owner = Owner([(0, region)])
    owner.refuses = {SnapshotId(1, 1)}
    pool = make_pool(owner, count=1, data_bytes=2 * DATA)
    assert stage(pool, 2).number == 1
    assert [one.number for one in pool.slots] == [0, 1]
    owner.refuses.clear()
    assert pool.acquire() is not None
    assert [one.number for one in pool.slots] == [1]
    assert "dropped 0" in owner.told
    assert region.fd is None
    pool.close()


def test_no_number_left_means_no_slot() -> None:
    owner = Owner()
    pool = make_pool(owner, count=3)
    owner.refuses = {SnapshotId(1, step) for step in range(1, 4)}
    for step in (1, 2, 3):
        stage(pool, step)
    pool.resize(2 * DATA)
    assert stage(pool, 4).number == 3
    assert take(pool).number == 3
    assert not pool.has_room()
    assert pool.acquire() is None
    owner.refuses.clear()
    assert take(pool).number == 0
    pool.close()


def test_number_of_slots_is_the_owners_to_bound() -> None:
    with pytest.raises(UsageError, match=r"count=5 \(1..4\)"):
        make_pool(Owner(), count=5)


def test_owner_that_does_not_answer_fails_the_writer_only() -> None:
    owner = Owner()
    owner.short = True
    pool = SlotPool(count=2, data_bytes=DATA, header_bytes=HEADER, regions=owner)
    pool.wait_prefaulted()
    with pytest.raises(UnavailableError, match="nobody answers"):
        pool.acquire()
    pool.close()


def test_memory_of_another_size_than_told_is_refused_and_closed() -> None:
    region = Region(2 * PAGE_BYTES)
    if region.fd is None:
        pytest.skip("memory can't be handed on here")
    for size_bytes, error in [
        (4 * PAGE_BYTES, IntegrityError),
        (PAGE_BYTES, IntegrityError),
        (7, UsageError),
    ]:
        fd = os.dup(region.fd)
        with pytest.raises(error):
            Region.from_fd(fd, size_bytes)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    other = Region.from_fd(os.dup(region.fd), 2 * PAGE_BYTES)
    other.view[5] = 9
    assert region.view[5] == 9
    other.close()
    region.close()


def test_header_area_is_known_once_a_slot_was_begun() -> None:
    pool = make_pool(Owner(), count=1)
    slot = take(pool)
    assert header_bytes_of(slot.memory) is None
    slot.begin()
    assert header_bytes_of(slot.memory) == HEADER
    slot.memory[24:32] = (HEADER + 1).to_bytes(8, "little")
    assert header_bytes_of(slot.memory) is None
    assert header_bytes_of(slot.memory[:64]) is None
    pool.close()


def test_room_is_found_where_slots_of_an_old_size_hold_all_numbers_until_they_are_free() -> None:
    owner = Owner()
    owner.slots_max = 1
    pool = make_pool(owner, count=1)
    pin = stage(pool, 1).pin()
    pool.resize(2 * DATA)
    assert not pool.has_room()
    pin.release()
    assert pool.has_room()
    pool.close()
