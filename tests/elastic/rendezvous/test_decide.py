"""What agents do about what they see, as values: no membership, no clock."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest

from ckpt.cluster.membership.records import (
    EpochRecord,
    Leader,
    Member,
    NodeInfo,
    NodePlacement,
    View,
    ViewScope,
)
from ckpt.elastic.rendezvous.decide import (
    AgentStatus,
    AgentsView,
    HoldRound,
    PlacedInRound,
    PublishRound,
    RendezvousRound,
    RendezvousRules,
    RendezvousShut,
    RoundPending,
    RunUnranked,
    StandBy,
    count_present,
    decide_for_agent,
    decode_status,
    encode_round_note,
    encode_status,
    next_round,
    restart_request,
    round_of,
    round_problem,
    update_enough_since,
)
from ckpt.errors import IntegrityError

RULES = RendezvousRules(agents_min=2, agents_max=3, last_call_s=30.0, shrink_wait_s=5.0)


def waiting(last: int = 0) -> AgentStatus:
    return AgentStatus("waiting", last)


def running(number: int = 1) -> AgentStatus:
    return AgentStatus("running", number)


ALONE = AgentStatus("alone", 1)


def look(
    seats: Mapping[str, AgentStatus | None],
    places: str = "",
    *,
    number: int = 1,
    kept: bool = False,
    closed: str | None = None,
) -> AgentsView:
    """Agents by letter and what each does; ``places``: the letters of the round's agents, the first
    join of each."""
    members = tuple(
        Member(NodeInfo(node=f"{name}-1", host=name, slots=1), lease_id=7, joined_revision=place)
        for place, name in enumerate(sorted(seats))
    )
    record = EpochRecord(
        job="j",
        number=number,
        places=tuple(NodePlacement(f"{name}-1", 1) for name in places),
        leader="a-1",
        nodes_min=1,
        nodes_max=3,
        note=encode_round_note(5, 3),
    )
    view = View(
        job="j",
        revision=9,
        scope=ViewScope.ALL,
        leader=Leader("a-1", 1),
        epoch=record if places else None,
        members=members,
    )
    said = {f"{name}-1": seat for name, seat in seats.items() if seat is not None}
    return AgentsView(view, said, kept_by_keepers=kept, closed=closed)


def letters(found: PublishRound) -> str:
    return "".join(place.node[0] for place in found.places)


def decide(
    seen: AgentsView,
    *,
    rules: RendezvousRules = RULES,
    enough_since_s: float | None = 0.0,
    now_s: float = 0.0,
) -> PublishRound | HoldRound:
    return next_round(seen, enough_since_s, rules, now_s)


def test_all_that_may_come_begin_at_once() -> None:
    found = decide(look(dict.fromkeys("abc", waiting())))
    assert isinstance(found, PublishRound)
    assert letters(found) == "abc"


def test_the_minimum_waits_for_the_last_call() -> None:
    seen = look(dict.fromkeys("ab", waiting()))
    assert update_enough_since(None, seen, RULES, 10.0) == 10.0
    assert update_enough_since(10.0, seen, RULES, 20.0) == 10.0
    assert decide(seen, enough_since_s=10.0, now_s=39.0) == HoldRound(
        40.0, "waits for more agents. waiting=2 wanted=3"
    )
    assert isinstance(decide(seen, enough_since_s=10.0, now_s=40.0), PublishRound)


def test_too_few_wait() -> None:
    seen = look({"a": waiting()})
    assert update_enough_since(10.0, seen, RULES, 20.0) is None
    assert decide(seen) == HoldRound(math.inf, "too few agents. waiting=1 nodes_min=2")


def test_a_round_that_runs_is_left_alone() -> None:
    found = decide(look({"a": running(), "b": running(), "c": waiting()}, "ab"))
    assert isinstance(found, HoldRound)
    assert found.reason.startswith("agents of the round still run")


def test_nothing_begins_before_all_that_live_have_stopped() -> None:
    assert isinstance(
        decide(look({"a": waiting(1), "b": running(), "c": running()}, "abc")), HoldRound
    )
    found = decide(look({"a": waiting(1), "b": waiting(1), "c": waiting(1)}, "abc"))
    assert isinstance(found, PublishRound)
    assert letters(found) == "abc"


def test_who_is_about_to_run_a_round_is_not_taken_for_one_that_left_it() -> None:
    assert isinstance(decide(look({"a": waiting(1), "b": waiting(1)}, "ab", number=2)), HoldRound)


def test_a_spare_takes_the_lost_rank_at_once() -> None:
    found = decide(look({"b": waiting(1), "c": waiting(1), "d": waiting()}, "abc"))
    assert isinstance(found, PublishRound)
    assert letters(found) == "dbc"


def test_the_world_shrinks_after_a_while() -> None:
    seen = look({"b": waiting(1), "c": waiting(1)}, "abc")
    assert decide(seen, now_s=4.9) == HoldRound(5.0, "waits for more agents. waiting=2 wanted=3")
    found = decide(seen, now_s=5.0)
    assert isinstance(found, PublishRound)
    assert letters(found) == "bc"


def test_as_many_as_before_do_not_wait_for_more() -> None:
    assert isinstance(decide(look({"a": waiting(1), "b": waiting(1)}, "ab")), PublishRound)


def test_a_closed_rendezvous_has_no_round() -> None:
    assert isinstance(decide(look(dict.fromkeys("abc", waiting()), closed="over")), HoldRound)


def test_under_keepers_a_place_changes_hands_and_nobody_stops() -> None:
    found = decide(
        look({"b": running(), "c": running(), "d": waiting(), "e": waiting()}, "abc", kept=True)
    )
    assert isinstance(found, PublishRound)
    assert letters(found) == "dbc"
    found = decide(look({"a": waiting(1), "b": running(), "d": waiting()}, "ab", kept=True))
    assert isinstance(found, PublishRound)
    assert letters(found) == "ab"  # who comes back takes its own place
    assert isinstance(
        decide(look({"a": running(), "b": running(), "d": waiting()}, "ab", kept=True)), HoldRound
    )
    assert isinstance(decide(look({"b": running()}, "ab", kept=True)), HoldRound)


def test_what_becomes_of_who_waits() -> None:
    assert isinstance(
        decide_for_agent(look({"a": waiting(), "b": waiting()}, "ab"), "a", 0, RULES), PlacedInRound
    )
    assert isinstance(
        decide_for_agent(look({"a": waiting(1), "b": running()}, "ab"), "a", 1, RULES), RoundPending
    )
    running_two = {"a": running(), "b": running(), "c": waiting()}
    assert isinstance(decide_for_agent(look(running_two, "ab"), "c", 0, RULES), StandBy)
    warm = RendezvousRules(agents_min=2, agents_max=2, warm=True)
    assert isinstance(decide_for_agent(look(running_two, "ab"), "c", 0, warm), RunUnranked)
    assert isinstance(
        decide_for_agent(look({"b": running(), "c": waiting()}, "ab"), "c", 0, warm), RoundPending
    )  # it is needed
    assert isinstance(decide_for_agent(look({"c": waiting()}), "c", 0, RULES), RoundPending)
    assert isinstance(
        decide_for_agent(look(running_two, "ab", closed="over"), "c", 0, RULES), RendezvousShut
    )


def test_under_keepers_nobody_gets_a_round_again() -> None:
    warm = RendezvousRules(agents_min=2, agents_max=2, warm=True)
    back = look({"a": waiting(1), "b": running()}, "ab", kept=True)
    assert isinstance(decide_for_agent(back, "a", 1, warm), RunUnranked)
    assert isinstance(decide_for_agent(back, "a", 1, RULES), StandBy)
    placed = look({"c": waiting(), "b": running()}, "cb", number=2, kept=True)
    assert isinstance(decide_for_agent(placed, "c", 0, RULES), RunUnranked)


@pytest.mark.parametrize("kept", [False, True])
def test_who_is_asked_back(kept: bool) -> None:
    def count(
        seats: Mapping[str, AgentStatus],
        places: str = "ab",
        *,
        rules: RendezvousRules = RULES,
        lost_for_s: float = 9.0,
    ) -> int:
        seen = look(seats, places, kept=kept)
        mine = round_of(look(seats, "ab").view.epoch)
        return restart_request(seen, mine, rules, lost_for_s)[0]

    least_one = RendezvousRules(agents_min=1, agents_max=3)
    assert count({"a": running(), "b": running(), "c": waiting()}) == 0
    assert count({"a": running(), "b": waiting(1), "c": waiting()}) == (0 if kept else 2)
    assert count({"a": running(), "c": waiting()}) == (0 if kept else 1)
    assert count({"a": running()}) == 0  # too few would be left
    assert count({"a": running()}, rules=least_one) == (0 if kept else 1)
    assert (
        count({"a": running()}, rules=least_one, lost_for_s=0.1) == 0
    )  # it may only have lost its lease
    grow = RendezvousRules(agents_min=2, agents_max=3, grow=True)
    assert count({"a": running(), "b": running(), "c": waiting()}, rules=grow) == (0 if kept else 1)


def test_an_agent_that_others_went_on_without_is_asked_back() -> None:
    mine = round_of(look({}, "ab").view.epoch)
    assert (
        restart_request(
            look({"a": running(), "b": running(2), "c": running(2)}, "bc", number=2), mine, RULES
        )[0]
        == 1
    )
    assert (
        restart_request(look({"a": running()}, "bc", number=2, closed="over"), mine, RULES)[0] == 0
    )


def test_an_agent_is_the_same_after_it_joined_anew() -> None:
    seen = look({"a": running(), "b": running()}, "ab")
    again = Member(NodeInfo(node="a-2", host="a", slots=1), lease_id=8, joined_revision=5)
    view = View(
        job="j",
        revision=9,
        scope=ViewScope.ALL,
        epoch=seen.view.epoch,
        members=(again, seen.view.members[1]),
    )
    found = AgentsView(view, {"a-2": running(), "b-1": running()})
    assert (found.lost, found.running) == ((), ("a", "b"))


def test_whether_a_round_can_begin() -> None:
    mine = round_of(look({}, "ab").view.epoch)
    assert round_problem(look({"a": running(), "b": waiting()}, "ab"), mine) == ""
    assert round_problem(look({"a": running()}, "ab"), mine) == "b is gone"
    assert round_problem(look({"a": running(), "b": waiting(1)}, "ab"), mine) == "b left it"
    assert (
        round_problem(look({"a": running(), "b": running()}, "ab", number=2), mine)
        == "another round began"
    )


def test_who_is_waited_for_at_the_end() -> None:
    mine = round_of(look({}, "abc").view.epoch)
    assert count_present(look({"a": running(), "b": waiting()}, "abc"), mine) == 2
    assert count_present(look({"a": running(), "b": ALONE, "c": waiting(1)}, "abc"), mine) == 1


def test_words_that_are_none() -> None:
    assert decode_status(encode_status(running())) == running()
    assert decode_status(b"{}") is None
    record = EpochRecord(
        job="j", number=1, places=(NodePlacement("a-1", 1),), leader="a-1", nodes_min=1, nodes_max=1
    )
    with pytest.raises(IntegrityError):
        round_of(record)


def test_round_of_an_older_release_does_not_say_which_end_is_its_own() -> None:
    record = EpochRecord(
        job="j",
        number=4,
        places=(NodePlacement("a-1", 1),),
        leader="a-1",
        nodes_min=1,
        nodes_max=1,
        note='{"lease":5}',
    )
    assert round_of(record) == RendezvousRound(4, ("a",), 5, -1)
    assert round_of(replace(record, note=encode_round_note(5, 7))).ends_after == 7
