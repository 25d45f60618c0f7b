"""What ranks have in common, and what becomes of it on a board."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from ckpt.cluster.mesh.messages import NodeProgress
from ckpt.ipc.board import SLOTS_MAX, Board
from ckpt.keeper.mirrors.plan import MirrorReport, MirrorRound
from ckpt.keeper.nodes.progress import common_progress, common_progress_without_each, progress_of
from ckpt.values import SnapshotId

P1, P2, P3 = SnapshotId(1, 1), SnapshotId(1, 2), SnapshotId(1, 3)


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board.create(2)
    board.begin_attempt(1)
    yield board
    board.close()


def standing(
    *sealed: SnapshotId, completed: int = 5, mirrored: SnapshotId | None = None
) -> NodeProgress:
    return NodeProgress(attempt=1, sealed=sealed, completed=completed, mirrored=mirrored)


def test_a_node_holds_what_all_its_ranks_hold_and_is_as_far_as_the_last_of_them(
    board: Board,
) -> None:
    board.rank(0).publish(0, P1, 1)
    board.rank(0).publish(1, P2, 1)
    board.rank(1).publish(0, P1, 1)
    board.rank(0).completed = 7
    ranks = [board.rank(0), board.rank(1)]
    assert progress_of(ranks, 1, MirrorReport()) == standing(P1, completed=-1)
    board.rank(1).completed = 6
    assert progress_of(ranks, 1, MirrorReport(P1, P2)) == replace(
        standing(P1, completed=6, mirrored=P1), missed=P2
    )


def test_of_several_nodes_only_what_all_have_counts() -> None:
    assert common_progress(
        [standing(P2, P1, completed=4), standing(P1, completed=9)], 1
    ) == standing(P1, completed=4)
    assert common_progress([standing(P1), None], 1) == standing(completed=-1)
    assert common_progress([], 1) == standing(completed=-1)


def test_of_mirrors_the_round_is_told_whatever_single_nodes_have() -> None:
    told = common_progress([standing(mirrored=P2), None], 1, MirrorRound(named=P3, kept=P1))
    assert (told.named, told.mirrored, told.missed) == (P3, P1, None)
    assert common_progress([standing(mirrored=P2)], 1).mirrored is None


_standings = st.builds(
    standing,
    *[st.sampled_from([P1, P2, P3])] * 2,
    completed=st.integers(-1, 3),
    mirrored=st.sampled_from([None, P1]),
)


@given(mine=_standings, others=st.lists(st.none() | _standings, max_size=5))
def test_all_but_each_have_in_common_what_the_rest_has(
    mine: NodeProgress, others: list[NodeProgress | None]
) -> None:
    by_node = {str(number): one for number, one in enumerate(others)}
    now = MirrorRound(named=P3, kept=P1)
    assert common_progress_without_each(mine, by_node, 1, now) == {
        node: common_progress(
            [mine, *[one for other, one in by_node.items() if other != node]], 1, now
        )
        for node in by_node
    }


def test_pair_is_complete_once_ranks_elsewhere_hold_it_too(board: Board) -> None:
    for rank in range(2):
        board.rank(rank).publish(0, P1, 1)
        board.rank(rank).publish(1, P2, 1)
    assert board.newest_complete() == P2
    board.has_remote_ranks = True
    assert board.newest_complete() is None
    board.remote_ranks.publish_remote([P1], 3)
    assert board.newest_complete() == P1
    board.remote_ranks.publish_remote([P1, P2], 4)
    assert board.newest_complete() == P2
    assert [one.completed for one in board.all_ranks()] == [None, None, 4]
    board.has_remote_ranks = False
    assert len(board.all_ranks()) == 2


@pytest.mark.slow
@given(
    st.lists(
        st.sets(st.builds(SnapshotId, st.integers(1, 3), st.integers(0, 40)), max_size=20),
        max_size=6,
    )
)
def test_board_shows_the_newest_of_what_was_last_told(told: list[set[SnapshotId]]) -> None:
    board = Board.create(1)
    try:
        for pairs in told:
            board.remote_ranks.publish_remote(pairs, 1)
            assert board.remote_ranks.sealed_snapshots() == frozenset(sorted(pairs)[-SLOTS_MAX:])
    finally:
        board.close()


def test_a_new_attempt_forgets_how_far_others_were(board: Board) -> None:
    board.remote_ranks.publish_remote([P3], 9)
    board.begin_attempt(2)
    assert board.remote_ranks.completed is None
