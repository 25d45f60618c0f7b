"""Slots that a keeper holds too: they outlive their trainer, the board mirrors them, and the rule
decides what may go."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from ckpt.errors import IntegrityError, UnavailableError, UsageError
from ckpt.format.canonical import digest
from ckpt.ipc.board import SLOTS_MAX, Board
from ckpt.session.keeper.slots import SharedSlots, open_staged
from ckpt.staging.memory import Region
from ckpt.staging.slot import Slot, SlotPool, read_slot
from ckpt.values import Box, Leaf, LeafKind, SnapshotId, StagedIndex, StagedShard

HEADER = 64 << 10
DATA = 64 << 10
RANKS = 2

pytestmark = pytest.mark.skipif(
    not hasattr(os, "memfd_create"), reason="needs memory that can be handed on"
)


class FakeKeeper:
    """Holds descriptors as a keeper does; ``gone``: it answers nothing any more."""

    def __init__(self) -> None:
        self.held: dict[int, dict[int, tuple[int, int]]] = {rank: {} for rank in range(RANKS)}
        self.gone = False

    def of(self, rank: int) -> RankKeeper:
        return RankKeeper(self, rank)

    def close(self) -> None:
        for held in self.held.values():
            for fd, _ in held.values():
                os.close(fd)


class RankKeeper:
    """One rank's connection."""

    def __init__(self, keeper: FakeKeeper, rank: int) -> None:
        self._keeper = keeper
        self._rank = rank

    def slots(self, rank: int) -> list[tuple[int, Region]]:
        self._check()
        found = sorted(self._keeper.held[rank].items())
        return [(index, Region.from_fd(os.dup(fd), size)) for index, (fd, size) in found]

    def slot_created(
        self, index: int, fd: int, size_bytes: int, *, free_share: float = 0.0
    ) -> None:
        self._check()
        assert index not in self._keeper.held[self._rank], "a number is given twice"
        self._keeper.held[self._rank][index] = os.dup(fd), size_bytes

    def slot_released(self, index: int) -> None:
        os.close(self._keeper.held[self._rank].pop(index)[0])

    def _check(self) -> None:
        if self._keeper.gone:
            raise UnavailableError("the keeper is gone")


@pytest.fixture
def keeper() -> Iterator[FakeKeeper]:
    made = FakeKeeper()
    yield made
    made.close()


@pytest.fixture
def board() -> Iterator[Board]:
    made = Board.create(RANKS)
    yield made
    made.close()


class Trainer:
    """One rank of one attempt."""

    def __init__(
        self, keeper: FakeKeeper, board: Board, rank: int, *, count: int = 3, data_bytes: int = DATA
    ) -> None:
        self.rank = rank
        self.own = board.rank(rank)
        self.shared = SharedSlots(keeper.of(rank), board, rank)
        self.shared.epoch = 1
        self.pool = SlotPool(
            count=count,
            data_bytes=data_bytes,
            header_bytes=HEADER,
            prefault=False,
            regions=self.shared,
        )

    def acquire(self, wait_s: float = 0.0) -> Slot:
        slot = self.pool.acquire(wait_s=wait_s)
        assert slot is not None
        return slot

    def stage(self, step: int, *, epoch: int = 1) -> Slot:
        slot = self.acquire()
        slot.begin()
        slot.data[:] = bytes([step]) * len(slot.data)
        slot.seal(index(self.rank, SnapshotId(epoch, step), bytes(slot.data)))
        return slot

    def die(self) -> None:
        """Its memory is unmapped, without a word to anybody."""
        self.pool.close()


def index(rank: int, snapshot: SnapshotId, data: bytes) -> StagedIndex:
    leaf = Leaf(name="w", kind=LeafKind.TENSOR, dtype="uint8", shape=(len(data),), rank=rank)
    shard = StagedShard(
        leaf=leaf,
        box=Box.whole(leaf.shape),
        offset_bytes=0,
        size_bytes=len(data),
        digests=(digest(data),),
    )
    return StagedIndex(snapshot=snapshot, rank=rank, world_size=RANKS, shards=(shard,))


