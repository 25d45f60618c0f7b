"""A supervisor's view of its trainers: their process groups, their signals and the terminal."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import msgspec

from ckpt.elastic.processes.trainer import ENTERED, FAILING, TrainerOrder
from ckpt.errors import InternalError
from ckpt.ipc.messages import Failing

REPORT_BYTES_MAX = 4096
"""The most bytes of a trainer read at once; each is one report."""

_PR_SET_CHILD_SUBREAPER = 36

# ---- a killed group, some of whose processes may never be reaped

MEMBERS_LOOK_S = 0.1
"""How long a killed group may take before ``/proc`` is read for what is left of it; then again
after a half of the time waited, at most each second."""

MEMBERS_LOOK_S_MAX = 1.0
MEMBERS_TOLD_S = 5.0
MEMBERS_WAIT_S = 60.0
"""How long processes are waited for that SIGKILL does not end: the kernel waits for a device or a
file system in them. They run no code of the program any more."""


@dataclass(frozen=True, slots=True)
class LivingMember:
    """A process that is not dead: its ``state`` is the kernel's letter."""

    pid: int
    name: str
    state: str


def living_members(group: int, *, proc: Path = Path("/proc")) -> list[LivingMember]:
    """The processes of a group in which a thread is not dead.

    A zombie holds no memory and no port, so it does not count. Reads the state of every process.
    Where there is no ``/proc`` (macOS) the kernel tells of a group only whether it lives: one
    member then stands for all.
    """
    if not proc.is_dir():
        return [LivingMember(group, "any process of its group", "?")] if _lives(group) else []
    found = []
    for entry in proc.glob("[0-9]*"):
        name, state, of_group = _stat(entry)
        if of_group != group:
            continue
        # The first thread may be dead while another one still holds the memory.
        states = (_stat(task)[1] for task in (entry / "task").glob("[0-9]*"))
        state = next((each for each in (state, *states) if each not in ("Z", "X", "")), "")
        if state:
            found.append(LivingMember(int(entry.name), name, state))
    return found


