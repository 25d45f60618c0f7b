"""The rule alone, over everything that two ranks can hold."""

from __future__ import annotations

import itertools

import pytest

from ckpt.session.slot_rule import BoardView, overtaken, passed, reason_kept
from ckpt.values import SnapshotId

PAIRS = [SnapshotId(1, 1), SnapshotId(1, 2), SnapshotId(2, 1)]
SETS = [frozenset(some) for size in range(4) for some in itertools.combinations(PAIRS, size)]


def seen(*sealed: frozenset[SnapshotId]) -> BoardView:
    """As the board shows ranks that have come as far as what they hold."""
    return BoardView(tuple(max(one, default=None) for one in sealed), sealed)


@pytest.mark.parametrize("mine", [one for one in SETS if one])
@pytest.mark.parametrize("other", SETS)
@pytest.mark.parametrize("epoch", [1, 2])
def test_of_what_two_ranks_hold_exactly_the_useless_is_given_free(
    mine: frozenset[SnapshotId], other: frozenset[SnapshotId], epoch: int
) -> None:
    common = max(mine & other, default=None)
    for pair in mine:
        free = reason_kept(pair, in_use=False, view=seen(mine, other), epoch=epoch) is None
        older = common is not None and pair < common
        lost = pair not in other and (pair.epoch < epoch or any(one > pair for one in other))
        assert free == (older or lost)
        assert not (free and pair == common)
        assert reason_kept(pair, in_use=True, view=seen(mine, other), epoch=epoch) == "it is in use"


@pytest.mark.parametrize("other", SETS)
def test_overwriting_what_is_free_never_loses_the_newest_common(
    other: frozenset[SnapshotId],
) -> None:
    for mine in SETS:
        for pair in mine:
            if reason_kept(pair, in_use=False, view=seen(mine, other), epoch=2) is None:
                assert max((mine - {pair}) & other, default=None) == max(mine & other, default=None)


def test_empty_slot_is_free_unless_in_use() -> None:
    assert reason_kept(None, in_use=False, view=seen(frozenset(PAIRS)), epoch=1) is None
    assert reason_kept(None, in_use=True, view=seen(frozenset(PAIRS)), epoch=1) is not None


def test_rank_alone_keeps_only_its_newest() -> None:
    alone = seen(frozenset(PAIRS))
    assert [reason_kept(pair, in_use=False, view=alone, epoch=2) is None for pair in PAIRS] == [
        True,
        True,
        False,
    ]


def test_newer_pair_waits_for_ranks_that_have_not_come_so_far() -> None:
    behind = BoardView((PAIRS[1], PAIRS[0]), (frozenset(PAIRS[:2]), frozenset(PAIRS[:1])))
    assert (
        reason_kept(PAIRS[1], in_use=False, view=behind, epoch=1)
        == "other ranks may still complete it"
    )
    assert (
        reason_kept(PAIRS[0], in_use=False, view=behind, epoch=1)
        == "it is the newest that all ranks hold"
    )


def test_rank_that_went_on_without_it_will_never_hold_it() -> None:
    held = frozenset({SnapshotId(1, 5)})
    for completed, gone in [(5, False), (6, False), (7, True), (None, False)]:
        far = passed([None], completed=completed, epoch=1)
        assert (
            overtaken(SnapshotId(1, 5), BoardView((SnapshotId(1, 5), far), (held, frozenset())))
            is gone
        )


def test_steps_of_this_epoch_count_beside_what_slots_hold() -> None:
    assert passed([SnapshotId(1, 9), None], completed=None, epoch=2) == SnapshotId(1, 9)
    assert passed([SnapshotId(1, 9), None], completed=8, epoch=2) == SnapshotId(2, 6)
    assert passed([SnapshotId(2, 9)], completed=8, epoch=2) == SnapshotId(2, 9)
    assert passed([], completed=None, epoch=2) is None
