"""When a rank counts as hanging."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.keeper.attempts.hang import (
    LOOK_GAPS_MAX,
    STEP_TIME_FACTOR,
    Observation,
    Pulse,
    building_s,
    check_interval_s,
    first_step_s,
    hung_ranks,
    observe,
    start_limit_s,
    timeout_s,
)
from ckpt.values import TrainerPhase

FLOOR_S = 10.0
WELL = Pulse(0, TrainerPhase.TRAINING, True, completed=5, idle_s=1.0, longest_step_s=0.5)
LATE = replace(WELL, rank=1, idle_s=FLOOR_S + 1)


def test_a_rank_that_stands_still_longer_than_the_floor_hangs() -> None:
    assert hung_ranks([WELL, LATE], floor_s=FLOOR_S) == (1,)
    assert hung_ranks([WELL, replace(LATE, idle_s=FLOOR_S)], floor_s=FLOOR_S) == ()


def test_long_steps_make_it_patient() -> None:
    slow = replace(WELL, longest_step_s=2.0)
    assert timeout_s([slow, LATE], floor_s=FLOOR_S) == 2.0 * STEP_TIME_FACTOR
    assert hung_ranks([slow, LATE], floor_s=FLOOR_S) == ()


@pytest.mark.parametrize(
    "phase",
    [TrainerPhase.STARTING, TrainerPhase.BUILDING, TrainerPhase.PAUSED, TrainerPhase.DEBUGGING],
)
def test_nobody_hangs_while_somebody_is_exempt(phase: TrainerPhase) -> None:
    assert hung_ranks([replace(WELL, phase=phase), LATE], floor_s=FLOOR_S) == ()


def test_nobody_hangs_before_the_first_step_or_in_a_debugger() -> None:
    assert hung_ranks([replace(WELL, first_step_done=False), LATE], floor_s=FLOOR_S) == ()
    assert hung_ranks([replace(WELL, traced=True), LATE], floor_s=FLOOR_S) == ()


@pytest.mark.parametrize(
    "phase",
    [
        TrainerPhase.STARTING,
        TrainerPhase.BUILDING,
        TrainerPhase.TRAINING,
        TrainerPhase.PAUSED,
        TrainerPhase.DEBUGGING,
    ],
)
def test_a_stopped_process_hangs_in_its_first_step_and_in_a_pause_too(phase: TrainerPhase) -> None:
    halted = replace(WELL, phase=phase, first_step_done=False, idle_s=61.0, stopped=True)
    assert hung_ranks([replace(WELL, rank=1, idle_s=61.0), halted], floor_s=60.0) == (0,)
    assert hung_ranks([replace(halted, idle_s=59.0)], floor_s=60.0) == ()
    assert hung_ranks([replace(halted, traced=True)], floor_s=60.0) == ()
    assert hung_ranks([replace(halted, phase=TrainerPhase.FINISHED)], floor_s=60.0) == ()
    assert hung_ranks([halted], floor_s=0.0) == ()


def test_a_rank_that_finished_neither_hangs_nor_exempts() -> None:
    done = replace(LATE, rank=0, phase=TrainerPhase.FINISHED, first_step_done=False)
    assert hung_ranks([done, LATE], floor_s=FLOOR_S) == (1,)
    assert hung_ranks([done], floor_s=FLOOR_S) == ()


def test_those_furthest_behind_come_first_and_of_those_the_longest_idle() -> None:
    pulses = [
        replace(LATE, rank=0, completed=6),
        replace(LATE, rank=1),
        replace(LATE, rank=2, idle_s=20.0),
    ]
    assert hung_ranks(pulses, floor_s=FLOOR_S) == (2, 1, 0)


def test_no_floor_means_never() -> None:
    assert hung_ranks([replace(LATE, idle_s=1e9)], floor_s=0.0) == ()
    assert hung_ranks([], floor_s=FLOOR_S) == ()


@given(st.floats(0.01, 1e6))
def test_it_looks_often_enough_and_not_too_often(floor_s: float) -> None:
    assert 0.1 <= check_interval_s(floor_s) <= 5.0
    assert check_interval_s(floor_s) <= max(0.1, floor_s / 8)


def seen(*looks: tuple[float, dict[int, object]]) -> Observation:
    """What is known after looks, one second apart as a rule."""
    sight: Observation | None = None
    for now_s, marks in looks:
        sight = observe(sight, marks, now_s=now_s, check_s=1.0)
    assert sight is not None
    return sight


def test_time_counts_from_the_look_that_first_saw_the_same() -> None:
    assert seen((0.0, {0: "a"})).idle_s == {0: 0.0}
    assert seen((0.0, {0: "a"}), (1.0, {0: "a"}), (2.5, {0: "a"})).idle_s == {0: 2.5}
    assert seen(
        (0.0, {0: "a", 1: "x"}), (1.0, {0: "b", 1: "x"}), (2.0, {0: "b", 1: "x"})
    ).idle_s == {0: 1.0, 1: 2.0}


def test_a_watcher_that_stood_still_itself_takes_nobody_for_hung() -> None:
    assert seen((0.0, {0: "a"}), (1.0, {0: "a"}), (3600.0, {0: "a"})).idle_s == {
        0: 1.0 + LOOK_GAPS_MAX
    }


def test_a_rank_that_is_seen_for_the_first_time_has_not_stood_still() -> None:
    assert seen((0.0, {0: "a"}), (1.0, {0: "a", 1: None})).idle_s == {0: 1.0, 1: 0.0}


FIRST = replace(LATE, first_step_done=False, completed=-1)


def test_first_step_has_a_limit_of_its_own() -> None:
    assert hung_ranks([WELL, FIRST], floor_s=FLOOR_S, start_s=60.0) == ()
    late = replace(FIRST, idle_s=61.0)
    assert hung_ranks([WELL, late], floor_s=FLOOR_S, start_s=60.0) == (1,)
    assert hung_ranks([WELL, late], floor_s=FLOOR_S, start_s=0.0) == (), "without limit"
    building = replace(WELL, phase=TrainerPhase.BUILDING)
    assert hung_ranks([building, late], floor_s=FLOOR_S, start_s=60.0) == (), "it may wait for that"
    assert hung_ranks([replace(late, traced=True)], floor_s=FLOOR_S, start_s=60.0) == ()
    assert first_step_s([WELL, FIRST, late]) == 61.0
    assert first_step_s([WELL, building]) is None


def test_limit_of_the_first_step_follows_those_of_earlier_attempts() -> None:
    assert start_limit_s(None, floor_s=FLOOR_S, start_s=1800.0) == 1800.0
    assert start_limit_s(0.5, floor_s=FLOOR_S, start_s=1800.0) == FLOOR_S
    assert start_limit_s(30.0, floor_s=FLOOR_S, start_s=1800.0) == 30.0 * STEP_TIME_FACTOR
    assert start_limit_s(900.0, floor_s=FLOOR_S, start_s=1800.0) == 1800.0
    assert start_limit_s(30.0, floor_s=FLOOR_S, start_s=0.0) == 0.0


def test_ranks_that_build_hang_once_the_last_of_them_has_stood_still_for_the_limit() -> None:
    builds = Pulse(0, TrainerPhase.STARTING, False, completed=-1, idle_s=70.0, longest_step_s=0.0)
    other = replace(builds, rank=1, phase=TrainerPhase.BUILDING, idle_s=65.0)
    limits = {"floor_s": FLOOR_S, "start_s": 1e9}
    assert hung_ranks([other, builds], **limits, build_s=60.0) == (0, 1)
    assert hung_ranks([other, builds], **limits, build_s=66.0) == (), "the other came further"
    assert hung_ranks([other, builds], **limits, build_s=0.0) == ()
    assert hung_ranks([other, builds], floor_s=0.0, build_s=60.0) == ()
    waits = replace(WELL, rank=2, first_step_done=False, idle_s=500.0)
    assert hung_ranks([waits, builds], **limits, build_s=60.0) == (0,), "the other waits for it"
    for exempt in (replace(builds, rank=2, traced=True), replace(WELL, phase=TrainerPhase.PAUSED)):
        assert hung_ranks([exempt, builds], **limits, build_s=60.0) == ()
        assert building_s([exempt, builds]) is None
    assert building_s([WELL]) is None
