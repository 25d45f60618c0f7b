"""What agents do about what they see, as values: no membership, no clock."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest

from ckpt.cluster.membership.records import EpochRecord, Leader, Member, NodeInfo, Place, Scope, View
from ckpt.elastic.rendezvous.decide import (
    Apart,
    Hold,
    Look,
    Pending,
    Publish,
    Rules,
    Seat,
    Seated,
    Shut,
    Standby,
    ask_back,
    broken,
    decode_seat,
    encode_seat,
    next_round,
    notice,
    present,
    round_note,
    round_of,
    seat_for,
)
from ckpt.errors import IntegrityError

RULES = Rules(agents_min=2, agents_max=3, last_call_s=30.0, shrink_s=5.0)


def waiting(last: int = 0) -> Seat:
    return Seat("waiting", last)


def running(number: int = 1) -> Seat:
    return Seat("running", number)


ALONE = Seat("alone", 1)


def look(
    seats: Mapping[str, Seat | None],
    places: str = "",
    *,
    number: int = 1,
    kept: bool = False,
    closed: str | None = None,
) -> Look:
    """Agents by letter and what each does; ``places``: the letters of the round's agents, the first join of each."""
    members = tuple(
        Member(NodeInfo(node=f"{name}-1", host=name, slots=1), lease_id=7, joined=place)
        for place, name in enumerate(sorted(seats))
    )
    record = EpochRecord(
        job="j", number=number, places=tuple(Place(f"{name}-1", 1) for name in places), leader="a-1", nodes_min=1,
        nodes_max=3, note=round_note(5),
    )  # fmt: skip
    view = View(
        job="j", revision=9, scope=Scope.ALL, leader=Leader("a-1", 1), epoch=record if places else None, members=members
    )
    said = {f"{name}-1": seat for name, seat in seats.items() if seat is not None}
    return Look(view, said, kept=kept, closed=closed)


def letters(found: Publish) -> str:
    return "".join(place.node[0] for place in found.places)


def decide(
    seen: Look, *, rules: Rules = RULES, enough_since_s: float | None = 0.0, now_s: float = 0.0
) -> Publish | Hold:
    return next_round(seen, enough_since_s, rules, now_s)


def test_all_that_may_come_begin_at_once() -> None:
    found = decide(look(dict.fromkeys("abc", waiting())))
    assert isinstance(found, Publish)
    assert letters(found) == "abc"


def test_the_minimum_waits_for_the_last_call() -> None:
    seen = look(dict.fromkeys("ab", waiting()))
    assert notice(None, seen, RULES, 10.0) == 10.0
    assert notice(10.0, seen, RULES, 20.0) == 10.0
    assert decide(seen, enough_since_s=10.0, now_s=39.0) == Hold(40.0, "waits for more agents. waiting=2 wanted=3")
    assert isinstance(decide(seen, enough_since_s=10.0, now_s=40.0), Publish)


def test_too_few_wait() -> None:
    seen = look({"a": waiting()})
    assert notice(10.0, seen, RULES, 20.0) is None
    assert decide(seen) == Hold(math.inf, "too few agents. waiting=1 nodes_min=2")


def test_a_round_that_runs_is_left_alone() -> None:
    found = decide(look({"a": running(), "b": running(), "c": waiting()}, "ab"))
    assert isinstance(found, Hold)
    assert found.why.startswith("agents of the round still run")


def test_nothing_begins_before_all_that_live_have_stopped() -> None:
    assert isinstance(decide(look({"a": waiting(1), "b": running(), "c": running()}, "abc")), Hold)
    found = decide(look({"a": waiting(1), "b": waiting(1), "c": waiting(1)}, "abc"))
    assert isinstance(found, Publish)
    assert letters(found) == "abc"


def test_who_is_about_to_run_a_round_is_not_taken_for_one_that_left_it() -> None:
    assert isinstance(decide(look({"a": waiting(1), "b": waiting(1)}, "ab", number=2)), Hold)


def test_a_spare_takes_the_lost_rank_at_once() -> None:
    found = decide(look({"b": waiting(1), "c": waiting(1), "d": waiting()}, "abc"))
    assert isinstance(found, Publish)
    assert letters(found) == "dbc"


def test_the_world_shrinks_after_a_while() -> None:
    seen = look({"b": waiting(1), "c": waiting(1)}, "abc")
    assert decide(seen, now_s=4.9) == Hold(5.0, "waits for more agents. waiting=2 wanted=3")
    found = decide(seen, now_s=5.0)
    assert isinstance(found, Publish)
    assert letters(found) == "bc"


def test_as_many_as_before_do_not_wait_for_more() -> None:
    assert isinstance(decide(look({"a": waiting(1), "b": waiting(1)}, "ab")), Publish)


def test_a_closed_rendezvous_has_no_round() -> None:
    assert isinstance(decide(look(dict.fromkeys("abc", waiting()), closed="over")), Hold)


