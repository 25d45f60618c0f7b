"""The border of a decorated call, for an exception that is not the program's end: the trainer dies
on the spot.

The next attempt is forked from the supervisor, which still stands inside whatever surrounds the
call. Unwinding here would run those ``finally`` and ``with`` blocks, on files that the next attempt
needs. So nothing above the call learns of it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TypedDict

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from ckpt.elastic.boundaries import Milestones
from ckpt.elastic.processes.trainer import TrainerProcess
from ckpt.errors import FencedError, IntegrityError, NotFoundError, UnavailableError, UsageError
from ckpt.format.canonical import digest_hex
from ckpt.ipc.messages import WIRE_VERSION, Hello, Policy
from ckpt.session.keeper.attachment import SupervisedTrainer, supervised_trainer
from ckpt.session.keeper.connection import KeeperLink
from ckpt.session.session import Session

# How a preempted program ends: at a step boundary, durable, with an exit status of its own.

PREEMPTED_STATUS = 128 + signal.SIGTERM
"""143: what a shell reports for a program that SIGTERM ended."""


class Preempted(SystemExit):
    """Raised out of ``run.steps`` or ``run.completed`` when the node is about to be taken away and
    the state is safe.

    A ``SystemExit``: ``finally`` blocks run, the program exits with 143, nothing after the loop
    takes it for a finished one.
    """

    def __init__(self, step: int) -> None:
        super().__init__(PREEMPTED_STATUS)
        self.step = step
        """How many steps were complete."""


# An exception of the user's program, as a keeper judges it.

TEXT_MAX = 500

_FINAL = (UsageError, FencedError, IntegrityError, NotFoundError, KeyboardInterrupt, Preempted)
"""Starting again would meet them again, or somebody wanted the end."""


class FailureDescription(TypedDict):
    """What ``Session.failing`` takes."""

    kind: str
    text: str
    fingerprint: str
    final: bool


def describe_failure(error: BaseException) -> FailureDescription:
    """Equal exceptions raised at equal places have equal fingerprints; their texts, which may hold
    addresses, don't count."""
    places = [
        f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)
    ]
    kind = type(error).__qualname__
    final = isinstance(error, _FINAL) or (isinstance(error, SystemExit) and not error.code)
    return FailureDescription(
        kind=kind,
        text=str(error)[:TEXT_MAX],
        fingerprint=digest_hex("\n".join([kind, *places]).encode()),
        final=final,
    )


# The keeper that judges how this process ends, where the run at hand uses another one: a second
# store in one program.


class ExitReporter:
    """Hears what a decorated call does: through the run's session where that one's keeper is the
    judge, else on its own.

    ``outermost``: the call stands in no other one, of which it would be a part.
    """

    def __init__(self, session: Session, *, outermost: bool = True) -> None:
        self._session = session
        self._outermost = outermost
        self._link: KeeperLink | None = None

    def entered(self, points: Milestones) -> None:
        """The call began; ``points`` has when."""
        seat = supervised_trainer()
        if seat is None or not self._outermost:
            return
        if self._session.supervised:
            self._session.join()
            points.report_to(self._session.reporter.report)
            return
        self._link = KeeperLink.connect(seat.spec, _hello(seat), start=False)
        points.report_to(self._link.phase)

    def failing(self, facts: FailureDescription, step: int) -> None:
        """The process is about to die of an exception."""
        if self._link is None:
            self._session.reporter.failing(**facts, step=step)
            return
        with suppress(UnavailableError):  # without a keeper nobody judges it
            self._link.failing(**facts, step=step)
        self._link.close()

    def finished(self) -> None:
        """The function returned and all is durable. A session tells it itself, before it parts with
        the keeper."""
        if self._link is not None:
            with suppress(UnavailableError):  # nothing is lost any more
                self._link.finished()
            self._link.close()


def _hello(seat: SupervisedTrainer) -> Hello:
    return Hello(
        version=WIRE_VERSION,
        role="trainer",
        pid=os.getpid(),
        launch=seat.launch,
        rank=seat.rank,
        ranks=seat.ranks,
        attempt=seat.attempt,
    )


ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Where torchrun looks for what a rank died of."""


def ends_process(
    error: BaseException, seat: TrainerProcess | None, policy: Policy, *, outermost: bool
) -> bool:
    """Whether ``error`` ends this process at the border; else it unwinds, as in a program without
    supervisor.

    It unwinds where nothing starts anew: in place, for an error that is final, where the policy
    allows no attempt after one. An inner decorated call unwinds into the outer one. A prepared
    trainer always dies: its elder needs what is around.
    """
    if seat is None:
        return False
    if not seat.attempt:
        return True
    return outermost and policy.same_error_max > 1 and not describe_failure(error)["final"]


def die(error: BaseException, *, last_words: Callable[[], None]) -> NoReturn:
    """Say what Python would say, and end without any exit handler; ``last_words`` come after the
    traceback."""
    status = _told(error)
    _flush()
    try:
        last_words()
    except Exception as later:  # noqa: BLE001  told; the end comes anyway
        sys.excepthook(type(later), later, later.__traceback__)
    finally:
        _flush()
        os._exit(status)


def remove_stale_error_file() -> None:
    """At a trainer's start: what an earlier attempt died of is not what this one will die of."""
    if path := os.environ.get(ERROR_FILE):
        with contextlib.suppress(OSError):
            Path(path).unlink(missing_ok=True)


def _told(error: BaseException) -> int:
    """Tell people and the launcher; the exit status."""
    if isinstance(error, SystemExit):
        if isinstance(error.code, int):
            return error.code & 0xFF or 1
        sys.stderr.write(f"{error.code}\n")
        return 1
    sys.excepthook(type(error), error, error.__traceback__)
    if os.environ.get(ERROR_FILE):
        with contextlib.suppress(OSError):
            get_error_handler().record_exception(error)
    return 1


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            with contextlib.suppress(OSError):  # nobody reads it any more
                stream.flush()
