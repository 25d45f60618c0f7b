"""Starting one trainer: a fork, whose child continues the program or runs its command again."""

from __future__ import annotations

import ctypes
import gc
import io
import mmap
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ckpt import events
from ckpt.elastic.processes.child import SignalPipe, TrainerChild
from ckpt.elastic.processes.start_method import Fork, Spawn
from ckpt.elastic.processes.trainer import (
    TrainerOrder,
    TrainerProcess,
    begin_child,
    enter_forked,
    exec_again,
    exit_after_error,
)
from ckpt.ipc.messages import RankPlacement


def _started_in() -> str:
    try:
        return os.getcwd()  # noqa: PTH109  a text that goes back to the system
    except FileNotFoundError:  # it was removed
        return "/"


STARTUP_FOLDER = _started_in()
"""The working folder at the start: relative names in the program's command refer to it."""


@contextmanager
def around_fork() -> Iterator[None]:
    """Around a fork: flush buffered output, so that it is written once, and silence a warning.

    Python 3.12 warns about native threads too, which a fork survives.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            with suppress(OSError):  # the reader is gone
                stream.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 counts native threads too
        yield


# ---- what the program opened above the call, of which each forked trainer gets a copy

_FILE = io.IOBase.__mro__[1]
"""What all file objects derive from, those written in C too."""

_RUNNING = -(1 << 30)
_WAIT_S_FIRST, _WAIT_S_MAX = 0.0005, 0.05


class InheritedProcesses:
    """How processes ended that the program started above the call.

    Their parent is the supervisor, so it alone can learn their exit status, and a trainer's
    ``Popen.wait`` would return 0 at once. The supervisor notes it in memory that its trainers
    share.
    """

    def __init__(self, processes: Sequence[subprocess.Popen[Any]]) -> None:
        """Has each of ``processes`` answer by what is noted here, in forked children."""
        self._parent = os.getpid()
        self._places = {process.pid: place for place, process in enumerate(processes)}
        memory = mmap.mmap(-1, 4 * len(processes)) if processes else b""
        self._statuses = memoryview(memory).cast("i")
        for process in processes:
            self._statuses[self._places[process.pid]] = _RUNNING
            kind = type(process)
            if not issubclass(kind, _InheritedPopen):
                process.__class__ = type(f"Inherited{kind.__name__}", (_InheritedPopen, kind), {})
            cast("_InheritedPopen", process).inherited = self

    def note(self, pid: int, status: int) -> None:
        """In the supervisor: child ``pid`` ended, as from ``os.waitstatus_to_exitcode``."""
        if (place := self._places.get(pid)) is not None:
            self._statuses[place] = status

    def status(self, pid: int) -> int | None:
        """How ``pid`` ended; None while it runs."""
        status = self._statuses[self._places[pid]]
        return None if status == _RUNNING else status

    @property
    def elsewhere(self) -> bool:
        """Whether this process is not the parent."""
        return os.getpid() != self._parent


class _InheritedPopen(subprocess.Popen[Any]):
    """Put before the class of a ``Popen`` that was made above the call."""

    inherited: InheritedProcesses

    def poll(self) -> int | None:
        if self.returncode is None and self.inherited.elsewhere:
            self.returncode = self.inherited.status(self.pid)
            return self.returncode
        return super().poll()

    def wait(self, timeout: float | None = None) -> int:
        if not self.inherited.elsewhere:
            return super().wait(timeout)
        until_s = None if timeout is None else time.monotonic() + timeout
        pause_s = _WAIT_S_FIRST
        while (status := self.poll()) is None:
            left_s = pause_s if until_s is None else until_s - time.monotonic()
            if left_s <= 0:
                raise subprocess.TimeoutExpired(self.args, cast("float", timeout))
            time.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, _WAIT_S_MAX)
        return status


def settle_above(emit: events.Emit) -> InheritedProcesses:
    """Before the first fork: write out what files hold in buffers, so that no trainer writes it
    again, and take over the processes that the program started.

    Once is enough: from here on the program goes on in trainers alone. Looks at all objects: 0.1 s
    where torch is imported.
    """
    files, processes = _files_and_processes()
    for file in files:
        if (problem := _write_out(file)) is not None:
            text = (
                "a file that was opened above the decorated call can't be written out before the "
                "training starts, and every attempt may write what it holds; close it above the "
                "call"
            )
            name = str(getattr(file, "name", file))
            emit(events.Event("unwritten-file", text, {"file": name, "why": problem}, alarm=True))
    if sys.platform == "linux":
        ctypes.CDLL(None).fflush(None)  # the same for what libraries in C have printed
    running = [process for process in processes if process.poll() is None]
    for process in running:
        if process.stdin is not None and not process.stdin.closed:
            text = (
                "a process that was started above the decorated call reads from a pipe that stays "
                "open in the supervisor, so that it never meets its end; start it inside the "
                "function, or close its stdin above"
            )
            emit(events.Event("pipe-above", text, {"pid": process.pid}, alarm=True))
    return InheritedProcesses(running)


def _files_and_processes() -> tuple[list[io.IOBase], list[subprocess.Popen[Any]]]:
    frozen = gc.get_freeze_count() > 0
    if frozen:
        gc.unfreeze()  # what is frozen is not listed
    objects = gc.get_objects()
    if frozen:
        gc.freeze()
    # By their types, which are few: ``isinstance`` would run code of proxies.
    types = set(map(type, objects))
    files = {kind for kind in types if _FILE in kind.__mro__}
    wanted = files | {kind for kind in types if subprocess.Popen in kind.__mro__}
    found = [each for each in objects if type(each) in wanted]
    return (
        [each for each in found if type(each) in files],
        [each for each in found if type(each) not in files and _began(each)],
    )


def _began(process: subprocess.Popen[Any]) -> bool:
    """Whether it was started, and is not known to have ended. An object whose ``__init__`` raised,
    which a traceback may keep, lacks a number or even these attributes."""
    pid = getattr(process, "pid", None)
    return pid is not None and getattr(process, "returncode", None) is None


def _write_out(file: io.IOBase) -> str | None:
    """Flush a file that is open for writing; returns why it could not be."""
    try:
        if not file.closed and file.writable():
            file.flush()
    except Exception as error:  # noqa: BLE001  a class of the program's may raise anything: told
        return str(error)
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerLaunch:
    """What all trainers of one supervisor share.

    ``stacks`` is a folder for stack dumps. ``close_in_child`` closes, in a child, what belongs to
    the supervisor. ``inherited``: what the program started above the call.
    """

    start: Fork | Spawn
    rank: int
    stacks: Path | None
    signals: SignalPipe
    close_in_child: Callable[[], None]
    inherited: InheritedProcesses


@dataclass(frozen=True, slots=True)
class _Pipes:
    """The pipes of one trainer: it writes reports and, if it is prepared, reads its order."""

    report_in: int
    report_out: int
    order_in: int = -1
    order_out: int = -1


def launch_trainer(
    shared: TrainerLaunch, *, attempt: int, port: int, seating: RankPlacement | None = None
) -> TrainerChild | TrainerProcess:
    """Start a trainer; attempt 0 starts a prepared one.

    Returns a ``TrainerChild`` in the parent, a ``TrainerProcess`` in the child.

    Raises OSError if no process or descriptor is left.
    """
    report = os.pipe()
    pipes = _Pipes(*report, *os.pipe()) if attempt == 0 else _Pipes(*report)
    os.set_blocking(pipes.report_in, False)
    supervisor_pid = os.getpid()
    with around_fork(), shared.signals.held():
        pid = os.fork()
        if pid == 0:
            shared.signals.restore()
    if pid == 0:
        return _be_trainer(
            shared, pipes, TrainerOrder(attempt=attempt, port=port, seating=seating), supervisor_pid
        )
    # Also in the child: whichever runs first, the group exists before anything kills it.
    # An error means that the child has done it and exec'd, or is gone.
    with suppress(PermissionError, ProcessLookupError):
        os.setpgid(pid, pid)
    os.close(pipes.report_out)
    if pipes.order_in >= 0:
        os.close(pipes.order_in)
    return TrainerChild(
        pid=pid,
        attempt=attempt,
        report_fd=pipes.report_in,
        order_fd=pipes.order_out,
        stacks=_stacks(shared, pid),
    )


def _be_trainer(
    shared: TrainerLaunch, pipes: _Pipes, order: TrainerOrder, supervisor_pid: int
) -> TrainerProcess:
    """The child's side.

    An error must not return into the child's copy of the supervisor's loop: it ends the child.
    """
    try:
        begin_child(supervisor_pid)
        os.close(pipes.report_in)
        if pipes.order_out >= 0:
            os.close(pipes.order_out)
        shared.close_in_child()
        start = shared.start
        spawned = isinstance(start, Spawn)
        how = "prepared" if order.attempt == 0 else "spawn" if spawned else "fork"
        trainer = TrainerProcess(
            attempt=order.attempt,
            port=order.port,
            how=how,
            pid=os.getpid(),
            report_fd=pipes.report_out,
            order_fd=pipes.order_in,
            stacks=_stacks(shared, os.getpid()),
            seating=order.seating,
        )
        if isinstance(start, Spawn):
            exec_again(trainer, start.folder or STARTUP_FOLDER)
        return enter_forked(trainer)
    except BaseException as error:  # noqa: BLE001  printed, and the end of this process
        exit_after_error(error)


def _stacks(shared: TrainerLaunch, pid: int) -> str:
    return str(shared.stacks / f"rank-{shared.rank}-{pid}.txt") if shared.stacks is not None else ""
