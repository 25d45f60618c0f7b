"""The slots that a keeper holds, over real memfds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
from kit.keepers.slot_makers import HEADER_BYTES, SLOT_BYTES, MadeSlot, descriptors

from ckpt.errors import CkptError, UsageError
from ckpt.ipc.board import SLOTS_MAX, Board
from ckpt.keeper import slots as slots_module
from ckpt.keeper.slots import SlotTable
from ckpt.values import PAGE_BYTES, SnapshotId

OLD, NEW, NEWER = SnapshotId(1, 4), SnapshotId(1, 5), SnapshotId(2, 6)


class Held:
    """A table for two ranks, and what it posted and told."""

    def __init__(self) -> None:
        self.board = Board.create(2)
        self.posted: list[Callable[[], object]] = []
        self.dropped: list[tuple[int, int]] = []
        self.table = SlotTable(
            self.board, self.posted.append, dropped=lambda *at: self.dropped.append(at)
        )
        self.made: dict[tuple[int, int], MadeSlot] = {}

    def add(
        self, rank: int, index: int, snapshot: SnapshotId | None = None, *, ranks: int = 2
    ) -> MadeSlot:
        """A rank's slot; published where it is sealed."""
        made = self.made[rank, index] = MadeSlot()
        if snapshot is not None:
            self.board.rank(rank).publish(
                index, snapshot, made.seal(snapshot, rank=rank, ranks=ranks)
            )
        self.table.add(rank, index, made.given(), made.size_bytes)
        return made

    def word(self, rank: int = 0, index: int = 0):
        return self.board.rank(rank).slot(index)

    def loop(self) -> None:
        """What the keeper's loop does with posted calls."""
        calls, self.posted[:] = list(self.posted), []
        for call in calls:
            call()


@pytest.fixture
def held() -> Iterator[Held]:
    one = Held()
    yield one
    one.table.close()
    one.board.close()
    for made in one.made.values():
        made.close()


def test_what_a_slot_holds_is_read_from_its_memory(held: Held) -> None:
    made = held.add(0, 0, OLD)
    sealed = held.table.hold_snapshot(0, OLD)
    assert sealed is not None
    assert sealed.index.snapshot == OLD
    assert (
        bytes(sealed.data[:4])
        == bytes(made.memory[HEADER_BYTES : HEADER_BYTES + 4])
        == bytes([4] * 4)
    )
    assert held.table.hold_snapshot(1, OLD) is None


def test_an_upload_holds_its_slot_until_the_loop_hears_that_it_let_go(held: Held) -> None:
    held.add(0, 0, OLD)
    first, second = held.table.hold_snapshot(0, OLD), held.table.hold(0, 0, 1)
    assert first is not None
    assert second is not None
    assert held.word().held
    first.free()
    held.loop()
    assert held.word().held
    second.free()
    assert held.word().held, "only the loop may change it"
    held.loop()
    assert not held.word().held


@pytest.mark.parametrize("how", ["another generation", "begun again", "no slot"])
def test_a_slot_that_is_not_as_it_was_told_is_no_upload_and_loses_its_mark(
    held: Held, how: str
) -> None:
    made = held.add(0, 0, OLD)
    held.board.rank(0).hold(0)
    if how == "begun again":
        made.begin()
    if how == "no slot":
        assert held.table.hold(0, 7, 1) is None
        return
    assert held.table.hold(0, 0, 2 if how == "another generation" else 1) is None
    assert not held.word().held


def test_a_mark_that_a_dead_trainer_left_is_cleared_between_attempts(held: Held) -> None:
    held.add(0, 0, OLD)
    held.add(0, 1, NEW)
    uploading = held.table.hold_snapshot(0, NEW)
    assert uploading is not None
    held.board.rank(0).hold(0)
    held.table.sync_board()
    assert not held.word(0, 0).held
    assert held.word(0, 1).held, "an upload's mark stays"


def test_the_board_says_what_the_headers_say_after_a_death(held: Held) -> None:
    half = held.add(0, 0, OLD)
    half.begin()  # died while it wrote
    sealed = held.add(0, 1)
    generation = sealed.seal(NEW)  # died before it told
    held.add(0, 2, OLD).seal(NEWER)  # died between
    held.table.sync_board()
    assert held.word(0, 0).snapshot is None
    assert (held.word(0, 1).snapshot, held.word(0, 1).generation) == (NEW, generation)
    assert held.word(0, 2).snapshot == NEWER


