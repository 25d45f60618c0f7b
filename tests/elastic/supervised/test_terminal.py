"""A program at a terminal: a debugger can be typed into, Ctrl-C and Ctrl-Z do what they do without
a supervisor."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt.ipc.messages import Bye, Died, Kill, Killed, Leave

WAIT_S = 60.0

SHELL = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
pid = os.fork()
if pid == 0:
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpgrp())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
while True:
    _, status = os.waitpid(pid, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        print("ended", os.waitstatus_to_exitcode(status), os.tcgetpgrp(0) == pid, flush=True)
        break
    os.tcsetpgrp(0, os.getpgrp())
    print("stopped", flush=True)
    sys.stdin.readline()
    os.tcsetpgrp(0, pid)
    os.killpg(pid, signal.SIGCONT)
    print("continued", flush=True)
"""


class Screen:
    """A terminal with a small shell that runs one program."""

    def __init__(self, folder: Path, program: str, environment: dict[str, str]) -> None:
        self._fd, far = os.openpty()
        (folder / "shell.py").write_text(SHELL)
        (folder / "program.py").write_text(program)
        self._process = subprocess.Popen(
            [sys.executable, "shell.py", "program.py"],
            cwd=folder,
            env=environment,
            stdin=far,
            stdout=far,
            stderr=far,
            start_new_session=True,
        )
        os.close(far)
        self._seen = ""

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._fd, text.encode())

    def see(self, pattern: str) -> re.Match[str]:
        """Wait until this appears after what was seen last."""
        while not (match := re.search(pattern, self._seen)):
            ready, _, _ = select.select([self._fd], [], [], WAIT_S)
            assert ready, f"waited for {pattern!r}, seen {self._seen!r}"
            try:
                self._seen += os.read(self._fd, 4096).decode()
            except OSError as error:  # EIO: nobody has the terminal open
                raise AssertionError(f"ended before {pattern!r}, seen {self._seen!r}") from error
        self._seen = self._seen[match.end() :]
        return match

    def close(self) -> None:
        """Hang up."""
        self._process.kill()
        self._process.wait(WAIT_S)
        os.close(self._fd)


@pytest.fixture
def screen(tmp_path: Path, keeper, head: str) -> Iterator[Screen]:
    """A program that debugs itself, and waits for signals after it."""
    environment = {
        **{
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("CKPT_", "PYTEST_", "PYTHON"))
        },
        "TEST_KEEPER": str(keeper.path),
        "TEST_FOLDER": str(tmp_path),
        "TERM": "dumb",
    }
    text = (
        "seat = sit()\nsay('attempt', seat.attempt, 'pid', os.getpid(), '.')\nx = "
        "41\nbreakpoint()\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # pdb has one of its own
        "say('front', os.tcgetpgrp(0) == os.getpgrp(), 'x', x, '.')\nforever()\n"
    )
    made = Screen(tmp_path, head + text, environment)
    yield made
    made.close()


@pytest.mark.slow
def test_debugger_can_be_typed_into_and_interrupt_ends_all_as_without_supervisor(
    screen: Screen, keeper
) -> None:
    link = keeper.accept()
    for attempt in (1, 2):  # the terminal comes back from a dead trainer, and is lent once more
        link.start(attempt)
        screen.see(rf"attempt {attempt} pid \d+ \.")
        screen.see(r"\(Pdb\) ")
        screen.type("x += 1\n")
        screen.see(r"\(Pdb\) ")
        screen.type("c\n")
        screen.see(r"front True x 42 \.")
        if attempt == 1:
            link.send(Kill(attempt=1))
            link.expect(Killed)
    screen.type("\x03")
    screen.see("KeyboardInterrupt")
    assert link.expect(Died).status == -signal.SIGINT
    link.send(Leave(status=130))
    link.expect(Bye)
    screen.see(r"ended -2 True")


@pytest.mark.slow
def test_suspended_program_goes_on_where_it_was(screen: Screen, keeper) -> None:
    link = keeper.accept()
    link.start()
    screen.see(r"attempt 1 pid \d+ \.")
    screen.see(r"\(Pdb\) ")
    screen.type("\x1a")
    screen.see("stopped")
    screen.type("\n")
    screen.see("continued")
    screen.type("x += 2\n")
    screen.type("c\n")
    screen.see(r"front True x 43 \.")
    link.send(Leave(status=5))
    link.expect(Bye)
    screen.see(r"ended 5 True")


@pytest.mark.slow
def test_interrupt_before_anyone_asked_for_the_terminal_reaches_the_trainer(
    screen: Screen, keeper
) -> None:
    link = keeper.accept()
    screen.type("\x03")
    screen.see(r"ended -2 True")
    assert link.wire.receive(WAIT_S) is None


@pytest.mark.slow
def test_stopped_program_stops_its_trainer_too(screen: Screen, keeper) -> None:
    link = keeper.accept()
    pid = link.start().trainer_pid
    screen.see(r"\(Pdb\) ")
    screen.type("c\n")
    screen.see(r"front True x 41 \.")
    screen.type("\x1a")
    screen.see("stopped")
    assert "T" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    screen.type("\n")
    screen.see("continued")
    screen.type("\x03")  # the supervisor's again until the trainer asks: passed on
    screen.see("KeyboardInterrupt")
    assert link.expect(Died).status == -signal.SIGINT
