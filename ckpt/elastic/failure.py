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
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TypedDict

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from ckpt.elastic.boundaries import Milestones
from ckpt.elastic.processes.trainer import TrainerProcess, trainer_of_process
from ckpt.errors import (
    CkptError,
    FencedError,
    IntegrityError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from ckpt.format.canonical import digest_hex
from ckpt.ipc.messages import WIRE_VERSION, Failing, Hello, Policy
from ckpt.session.keeper.attachment import SupervisedTrainer, supervised_trainer
from ckpt.session.keeper.connection import KeeperLink
from ckpt.session.session import Session

PREEMPTED_STATUS = 128 + signal.SIGTERM
"""143: what a shell reports for a program that SIGTERM ended."""

NOT_DURABLE_STATUS = 75
"""As that, but the last step is not durable: EX_TEMPFAIL of sysexits."""


class Preempted(SystemExit):
    """The node is about to be taken away, and the state is safe.

    Raised from ``run.steps`` or ``run.completed``. A ``SystemExit``: ``finally`` blocks run, the
    program exits with 143, and code after the loop does not run as if training had finished. If the
    last step did not become durable in time it exits with 75.
    """

    def __init__(self, step: int, *, durable: bool = True) -> None:
        super().__init__(PREEMPTED_STATUS if durable else NOT_DURABLE_STATUS)
        self.durable = durable
        """Whether that step is durable."""
        self.step = step
        """The number of completed steps."""


# ---- describing exceptions

TEXT_MAX = 500

PROGRESS_S = 1.0
"""How often the steps of a run on another store are reported to the trainer's keeper."""

_FINAL = (UsageError, FencedError, IntegrityError, NotFoundError, KeyboardInterrupt, Preempted)
"""A restart would raise them again, or a person wanted the end."""


class FailureDescription(TypedDict):
    """What a keeper needs to know about an exception; see ``messages.Failing``."""

    kind: str
    text: str
    fingerprint: str
    final: bool
    passing: bool


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
        passing=not final and may_pass(error),
    )


_STAYS = (
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
"""System errors that another attempt meets again, as it meets a wrong program."""

_CHAIN_MAX = 16


def may_pass(error: BaseException) -> bool:
    """Whether an exception may come of an outage that passes by itself: it, or what caused it, is a
    system error, a lost connection or a store that does not answer.
    """
    current: BaseException | None = error
    for _ in range(_CHAIN_MAX):
        if current is None:
            return False
        if isinstance(current, OSError):
            return not isinstance(current, _STAYS)
        if isinstance(current, CkptError):
            return current.retry
        if isinstance(current, dist.DistError):
            return True
        current = current.__cause__ or current.__context__
    return False


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
        self._inner: KeeperLink | None = None
        """Of a call inside another one, to report progress alone."""
        self._progress_at_s = 0.0

    def entered(self, milestones: Milestones) -> None:
        """The call began; reports ``milestones``."""
        trainer = supervised_trainer()
        if trainer is None or not self._outermost:
            return
        if (process := trainer_of_process()) is not None:
            process.entered()
        if self._session.supervised:
            self._session.join()
            milestones.report_to(self._session.reporter.report)
            return
        self._link = KeeperLink.connect(trainer.spec, _hello(trainer), start=False)
        milestones.report_to(self._link.phase)

    def failing(self, facts: FailureDescription, step: int) -> None:
        """The process is about to exit because of an exception."""
        failing = Failing(**facts, step=step)
        if (process := trainer_of_process()) is not None:
            process.failing(failing)  # the keeper may be gone, or go before it reads the message
        if self._inner is not None:
            self._inner.close()
        if self._link is None:
            self._session.reporter.failing(failing)
            return
        with suppress(UnavailableError):  # without a keeper there is nothing to report to
            self._link.failing(failing)
        self._link.close()

    def progress(self, completed: int) -> None:
        """Steps are complete. Reported if the trainer's keeper does not see them on its board: the
        first ones at once, later ones once a second.
        """
        trainer = supervised_trainer()
        if trainer is None or self._session.supervised:
            return
        now_s = time.monotonic()
        if now_s < self._progress_at_s:
            return
        self._progress_at_s = now_s + PROGRESS_S
        with suppress(UnavailableError):  # a keeper that is lost restarts the attempt
            link = self._link or self._inner
            if link is None:
                link = self._inner = KeeperLink.connect(trainer.spec, _hello(trainer), start=False)
            link.progress(self._session.url, completed)

    def finished(self) -> None:
        """The function returned and all is durable.

        A session reports that itself before it disconnects.
        """
        if self._link is not None:
            with suppress(UnavailableError):  # everything is durable already
                self._link.finished()
            self._link.close()
        if self._inner is not None:
            self._inner.close()


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
    error: BaseException,
    trainer: TrainerProcess | None,
    policy: Policy,
    *,
    outermost: bool,
    returned: bool = False,
) -> bool:
    """Whether ``error`` ends this process at the border of the call; else it unwinds as usual.

    It unwinds if nothing would be restarted: in place, for a final error, once the decorated
    function has ``returned``, and if the policy allows no restart after an exception. An inner
    decorated call unwinds into the outer one. A prepared trainer always exits: the live one still
    needs the surrounding code's files.
    """
    if trainer is None:
        return False
    if not trainer.attempt:
        return True
    if returned or not outermost or policy.same_error_max <= 1:
        return False
    return not describe_failure(error)["final"]


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
