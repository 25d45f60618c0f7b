"""Memory that becomes short in mid-training: the slots there are must do, and nothing is raised."""

from __future__ import annotations

import pytest

from ckpt.errors import UsageError
from ckpt.staging.memory import Region
from ckpt.staging.slot import OwnRegions, Slot, SlotPool
from ckpt.values import PAGE_BYTES, SnapshotId, StagedIndex


class Scarce(OwnRegions):
    """Gives memory for so many slots; ``refuses`` are snapshots that must not be overwritten."""

    def __init__(self, left: int, *, slots_min: int = 1) -> None:
        self.left = left
        self.slots_min = slots_min
        self.asked = 0
        self.refuses: set[SnapshotId] = set()

    def make(self, number: int, size_bytes: int, *, free_share: float) -> Region:
        self.asked += 1
        if not self.left:
            raise UsageError("memory is short")
        self.left -= 1
        return Region(size_bytes)

    def may_overwrite(self, slot: Slot, *, spare: bool) -> bool:
        return slot.snapshot not in self.refuses


def pool_of(regions: Scarce, told: list[UsageError], *, count: int = 3) -> SlotPool:
    return SlotPool(
        count=count,
        data_bytes=PAGE_BYTES,
        header_bytes=2 * PAGE_BYTES,
        prefault=False,
        regions=regions,
        on_short=told.append,
    )


def fill(pool: SlotPool, step: int) -> Slot:
    slot = pool.acquire()
    assert slot is not None, step
    slot.begin()
    slot.seal(StagedIndex(snapshot=SnapshotId(1, step), rank=0, world_size=1, shards=()))
    return slot


def test_first_slot_that_does_not_fit_is_the_users_to_know() -> None:
    told: list[UsageError] = []
    with pytest.raises(UsageError, match="memory is short"):
        pool_of(Scarce(0), told).acquire()
    assert told == []


def test_later_slot_that_does_not_fit_is_done_without_and_told_once() -> None:
    told: list[UsageError] = []
    regions = Scarce(2)
    pool = pool_of(regions, told)
    slots = [fill(pool, step) for step in range(1, 7)]
    assert slots == slots[:2] * 3, "the one sealed longest ago"
    assert [str(error) for error in told] == ["memory is short"]
    assert pool.shortage is told[0]
    assert (pool.count, regions.asked) == (2, 3), "not asked for again"


def test_no_slot_is_no_error_where_none_is_given_free() -> None:
    told: list[UsageError] = []
    regions = Scarce(2, slots_min=2)
    pool = pool_of(regions, told)
    for step in (1, 2):
        fill(pool, step)
        regions.refuses.add(SnapshotId(1, step))
    assert pool.acquire() is None
    regions.refuses.discard(SnapshotId(1, 1))
    assert fill(pool, 3).snapshot == SnapshotId(1, 3)


def test_with_fewer_slots_than_the_owner_needs_memory_is_asked_for_again() -> None:
    told: list[UsageError] = []
    regions = Scarce(1, slots_min=2)
    pool = pool_of(regions, told)
    fill(pool, 1)
    regions.refuses.add(SnapshotId(1, 1))
    assert pool.acquire() is None
    assert pool.acquire() is None
    regions.left = 1
    assert fill(pool, 2).number == 1
    assert len(told) == 1