@pytest.fixture
def ranks(keeper: FakeKeeper, board: Board) -> Iterator[list[Trainer]]:
    made = [Trainer(keeper, board, rank) for rank in range(RANKS)]
    yield made
    for one in made:
        one.die()


def pairs(trainer: Trainer) -> list[SnapshotId]:
    return sorted(word.snapshot for word in trainer.own.slots() if word.snapshot is not None)


def test_new_slots_are_handed_to_the_keeper_and_mirrored(
    keeper: FakeKeeper, ranks: list[Trainer]
) -> None:
    slot = ranks[0].stage(7)
    assert keeper.held[0].keys() == {slot.number}
    word = ranks[0].own.slot(slot.number)
    assert (word.snapshot, word.generation, word.held) == (SnapshotId(1, 7), 1, False)
    slot._take()
    slot.begin()
    assert ranks[0].own.slot(slot.number).snapshot is None
    slot.invalidate()


def test_pinned_slot_is_marked_before_it_is_published_and_until_the_pin_goes(
    ranks: list[Trainer],
) -> None:
    slot = ranks[0].acquire()
    pin = slot.pin()
    slot.begin()
    slot.seal(index(0, SnapshotId(1, 1), bytes(slot.data)))
    assert ranks[0].own.slot(slot.number).held
    assert ranks[0].shared.reason_kept(slot) == "it is in use"
    pin.release()
    assert not ranks[0].own.slot(slot.number).held


def test_handed_over_slot_stays_marked_until_the_keeper_lets_go(ranks: list[Trainer]) -> None:
    slot = ranks[0].acquire()
    pin = slot.pin()
    slot.begin()
    slot.seal(index(0, SnapshotId(1, 1), bytes(slot.data)))
    ranks[0].shared.hand_over(slot)
    pin.release()
    assert ranks[0].own.slot(slot.number).held
    ranks[0].own.release(slot.number)
    assert ranks[0].shared.reason_kept(slot) == "other ranks may still complete it"


def test_slot_taken_back_is_let_go_with_its_pin(ranks: list[Trainer]) -> None:
    slot = ranks[0].acquire()
    pin = slot.pin()
    slot.begin()
    slot.seal(index(0, SnapshotId(1, 1), bytes(slot.data)))
    ranks[0].shared.hand_over(slot)
    ranks[0].shared.take_back(slot)
    pin.release()
    assert not ranks[0].own.slot(slot.number).held


def test_copy_that_failed_leaves_an_empty_unmarked_slot(ranks: list[Trainer]) -> None:
    slot = ranks[0].acquire()
    pin = slot.pin()
    slot.begin()
    slot.invalidate()
    pin.release()
    word = ranks[0].own.slot(slot.number)
    assert (word.snapshot, word.held) == (None, False)
    assert ranks[0].acquire() is slot


def test_only_what_a_newer_complete_pair_replaces_is_overwritten(ranks: list[Trainer]) -> None:
    first = [one.stage(1) for one in ranks]
    second = ranks[0].stage(2)
    third = ranks[0].stage(3)
    assert not ranks[0].pool.has_room()
    assert ranks[0].pool.acquire() is None
    ranks[1].stage(2)
    assert ranks[0].pool.has_room()
    assert ranks[0].acquire() is first[0]
    assert {slot.snapshot for slot in (second, third)} == {SnapshotId(1, 2), SnapshotId(1, 3)}


def test_waiting_rank_sees_that_another_completed_a_pair(ranks: list[Trainer]) -> None:
    first = [one.stage(1) for one in ranks]
    ranks[0].stage(2)
    ranks[0].stage(3)
    other = threading.Thread(target=lambda: ranks[1].stage(2))
    other.start()
    assert ranks[0].pool.acquire(wait_s=20) is first[0]
    other.join()