def test_under_keepers_a_place_changes_hands_and_nobody_stops() -> None:
    found = decide(look({"b": running(), "c": running(), "d": waiting(), "e": waiting()}, "abc", kept=True))
    assert isinstance(found, Publish)
    assert letters(found) == "dbc"
    found = decide(look({"a": waiting(1), "b": running(), "d": waiting()}, "ab", kept=True))
    assert isinstance(found, Publish)
    assert letters(found) == "ab"  # who comes back takes its own place
    assert isinstance(decide(look({"a": running(), "b": running(), "d": waiting()}, "ab", kept=True)), Hold)
    assert isinstance(decide(look({"b": running()}, "ab", kept=True)), Hold)


def test_what_becomes_of_who_waits() -> None:
    assert isinstance(seat_for(look({"a": waiting(), "b": waiting()}, "ab"), "a", 0, RULES), Seated)
    assert isinstance(seat_for(look({"a": waiting(1), "b": running()}, "ab"), "a", 1, RULES), Pending)
    running_two = {"a": running(), "b": running(), "c": waiting()}
    assert isinstance(seat_for(look(running_two, "ab"), "c", 0, RULES), Standby)
    warm = Rules(agents_min=2, agents_max=2, warm=True)
    assert isinstance(seat_for(look(running_two, "ab"), "c", 0, warm), Apart)
    assert isinstance(seat_for(look({"b": running(), "c": waiting()}, "ab"), "c", 0, warm), Pending)  # it is needed
    assert isinstance(seat_for(look({"c": waiting()}), "c", 0, RULES), Pending)
    assert isinstance(seat_for(look(running_two, "ab", closed="over"), "c", 0, RULES), Shut)


def test_under_keepers_nobody_gets_a_round_again() -> None:
    warm = Rules(agents_min=2, agents_max=2, warm=True)
    back = look({"a": waiting(1), "b": running()}, "ab", kept=True)
    assert isinstance(seat_for(back, "a", 1, warm), Apart)
    assert isinstance(seat_for(back, "a", 1, RULES), Standby)
    placed = look({"c": waiting(), "b": running()}, "cb", number=2, kept=True)
    assert isinstance(seat_for(placed, "c", 0, RULES), Apart)


@pytest.mark.parametrize("kept", [False, True])
def test_who_is_asked_back(kept: bool) -> None:
    def count(seats: Mapping[str, Seat], places: str = "ab", *, rules: Rules = RULES, lost_for_s: float = 9.0) -> int:
        seen = look(seats, places, kept=kept)
        mine = round_of(look(seats, "ab").view.epoch)
        return ask_back(seen, mine, rules, lost_for_s)[0]

    least_one = Rules(agents_min=1, agents_max=3)
    assert count({"a": running(), "b": running(), "c": waiting()}) == 0
    assert count({"a": running(), "b": waiting(1), "c": waiting()}) == (0 if kept else 2)
    assert count({"a": running(), "c": waiting()}) == (0 if kept else 1)
    assert count({"a": running()}) == 0  # too few would be left
    assert count({"a": running()}, rules=least_one) == (0 if kept else 1)
    assert count({"a": running()}, rules=least_one, lost_for_s=0.1) == 0  # it may only have lost its lease
    grow = Rules(agents_min=2, agents_max=3, grow=True)
    assert count({"a": running(), "b": running(), "c": waiting()}, rules=grow) == (0 if kept else 1)


def test_an_agent_that_others_went_on_without_is_asked_back() -> None:
    mine = round_of(look({}, "ab").view.epoch)
    assert ask_back(look({"a": running(), "b": running(2), "c": running(2)}, "bc", number=2), mine, RULES)[0] == 1
    assert ask_back(look({"a": running()}, "bc", number=2, closed="over"), mine, RULES)[0] == 0


def test_an_agent_is_the_same_after_it_joined_anew() -> None:
    seen = look({"a": running(), "b": running()}, "ab")
    again = Member(NodeInfo(node="a-2", host="a", slots=1), lease_id=8, joined=5)
    view = View(job="j", revision=9, scope=Scope.ALL, epoch=seen.view.epoch, members=(again, seen.view.members[1]))
    found = Look(view, {"a-2": running(), "b-1": running()})
    assert (found.lost, found.busy) == ((), ("a", "b"))


def test_whether_a_round_can_begin() -> None:
    mine = round_of(look({}, "ab").view.epoch)
    assert broken(look({"a": running(), "b": waiting()}, "ab"), mine) == ""
    assert broken(look({"a": running()}, "ab"), mine) == "b is gone"
    assert broken(look({"a": running(), "b": waiting(1)}, "ab"), mine) == "b left it"
    assert broken(look({"a": running(), "b": running()}, "ab", number=2), mine) == "another round came"


def test_who_is_waited_for_at_the_end() -> None:
    mine = round_of(look({}, "abc").view.epoch)
    assert present(look({"a": running(), "b": waiting()}, "abc"), mine) == 2
    assert present(look({"a": running(), "b": ALONE, "c": waiting(1)}, "abc"), mine) == 1


def test_words_that_are_none() -> None:
    assert decode_seat(encode_seat(running())) == running()
    assert decode_seat(b"{}") is None
    record = EpochRecord(job="j", number=1, places=(Place("a-1", 1),), leader="a-1", nodes_min=1, nodes_max=1)
    with pytest.raises(IntegrityError):
        round_of(record)