def _lives(group: int) -> bool:
    """Whether a process group has members that a signal reaches. macOS answers EPERM for one of
    zombies alone.
    """
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _stat(entry: Path) -> tuple[str, str, int]:
    """Name, state and process group of a process or thread; "" and 0 if it is gone."""
    try:
        text = (entry / "stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return "", "", 0
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    return head.partition("(")[2], fields[0], int(fields[2])


class KilledGroup:
    """What is left of a process group since it was killed, and how long that is waited for."""

    def __init__(
        self,
        group: int,
        *,
        now: Callable[[], float] = time.monotonic,
        members: Callable[[int], list[LivingMember]] = living_members,
    ) -> None:
        self._group = group
        self._now = now
        self._members = members
        self._killed_s = now()
        self._look_s = self._killed_s + MEMBERS_LOOK_S
        self._left: list[LivingMember] = []
        self._told = 0
        self._over = False

    def over(self) -> bool:
        """Whether nothing of it lives, or the wait is over. Stays true."""
        now_s = self._now()
        if not self._over and now_s >= self._look_s:
            waited_s = now_s - self._killed_s
            self._look_s = now_s + min(MEMBERS_LOOK_S_MAX, max(MEMBERS_LOOK_S, waited_s / 2))
            self._left = self._members(self._group)
            self._over = not self._left or waited_s >= MEMBERS_WAIT_S
        return self._over

    def line(self) -> str:
        """What a person should know of the wait, each line once; "" for nothing new."""
        waited_s = self._now() - self._killed_s
        due = 0 if not self._left else 1 + (waited_s >= MEMBERS_WAIT_S)
        if due <= self._told or waited_s < MEMBERS_TOLD_S:
            return ""
        self._told = due
        left = " ".join(f"pid={each.pid} ({each.name}, {each.state})" for each in self._left)
        then = (
            "it is not waited for any longer, and may hold memory and devices"
            if due > 1
            else f"it is waited for, {MEMBERS_WAIT_S:.0f} s at most"
        )
        return (
            f"SIGKILL does not end a process of a killed trainer: {then}. {left}; look at the "
            "disk, network file system or device that it waits for"
        )


@dataclass(slots=True, kw_only=True)
class TrainerChild:
    """A started trainer. It leads a process group of its own, whose number is ``pid``.

    ``attempt`` is 0 for a prepared one. ``status``: how it ended, as from
    ``os.waitstatus_to_exitcode``; None while it lives. ``killed``: the supervisor killed it;
    ``rest``: what is left of the killed group.
    ``stacks``: its file for stack dumps; ``dumps``: it writes there on SIGUSR2. ``stopped``: the
    kernel stopped it because it tried to use the terminal. ``failing``: the exception that it said
    it ends with; ``partial``: the beginning of such a line.
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
    failing: Failing | None = None
    partial: bytes = field(default=b"", repr=False)
    rest: KilledGroup | None = field(default=None, repr=False)

    def signal(self, number: int, *, group: bool = False) -> None:
        """Send a signal to the trainer, or to its whole group, unless it has ended."""
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if group else os.kill)(self.pid, number)

    def kill(self) -> None:
        """Kill the whole group. ``gone`` says when that has happened. May be repeated."""
        self.killed = True
        if self.rest is None:
            self.rest = KilledGroup(self.pid)
        if self.gone():
            return
        # Empty, or the number is another user's now.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def gone(self) -> bool:
        """Whether no process of its group can run any more.

        Some time after ``kill`` a zombie that nobody reaps counts as gone, and at last also what
        SIGKILL did not end within ``MEMBERS_WAIT_S``.
        """
        if self.status is not None:
            try:
                os.killpg(self.pid, 0)
            except (ProcessLookupError, PermissionError):
                return True
        return self.rest is not None and self.rest.over()

    def dump(self, path: Path) -> None:
        """Have the trainer write its stacks to the file ``path``, soon.

        Does nothing if it cannot.
        """
        if not self.dumps or self.status is not None:
            return
        try:
            os.truncate(self.stacks, 0)
            path.unlink(missing_ok=True)
            os.link(self.stacks, path)  # so that it outlives the trainer
        except OSError:  # the folder was removed: the trainer is killed without a dump
            return
        self.signal(signal.SIGUSR2)

    def read_reports(self) -> bytes:
        """The trainer's report bytes; a line about a failure is kept as ``failing``.

        b"" and a closed ``report_fd`` once the trainer and all its children are gone.
        """
        try:
            reports = os.read(self.report_fd, REPORT_BYTES_MAX)
        except BlockingIOError:
            return b""
        if not reports:
            os.close(self.report_fd)
            self.report_fd = -1
        return self._without_lines(self.partial + reports)

    def _without_lines(self, reports: bytes) -> bytes:
        """The single bytes among the reports."""
        single = bytearray()
        while reports:
            first, reports = reports[:1], reports[1:]
            if first == ENTERED:
                self.failing = None
            elif first == FAILING:
                line, end, rest = reports.partition(b"\n")
                if not end:  # the rest of it is on its way
                    self.partial = first + line
                    return bytes(single)
                with contextlib.suppress(msgspec.MsgspecError):  # a program may write there too
                    self.failing = msgspec.json.decode(line, type=Failing)
                reports = rest
            else:
                single += first
        self.partial = b""
        return bytes(single)

    def promote(self, order: TrainerOrder) -> bool:
        """Give a prepared trainer its attempt; false if it is gone."""
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
        """Close the pipes of a trainer that is gone, and remove its file for stack dumps."""
        self.close()
        if self.stacks:
            with contextlib.suppress(OSError):
                Path(self.stacks).unlink(missing_ok=True)


def adopt_orphans() -> None:
    """Make this process the parent of orphans among its descendants, so that it can reap them.

    In a container the first process often reaps nothing, and a zombie in a process group would
    look alive for ever.
    """
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    if libc is not None and libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise InternalError(
            f"cannot adopt the trainers' children. why={os.strerror(ctypes.get_errno())}"
        )


def reap_children() -> Iterator[tuple[int, int]]:
    """Every child that ended or was stopped since the last call: its pid and raw wait status."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, status


def anonymous_memory_bytes(pid: int) -> int | None:
    """The memory that a second process like ``pid`` would need: its anonymous memory.

    None if the system does not say.
    """
    try:
        lines = (
            Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
        )
    except OSError:
        return None
    return next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), None
    )


