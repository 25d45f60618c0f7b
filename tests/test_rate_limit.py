"""A token bucket by a clock of the test's own: never faster than its rate, never slower than it
must be."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.rate_limit import BURST_S, RATE_BYTES_MIN, RateLimit, TokenBucket

RATE = 1000.0
SENDS = st.lists(st.tuples(st.floats(0.0, 3.0), st.integers(0, 400)), min_size=1, max_size=60)
"""Pauses in which nobody has anything to send, and what is sent then."""


def sent(sends: list[tuple[float, int]], rate: float | None = RATE) -> list[tuple[float, int]]:
    """When each block went, as who waits for the bucket sends them."""
    now_s, bucket, found = 0.0, TokenBucket(rate, 0.0), []
    for pause_s, size_bytes in sends:
        now_s += pause_s
        bucket = bucket.at(now_s)
        now_s += bucket.wait_s
        bucket = bucket.at(now_s).taken(size_bytes)
        found.append((now_s, size_bytes))
    return found


@given(SENDS)
def test_in_no_time_goes_more_than_its_rate_a_burst_and_a_block(
    sends: list[tuple[float, int]],
) -> None:
    found = sent(sends)
    for first in range(len(found)):
        for last in range(first, len(found)):
            took_s = found[last][0] - found[first][0]
            between = sum(
                size for _, size in found[first:last]
            )  # the last block is let go once nothing is owed
            assert between <= RATE * (took_s + BURST_S) + 1e-6 * (1 + between)


@given(SENDS)
def test_nobody_waits_longer_than_for_what_went_before(sends: list[tuple[float, int]]) -> None:
    now_s = 0.0
    for (at_s, _), (pause_s, _), before in zip(
        sent(sends), sends, [0, *(size for _, size in sends)], strict=False
    ):
        assert at_s <= now_s + max(pause_s, before / RATE) + 1e-6
        now_s = at_s


@given(SENDS)
def test_without_a_rate_all_goes_at_once(sends: list[tuple[float, int]]) -> None:
    at_s = 0.0
    for (pause_s, size), found in zip(sends, sent(sends, None), strict=True):
        at_s += pause_s
        assert found == (at_s, size)


def test_one_that_waits_long_is_evened_out() -> None:
    found = sent([(0.0, 100)] * 50)
    assert found[-1][0] == pytest.approx(49 * 100 / RATE, abs=BURST_S)


def test_clock_that_stands_still_or_goes_back_gives_nothing() -> None:
    bucket = TokenBucket(RATE, 5.0).taken(100)
    assert bucket.at(5.0).wait_s == bucket.at(4.0).wait_s == pytest.approx(0.1)
    assert bucket.at(4.0).at(5.05).wait_s == pytest.approx(0.05)


def test_debt_is_paid_at_a_new_rate_and_forgiven_without_one() -> None:
    bucket = TokenBucket(RATE, 0.0).taken(100)
    assert bucket.with_rate(RATE / 2).wait_s == pytest.approx(0.2)
    assert bucket.with_rate(None).at(0.0).with_rate(RATE).wait_s == 0.0


def test_cap_goes_by_the_clock_that_it_is_given() -> None:
    now_s = [100.0]
    cap = RateLimit(RATE_BYTES_MIN, clock=lambda: now_s[0])
    assert cap.take(RATE_BYTES_MIN) == 0.0
    now_s[0] += 1.0
    assert cap.take(0) == 0.0  # paid back while nobody asked
    cap.take(3600 * RATE_BYTES_MIN)
    waited = threading.Thread(target=cap.take, args=(1,), daemon=True)
    waited.start()
    now_s[0] += 3601.0
    cap.set(RATE_BYTES_MIN)  # so that it looks at the clock again
    waited.join(30.0)
    assert not waited.is_alive()
