"""A keeper whose loop hangs ends, and says where it stood; one that goes on, or has ended, is left
alone."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ckpt.keeper.process import Watchdog

HUNG = """
import threading
from ckpt.keeper.process import Watchdog, end_hung_process
def loop_that_hangs():
    threading.Event().wait()
Watchdog(end_hung_process, check_s=0.01, checks_max=5)
loop_that_hangs()
"""


def test_hung_loop_ends_its_process_which_says_where_it_stood() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HUNG], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert "loop_that_hangs" in done.stderr
    assert "has hung" in done.stderr


def test_hung_loop_ends_its_process_though_nothing_can_be_written() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([sys.executable, "-c", HUNG], stderr=full, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_loop_that_turns_is_left_alone_and_one_that_ended_too() -> None:
    hung = threading.Event()
    watchdog = Watchdog(hung.set, check_s=0.1, checks_max=25)
    until_s = time.monotonic() + 4.0
    while time.monotonic() < until_s:
        watchdog.beat()
        time.sleep(0.01)
    watchdog.stop()
    assert not hung.wait(1.0)


def test_it_is_called_once_where_no_turn_comes() -> None:
    calls: list[float] = []
    came = threading.Event()

    def hung() -> None:
        calls.append(time.monotonic())
        came.set()

    watchdog = Watchdog(hung, check_s=0.01, checks_max=5)
    assert came.wait(30.0)
    watchdog.stop()
    assert len(calls) == 1
