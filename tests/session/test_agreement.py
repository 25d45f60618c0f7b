"""Where requests are placed, how orders merge, when due snapshots are skipped."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.errors import ConflictError
from ckpt.session.agreement import (
    Ack,
    Skip,
    SnapshotRequest,
    Take,
    boundary_for,
    merge_requests,
    take_or_skip,
)


def test_running_ranks_get_the_first_boundary_that_none_has_passed() -> None:
    for reached in product(range(4), repeat=3):
        boundary = boundary_for({rank: Ack(completed) for rank, completed in enumerate(reached)})
        assert boundary == max(reached) + 1
        assert all(boundary > completed for completed in reached)


def test_ended_and_running_ranks_meet_at_the_end_or_conflict() -> None:
    for acks in product(product(range(4), (False, True)), repeat=3):
        answers = {rank: Ack(*ack) for rank, ack in enumerate(acks)}
        ends = {ack.completed for ack in answers.values() if ack.ended}
        reached = max(ack.completed for ack in answers.values())
        if not ends:
            assert boundary_for(answers) == reached + 1
        elif len(ends) == 1 and reached <= max(ends):
            assert boundary_for(answers) == max(ends)
        else:
            with pytest.raises(ConflictError, match="ended at different steps"):
                boundary_for(answers)


def test_conflict_names_every_rank_and_who_ended() -> None:
    with pytest.raises(ConflictError, match=r"completed_by_rank=0:5\(ended\),1:7;"):
        boundary_for({1: Ack(7), 0: Ack(5, ended=True)})


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=64))
def test_placing_depends_on_no_order_of_ranks(reached: list[int]) -> None:
    forwards = {rank: Ack(n) for rank, n in enumerate(reached)}
    backwards = dict(reversed(list(forwards.items())))
    assert boundary_for(forwards) == boundary_for(backwards) == max(reached) + 1


ORDERS = st.lists(
    st.builds(
        SnapshotRequest, st.lists(st.sampled_from("abcd"), max_size=3).map(tuple), st.booleans()
    ),
    max_size=6,
)


@given(ORDERS)
def test_merged_order_has_each_tag_once_in_order_and_any_force(
    orders: list[SnapshotRequest],
) -> None:
    merged = merge_requests(orders)
    assert list(merged.tags) == list(dict.fromkeys(tag for order in orders for tag in order.tags))
    assert merged.forced == any(order.forced for order in orders)


@given(ORDERS, ORDERS)
def test_merging_in_two_steps_is_merging_at_once(
    first: list[SnapshotRequest], second: list[SnapshotRequest]
) -> None:
    assert merge_requests([merge_requests(first), merge_requests(second)]) == merge_requests(
        [*first, *second]
    )


def test_due_snapshot_is_taken_while_a_slot_is_free() -> None:
    for in_flight, slots in product(range(5), range(1, 5)):
        match take_or_skip(in_flight=in_flight, slots=slots):
            case Take():
                assert in_flight < slots
            case Skip(why):
                assert in_flight >= slots
                assert f"in_flight={in_flight} slots={slots}" in why