def test_slots_outlive_their_trainer_with_what_they_hold(
    keeper: FakeKeeper, board: Board, ranks: list[Trainer]
) -> None:
    for one in ranks:
        one.stage(1)
        one.stage(2)
    ranks[0].die()
    heir = Trainer(keeper, board, 0)
    newest = heir.pool.newest()
    assert newest is not None
    assert newest.snapshot == SnapshotId(1, 2)
    assert newest.generation == 1
    slots = [heir.stage(step) for step in (3, 4)]
    assert all(slot is not newest for slot in slots)
    assert keeper.held[0].keys() == {slot.number for slot in (newest, *slots)}
    again = next(slot for slot in slots if slot.generation == 2)
    assert read_slot(again.memory) is not None
    heir.die()


def test_pair_of_an_earlier_epoch_that_no_other_rank_holds_is_given_free(
    keeper: FakeKeeper, board: Board, ranks: list[Trainer]
) -> None:
    for one in ranks:
        one.stage(1)
    ranks[0].stage(2)
    ranks[0].stage(3)
    ranks[0].die()
    heir = Trainer(keeper, board, 0)
    assert not heir.pool.has_room()
    heir.shared.epoch = 2
    heir.stage(2, epoch=2)
    heir.stage(3, epoch=2)
    assert pairs(heir) == [SnapshotId(1, 1), SnapshotId(2, 2), SnapshotId(2, 3)]
    heir.die()


def test_rank_that_went_on_without_a_pair_gives_it_free(ranks: list[Trainer]) -> None:
    for one in ranks:
        one.stage(1)
    lost = ranks[0].stage(2)
    assert ranks[0].shared.reason_kept(lost) is not None
    ranks[1].own.beat(4)
    assert ranks[0].shared.reason_kept(lost) is None


def test_trainer_dead_between_header_and_board_is_corrected(
    keeper: FakeKeeper, board: Board, ranks: list[Trainer]
) -> None:
    sealed, begun = ranks[0].stage(1), ranks[0].stage(2)
    ranks[0].own.clear(sealed.number)
    begun._header.begin()
    ranks[0].own.hold(begun.number)
    ranks[0].own.publish(SLOTS_MAX - 1, SnapshotId(1, 9), 1)
    ranks[0].die()
    heir = Trainer(keeper, board, 0)
    assert heir.own.slot(sealed.number).snapshot == SnapshotId(1, 1)
    assert (heir.own.slot(begun.number).snapshot, heir.own.slot(begun.number).held) == (None, False)
    assert pairs(heir) == [SnapshotId(1, 1)]
    heir.die()


def test_mark_of_an_upload_outlives_the_trainer(
    keeper: FakeKeeper, board: Board, ranks: list[Trainer]
) -> None:
    slot = ranks[0].stage(1)
    ranks[0].own.hold(slot.number)
    ranks[0].die()
    heir = Trainer(keeper, board, 0)
    assert heir.own.slot(slot.number).held
    heir.die()


def test_damaged_header_counts_as_nothing(
    keeper: FakeKeeper, board: Board, ranks: list[Trainer]
) -> None:
    slot = ranks[0].stage(1)
    slot.memory[100] ^= 1
    ranks[0].die()
    heir = Trainer(keeper, board, 0)
    assert heir.pool.newest() is None
    assert pairs(heir) == []
    assert heir.acquire().number == slot.number
    heir.die()


def test_slots_too_small_go_once_something_newer_is_complete(
    keeper: FakeKeeper, board: Board, ranks: list[Trainer]
) -> None:
    old = [one.stage(1) for one in ranks]
    for one in ranks:
        one.die()
    heirs = [Trainer(keeper, board, rank, data_bytes=2 * DATA) for rank in range(RANKS)]
    fresh = [one.stage(2) for one in heirs]
    assert all(len(slot.data) == 2 * DATA for slot in fresh)
    assert keeper.held[0].keys() == {old[0].number, fresh[0].number}
    assert heirs[0].acquire().number == old[0].number, "the number is free again"
    assert keeper.held[0][old[0].number][1] == HEADER + 2 * DATA
    assert heirs[0].own.slot(old[0].number).snapshot is None
    assert heirs[0].own.slot(fresh[0].number).snapshot == SnapshotId(1, 2)
    for one in heirs:
        one.die()


