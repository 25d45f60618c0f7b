"""One trainer as its supervisor sees it: a child, its process group, and the bytes it says."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ckpt.elastic.processes.trainer import Order
from ckpt.errors import InternalError

WORDS_MAX = 4096
"""Bytes of a trainer's words read at once; each word is one."""

_PR_SET_CHILD_SUBREAPER = 36


@dataclass(slots=True, kw_only=True)
class Child:
    """A started trainer. It leads a process group of its own, whose number is ``pid``.

    ``attempt`` is 0 for a prepared one. ``status``: how it ended (as ``os.waitstatus_to_exitcode``), None while it lives.
    ``killed``: its end was asked for. ``stacks``: its file for stack dumps; ``dumps``: it writes there on SIGUSR2.
    ``stopped``: it was stopped because it asked for the terminal.
    """

    pid: int
    attempt: int
    report_fd: int
    order_fd: int = -1
    stacks: str = ""
    status: int | None = None
    killed: bool = False
    dumps: bool = False
    stopped: bool = False

    def signal(self, number: int, *, group: bool = False) -> None:
        """Send a signal to the trainer, or to its whole group. One that has ended gets nothing."""
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if group else os.kill)(self.pid, number)

    def kill(self) -> None:
        """Kill all of the group. ``gone`` tells when it has happened. May be repeated."""
        self.killed = True
        if self.gone():
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing left, or nothing that is ours
            os.killpg(self.pid, signal.SIGKILL)

    def gone(self) -> bool:
        """Whether the trainer was reaped and nothing of its group is left."""
        if self.status is None:
            return False
        try:
            os.killpg(self.pid, 0)
        except (ProcessLookupError, PermissionError):
            return True
        return False

    def dump(self, path: Path) -> None:
        """Have it write its stacks to the file ``path``, soon. Nothing happens where it can't."""
        if not self.dumps or self.status is not None:
            return
        try:
            os.truncate(self.stacks, 0)
            path.unlink(missing_ok=True)
            os.link(self.stacks, path)  # outlives the trainer
        except OSError:  # the folder was cleaned away: what is hung is killed without a word
            return
        self.signal(signal.SIGUSR2)

    def words(self) -> bytes:
        """What the trainer has said. b"" and a closed ``report_fd`` where it and all its children are gone."""
        try:
            said = os.read(self.report_fd, WORDS_MAX)
        except BlockingIOError:
            return b""
        if not said:
            os.close(self.report_fd)
            self.report_fd = -1
        return said

    def promote(self, order: Order) -> bool:
        """Give a prepared trainer its attempt; False where it isn't there any more."""
        if self.status is not None or self.order_fd < 0:
            return False
        try:
            os.write(self.order_fd, msgspec.json.encode(order) + b"\n")
        except BrokenPipeError:
            return False
        os.close(self.order_fd)
        self.order_fd = -1
        self.attempt = order.attempt
        return True

    def close(self) -> None:
        """Close the pipes. Idempotent."""
        for fd in (self.report_fd, self.order_fd):
            if fd >= 0:
                os.close(fd)
        self.report_fd = self.order_fd = -1

    def forget(self) -> None:
        """Close what is left of a trainer that is gone."""
        self.close()
        if self.stacks:
            with contextlib.suppress(OSError):
                Path(self.stacks).unlink(missing_ok=True)


def adopt_orphans() -> None:
    """Make this process the parent of what its descendants leave behind, so that it can reap them.

    In a container the first process often reaps nobody, and a zombie in a process group would look alive for ever.
    """
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    if libc is not None and libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise InternalError(f"cannot adopt the trainers' children. why={os.strerror(ctypes.get_errno())}")


def reaped() -> Iterator[tuple[int, int]]:
    """Every child that has ended or was stopped since the last call: its number and raw wait status."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, status


def memory_bytes(pid: int) -> int | None:
    """What a second process like ``pid`` would take for itself: its anonymous memory. None where the system doesn't say."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), None)
