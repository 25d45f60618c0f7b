"""The background thread does calls in order, and holds up no exit for ever."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from ckpt.threads import CallQueue

WAIT_S = 30


def test_calls_are_done_in_order_and_their_errors_come_back() -> None:
    queue = CallQueue("test")
    done: list[int] = []
    futures = [queue.submit(lambda n=n: done.append(n) or n) for n in range(20)]  # type: ignore[misc]
    failing = queue.submit(lambda: 1 // 0)
    assert queue.close()
    assert done == [future.result() for future in futures] == list(range(20))
    with pytest.raises(ZeroDivisionError):
        failing.result()


def test_cancelled_queue_drops_what_has_not_begun() -> None:
    queue = CallQueue("test")
    began, go_on = threading.Event(), threading.Event()

    def slow() -> int:
        began.set()
        assert go_on.wait(WAIT_S)
        return 1

    first = queue.submit(slow)
    second = queue.submit(lambda: 2)
    assert began.wait(WAIT_S)
    assert not queue.close(cancel=True, timeout_s=0.0), "the running call is not waited for"
    go_on.set()
    assert first.result(WAIT_S) == 1
    assert second.cancelled()


EXIT = """
import ckpt.threads as q
q.EXIT_WAIT_S = {limit}
import threading, time
queue = q.CallQueue("test")
queue.submit(lambda: ({call}, print("done", flush=True)))
"""


@pytest.mark.slow
def test_exit_waits_for_a_call_that_was_not_closed() -> None:
    code = EXIT.format(limit=WAIT_S, call="time.sleep(0.2)")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT_S, check=True
    )
    assert done.stdout == "done\n"


@pytest.mark.slow
def test_exit_does_not_wait_for_ever() -> None:
    code = EXIT.format(limit=0.2, call="threading.Event().wait()")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT_S, check=True
    )
    assert done.stdout == ""
