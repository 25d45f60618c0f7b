"""Every combination of what up to three stores say, and of who is left alone: what a read then does
and says."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.replicated.quorums import quorums

from ckpt.backends.replicated import read_race as races
from ckpt.backends.replicated.policy import Quorum, ReplicationLimits, stall_s
from ckpt.backends.replicated.read_race import DeliverRead, GiveUpRead, ReadFailure, ReadResult

PACE = ReplicationLimits()
HANGS = None
ANSWERS = (
    ReadResult.RIGHT,
    ReadResult.WRONG,
    ReadResult.SHORT,
    ReadResult.MISSING,
    ReadResult.SILENT,
    HANGS,
)
LATE_S = 1.0

Script = Mapping[int, Sequence[tuple[float, "ReadResult | None"]]]
"""By place, for each time that it is asked: how long it takes and what it says; the last one
repeats."""


def run(
    quorum: Quorum, usable: frozenset[int], script: Script, *, jitter: float = 0.5
) -> tuple[DeliverRead | GiveUpRead, list[tuple[float, int]], float]:
    """Play a read; how it ended, who was asked when, and how long it took."""
    race = races.begin_read(quorum, tuple(script), usable)
    now_s, steps = 0.0, 0
    asked: list[tuple[float, int]] = []
    times = dict.fromkeys(script, 0)
    answers: list[tuple[float, int, ReadResult]] = []
    while True:
        steps += 1
        assert steps < 1000, "the race doesn't end"
        race, move = races.decide(race, now_s, limits=PACE, jitter=jitter)
        match move:
            case races.AskStore(place):
                assert place not in race.pending
                asked.append((now_s, place))
                takes_s, says = script[place][min(times[place], len(script[place]) - 1)]
                times[place] += 1
                if says is not None:
                    heapq.heappush(answers, (now_s + takes_s, place, says))
                race = races.with_asked(
                    race, place, late_s=now_s + LATE_S, lost_s=now_s + stall_s(PACE, 0)
                )
            case races.WaitForRead(until_s):
                assert until_s > now_s
                if answers and answers[0][0] <= until_s:
                    now_s, place, says = heapq.heappop(answers)
                    race = races.with_result(race, place, says)
                else:
                    now_s = until_s
            case _:
                return move, asked, now_s


def check(quorum: Quorum, usable: frozenset[int], says: Sequence[ReadResult | None]) -> None:
    script = {place: [(0.1, what)] for place, what in enumerate(says)}
    end, asked, took_s = run(quorum, usable, script)
    places = [place for _, place in asked]
    missing = {place for place, what in enumerate(says) if what is ReadResult.MISSING}
    nowhere = quorum.proves_absent(missing)
    bad = any(what in (ReadResult.WRONG, ReadResult.SHORT) for what in says)
    silent = any(what in (ReadResult.SILENT, HANGS) for what in says)
    right = {place for place, what in enumerate(says) if what is ReadResult.RIGHT}
    match end:
        case DeliverRead(place):
            assert place in right
            assert took_s <= LATE_S * len(says) + PACE.retry_s_max * 3
        case GiveUpRead(ReadFailure.NOT_FOUND):
            assert nowhere
            assert not right & usable
        case GiveUpRead(ReadFailure.DAMAGED):
            assert bad
            assert not right
            assert not silent
        case GiveUpRead(ReadFailure.UNAVAILABLE):
            assert not right
            assert silent or not nowhere
            assert not nowhere or bad
    if right & usable:
        assert isinstance(end, DeliverRead)
    if right and not nowhere:
        assert isinstance(end, DeliverRead)
    for place in range(len(says)):
        if says[place] not in (ReadResult.SILENT, HANGS):
            assert places.count(place) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("stores", [1, 2, 3])
def test_every_combination_of_answers_ends_in_the_right_verdict(stores: int) -> None:
    subsets = [
        frozenset(c) for n in range(stores + 1) for c in itertools.combinations(range(stores), n)
    ]
    for quorum in quorums(stores):
        for usable in subsets:
            for says in itertools.product(ANSWERS, repeat=stores):
                check(quorum, usable, says)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.integers(4, 6), st.data())
def test_more_stores_end_in_the_right_verdict_too(stores: int, data: st.DataObject) -> None:
    says = data.draw(st.lists(st.sampled_from(ANSWERS), min_size=stores, max_size=stores))
    usable = data.draw(st.frozensets(st.integers(0, stores - 1)))
    check(data.draw(st.sampled_from(quorums(stores))), usable, says)


def three(*says: tuple[float, ReadResult | None]) -> Script:
    return {place: [what] for place, what in enumerate(says)}


Q3 = Quorum(3, 2, frozenset(range(3)))
ALL = frozenset(range(3))


def test_nobody_else_is_asked_while_the_first_is_in_time() -> None:
    end, asked, _ = run(
        Q3, ALL, three((0.9, ReadResult.RIGHT), (0, ReadResult.RIGHT), (0, ReadResult.RIGHT))
    )
    assert (end, asked) == (DeliverRead(0), [(0.0, 0)])


def test_late_first_is_hedged_and_the_first_right_one_wins() -> None:
    end, asked, took_s = run(
        Q3, ALL, three((9.0, ReadResult.RIGHT), (0.2, ReadResult.RIGHT), (0, ReadResult.RIGHT))
    )
    assert (end, asked, took_s) == (DeliverRead(1), [(0.0, 0), (1.0, 1)], 1.2)


def test_bad_answer_sends_on_at_once() -> None:
    end, asked, _ = run(
        Q3, ALL, three((0.1, ReadResult.WRONG), (0.1, ReadResult.SILENT), (0.1, ReadResult.RIGHT))
    )
    assert end == DeliverRead(2)
    assert [round(when, 3) for when, _ in asked] == [0.0, 0.1, 0.2]


def test_missing_object_is_looked_for_in_all_others_at_once() -> None:
    end, asked, took_s = run(
        Q3,
        ALL,
        three((0.1, ReadResult.MISSING), (0.5, ReadResult.MISSING), (0.5, ReadResult.MISSING)),
    )
    assert end == GiveUpRead(ReadFailure.NOT_FOUND)
    assert [round(when, 3) for when, _ in asked] == [0.0, 0.1, 0.1]
    assert took_s == pytest.approx(0.6)


def test_proven_absence_does_not_wait_for_a_hanging_store() -> None:
    end, _, took_s = run(
        Q3, ALL, three((0.1, ReadResult.MISSING), (0.1, ReadResult.MISSING), (0, HANGS))
    )
    assert end == GiveUpRead(ReadFailure.NOT_FOUND)
    assert took_s <= 2 * LATE_S


def test_silent_stores_are_asked_again_with_growing_pauses_up_to_the_limit() -> None:
    script = {place: [(0.0, ReadResult.SILENT)] for place in range(3)}
    end, asked, took_s = run(Q3, ALL, script)
    assert end == GiveUpRead(ReadFailure.UNAVAILABLE)
    assert [place for _, place in asked] == [0, 1, 2] * PACE.tries_max
    assert took_s == pytest.approx(PACE.retry_s_first * 3)


def test_store_that_was_silent_once_delivers_the_second_time() -> None:
    script = {
        0: [(0.0, ReadResult.SILENT), (0.1, ReadResult.RIGHT)],
        1: [(0.0, ReadResult.SILENT)],
        2: [(0.0, ReadResult.MISSING)],
    }
    assert run(Q3, ALL, script)[0] == DeliverRead(0)
