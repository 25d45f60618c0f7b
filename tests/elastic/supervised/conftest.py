"""A keeper that says what the test wants, and real programs that it supervises."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest
from kit import template

from ckpt.ipc.frames import MessageSocket
from ckpt.ipc.messages import Hello, Leave, Message, Start, Started, Welcome

WAIT_S = 60.0
"""How long anything may take before a test fails."""

HEAD = """
import json, os, signal, socket, sys, threading, time
from pathlib import Path
from ckpt.elastic.processes.start_method import Fork, Spawn
from ckpt.elastic.processes.supervisor import supervise
from ckpt.elastic.processes.supervisor import SupervisorPlan
from ckpt.elastic.processes.trainer import trainer_of_process
from ckpt.ipc.frames import MessageSocket
from ckpt.ipc.messages import Hello, Policy

def connect():
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(os.environ["TEST_KEEPER"])
    return MessageSocket(peer)

def sit(start=Fork(), prepare=False, reconnect=connect):
    seat = trainer_of_process()
    if seat is not None:
        return seat
    hello = Hello(version=1, role="supervisor", pid=os.getpid(), launch="l", ranks=1, policy=Policy(grace_s=3.0))
    stacks = Path(os.environ["TEST_FOLDER"])
    told = lambda event: say(event.kind)
    return supervise(connect(), SupervisorPlan(
        start=start, hello=hello, reconnect=reconnect, emit=told, stacks=stacks, prepare=prepare))

def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\\n")
    sys.stdout.flush()

def forever():
    while True:
        time.sleep(0.02)  # not pause(): a signal just before it would be handled after the next one
"""

M = TypeVar("M", bound=Message)


class Link:
    """The keeper's end of one supervisor's connection."""

    def __init__(self, wire: MessageSocket, hello: Hello) -> None:
        self.wire = wire
        self.hello = hello
        self.fds: list[tuple[Message, int]] = []

    def send(self, message: Message, fds: list[int] | None = None) -> None:
        """Say a word."""
        self.wire.send(message, fds or [])

    def expect(self, kind: type[M]) -> M:
        """The next word, which is of this kind. Descriptors that came before it are in ``fds``."""
        got = self.wire.receive(WAIT_S)
        assert got is not None, f"hung up instead of {kind.__name__}"
        word, fds = got
        self.fds += [(word, fd) for fd in fds]
        assert isinstance(word, kind), word
        return word

    def start(self, attempt: int = 1, port: int = 12345) -> Started:
        """Start an attempt and wait until it runs."""
        self.send(Start(attempt=attempt, port=port))
        return self.expect(Started)

    def silent(self, seconds: float) -> None:
        """Nothing is said for so long."""
        ready, _, _ = select.select([self.wire.fileno()], [], [], seconds)
        assert not ready, self.wire.receive(WAIT_S)

    def close(self) -> None:
        """Hang up, as a keeper that dies does."""
        for _, fd in self.fds:
            os.close(fd)
        self.fds.clear()
        self.wire.close()


class Keeper:
    """Listens for supervisors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._links: list[Link] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        self._socket.settimeout(WAIT_S)

    def accept(self, *, new: bool = False, attempt: int = 0) -> Link:
        """The next supervisor, welcomed."""
        peer, _ = self._socket.accept()
        wire = MessageSocket(peer)
        got = wire.receive(WAIT_S)
        assert got is not None
        hello, _ = got
        assert isinstance(hello, Hello)
        wire.send(Welcome(id=hello.id, boot="b", pid=os.getpid(), attempt=attempt, new=new))
        link = Link(wire, hello)
        self._links.append(link)
        return link

    def hang_up(self) -> None:
        """Take the next connection, and end it without a word, as a keeper does that is just
        ending."""
        peer, _ = self._socket.accept()
        peer.close()

    def close(self) -> None:
        """Hang up on all."""
        for link in self._links:
            link.close()
        self._socket.close()


@dataclass
class Program:
    """A program under supervision."""

    process: subprocess.Popen[bytes]
    said: bytes = b""

    @property
    def pid(self) -> int:
        """The supervisor's."""
        return self.process.pid

    def line(self) -> str:
        """The next line that it says; "" at the end."""
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        while b"\n" not in self.said:
            ready, _, _ = select.select([fd], [], [], WAIT_S)
            assert ready, f"it said nothing more. said={self.said!r}"
            piece = os.read(fd, 4096)
            if not piece:
                break
            self.said += piece
        line, _, self.said = self.said.partition(b"\n")
        return line.decode().strip()

    def end(self) -> int:
        """How the supervisor ended."""
        return self.process.wait(WAIT_S)


@dataclass
class Programs:
    """Starts programs: the helpers above, then the test's text."""

    folder: Path
    keeper: Keeper
    started: list[Program] = field(default_factory=list)

    def __call__(self, text: str, *, environment: dict[str, str] | None = None) -> Program:
        script = self.folder / "program.py"
        script.write_text(HEAD + text)
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("CKPT_", "PYTEST_"))
        }
        process = template.Program(
            [sys.executable, script.name],
            env={
                **kept,
                "TEST_KEEPER": str(self.keeper.path),
                "TEST_FOLDER": str(self.folder),
                **(environment or {}),
            },
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        program = Program(process)
        self.started.append(program)
        return program

    def close(self) -> None:
        """Kill what still runs."""
        for program in self.started:
            if program.process.poll() is None:
                program.process.kill()
            program.process.wait(WAIT_S)
            for pid in session(program.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if program.process.stdout is not None:
                program.process.stdout.close()


def session(number: int) -> list[int]:
    """The processes of a session: what a program of its own session left behind."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(int(entry.name)) == number:
                found.append(int(entry.name))
    return found


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return text.rpartition(")")[2].split()[0] not in ("Z", "X")


@pytest.fixture
def until() -> Callable[[Callable[[], object]], None]:
    """Waits for a condition; fails where it doesn't come true."""

    def wait(condition: Callable[[], object]) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline_s, "it never came true"
            time.sleep(0.005)

    return wait


@pytest.fixture
def alive() -> Callable[[int], bool]:
    """Whether a process runs."""
    return runs


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    """A keeper that listens."""
    made = Keeper(tmp_path / "socket")
    yield made
    made.close()


@pytest.fixture
def program(tmp_path: Path, keeper: Keeper) -> Iterator[Programs]:
    """Starts a supervised program."""
    made = Programs(tmp_path, keeper)
    yield made
    made.close()


@pytest.fixture
def leave() -> Callable[[Link, int], None]:
    """Ends a supervisor as a keeper does."""

    def say(link: Link, status: int) -> None:
        link.send(Leave(status=status))

    return say


@pytest.fixture
def head() -> str:
    """What programs begin with."""
    return HEAD
