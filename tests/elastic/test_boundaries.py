"""At which boundaries memory alone takes a snapshot: rank 0's word, found by every rank in time or
not at all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ckpt.elastic.boundaries import MemoryTier
from ckpt.ipc.board import Board
from ckpt.values import TrainerPhase


@pytest.fixture
def board() -> Iterator[Board]:
    made = Board.create(2)
    made.begin_attempt(1)
    yield made
    made.close()


def tiers(board: Board, every: int, completed: int = 0) -> list[MemoryTier]:
    found = [MemoryTier(board, rank=rank, every=every) for rank in range(2)]
    for tier in found:
        tier.begin(completed)
    return found


def boundary(tiers: list[MemoryTier], step: int, since: int | None = None) -> list[bool]:
    """All ranks pass a boundary, rank 0 first; which of them staged."""
    wants = []
    for tier in tiers:
        wanted = tier.should_stage(step, since=step - 1 if since is None else since)
        wants.append(wanted)
        tier.complete_boundary(step, staged=wanted)
    return wants


@pytest.mark.parametrize(
    ("every", "wanted"), [(1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (4, [4]), (0, [])]
)
def test_every_rank_stages_the_same_boundaries(board: Board, every: int, wanted: list[int]) -> None:
    both = tiers(board, every)
    staged = [step for step in range(1, 7) if boundary(both, step) == [True, True]]
    assert staged == wanted


def test_a_loop_that_counts_several_steps_at_once_stages_where_it_passes_the_word(
    board: Board,
) -> None:
    both = tiers(board, 1)
    assert boundary(both, 5, since=0) == [True, True]
    assert boundary(both, 10, since=5) == [True, True]


def test_a_rank_ahead_of_rank_0_finds_no_word_and_takes_none(board: Board) -> None:
    first, second = tiers(board, 1)
    assert second.should_stage(1, since=0)
    second.complete_boundary(1, staged=True)
    assert not second.should_stage(2, since=1)
    del first


def test_rank_0_waits_for_a_rank_that_is_far_behind(board: Board) -> None:
    first, second = tiers(board, 1)
    for step in (1, 2):
        first.complete_boundary(step, staged=first.should_stage(step, since=step - 1))
    assert not first.should_stage(3, since=2), "rank 1 has two boundaries to catch up"
    second.complete_boundary(2, staged=True)
    first.complete_boundary(3, staged=False)
    assert first.should_stage(4, since=3)


def test_a_boundary_that_was_not_taken_is_due_at_the_next(board: Board) -> None:
    both = tiers(board, 2)
    for tier in both:
        tier.complete_boundary(1, staged=False)
    for tier in both:
        tier.complete_boundary(2, staged=False)  # gradients were being accumulated there
    assert board.decision(3) == 1


def test_a_snapshot_that_another_node_passed_by_is_not_waited_for(board: Board) -> None:
    board.has_remote_ranks = True
    told: dict[int, int] = {}
    first, second = (
        MemoryTier(board, rank=rank, every=1, leads=rank == 0, forward_decision=told.__setitem__)
        for rank in range(2)
    )
    first.begin(0)
    second.begin(0)
    assert told == {1: 1, 2: 0}
    both = [first, second]
    assert boundary(both, 1) == [True, True]
    board.remote_ranks.publish_remote((), 1)
    assert boundary(both, 2) == [False, False]
    assert told[4] == 0, "the others may be about to take it"
    board.remote_ranks.publish_remote((), 2)
    assert boundary(both, 3) == [False, False]
    assert told[5] == 1, "they are beyond it, and have it not"


def test_the_board_shows_phase_steps_and_counts(board: Board) -> None:
    first, _ = tiers(board, 1, completed=7)
    words = board.rank(0)
    assert (words.completed, words.phase, words.first_step_done) == (
        7,
        TrainerPhase.TRAINING,
        False,
    )
    first.complete_boundary(8, staged=True)
    first.count_skipped()
    assert (words.completed, words.staged, words.skipped, words.first_step_done) == (8, 1, 1, True)
    first.set_phase(TrainerPhase.PAUSED)
    assert (words.completed, words.phase) == (8, TrainerPhase.PAUSED)


def test_interval_that_rank_0_measures_is_every_ranks(board: Board) -> None:
    both = [MemoryTier(board, rank=rank, every=None) for rank in range(2)]
    for tier in both:
        tier.begin(0)
    staged, changed, now_s = [], [], 0.0
    for step in range(1, 41):
        now_s += 1.0
        wanted = [tier.should_stage(step, since=step - 1) for tier in both]
        assert wanted[0] == wanted[1]
        if wanted[0]:
            staged.append(step)
            for tier in both:
                pace = tier.copied(step, began_s=now_s, ended_s=now_s + 0.1)
                changed += [(step, pace.every)] if pace is not None else []
        for tier in both:
            tier.complete_boundary(step, staged=wanted[0])
    assert changed == [(3, 8)]
    assert staged == [1, 2, 3, 11, 19, 27, 35]


def test_fixed_interval_is_kept_whatever_copies_cost(board: Board) -> None:
    both = tiers(board, 2)
    staged = []
    for step in range(1, 13):
        if boundary(both, step) == [True, True]:
            staged.append(step)
            assert both[0].copied(step, began_s=float(step), ended_s=step + 0.9) is None
    assert staged == [2, 4, 6, 8, 10, 12]
