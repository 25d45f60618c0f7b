"""What the leader decides: scenes one by one, all small cases, and what holds for any."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.membership.views import after, decided, view_of

from ckpt.cluster.membership.decide import (
    KeepEpoch,
    MembershipOptions,
    NewEpoch,
    WaitForNodes,
    WaitTimers,
    confirmed_suspects,
    decide,
    update_timers,
)
from ckpt.cluster.membership.records import View, decode_epoch, encode_epoch
from ckpt.errors import UsageError
from ckpt.values import SnapshotId


def nodes_of(decision: object) -> tuple[str, ...]:
    assert isinstance(decision, NewEpoch), decision
    return tuple(place.node for place in decision.record.places)


def options(low: int = 1, high: int = 4, **more: object) -> MembershipOptions:
    return MembershipOptions(nodes_min=low, nodes_max=high, **more)  # type: ignore[arg-type]


def test_the_first_epoch_waits_for_the_minimum() -> None:
    decision = decided(view_of("a"), options(2))
    assert isinstance(decision, WaitForNodes)
    assert (decision.until_s, "too few nodes" in decision.reason) == (math.inf, True)


def test_the_first_epoch_waits_for_a_last_call_and_no_longer() -> None:
    view, job = view_of("ab"), options(2, 3, last_call_s=10.0)
    noticed = update_timers(WaitTimers(), view, job, 100.0)
    assert decide(view, noticed, job, 100.0) == WaitForNodes(
        110.0, "last call for more nodes. nodes=2 nodes_max=3"
    )
    noticed = update_timers(noticed, view, job, 109.0)
    assert isinstance(decide(view, noticed, job, 109.9), WaitForNodes)
    assert nodes_of(decide(view, noticed, job, 110.0)) == ("a", "b")


def test_a_last_call_begins_anew_when_the_minimum_is_lost() -> None:
    job = options(2, 3)
    noticed = update_timers(WaitTimers(), view_of("ab"), job, 100.0)
    noticed = update_timers(noticed, view_of("a"), job, 101.0)
    assert update_timers(noticed, view_of("ab"), job, 102.0).enough_since_s == 102.0


def test_the_first_epoch_opens_at_once_with_the_maximum_and_the_others_stand_by() -> None:
    view = view_of("dcba")
    decision = decided(view, options(2, 3), now_s=0.0)
    assert nodes_of(decision) == ("a", "b", "c")
    assert isinstance(decision, NewEpoch)
    record = decision.record
    assert (record.number, record.leader, record.world_size, record.removed) == (1, "a", 6, ())
    assert record.ranks == {"a": range(2), "b": range(2, 4), "c": range(4, 6)}
    assert record.rank0_node == "a"
    assert isinstance(decided(after(view, decision), options(2, 3)), KeepEpoch)


def test_a_new_epoch_exceeds_what_was_seen_anywhere() -> None:
    decision = decided(view_of("ab"), options(2, 2, epoch_floor=41, resumes=SnapshotId(40, 7)))
    assert isinstance(decision, NewEpoch)
    assert (decision.record.number, decision.record.resumes) == (42, SnapshotId(40, 7))


def test_neighbours_are_placed_beside_each_other() -> None:
    view = view_of("abcd", domains={"a": "r2", "b": "r1", "c": "r2", "d": "r1"})
    assert nodes_of(decided(view, options())) == ("b", "d", "a", "c")


def test_nothing_lost_changes_nothing_and_a_newcomer_disturbs_nobody() -> None:
    assert isinstance(decided(view_of("abc", places="ab"), options(1, 2)), KeepEpoch)
    decision = decided(view_of("abc", places="ab"), options(1, 3))
    assert decision == KeepEpoch("1 standbys wait for a boundary")


def test_the_world_grows_at_a_boundary_and_nobody_moves() -> None:
    assert nodes_of(decided(view_of("abcd", places="dc"), options(1, 3, may_grow=True))) == (
        "d",
        "c",
        "a",
    )


def test_an_expired_lease_gives_its_ranks_to_a_standby_at_once() -> None:
    decision = decided(view_of("acx", places="abc"), options(1, 3, shrink_wait_s=60.0), now_s=0.0)
    assert nodes_of(decision) == ("a", "x", "c")
    assert isinstance(decision, NewEpoch)
    assert [(one.node, one.reason) for one in decision.record.removed] == [
        ("b", "its lease expired, or it left")
    ]
    assert decision.remove == ()


def test_a_standby_that_holds_the_lost_ranks_state_comes_first() -> None:
    lost = view_of(
        "acxyz", places="abc", holdings={"y": {2: 10, 3: 5}, "z": {0: 1000}, "x": {2: 12}}
    )
    assert nodes_of(decided(lost, options())) == ("a", "y", "c")


def test_of_two_lost_nodes_each_goes_to_who_holds_most_of_it() -> None:
    lost = view_of("cxy", places="abc", holdings={"x": {0: 5, 2: 9}, "y": {0: 4, 2: 8}})
    assert nodes_of(decided(lost, options())) == ("y", "x", "c")


def test_what_is_held_of_a_world_of_another_size_counts_for_nothing() -> None:
    lost = view_of("acxy", places="abc", holdings={"y": {2: 10}})
    assert lost.by_node["y"].inventory is not None
    lost.by_node["y"].inventory.size_bytes  # noqa: B018
    other = view_of("acxy", places="abcd", holdings={"y": {2: 10}})
    assert nodes_of(decided(lost, options())) == ("a", "y", "c")
    swapped = View(
        job="j",
        revision=1,
        scope=lost.scope,
        leader=lost.leader,
        epoch=lost.epoch,
        epoch_revision=7,
        members=other.members,
    )
    assert nodes_of(decided(swapped, options())) == ("a", "x", "c")


def test_standbys_spread_over_failure_domains() -> None:
    domains = {"a": "r1", "c": "r1", "x": "r1", "y": "r2"}
    assert nodes_of(decided(view_of("acxy", places="abc", domains=domains), options())) == (
        "a",
        "y",
        "c",
    )


def test_the_world_shrinks_when_no_standby_is_left_and_the_minimum_allows() -> None:
    decision = decided(view_of("ac", places="abc"), options(2, 3))
    assert nodes_of(decision) == ("a", "c")
    decision = decided(view_of("a", places="abc"), options(2, 3))
    assert isinstance(decision, WaitForNodes)
    assert decision.until_s == math.inf


def test_a_lost_node_may_have_some_time_to_come_back() -> None:
    view, job = view_of("ac", places="abc"), options(1, 3, shrink_wait_s=10.0)
    assert decided(view, job, now_s=5.0) == WaitForNodes(
        10.0, "node b lost, and no standby: it may come back before the world shrinks"
    )
    assert nodes_of(decided(view, job, now_s=10.0)) == ("a", "c")


def test_two_witnesses_open_an_epoch_and_one_does_not() -> None:
    one = view_of("abcx", places="abc", suspicions=[("b", "a")])
    assert decided(one, options(1, 3)) == KeepEpoch("suspected by too few: b and 0 others")
    two = view_of("abcx", places="abc", suspicions=[("b", "a"), ("b", "c")])
    decision = decided(two, options(1, 3))
    assert nodes_of(decision) == ("a", "x", "c")
    assert isinstance(decision, NewEpoch)
    assert decision.remove == ("b",)
    assert decision.record.removed[0].reason == "suspected by 2 nodes, as a says: reset"


def test_a_node_says_nothing_about_itself_nor_do_nodes_that_are_gone() -> None:
    view = view_of("abc", places="abc", suspicions=[("b", "b"), ("b", "gone"), ("b", "a")])
    assert isinstance(decided(view, options(1, 3)), KeepEpoch)


def test_a_standby_that_is_suspected_costs_no_epoch() -> None:
    view = view_of("abcx", places="abc", suspicions=[("x", "a"), ("x", "b")])
    assert isinstance(decided(view, options(1, 3)), KeepEpoch)
    lost = view_of("acxy", places="abc", suspicions=[("x", "a"), ("x", "c")])
    decision = decided(lost, options(1, 3))
    assert nodes_of(decision) == ("a", "y", "c")
    assert isinstance(decision, NewEpoch)
    assert decision.remove == ("x",)


@pytest.mark.parametrize(
    ("left", "right"), [("abcde", "fgh"), ("abc", "def"), ("fgh", "abcde"), ("ab", "cd")]
)
def test_two_halves_that_suspect_each_other_leave_one_half(left: str, right: str) -> None:
    words = [pair for a in left for b in right for pair in ((a, b), (b, a))]
    view = view_of(left + right, places=left + right, suspicions=words, leader=left[0])
    out = set(confirmed_suspects(view, 2))
    winner = max((left, right), key=lambda half: (len(half), left[0] in half))
    assert not out & set(winner)
    assert (
        len(set(left + right) - out - set(winner)) <= 1
    )  # the last of the others has too few accusers left


def test_when_nobody_is_left_an_epoch_is_made_of_who_came() -> None:
    view = view_of("xyz", places="abc", holdings={"z": {0: 7, 1: 7}, "x": {4: 1}})
    decision = decided(view, options(2, 3))
    assert nodes_of(decision) == ("z", "y", "x")
    assert isinstance(decision, NewEpoch)
    assert decision.record.number == 5
    assert isinstance(decided(view_of("x", places="abc"), options(2, 3)), WaitForNodes)


def test_a_standby_of_other_slots_fits_no_place_and_is_used_before_the_world_loses_a_node() -> None:
    view = view_of("acx", places="abc", slots={"x": 4})
    decision = decided(view, options())
    assert nodes_of(decision) == ("a", "c", "x")
    assert isinstance(decision, NewEpoch)
    assert decision.record.ranks == {"a": range(2), "c": range(2, 4), "x": range(4, 8)}


def test_where_nobody_leads_nothing_is_decided() -> None:
    assert decided(view_of("ab", leader=None), options()) == WaitForNodes(math.inf, "no node leads")


@pytest.mark.parametrize(
    "words",
    [
        {"nodes_min": 0, "nodes_max": 1},
        {"nodes_min": 3, "nodes_max": 2},
        {"nodes_min": 1, "nodes_max": 1, "witnesses_min": 0},
        {"nodes_min": 1, "nodes_max": 1, "epoch_floor": -1},
    ],
)
def test_options_that_make_no_sense_are_refused(words: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        MembershipOptions(**words)  # type: ignore[arg-type]


def check(view: View, job: MembershipOptions, *, now_s: float = 100.0) -> None:
    """All that must hold for a decision."""
    decision = decided(view, job, now_s=now_s)
    assert decision == decided(view, job, now_s=now_s)
    assert decision.reason
    old = view.epoch
    out = confirmed_suspects(view, job.witnesses_min)
    live = {member.node for member in view.members} - set(out)
    lost = [place.node for place in old.places if place.node not in live] if old else []
    if not isinstance(decision, NewEpoch):
        # Something lost is never let be where enough are left and no time is given.
        if view.leader is not None and old is not None and lost and len(lost) < len(old.places):
            assert isinstance(decision, WaitForNodes)
            assert min(len(live), len(old.places)) < job.nodes_min or now_s < job.shrink_wait_s
        return
    record = decision.record
    names = [place.node for place in record.places]
    assert set(names) <= live
    assert record.number > (old.number if old else 0)
    assert record.number > job.epoch_floor
    assert job.nodes_min <= len(names) <= job.nodes_max
    ranks = [rank for node in names for rank in record.ranks[node]]
    assert ranks == list(range(record.world_size))
    assert all(len(record.ranks[node]) == view.by_node[node].info.slots for node in names)
    assert set(decision.remove) == set(out)
    assert decode_epoch(encode_epoch(record)) == record
    unused = live - set(names)
    if old is not None and len(lost) < len(old.places):
        assert job.may_grow or lost
        if record.world_size == old.world_size and len(names) == len(old.places):
            slots = {place.slots for place in old.places} | {
                view.by_node[node].info.slots for node in live
            }
            if len(slots) == 1:
                assert all(
                    record.ranks[node] == old.ranks[node] for node in names if node in old.ranks
                )
        if len(names) < len(old.places):
            assert not unused  # a standby is used before the world shrinks
        survivors = [place.node for place in old.places if place.node in live]
        assert [node for node in names if node in survivors] == survivors
    else:
        assert len(names) == min(len(live), job.nodes_max)
    again = decided(after(view, decision), job, now_s=now_s)
    assert isinstance(again, KeepEpoch), again


def subsets(nodes: str) -> Iterator[tuple[str, ...]]:
    for count in range(len(nodes) + 1):
        yield from itertools.combinations(nodes, count)


@pytest.mark.slow
@pytest.mark.parametrize("may_grow", [False, True])
def test_every_small_job(may_grow: bool) -> None:
    """Each epoch of up to four of five nodes, each set of living nodes, each minimum and maximum,
    before and after waiting."""
    count = 0
    epochs = [None, *(places for places in subsets("abcde") if 1 <= len(places) <= 4)]
    for places in epochs:
        for live in subsets("abcde"):
            for low in range(1, 5):
                for high in range(max(low, len(places or ())), 6):
                    if places is not None and len(places) < low:
                        continue
                    job = options(low, high, may_grow=may_grow, shrink_wait_s=5.0)
                    view = view_of(live, places=places)
                    for now_s in (6.0,) if may_grow else (4.0, 6.0):
                        check(view, job, now_s=now_s)
                        count += 1
    assert count > 4_000


@pytest.mark.slow
def test_every_suspicion_among_four() -> None:
    """Each epoch of two or three of four nodes, and each graph of who suspects whom."""
    pairs = list(itertools.permutations("abcd", 2))
    job = options(1, 3)
    for places in ("ab", "abc"):
        for mask in range(1 << len(pairs)):
            words = [pair for bit, pair in enumerate(pairs) if mask >> bit & 1]
            check(view_of("abcd", places=places, suspicions=words), job)


@st.composite
def views(draw: st.DrawFn) -> tuple[View, MembershipOptions]:
    names = [f"n{number:02d}" for number in range(14)]
    live = draw(st.sets(st.sampled_from(names), min_size=1))
    places = draw(
        st.none() | st.lists(st.sampled_from(names), unique=True, min_size=1, max_size=10)
    )
    odd = draw(st.booleans())
    slots = {name: draw(st.integers(1, 3)) if odd else 2 for name in names}
    holdings = {
        name: draw(st.dictionaries(st.integers(0, 19), st.integers(0, 9), max_size=4))
        if draw(st.booleans())
        else {}
        for name in names
    }
    world = sum(slots[name] for name in places or ())
    holdings = {
        name: {rank: size for rank, size in held.items() if rank < world}
        for name, held in holdings.items()
    }
    view = view_of(
        live,
        places=places,
        slots=slots,
        holdings=holdings,
        domains={name: f"r{draw(st.integers(0, 3))}" for name in names},
        suspicions=draw(
            st.lists(st.tuples(st.sampled_from(names), st.sampled_from(names)), max_size=20)
        ),
    )
    low = draw(st.integers(1, len(places) if places else 5))
    high = draw(st.integers(max(low, len(places or ())), 14))
    return view, options(
        low, high, may_grow=draw(st.booleans()), epoch_floor=draw(st.integers(0, 9))
    )


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(views())
def test_what_holds_for_any_decision(case: tuple[View, MembershipOptions]) -> None:
    check(*case)


def test_a_job_of_many_nodes_is_decided_quickly_enough() -> None:
    """12,500 nodes, all of which come anew and hold what they held before."""
    old = [f"old{number:05d}" for number in range(12_500)]
    new = [f"new{number:05d}" for number in range(12_500)]
    holdings = {node: {2 * number: 7, 2 * number + 1: 7} for number, node in enumerate(new)}
    view = view_of(new, places=old, holdings=holdings)
    decision = decided(view, options(12_000, 12_500))
    assert nodes_of(decision) == tuple(new)
    assert isinstance(decision, NewEpoch)
    assert len(encode_epoch(decision.record)) < 400_000