def test_a_damaged_header_holds_nothing(held: Held) -> None:
    for index in range(2):
        made = held.add(index, 0, OLD)
        made.memory[70] ^= 0xFF
    assert held.table.complete_snapshots(2) == []
    assert held.table.hold_snapshot(0, OLD) is None
    held.table.sync_board()
    assert held.word().snapshot is None


def test_forgetting_stays_clear_of_memory_that_is_no_slot_any_more(held: Held) -> None:
    made = held.add(0, 0, NEW)
    made.memory[24:32] = bytes([255]) * 8
    held.table.discard_after(OLD)
    assert held.word().snapshot is None


def test_only_pairs_that_all_ranks_hold_are_complete_newest_first(held: Held) -> None:
    for rank, pairs in enumerate([(OLD, NEW, NEWER), (NEWER, OLD)]):
        for index, pair in enumerate(pairs):
            held.add(rank, index, pair)
    assert held.table.complete_snapshots(2) == [NEWER, OLD]


def test_slots_of_another_number_of_ranks_are_not_complete(held: Held) -> None:
    held.add(0, 0, OLD, ranks=2)
    held.add(1, 0, OLD, ranks=3)
    assert held.table.complete_snapshots(2) == []


@pytest.mark.parametrize(
    ("resume", "left"), [(NEWER, [NEWER, NEW, OLD]), (NEW, [NEW, OLD]), (OLD, [OLD]), (None, [])]
)
def test_what_was_captured_after_the_resumed_pair_is_forgotten(
    held: Held, resume: SnapshotId | None, left: list
) -> None:
    for rank in range(2):
        for index, pair in enumerate((OLD, NEW, NEWER)):
            held.add(rank, index, pair)
    held.table.discard_after(resume)
    assert held.table.complete_snapshots(2) == left
    assert held.board.newest_complete() == max(left, default=None)
    held.table.sync_board()
    assert held.table.complete_snapshots(2) == left, "it does not come back"


def test_an_uploads_slot_is_not_forgotten_under_it(held: Held) -> None:
    held.add(0, 0, NEWER)
    sealed = held.table.hold_snapshot(0, NEWER)
    held.table.discard_after(OLD)
    assert sealed is not None
    assert held.word().snapshot == NEWER


def test_a_slot_that_its_rank_gave_up_goes_when_no_upload_holds_it(held: Held) -> None:
    held.add(0, 0, OLD)
    held.add(0, 1, NEW)
    sealed = held.table.hold_snapshot(0, OLD)
    assert sealed is not None
    memory = held.made[0, 0]
    before = descriptors([memory])
    assert not held.table.drop(0, 0)
    assert [one.index for one in held.table.of_rank(0)] == [1]
    assert held.dropped == []
    sealed.free()
    held.loop()
    assert held.dropped == [(0, 0)]
    assert held.word().snapshot is None
    assert descriptors([memory]) < before
    assert held.table.drop(0, 1)
    assert held.dropped == [(0, 0), (0, 1)]
    assert not held.table.drop(0, 1)


def test_an_upload_reads_on_after_the_table_is_closed(held: Held) -> None:
    held.add(0, 0, NEW)
    sealed = held.table.hold_snapshot(0, NEW)
    assert sealed is not None
    held.table.close()
    assert bytes(sealed.data[:3]) == bytes([5] * 3)
    sealed.free()
    held.loop()


@pytest.mark.parametrize(
    ("rank", "index", "size_bytes"),
    [
        (0, 0, SLOT_BYTES),
        (0, SLOTS_MAX, SLOT_BYTES),
        (0, -1, SLOT_BYTES),
        (2, 1, SLOT_BYTES),
        (-1, 1, SLOT_BYTES),
        (0, 1, SLOT_BYTES + PAGE_BYTES),
        (0, 1, 0),
        (0, 1, -4096),
    ],
)
def test_a_slot_that_cannot_be_is_refused_and_its_descriptor_closed(
    held: Held, rank: int, index: int, size_bytes: int
) -> None:
    held.add(0, 0)
    other = MadeSlot()
    fd = other.given()
    with pytest.raises(UsageError):
        held.table.add(rank, index, fd, size_bytes)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)
    assert held.table.total_bytes == SLOT_BYTES
    other.close()


