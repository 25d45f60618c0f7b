"""What ``every=`` means, and when it is due."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.elastic.schedule import (
    AUTO_S,
    EverySeconds,
    EverySteps,
    is_due,
    next_due,
    parse_duration,
    parse_every,
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
