"""What ``every=`` means, and when it is due."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.elastic.schedule import (
    AUTO_S,
    EverySeconds,
    EverySteps,
    MemoryPace,
    capture_rule,
    is_due,
    next_due,
    parse_duration,
    parse_every,
    parse_memory_every,
)
from ckpt.errors import UsageError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30.0),
        ("500ms", 0.5),
        ("5m", 300.0),
        ("5min", 300.0),
        ("2h", 7200.0),
        ("1d", 86400.0),
        (" 1.5 s ", 1.5),
    ],
)
def test_duration_is_read(text: str, seconds: float) -> None:
    assert parse_duration(text, name="every") == pytest.approx(seconds)
    assert parse_every(text) == EverySeconds(seconds)


@pytest.mark.parametrize(
    "text", ["", "30", "s", "-1s", "0s", "1 week", "1e3s", "nan s", "1s2", "0.0ms", "١s x", "auto "]
)
def test_what_is_no_duration_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(UsageError, match="as in '30s'"):
        parse_every(text)


@pytest.mark.parametrize("every", [0, -1, True, False, 1.5, None, b"30s", [1]])
def test_what_is_neither_steps_nor_duration_is_refused(every: object) -> None:
    with pytest.raises(UsageError, match="every"):
        parse_every(every)


def test_auto_is_a_duration() -> None:
    assert parse_every("auto") == EverySeconds(AUTO_S)


@given(st.integers(1, 1000), st.integers(0, 10**6))
def test_due_boundaries_are_the_multiples(steps: int, completed: int) -> None:
    schedule = parse_every(steps)
    assert is_due(schedule, completed) == (completed > 0 and completed % steps == 0)


@given(st.integers(1, 1000), st.integers(0, 10**6))
def test_next_due_is_the_first_one_after(steps: int, completed: int) -> None:
    schedule = EverySteps(steps)
    due = next_due(schedule, completed)
    assert due is not None
    assert completed < due <= completed + steps
    assert is_due(schedule, due)


@given(st.integers(1, 50), st.lists(st.integers(1, 60), max_size=30))
def test_loop_that_counts_several_steps_at_once_meets_a_due_boundary_where_it_passed_a_multiple(
    steps: int, strides: list[int]
) -> None:
    schedule = EverySteps(steps)
    since = 0
    for stride in strides:
        completed = since + stride
        passed = any(n % steps == 0 for n in range(since + 1, completed + 1))
        assert is_due(schedule, completed, since=since) == passed
        since = completed


def test_schedules_by_time_are_never_due_by_step() -> None:
    assert not any(is_due(EverySeconds(1.0), completed) for completed in range(100))
    assert next_due(EverySeconds(1.0), 5) is None


@pytest.mark.parametrize(("every", "meant"), [(1, 1), (0, 0), (7, 7), ("auto", None)])
def test_memory_every_is_a_number_of_boundaries_or_measured(every, meant: int | None) -> None:
    assert parse_memory_every(every) == meant


@pytest.mark.parametrize("every", [-1, True, 1.5, "2", "often", None])
def test_memory_every_of_another_kind_is_refused(every) -> None:
    with pytest.raises(UsageError, match="memory_every counts boundaries"):
        parse_memory_every(every)


class Training:
    """Steps and copies of given lengths under a pace; ``changes`` are those of the interval."""

    def __init__(self) -> None:
        self.pace = MemoryPace()
        self.now_s, self.completed, self.copied_s = 50.0, 0, 0.0
        self.changes: list[int] = []

    def run(self, steps: int, *, step_s: float, copy_s: float, since: int = 0) -> float:
        """Train on; returns which share of the steps' time copies took from step ``since`` on."""
        trained_s = copied_s = 0.0
        for n in range(steps):
            self.now_s += step_s
            self.completed += 1
            trained_s += step_s * (n >= since)
            if self.completed % self.pace.every == 0:
                began_s, self.now_s = self.now_s, self.now_s + copy_s
                copied_s += copy_s * (n >= since)
                if self.pace.copied(self.completed, began_s=began_s, ended_s=self.now_s):
                    self.changes.append(self.pace.every)
        return copied_s / trained_s


@given(step_s=st.floats(0.001, 10.0), copy_s=st.floats(0.0001, 5.0), later_s=st.floats(0.0001, 5.0))
def test_copies_in_memory_cost_two_percent_at_most_and_the_interval_settles(
    step_s: float, copy_s: float, later_s: float
) -> None:
    for length_s in (copy_s, later_s):  # the state may grow, or the machine become busy
        training = Training()
        wanted = max(1.0, length_s / (0.02 * step_s))
        steps = min(20_000, int(60 * wanted) + 20)
        share = training.run(steps, step_s=step_s, copy_s=length_s, since=steps // 2)
        assert len(training.changes) <= 1 + math.log(wanted, 8), "each change is announced"
        if steps == 20_000:
            continue  # it may not have got there
        assert share <= 0.021
        aimed = length_s / (training.pace.every * step_s)
        assert aimed <= 0.0201
        assert training.pace.every == 1 or aimed > 0.005, "no rarer than that needs"


def test_interval_follows_steps_that_become_longer_and_shorter() -> None:
    training = Training()
    training.run(10, step_s=1.0, copy_s=0.001)
    assert (training.pace.every, training.changes) == (1, [])
    training.run(20, step_s=1.0, copy_s=0.3)
    assert training.pace.every == 8
    training.run(100, step_s=1.0, copy_s=0.3)
    assert training.pace.every == 20
    training.run(400, step_s=10.0, copy_s=0.3)
    assert training.pace.every == 2
    assert training.changes == [8, 20, 4, 2], "one window had steps of both kinds"


def test_pause_and_a_snapshot_in_between_do_not_count_as_steps() -> None:
    training = Training()
    for _ in range(8):
        training.run(1, step_s=0.1, copy_s=0.1)
        training.now_s += 60.0
        training.pace.interrupted()
        training.run(1, step_s=0.1, copy_s=0.1)
        training.pace.interrupted()
    training.run(2, step_s=0.1, copy_s=0.1)
    assert training.pace.every == 8


def test_ranks_must_agree_on_steps_and_on_whether_memory_holds_copies_alone() -> None:
    rules = [
        capture_rule(parse_every(every), parse_memory_every(memory_every))
        for every, memory_every in [("30s", 1), ("auto", "auto"), (50, 1), (60, 1), (50, 0)]
    ]
    assert rules[0] == rules[1], "rank 0's clock and measurements decide"
    assert len(set(rules[1:])) == 4
    assert rules[2] == "every=50 memory_every=some"
