"""What the program opened above the call, and what forked trainers make of it."""

from __future__ import annotations

import gc
import io
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from ckpt.elastic.processes.launch import settle_above
from ckpt.events import Event


def in_fork(body: Callable[[], object]) -> int:
    """How a forked child ended that ran ``body`` and then left without an exit handler."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
        except BaseException:  # noqa: BLE001  printed, and the end of this process
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("frozen", [False, True])
def test_files_opened_above_are_written_out_before_a_fork_can_write_them_again(
    tmp_path: Path, frozen: bool
) -> None:
    events: list[Event] = []
    with (tmp_path / "text").open("w") as text, (tmp_path / "bytes").open("wb") as raw:
        text.write("header\n")
        raw.write(b"head")
        if frozen:
            gc.freeze()
        try:
            settle_above(events.append)
        finally:
            gc.unfreeze()
        assert in_fork(lambda: (text.close(), raw.close())) == 0
        assert in_fork(lambda: (text.close(), raw.close())) == 0
    assert (tmp_path / "text").read_text() == "header\n"
    assert (tmp_path / "bytes").read_bytes() == b"head"
    assert events == []


class Refuses(io.StringIO):
    name = "weights.log"

    def flush(self) -> None:
        if not self.closed:
            raise RuntimeError("no room")


def test_file_that_can_not_be_written_out_is_named() -> None:
    events: list[Event] = []
    file = Refuses()
    settle_above(events.append)
    (told,) = events
    assert (told.kind, told.alarm) == ("unwritten-file", True)
    assert told.facts == {"file": "weights.log", "why": "no room"}
    file.close()


def test_process_started_above_is_waited_for_and_its_exit_status_is_right() -> None:
    script = "import sys; sys.stdin.read(); sys.exit(7)"
    with subprocess.Popen([sys.executable, "-S", "-c", script], stdin=subprocess.PIPE) as process:
        events: list[Event] = []
        inherited = settle_above(events.append)
        assert [event.kind for event in events] == ["pipe-above"]

        def lives() -> None:
            assert process.poll() is None
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.01)
            assert not isinstance(process.returncode, int)

        assert in_fork(lives) == 0
        assert process.stdin is not None
        process.stdin.close()
        # As the supervisor reaps: any child, by its number.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        pid, status = os.waitpid(process.pid, 0)
        inherited.note(pid, os.waitstatus_to_exitcode(status))
        inherited.note(1 << 22, 0)  # an orphan of a trainer

        def ended() -> None:
            assert process.wait() == 7
            assert process.poll() == 7

        assert in_fork(ended) == 0
        assert in_fork(ended) == 0, "the next attempt"
        process.returncode = 7


def test_wait_in_a_trainer_ends_as_the_process_does() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        inherited = settle_above([].append)
        began_s = time.monotonic()
        pid = os.fork()
        if pid == 0:
            os._exit(0 if process.wait() == -signal.SIGKILL else 1)
        os.kill(process.pid, signal.SIGKILL)
        _, status = os.waitpid(process.pid, 0)
        inherited.note(process.pid, os.waitstatus_to_exitcode(status))
        assert os.waitpid(pid, 0)[1] == 0
        assert time.monotonic() - began_s < 30
        process.returncode = -signal.SIGKILL


@pytest.mark.parametrize(
    ("words", "options"),
    [(["true"], {"bufsize": "wrong"}), (["/no/such/program"], {"close_fds": False})],
)
def test_process_that_could_not_be_started_is_passed_over(
    words: list[str], options: dict[str, object]
) -> None:
    made = subprocess.Popen.__new__(subprocess.Popen)
    with pytest.raises((TypeError, OSError)):
        made.__init__(words, **options)  # type: ignore[misc, call-overload]
    settle_above(pytest.fail)
    assert type(made) is subprocess.Popen
