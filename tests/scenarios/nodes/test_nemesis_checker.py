"""The checker of the nemesis runs tells each kind of wrong history from a right one, and names
it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from kit.nemesis.checker import check, lateness_s
from kit.nemesis.history import (
    Beat,
    Change,
    Committed,
    Content,
    History,
    Opened,
    Pause,
    Sighting,
    Silence,
    Trainer,
)
from kit.nemesis.log import read_log
from kit.nemesis.made_up import FIRST, REFERENCE, S, epoch, node, right, steps, with_steps
from kit.nemesis.schedule import ACTS, draw, longest_s


def test_right_history_is_right() -> None:
    assert check(right()) == []


def more_changes(*changes: Change) -> History:
    return replace(right(), changes=(*right().changes, *changes))


def log(*records: Opened | Committed) -> History:
    """The right history with another log; what the store's reader says is left as it was."""
    return replace(right(), log=records)


def swap(history: History, at: int, **changes: object) -> History:
    """One step of it is another."""
    wrong = replace(history.steps[at], **changes)  # type: ignore[arg-type]
    return replace(history, steps=(*history.steps[:at], wrong, *history.steps[at + 1 :]))


def spoilt_content(pair: tuple[int, int], content: Content | str) -> History:
    return replace(right(), contents={**right().contents, pair: content})


LATE = Beat(FIRST[1], 7 * S, 6 * S)
"""A second after its node's time was over."""

BEYOND = Trainer(1, 1, 2, "m2", 99)
"""A second trainer of rank 1 in the first epoch, on another machine."""

CUT_OFF = Silence("m1", 5 * S, 9 * S)
AFTER_TTL = Beat(FIRST[1], 8 * S, 9 * S)

