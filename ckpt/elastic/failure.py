"""What an exception in a decorated call means: restart or exit, with which reports and status.

An exception that is not the program's end makes a supervised trainer exit at the border of the
decorated call. The next attempt is forked from the supervisor, which is still inside the code
that surrounds the call. If the exception unwound through that code here, its ``finally`` and
``with`` blocks would run, on files that the next attempt needs. So no code above the call sees
it.
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

PREEMPTED_STATUS = 128 + signal.SIGTERM
"""143: what a shell reports for a program that SIGTERM ended."""


class Preempted(SystemExit):
    """The node is about to be taken away, and the state is safe.

    Raised from ``run.steps`` or ``run.completed``. A ``SystemExit``: ``finally`` blocks run, the
    program exits with 143, and code after the loop does not run as if training had finished.
    """

    def __init__(self, step: int) -> None:
        super().__init__(PREEMPTED_STATUS)
        self.step = step
        """The number of completed steps."""


# ---- describing exceptions

TEXT_MAX = 500

_FINAL = (UsageError, FencedError, IntegrityError, NotFoundError, KeyboardInterrupt, Preempted)
"""A restart would raise them again, or a person wanted the end."""


class FailureDescription(TypedDict):
    """What a keeper needs to know about an exception; see ``messages.Failing``."""

    kind: str
    text: str
    fingerprint: str
    final: bool


def describe_failure(error: BaseException) -> FailureDescription:
    """Describe an exception for the keeper.

    Equal exceptions at equal places have equal fingerprints. Their texts do not count: they may
    hold addresses.
    """
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


# ---- reporting to the keeper


class ExitReporter:
    """Reports to the keeper how a decorated call ends.

    The keeper that started this trainer decides about restarts. Usually it is the run's own
    keeper, and the run's session reports to it. If the run uses another store, this class holds a
    connection to the trainer's keeper. ``outermost``: the call is not inside another decorated
    call.
    """

    def __init__(self, session: Session, *, outermost: bool = True) -> None:
        self._session = session
        self._outermost = outermost
        self._link: KeeperLink | None = None

    def entered(self, milestones: Milestones) -> None:
        """The call began; reports ``milestones``."""
        trainer = supervised_trainer()
        if trainer is None or not self._outermost:
            return
        if self._session.supervised:
            self._session.join()
            milestones.report_to(self._session.reporter.report)
            return
        self._link = KeeperLink.connect(trainer.spec, _hello(trainer), start=False)
        milestones.report_to(self._link.phase)

    def failing(self, facts: FailureDescription, step: int) -> None:
        """The process is about to exit because of an exception."""
        if self._link is None:
            self._session.reporter.failing(**facts, step=step)
            return
        with suppress(UnavailableError):  # without a keeper there is nothing to report to
            self._link.failing(**facts, step=step)
        self._link.close()

    def finished(self) -> None:
        """The function returned and all is durable.

        A session reports that itself before it disconnects.
        """
        if self._link is not None:
            with suppress(UnavailableError):  # everything is durable already
                self._link.finished()
            self._link.close()


def _hello(trainer: SupervisedTrainer) -> Hello:
    return Hello(
        version=WIRE_VERSION,
        role="trainer",
        pid=os.getpid(),
        launch=trainer.launch,
        rank=trainer.rank,
        ranks=trainer.ranks,
        attempt=trainer.attempt,
    )


# ---- exiting at the border of the call

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Names the file in which torchrun looks for the exception of a rank."""


def ends_process(
    error: BaseException, trainer: TrainerProcess | None, policy: Policy, *, outermost: bool
) -> bool:
    """Whether ``error`` ends this process at the border of the call; else it unwinds as usual.

    It unwinds if nothing would be restarted: in place, for a final error, and if the policy
    allows no restart after an exception. An inner decorated call unwinds into the outer one. A
    prepared trainer always exits: the live one still needs the surrounding code's files.
    """
    if trainer is None:
        return False
    if not trainer.attempt:
        return True
    return outermost and policy.same_error_max > 1 and not describe_failure(error)["final"]


def die(error: BaseException, *, last_words: Callable[[], None]) -> NoReturn:
    """Print the traceback as Python would and exit without exit handlers.

    ``last_words`` runs after the traceback.
    """
    status = _report(error)
    _flush()
    try:
        last_words()
    except Exception as later:  # noqa: BLE001  printed; the process exits in any case
        sys.excepthook(type(later), later, later.__traceback__)
    finally:
        _flush()
        os._exit(status)


def remove_stale_error_file() -> None:
    """At a trainer's start: remove the error file of an earlier attempt."""
    if path := os.environ.get(ERROR_FILE):
        with contextlib.suppress(OSError):
            Path(path).unlink(missing_ok=True)


def _report(error: BaseException) -> int:
    """Report the exception to people and to the launcher; returns the exit status."""
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
            with contextlib.suppress(OSError):  # the reader is gone
                stream.flush()
