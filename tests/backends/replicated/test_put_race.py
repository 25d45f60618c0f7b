"""Every combination of what up to three stores do with a put."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.replicated.quorums import quorums

from ckpt.backends.replicated import put_race as races
from ckpt.backends.replicated.policy import Quorum, ReplicationLimits, give_up_s, grace_s, stall_s
from ckpt.backends.replicated.put_race import PutDone, PutFailed, PutState

PACE = ReplicationLimits()
ACKS, SLOW, FAILS, REFUSES, HANGS, SECOND = (
    "acks",
    "acks late",
    "fails",
    "refuses",
    "hangs",
    "acks when tried again",
)
DOES = (ACKS, SLOW, FAILS, REFUSES, HANGS, SECOND)
SLOW_S = PACE.grace_s_max + 5
Q3 = Quorum(3, 2, frozenset(range(3)))


def run(
    quorum: Quorum, apart: frozenset[int], does: Sequence[str]
) -> tuple[PutDone | PutFailed, races.PutRace, float, list[list[float]]]:
    """Play a put; how it ended, when, and when each store was given the bytes."""
    race = races.begin_put(quorum, size_bytes=0, now_s=0.0, held_back=apart)
    now_s, steps = 0.0, 0
    given: list[list[float]] = [[] for _ in does]
    answers: list[tuple[float, int, str]] = []

    def give(place: int) -> None:
        given[place].append(now_s)
        what = does[place]
        if what == SECOND:
            what = ACKS if len(given[place]) > 1 else FAILS
        if what != HANGS:
            heapq.heappush(answers, (now_s + (SLOW_S if what == SLOW else 0.1), place, what))

    for place in range(quorum.stores):
        if place not in apart:
            give(place)
    while True:
        steps += 1
        assert steps < 1000, "the race doesn't end"
        match move := races.decide(race, now_s, limits=PACE):
            case races.SendTo(places):
                race = races.with_sent(race, places)
                for place in places:
                    give(place)
            case races.WaitForAck(until_s):
                assert until_s > now_s
                if answers and answers[0][0] <= until_s:
                    now_s, place, what = heapq.heappop(answers)
                    if what in (ACKS, SLOW):
                        race = races.with_ack(race, place, now_s)
                    else:
                        passing = what == FAILS
                        race = races.with_failure(
                            race, place, now_s, transient=passing, limits=PACE, jitter=0.5
                        )
                else:
                    now_s = until_s
            case _:
                return move, race, now_s, given


def check(quorum: Quorum, apart: frozenset[int], does: Sequence[str]) -> None:
    end, race, took_s, given = run(quorum, apart, does)
    acked = race.in_state(PutState.ACKED)
    can = {place for place, what in enumerate(does) if what in (ACKS, SLOW, SECOND)}
    assert acked <= can
    if isinstance(end, PutDone):
        assert quorum.is_write_quorum(acked)
        assert end.behind == frozenset(range(quorum.stores)) - acked
        assert race.quorum_s is not None
        assert took_s <= race.quorum_s + grace_s(PACE, race.quorum_s)
    else:
        assert not quorum.is_write_quorum(acked)
        assert not quorum.is_write_quorum(can)
    if quorum.is_write_quorum(can):
        assert isinstance(end, PutDone)
    assert took_s <= give_up_s(PACE, 0)
    assert all(len(times) <= PACE.tries_max for times in given)
    if quorum.is_write_quorum(
        {place for place in can if place not in apart and does[place] in (ACKS, SECOND)}
    ):
        assert all(not given[place] for place in apart)


@pytest.mark.slow
@pytest.mark.parametrize("stores", [1, 2, 3])
def test_every_combination_ends_at_the_quorum_or_where_it_cannot_be_reached(stores: int) -> None:
    subsets = [
        frozenset(c) for n in range(stores + 1) for c in itertools.combinations(range(stores), n)
    ]
    for quorum in quorums(stores):
        for apart in subsets:
            for does in itertools.product(DOES, repeat=stores):
                check(quorum, apart, does)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.integers(4, 6), st.data())
def test_more_stores_end_so_too(stores: int, data: st.DataObject) -> None:
    does = data.draw(st.lists(st.sampled_from(DOES), min_size=stores, max_size=stores))
    apart = data.draw(st.frozensets(st.integers(0, stores - 1)))
    check(data.draw(st.sampled_from(quorums(stores))), apart, does)


def test_all_quick_stores_end_the_put_without_the_grace() -> None:
    end, _, took_s, _ = run(Q3, frozenset(), [ACKS, ACKS, ACKS])
    assert (end, took_s) == (PutDone(frozenset()), 0.1)


def test_straggler_gets_the_grace_and_no_more() -> None:
    end, _, took_s, _ = run(Q3, frozenset(), [ACKS, HANGS, ACKS])
    assert end == PutDone(frozenset({1}))
    assert took_s == pytest.approx(0.1 + grace_s(PACE, 0.1))


def test_lost_quorum_fails_at_once() -> None:
    end, _, took_s, _ = run(Q3, frozenset(), [REFUSES, HANGS, REFUSES])
    assert (end, took_s) == (PutFailed(), 0.1)


def test_stores_left_apart_are_asked_where_the_others_hang() -> None:
    end, _, took_s, given = run(Q3, frozenset({2}), [ACKS, HANGS, ACKS])
    assert isinstance(end, PutDone)
    assert given[2] == [stall_s(PACE, 0)]
    assert took_s < give_up_s(PACE, 0)
    end, _, took_s, given = run(Q3, frozenset({2}), [ACKS, REFUSES, ACKS])
    assert given[2] == [0.1]


def test_grace_follows_the_quorum_within_its_limits() -> None:
    assert grace_s(PACE, 0.0) == PACE.grace_s_min
    assert grace_s(PACE, 2.0) == 2.0
    assert grace_s(PACE, 1e9) == PACE.grace_s_max
