"""Starting one trainer: a fork, whose child continues the program or runs its command again."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerLaunch:
    """What all trainers of one supervisor share.

    ``stacks`` is a folder for stack dumps. ``close_in_child`` closes, in a child, what belongs to
    the supervisor.
    """

    start: Fork | Spawn
    rank: int
    stacks: Path | None
    signals: SignalPipe
    close_in_child: Callable[[], None]


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
        spawned = isinstance(shared.start, Spawn)
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
        if spawned:
            exec_again(trainer, STARTUP_FOLDER)
        return enter_forked(trainer)
    except BaseException as error:  # noqa: BLE001  printed, and the end of this process
        exit_after_error(error)


def _stacks(shared: TrainerLaunch, pid: int) -> str:
    return str(shared.stacks / f"rank-{shared.rank}-{pid}.txt") if shared.stacks is not None else ""