WRONG: dict[str, tuple[Callable[[], History], str]] = {
    "two epochs of one number": (
        lambda: more_changes(Change(9, 12 * S, "epoch", epoch(2, "m0", "m1"))),
        "of one number with different content",
    ),
    "an epoch goes back": (
        lambda: more_changes(Change(9, 12 * S, "epoch", epoch(1, "m0", "m1"))),
        "follows one that is no smaller",
    ),
    "an epoch vanishes": (
        lambda: more_changes(Change(9, 12 * S, "epoch", None)),
        "the epoch was deleted",
    ),
    "an epoch by who does not lead": (
        lambda: more_changes(Change(9, 12 * S, "epoch", epoch(3, "m0", "m2", leader="m2"))),
        "is not its leader's",
    ),
    "an epoch with a lost node": (
        lambda: more_changes(Change(9, 12 * S, "epoch", epoch(3, "m0", "m1"))),
        "places who is no member",
    ),
    "a node id comes back": (
        lambda: more_changes(Change(9, 12 * S, "nodes/n-m1", node("m1"), 7)),
        "came back under an id that was over",
    ),
    "two live trainers of one rank in one epoch": (
        lambda: replace(
            right(), entered=(*right().entered, replace(right().entered[1], who=BEYOND))
        ),
        "one rank of one epoch was trained by two",
    ),
    "a trainer where its epoch places another": (
        lambda: replace(
            right(), entered=(*right().entered, replace(right().entered[1], who=BEYOND))
        ),
        "trained where its epoch places somebody else",
    ),
    "a trainer of no epoch": (
        lambda: replace(right(), changes=right().changes[:-1]),
        "in an epoch that was never published",
    ),
    "an older epoch trains on": (
        lambda: with_steps(right(), *steps(FIRST[1], 5, 6, at_s=13.05)),
        "two epochs trained at once",
    ),
    "a rank goes on alone": (
        lambda: with_steps(right(), *steps(FIRST[1], 5, 7, at_s=3.5)),
        "went on without another",
    ),
    "an older epoch's step is committed though the line went on without it": (
        lambda: log(*right().log, Committed(4, 2, (1, 5))),
        "the line had gone on without",
    ),
    "a zombie's commit is taken for one that counts": (
        lambda: replace(
            log(*right().log, Committed(4, 1, (1, 4))), snapshots=right().snapshots | {(1, 5)}
        ),
        "sees other snapshots than the log has",
    ),
    "an epoch goes on from before the newest snapshot": (
        lambda: log(*right().log, Opened(4, 3, (2, 6))),
        "goes on from before the newest snapshot",
    ),
    "the reader's newest is another": (
        lambda: replace(right(), newest=(1, 4)),
        "has another newest",
    ),
    "the log has a hole": (
        lambda: replace(right(), hole="record is missing"),
        "can't be read to its end",
    ),
    "a record changes": (
        lambda: replace(
            right(), sightings=(Sighting(S, 0, "1.json", "d1"), Sighting(2 * S, 0, "1.json", "x"))
        ),
        "a record of the log changed",
    ),
    "a record vanishes": (
        lambda: replace(
            right(), sightings=(Sighting(S, 0, "1.json", "d1"), Sighting(2 * S, 0, "1.json", None))
        ),
        "a record of the log vanished",
    ),
    "a record at the end is another": (
        lambda: replace(right(), sightings=(Sighting(S, 0, "1.json", "x"),)),
        "is not what it was",
    ),
    "two commits at one seq on two stores": (
        lambda: replace(right(), log_digests={**right().log_digests, (1, "1.json"): "other"}),
        "two records at one place",
    ),
    "a record is on one of three stores": (
        lambda: replace(right(), stores=3),
        "a record is on too few stores",
    ),
    "a committed snapshot vanished": (
        lambda: spoilt_content((1, 4), "not found"),
        "a committed snapshot can't be read",
    ),
    "a committed snapshot was never there": (
        lambda: replace(right(), contents={(2, 8): right().contents[2, 8]}),
        "a committed snapshot can't be read",
    ),
    "a committed snapshot differs": (
        lambda: spoilt_content((1, 4), Content(4, 0, (1,) * 4)),
        "a snapshot holds a wrong state",
    ),
    "a snapshot mixes lines": (
        lambda: spoilt_content((2, 8), Content(8, REFERENCE[8], (1,) * 5 + (2,) * 3)),
        "a snapshot is not of its line",
    ),
    "a snapshot of a step that nobody took": (
        lambda: log(*right().log[:3], Committed(3, 2, (2, 12))),
        "of a step that not all ranks completed",
    ),
    "a restored state is wrong": (
        lambda: replace(
            right(), entered=(*right().entered[:3], replace(right().entered[3], value=0))
        ),
        "restored a wrong state",
    ),
    "restored another line": (
        lambda: replace(
            right(), entered=(*right().entered[:3], replace(right().entered[3], trail=(1, 1, 1, 2)))
        ),
        "restored what is not of its line",
    ),
    "ranks go on from different pairs": (
        lambda: replace(
            right(),
            entered=(*right().entered[:3], replace(right().entered[3], pair=(1, 3), step=3)),
        ),
        "went on from another pair than its epoch",
    ),
    "a step differs from the undisturbed run": (
        lambda: swap(right(), 2, value=0),
        "differs from the undisturbed run",
    ),
    "a step is left out": (
        lambda: replace(right(), steps=(*right().steps[:2], *right().steps[3:])),
        "steps do not follow each other",
    ),
    "two attempts in one epoch of the log": (
        lambda: swap(right(), -1, epoch=1),
        "two attempts in one epoch of the log",
    ),
    "a node acts after its lease could have been given away": (
        lambda: replace(right(), beats=(*right().beats, LATE)),
        "after its node's time was over",
    ),
    "a node acts though it was cut off for a TTL": (
        lambda: replace(right(), beats=(*right().beats, AFTER_TTL), silences=(CUT_OFF,)),
        "after its node was cut off",
    ),
    "a program ends badly": (
        lambda: replace(right(), ends={"m0": 0, "m2": 1}),
        "a program ended badly",
    ),
    "the final state differs": (
        lambda: replace(right(), finals={0: Content(8, 0, (1,) * 4 + (2,) * 4)}),
        "not that of an undisturbed run",
    ),
    "the final state is of another line": (
        lambda: replace(right(), finals={0: Content(8, REFERENCE[8], (1,) * 8)}),
        "not of the newest line",
    ),
    "the last state is not durable": (
        lambda: replace(log(*right().log[:3]), snapshots=frozenset({(1, 4)}), newest=(1, 4)),
        "last state is not durable",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_history_is_told_by_the_rule_for_it(what: str) -> None:
    make, words = WRONG[what]
    assert any(words in one for one in check(make())), check(make())


def test_trainer_that_slept_past_its_time_may_wake_but_not_where_its_keeper_alone_slept() -> None:
    slept = replace(right(), beats=(*right().beats, LATE))
    for what, fine in (("node", True), ("trainer", True), ("keeper", False)):
        history = replace(slept, pauses=(Pause("m1", what, 5 * S, 7 * S - S // 10),))
        assert (check(history) == []) is fine, what
    elsewhere = replace(slept, pauses=(Pause("m0", "node", 5 * S, 7 * S),))
    assert check(elsewhere) != []
    long_ago = replace(slept, pauses=(Pause("m1", "node", 2 * S, 3 * S),))
    assert check(long_ago) != []


def test_commit_of_an_older_epoch_that_a_newer_one_writes_is_on_the_line() -> None:
    # What was staged before a death becomes durable after it.
    history = log(
        Opened(0, 1, None), Opened(1, 2, (1, 4)), Committed(2, 2, (1, 4)), Committed(3, 2, (2, 8))
    )
    assert check(history) == []


def test_cut_off_trainer_may_live_for_a_ttl_and_after_its_node_is_back() -> None:
    cut = replace(right(), silences=(CUT_OFF,))
    for at_s, fine in ((6.9, True), (7.5, False), (9.5, True)):
        beat = Beat(FIRST[1], int(at_s * S), 99 * S)
        assert (check(replace(cut, beats=(*cut.beats, beat))) == []) is fine, at_s


def test_epoch_may_place_who_was_lost_after_its_leader_looked_but_not_who_was_lost_before() -> None:
    lost = Change(9, 12 * S, "nodes/n-m2", None)
    once = Change(10, 12 * S, "epoch", epoch(3, "m0", "m2"))
    again = Change(11, 12 * S, "epoch", epoch(4, "m0", "m2"))
    assert check(more_changes(lost, once)) == []
    assert "places who is no member" in check(more_changes(lost, once, again))[0]


def test_time_that_is_called_off_is_over_soon() -> None:
    # The roll let it live until 9; then it is told that its lease is over, and dies. Or it does
    # not.
    told = (Beat(FIRST[1], 7 * S, 9 * S), Beat(FIRST[1], 7 * S + S // 20, 6 * S))
    assert check(replace(right(), beats=told)) == []
    assert check(replace(right(), beats=(*told, Beat(FIRST[1], 9 * S, 6 * S)))) != []


def test_lateness_is_how_long_a_trainer_outlived_its_nodes_time() -> None:
    assert lateness_s(right()) == -2.0
    assert lateness_s(replace(right(), beats=(*right().beats, LATE))) == 1.0


def test_zombies_step_that_is_not_completed_by_all_is_no_step_of_its_epoch() -> None:
    # It was stopped inside the last step that both began, and ended it when it woke: late, and
    # harmless.
    asleep = replace(right().steps[9], ended_ns=20 * S)
    assert asleep.who == FIRST[1]
    assert check(replace(right(), steps=(*right().steps[:9], asleep, *right().steps[10:]))) == []


def test_schedule_is_the_same_each_time_and_ends() -> None:
    for seed in range(200):
        schedule = draw(seed)
        assert schedule == draw(seed)
        assert 4 <= len(schedule.acts) <= 8
        times = [act.at_s for act in schedule.acts]
        assert times == sorted(times)
        assert all(0.0 <= act.last_s <= longest_s(schedule.ttl_s) for act in schedule.acts)


def test_schedules_of_a_campaign_have_every_act() -> None:
    assert {act.kind for seed in range(1, 61) for act in draw(seed).acts} == ACTS.keys()


def test_open_of_an_earlier_membership_epoch_is_void_to_the_checker_too() -> None:
    late = Opened(2, 3, None, ("a", 4))
    first = Opened(0, 1, None, ("a", 4))
    assert sorted(read_log([first, Opened(1, 2, None, ("a", 5)), late]).opens) == [1, 2]
    assert sorted(read_log([first, Opened(1, 2, None, ("b", 5)), late]).opens) == [1, 2, 3]
