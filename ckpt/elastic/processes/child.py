"""One trainer as its supervisor sees it: a child, its process group, and the bytes it says."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import msgspec

from ckpt.elastic.processes.trainer import TrainerOrder
from ckpt.errors import InternalError

REPORT_BYTES_MAX = 4096
"""Bytes of a trainer's words read at once; each word is one."""

_PR_SET_CHILD_SUBREAPER = 36


@dataclass(slots=True, kw_only=True)
class TrainerChild:
    """A started trainer. It leads a process group of its own, whose number is ``pid``.

    ``attempt`` is 0 for a prepared one. ``status``: how it ended (as
    ``os.waitstatus_to_exitcode``), None while it lives. ``killed``: its end was asked for.
    ``stacks``: its file for stack dumps; ``dumps``: it writes there on SIGUSR2. ``stopped``: it was
    stopped because it asked for the terminal.
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
        with contextlib.suppress(
            ProcessLookupError, PermissionError
        ):  # nothing left, or nothing that is ours
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

    def read_reports(self) -> bytes:
        """What the trainer has said. b"" and a closed ``report_fd`` where it and all its children
        are gone."""
        try:
            said = os.read(self.report_fd, REPORT_BYTES_MAX)
        except BlockingIOError:
            return b""
        if not said:
            os.close(self.report_fd)
            self.report_fd = -1
        return said

    def promote(self, order: TrainerOrder) -> bool:
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

    In a container the first process often reaps nobody, and a zombie in a process group would look
    alive for ever.
    """
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    if libc is not None and libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise InternalError(
            f"cannot adopt the trainers' children. why={os.strerror(ctypes.get_errno())}"
        )


def reap_children() -> Iterator[tuple[int, int]]:
    """Every child that has ended or was stopped since the last call: its number and raw wait
    status."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, status


def anonymous_memory_bytes(pid: int) -> int | None:
    """What a second process like ``pid`` would take for itself: its anonymous memory. None where
    the system doesn't say."""
    try:
        lines = (
            Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
        )
    except OSError:
        return None
    return next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), None
    )


# A supervisor's signals as things to read: a number for each in a pipe, and the user's handlers
# put back in a child.

Handler = Callable[[int, FrameType | None], object] | int | None

SUPERVISOR_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGTSTP})
"""What a supervisor acts on."""

_FAULTS = frozenset(
    {
        signal.SIGSEGV,
        signal.SIGBUS,
        signal.SIGFPE,
        signal.SIGILL,
        signal.SIGABRT,
        signal.SIGTRAP,
        signal.SIGSYS,
    }
)
_READ_BYTES = 512


class SignalPipe:
    """Catches signals from when it is made. ``fd`` is readable where there are some.

    Besides its own, those that the user's program handles, and SIGUSR1: schedulers send them to the
    process that they know, the supervisor, and they are meant for the trainer.
    """

    def __init__(self) -> None:
        self.fd, self._write = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self._write, False)
        self._before: dict[signal.Signals, Handler] = {}
        for number in _watched():
            before = signal.getsignal(number)
            if number == signal.SIGCHLD or before is not signal.SIG_IGN:
                self._before[number] = before
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in self._before:
            signal.signal(number, _noted)

    def read(self) -> list[int]:
        """The signals that came since the last call, in order."""
        try:
            return list(os.read(self.fd, _READ_BYTES))
        except BlockingIOError:
            return []

    @contextmanager
    def held(self) -> Iterator[None]:
        """Around a fork: nothing comes to the child before it has put the user's handlers back."""
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._before.keys())
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def restore(self) -> None:
        """The handlers as they were before, and the pipe closed: in a child, or where supervising
        ends with an error."""
        signal.set_wakeup_fd(self._wakeup_before)
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)
        os.close(self.fd)
        os.close(self._write)

    def stop_here(self, group: int) -> None:
        """Stop this process, and what else is in ``group``, as Ctrl-Z would. Returns when it is
        continued."""
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        try:
            if group:
                os.killpg(group, signal.SIGTSTP)
            else:
                os.kill(os.getpid(), signal.SIGTSTP)
        finally:
            signal.signal(signal.SIGTSTP, _noted)


def _watched() -> list[signal.Signals]:
    """Which signals a supervisor catches. A handler that isn't Python's own (None) is left alone
    unless it must not be."""
    handled = [
        number
        for number in signal.valid_signals()
        if isinstance(number, signal.Signals)
        and number not in _FAULTS
        and callable(signal.getsignal(number))
    ]
    return sorted({*SUPERVISOR_SIGNALS, signal.SIGUSR1, *handled})


def _noted(number: int, frame: FrameType | None) -> None:
    """The number is in the pipe already."""


# The terminal, which only one process group may read: lent to the trainer that asks for it.
#
# Trainers have groups of their own, so that all of one can be killed at once. The kernel stops a
# process that reads from the terminal (``breakpoint()``) without being in its foreground group.
# That is the question; the answer is to make the trainer's group the foreground one. Until
# somebody asks, Ctrl-C reaches the launcher and every supervisor, as without supervisors.


class Terminal:
    """The terminal that controls this process, if there is one."""

    def __init__(self) -> None:
        self._lent_to = 0

    @property
    def lent(self) -> bool:
        """Whether a trainer has it: then the terminal's signals reach that trainer only."""
        return bool(self._lent_to)

    def lend(self, group: int) -> bool:
        """Make ``group`` the foreground one, if the terminal is now this process's own group's;
        says whether it is.

        False where this process is in the background, another trainer has the terminal, or there is
        none.
        """
        with _opened() as fd:
            if fd < 0 or os.tcgetpgrp(fd) not in (os.getpgrp(), group):
                return False
            _give(fd, group)
        self._lent_to = group
        return True

    def take_back(self) -> None:
        """Make this process's group the foreground one again, where what it lent the terminal to
        still has it."""
        group, self._lent_to = self._lent_to, 0
        if not group:
            return
        with _opened() as fd:
            if fd >= 0 and os.tcgetpgrp(fd) in (group, 0):
                _give(fd, os.getpgrp())


@contextmanager
def _opened() -> Iterator[int]:
    """The controlling terminal, open; -1 where there is none."""
    try:
        fd = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:  # ENXIO: no terminal controls this process
        yield -1
        return
    try:
        yield fd
    finally:
        os.close(fd)


def _give(fd: int, group: int) -> None:
    """Who isn't in the foreground itself may do this only with SIGTTOU blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        with contextlib.suppress(
            PermissionError, ProcessLookupError
        ):  # the group is gone, or in another session
            os.tcsetpgrp(fd, group)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
