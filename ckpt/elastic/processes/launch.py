"""Starting one trainer: a fork, and in the child either the user's program as it stands or the same
command anew."""

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
    except FileNotFoundError:  # it was removed since
        return "/"


STARTUP_FOLDER = _started_in()
"""Where this program was started, as far as is known: relative names in its command count from
there."""


@contextmanager
def around_fork() -> Iterator[None]:
    """Around a fork: what is buffered is written once only, and no warning of native threads, which
    forks survive."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            with suppress(OSError):  # nobody reads it any more
                stream.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 counts native threads too
        yield


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerLaunch:
    """What all trainers of one supervisor share. ``stacks`` is a folder for stack dumps.

    ``forget`` lets go, in a child, of what is the supervisor's.
    """

    start: Fork | Spawn
    rank: int
    stacks: Path | None
    signals: SignalPipe
    close_in_child: Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Pipes:
    """Where the trainer reports and where it gets its order: read ends and write ends."""

    report_in: int
    report_out: int
    order_in: int = -1
    order_out: int = -1


def launch_trainer(
    shared: TrainerLaunch, *, attempt: int, port: int, seating: RankPlacement | None = None
) -> TrainerChild | TrainerProcess:
    """Start a trainer; attempt 0: one that runs ahead and waits. A ``TrainerChild`` in the parent,
    its seat in the child.

    Raises OSError where there is no process or descriptor left.
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
    with suppress(
        PermissionError, ProcessLookupError
    ):  # the child did it itself and went on, or is gone
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
    """The child's side. An error here must not come back into the copy of the supervisor's loop: it
    ends the child."""
    try:
        begin_child(supervisor_pid)
        os.close(pipes.report_in)
        if pipes.order_out >= 0:
            os.close(pipes.order_out)
        shared.close_in_child()
        spawned = isinstance(shared.start, Spawn)
        how = "prepared" if order.attempt == 0 else "spawn" if spawned else "fork"
        seat = TrainerProcess(
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
            exec_again(seat, STARTUP_FOLDER)
        return enter_forked(seat)
    except BaseException as error:  # noqa: BLE001  told, and the end of this process
        exit_after_error(error)


def _stacks(shared: TrainerLaunch, pid: int) -> str:
    return str(shared.stacks / f"rank-{shared.rank}-{pid}.txt") if shared.stacks is not None else ""
