"""What is sent again, what is refused, and how long an answer is waited for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.errors import UsageError
from ckpt.serve.front.decide import (
    AttemptEnd,
    deadline_s,
    expected_wait_s,
    goes_elsewhere,
    refusal,
    repeatable,
)
from ckpt.serve.front.policies import ReplicaLoad


@pytest.mark.parametrize(
    ("method", "path", "headers", "may"),
    [
        ("GET", "/x", {}, True),
        ("PUT", "/x", {}, True),
        ("POST", "/x", {}, False),
        ("PATCH", "/x", {}, False),
        ("POST", "/x", {"Idempotency-Key": "7"}, True),
        ("POST", "/predict", {}, True),
        ("POST", "/predict/more", {}, False),
    ],
)
def test_which_requests_may_be_repeated(
    method: str, path: str, headers: dict[str, str], may: bool
) -> None:
    assert repeatable(method, path, headers, {"/predict"}) is may


@pytest.mark.parametrize(
    ("end", "always", "if_repeatable"),
    [
        ("answered", False, False),
        ("not-handled", True, True),
        ("refused", True, True),
        ("broken", False, True),
    ],
)
def test_what_goes_elsewhere(end: AttemptEnd, always: bool, if_repeatable: bool) -> None:
    assert goes_elsewhere(end, repeatable=False) is always
    assert goes_elsewhere(end, repeatable=True) is if_repeatable


def test_deadline_of_a_request() -> None:
    assert deadline_s({}, 7.0) == 7.0
    assert deadline_s({"X-Ckpt-Deadline-Ms": "250"}, 7.0) == 0.25
    assert deadline_s({"X-Ckpt-Deadline-Ms": "9" * 40}, 7.0) == 1e9
    for wrong in ("", "soon", "-1", "1.5", "inf", "nan", "１"):
        with pytest.raises(UsageError, match="number of milliseconds"):
            deadline_s({"X-Ckpt-Deadline-Ms": wrong}, 7.0)


LOADS = st.lists(
    st.builds(
        ReplicaLoad, st.just("r"), outstanding=st.integers(0, 99), capacity=st.floats(0.1, 1e3)
    ),
    max_size=5,
)


@given(st.integers(0, 20), LOADS, st.integers(1, 20), st.floats(0, 100))
def test_what_is_taken_in_fits_the_queue_and_the_deadline(
    held: int, loads: list[ReplicaLoad], queue: int, left_s: float
) -> None:
    why = refusal(held, loads, queue=queue, left_s=left_s)
    if held >= queue:
        assert "as many requests as it may" in why
    elif any(load.outstanding / load.capacity <= left_s for load in loads) or not loads:
        assert not why, "one of them is expected to be in time, or a standby may be"
    else:
        assert "longer than its deadline" in why


def test_wait_is_that_at_the_least_loaded() -> None:
    slow = ReplicaLoad("a", outstanding=1, capacity=0.5)
    fast = ReplicaLoad("b", outstanding=10, capacity=10.0)
    assert expected_wait_s([slow, fast]) == 1.0
    assert expected_wait_s([]) == 0.0