def test_what_is_no_memory_is_refused(held: Held) -> None:
    read, write = os.pipe()
    with pytest.raises(CkptError):
        held.table.add(0, 0, read, 4096)
    os.close(write)


def test_a_slot_beyond_the_nodes_memory_is_refused_in_clear_words(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first slot's pages are promised, but hardly taken: they count.
    held.add(0, 0)
    monkeypatch.setattr(
        slots_module, "available_bytes", lambda **_: 2 * SLOT_BYTES - 4 * PAGE_BYTES
    )
    other = MadeSlot()
    with pytest.raises(
        UsageError,
        match=r"not enough memory for another slot.* rank=1 slot_bytes=65536 .*allow fewer slots",
    ):
        held.table.add(1, 0, other.given(), SLOT_BYTES)
    monkeypatch.setattr(slots_module, "available_bytes", lambda **_: 2 * SLOT_BYTES)
    held.table.add(1, 0, other.given(), SLOT_BYTES)
    other.close()


def test_slot_that_can_be_done_without_leaves_memory_free_and_the_other_ranks_as_many(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def left(*, free_share: float) -> int:
        asked.append(free_share)
        return 3 * SLOT_BYTES

    for rank in range(2):
        held.add(rank, 0).memory[:] = bytes(SLOT_BYTES)  # its pages are taken
    monkeypatch.setattr(slots_module, "available_bytes", left)
    made = [MadeSlot() for _ in range(3)]
    held.table.add(0, 1, made[0].given(), SLOT_BYTES, free_share=0.1)
    with pytest.raises(UsageError, match="not enough memory for another slot"):
        # Room for it, but not for a third of the other rank, which has one only.
        held.table.add(0, 2, made[1].given(), SLOT_BYTES, free_share=0.1)
    held.table.add(1, 1, made[2].given(), SLOT_BYTES, free_share=0.1)
    assert asked == [0.1, 0.1, 0.1]
    for each in made:
        each.close()


def test_pages_that_are_taken_already_are_not_counted_twice(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = MadeSlot()
    made.memory[:] = bytes(SLOT_BYTES)
    monkeypatch.setattr(slots_module, "available_bytes", lambda **_: 0)
    held.table.add(0, 0, made.given(), SLOT_BYTES)
    made.close()


def test_tools_see_what_the_board_says(held: Held) -> None:
    held.add(1, 2, NEW)
    held.board.rank(1).hold(2)
    (report,) = held.table.report(1)
    assert (report.index, report.size_bytes, report.snapshot, report.held) == (
        2,
        SLOT_BYTES,
        NEW,
        True,
    )
    assert held.table.report(0) == ()
    assert [(entry.index, entry.size_bytes) for entry in held.table.entries(1)] == [(2, SLOT_BYTES)]


def test_a_slot_that_was_given_up_and_uploads_on_does_not_take_its_number_from_the_next(
    held: Held,
) -> None:
    held.add(0, 0, OLD)
    old = held.made[0, 0]
    uploading = held.table.hold_snapshot(0, OLD)
    assert uploading is not None
    assert not held.table.drop(0, 0)
    assert held.dropped == []
    before = descriptors([old])
    held.add(0, 0, NEW)
    assert held.dropped == [(0, 0)], (
        "supervisors know slots by number: the old one goes before the new one comes"
    )
    held.board.rank(0).publish(0, NEW, 1)
    assert not held.word().held
    assert held.table.total_bytes == 2 * SLOT_BYTES
    assert bytes(uploading.data[:2]) == bytes([4] * 2)
    next_one = held.table.hold_snapshot(0, NEW)
    assert next_one is not None
    uploading.free()
    held.loop()
    assert held.word().held, "the mark is the next one's"
    assert held.word().snapshot == NEW
    assert held.dropped == [(0, 0)]
    assert held.table.total_bytes == SLOT_BYTES
    assert descriptors([old]) < before, "the table's of the old one is closed"
    next_one.free()
    held.loop()
    assert not held.word().held
    old.close()