# ---- signals

Handler = Callable[[int, FrameType | None], object] | int | None

SUPERVISOR_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGTSTP})
"""The signals that a supervisor acts on."""

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
    """Catches signals and makes them readable as bytes; ``fd`` is readable when there are some.

    Catches the supervisor's own signals, those that the user's program handles, SIGUSR1 and
    SIGUSR2: schedulers send these to the process that they know, the supervisor, and mean the
    trainer.
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
        """The signals that arrived since the last call, in order."""
        try:
            return list(os.read(self.fd, _READ_BYTES))
        except BlockingIOError:
            return []

    @contextmanager
    def held(self) -> Iterator[None]:
        """Around a fork: no signal reaches the child before it has restored the user's handlers."""
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._before.keys())
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def restore(self) -> None:
        """Restore the earlier handlers and close the pipe: in a child, or after an error."""
        signal.set_wakeup_fd(self._wakeup_before)
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)
        os.close(self.fd)
        os.close(self._write)

    def stop_here(self, group: int) -> None:
        """Stop this process, and the rest of ``group``, as Ctrl-Z would.

        Returns when it is continued.
        """
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        try:
            if group:
                os.killpg(group, signal.SIGTSTP)
            else:
                os.kill(os.getpid(), signal.SIGTSTP)
        finally:
            signal.signal(signal.SIGTSTP, _noted)


def _watched() -> list[signal.Signals]:
    """The signals that a supervisor catches.

    A handler that is not Python's (None) is left alone unless it must not be.
    """
    handled = [
        number
        for number in signal.valid_signals()
        if isinstance(number, signal.Signals)
        and number not in _FAULTS
        and callable(signal.getsignal(number))
    ]
    # The function may set handlers for these later, which only its trainer knows of.
    return sorted({*SUPERVISOR_SIGNALS, signal.SIGUSR1, signal.SIGUSR2, *handled})


def _noted(number: int, frame: FrameType | None) -> None:
    """Does nothing: the wakeup descriptor has written the number into the pipe."""


# ---- the terminal, which only one process group may read: lent to the trainer that asks for it
#
# Each trainer has a process group of its own, so that all of it can be killed at once. The kernel
# stops a process that reads from the terminal (``breakpoint()``) outside the foreground group. That
# is the request; the answer is to make the trainer's group the foreground group. Until then Ctrl-C
# reaches the launcher and every supervisor, as it does without supervisors.


class Terminal:
    """The controlling terminal of this process, if there is one."""

    def __init__(self) -> None:
        self._lent_to = 0

    @property
    def lent(self) -> bool:
        """Whether a trainer has it: then the terminal's signals reach only that trainer."""
        return bool(self._lent_to)

    def lend(self, group: int) -> bool:
        """Make ``group`` the foreground group, if that is this process's own; true if it now is.

        False if this process is in the background, another trainer has the terminal, or there is
        none.
        """
        with _opened() as fd:
            if fd < 0 or os.tcgetpgrp(fd) not in (os.getpgrp(), group):
                return False
            _give(fd, group)
        self._lent_to = group
        return True

    def take_back(self) -> None:
        """Make this process's group the foreground group again, if the borrowing group still is."""
        group, self._lent_to = self._lent_to, 0
        if not group:
            return
        with _opened() as fd:
            if fd >= 0 and os.tcgetpgrp(fd) in (group, 0):
                _give(fd, os.getpgrp())


@contextmanager
def _opened() -> Iterator[int]:
    """The controlling terminal, open; -1 if there is none."""
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
    """Set the foreground group.

    A process in the background may do this only with SIGTTOU blocked.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        # The group is gone, or in another session.
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.tcsetpgrp(fd, group)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
