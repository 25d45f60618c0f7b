from __future__ import annotations

import threading

import pytest

from ckpt.maintenance.copy_io import BURST_S, MaintenancePace, Stopped


class Time:
    """A clock that only waiting moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.waited: list[float] = []

    def wait(self, wait_s: float) -> bool:
        self.waited.append(wait_s)
        self.now += wait_s
        return False


def test_rate_holds_in_the_long_run_and_the_first_bytes_wait_for_nothing() -> None:
    time = Time()
    pace = MaintenancePace(1000.0, clock=lambda: time.now, wait=time.wait)
    for _ in range(50):
        pace.take(100)
    assert time.now - 100.0 == pytest.approx(4.9)
    assert pace.moved_bytes == 5000


def test_what_was_not_used_is_made_up_for_by_a_burst_only() -> None:
    time = Time()
    pace = MaintenancePace(1000.0, clock=lambda: time.now, wait=time.wait)
    time.now += 3600.0
    start = time.now
    for _ in range(10):
        pace.take(1000)
    assert time.now - start == pytest.approx(9.0 - BURST_S)


def test_without_a_rate_nothing_waits() -> None:
    time = Time()
    pace = MaintenancePace(None, clock=lambda: time.now, wait=time.wait)
    pace.take(1 << 40)
    assert time.waited == []


def test_stop_ends_a_wait_and_everything_after_it() -> None:
    stop = threading.Event()
    time = Time()

    def wait(wait_s: float) -> bool:
        stop.set()
        return True

    pace = MaintenancePace(1.0, stop=stop, clock=lambda: time.now, wait=wait)
    pace.take(10)
    with pytest.raises(Stopped):
        pace.take(10)
    with pytest.raises(Stopped):
        pace.check()