def test_larger_and_more_slots_than_asked_for_are_used_or_given_up(
    keeper: FakeKeeper, board: Board, ranks: list[Trainer]
) -> None:
    for step in (1, 2, 3):
        ranks[0].stage(step)
    ranks[0].die()
    heir = Trainer(keeper, board, 0, count=2, data_bytes=DATA // 2)
    assert {slot.snapshot for slot in heir.pool.slots} == {
        SnapshotId(1, step) for step in (1, 2, 3)
    }
    heir.shared.epoch = 2
    slot = heir.acquire()
    assert slot.snapshot == SnapshotId(1, 2)
    assert len(slot.data) == DATA
    assert len(keeper.held[0]) == 2
    heir.die()


def test_one_slot_is_too_few(keeper: FakeKeeper, board: Board) -> None:
    with pytest.raises(UsageError, match=r"number of slots out of range. count=1 \(2..16\)"):
        Trainer(keeper, board, 0, count=1)


def test_keeper_that_is_gone_makes_no_slot(keeper: FakeKeeper, ranks: list[Trainer]) -> None:
    keeper.gone = True
    with pytest.raises(UnavailableError, match="gone"):
        ranks[0].pool.acquire()
    pool = SlotPool(count=2, data_bytes=DATA, header_bytes=HEADER, regions=ranks[0].shared)
    pool.wait_prefaulted()
    assert pool.slots == ()
    pool.close()


def test_next_keeper_is_given_every_slot_without_old_marks(
    board: Board, ranks: list[Trainer]
) -> None:
    uploading, mine = ranks[0].stage(1), ranks[0].acquire()
    ranks[0].own.hold(uploading.number)
    pin = mine.pin()
    mine.begin()
    mine.seal(index(0, SnapshotId(1, 2), bytes(mine.data)))
    heir = FakeKeeper()
    ranks[0].shared._keeper = heir.of(0)
    ranks[0].shared.hand_over_all(ranks[0].pool.slots)
    assert heir.held[0].keys() == {uploading.number, mine.number}
    assert not ranks[0].own.slot(uploading.number).held
    assert ranks[0].own.slot(mine.number).held
    pin.release()
    heir.close()


def test_what_no_pool_took_over_is_unmapped(
    keeper: FakeKeeper, board: Board, ranks: list[Trainer]
) -> None:
    ranks[0].stage(1)
    shared = SharedSlots(keeper.of(0), board, 0)
    ((_, region),) = shared._kept.items()
    shared.close()
    shared.close()
    assert region.fd is None
    assert shared.kept() == []


def test_staged_snapshot_is_opened_over_the_slots_of_all_ranks(
    keeper: FakeKeeper, ranks: list[Trainer]
) -> None:
    for one in ranks:
        one.stage(1)
        one.stage(2)
    with open_staged(keeper.of(1), SnapshotId(1, 1), ranks=RANKS, job="job") as (found, store):
        assert found.manifest.snapshot == SnapshotId(1, 1)
        out = bytearray(DATA)
        store.read_into("slot/0", memoryview(out))
        assert bytes(out) == b"\x01" * DATA
    with (
        pytest.raises(IntegrityError, match="no slot of this rank"),
        open_staged(keeper.of(1), SnapshotId(1, 5), ranks=RANKS, job="job"),
    ):
        pass


def test_slot_overwritten_while_it_is_read_is_told(
    keeper: FakeKeeper, ranks: list[Trainer]
) -> None:
    slots = [one.stage(1) for one in ranks]
    with (
        pytest.raises(IntegrityError, match="overwritten while it was read"),
        open_staged(keeper.of(1), SnapshotId(1, 1), ranks=RANKS, job="job"),
    ):
        slots[0]._take()
        slots[0].begin()
