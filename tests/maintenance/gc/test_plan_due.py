"""When a round is due, and when it sweeps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ckpt.maintenance.gc.plan import (
    REST_FACTOR,
    ROUND_S,
    SWEEPS_PER_GRACE,
    GcHistory,
    GcIdle,
    GcRound,
    next_round,
    sweep_every_s,
)

DAY = 86400.0
seconds = st.floats(0, 10 * DAY)


def test_nothing_is_done_before_the_first_commit() -> None:
    for hurry in (False, True):
        assert next_round(GcHistory(), 1e9, commits=0, grace_s=0.0, hurry=hurry) == GcIdle(None)


def test_first_commit_is_followed_by_a_round_at_once_that_sweeps_what_earlier_runs_left() -> None:
    assert next_round(GcHistory(), 100.0, commits=1, grace_s=DAY) == GcRound(sweep=True)


def test_commits_that_come_every_second_give_one_round_in_ten_seconds() -> None:
    past, rounds = GcHistory(), []
    for second in range(100):
        now_s = 1000.0 + second
        found = next_round(past, now_s, commits=second + 1, grace_s=DAY)
        if isinstance(found, GcRound):
            rounds.append(second)
            past = GcHistory(
                commits=second + 1,
                round_started_s=now_s,
                round_ended_s=now_s,
                sweep_started_s=past.sweep_started_s or now_s,
            )
    assert rounds == list(range(0, 100, int(ROUND_S)))


def test_long_round_is_followed_by_a_rest_of_nine_times_its_length() -> None:
    past = GcHistory(commits=1, round_started_s=100.0, round_ended_s=150.0, sweep_started_s=100.0)
    assert next_round(past, 150.0, commits=2, grace_s=DAY) == GcIdle(50.0 * REST_FACTOR)
    assert next_round(past, 150.0 + 50.0 * REST_FACTOR, commits=2, grace_s=DAY) == GcRound(
        sweep=False
    )


def test_bytes_go_while_nothing_is_committed() -> None:
    past = GcHistory(commits=3, round_started_s=100.0, round_ended_s=101.0, sweep_started_s=100.0)
    every_s = DAY / SWEEPS_PER_GRACE
    assert next_round(past, 200.0, commits=3, grace_s=DAY) == GcIdle(every_s - 100.0)
    assert next_round(past, 100.0 + every_s, commits=3, grace_s=DAY) == GcRound(sweep=True)


def test_round_that_failed_is_owed_until_one_went_well() -> None:
    failed = GcHistory(commits=0, round_started_s=100.0, round_ended_s=100.5)
    assert next_round(failed, 105.0, commits=1, grace_s=DAY) == GcIdle(ROUND_S - 4.5)
    assert next_round(failed, 111.0, commits=1, grace_s=DAY) == GcRound(sweep=True)


def test_at_the_end_what_is_owed_is_done_without_rest_and_nothing_else() -> None:
    past = GcHistory(commits=4, round_started_s=100.0, round_ended_s=101.0, sweep_started_s=100.0)
    assert next_round(past, 101.0, commits=5, grace_s=DAY, hurry=True) == GcRound(sweep=False)
    assert next_round(past, 101.0, commits=5, grace_s=0.0, hurry=True) == GcRound(sweep=True)
    assert next_round(past, 101.0, commits=4, grace_s=0.0, hurry=True) == GcIdle(None)
    assert next_round(past, 100.0 + DAY, commits=4, grace_s=DAY, hurry=True) == GcRound(sweep=True)


@given(
    st.integers(0, 9),
    st.integers(0, 9),
    seconds,
    seconds,
    st.none() | seconds,
    st.floats(0, 30 * DAY),
    st.booleans(),
)
def test_whoever_rests_as_told_comes_to_a_round(
    done: int,
    new: int,
    began_s: float,
    took_s: float,
    swept_s: float | None,
    grace_s: float,
    hurry: bool,
) -> None:
    past = GcHistory(
        commits=done,
        round_started_s=began_s,
        round_ended_s=began_s + took_s,
        sweep_started_s=swept_s,
    )
    now_s = began_s + took_s
    found = next_round(past, now_s, commits=done + new, grace_s=grace_s, hurry=hurry)
    if isinstance(found, GcIdle) and found.seconds is not None:
        assert found.seconds > 0
        longest_s = max(
            ROUND_S,
            REST_FACTOR * took_s + 1,
            sweep_every_s(grace_s) + max(began_s + took_s, swept_s or 0.0),
        )
        assert found.seconds <= longest_s
        later = next_round(
            past, now_s + found.seconds + 1e-3, commits=done + new, grace_s=grace_s, hurry=hurry
        )
        assert isinstance(later, GcRound)
    elif isinstance(found, GcIdle):
        assert hurry or done + new == 0
