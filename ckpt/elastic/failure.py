"""The border of a decorated call, for an exception that is not the program's end: the trainer dies on the spot.

The next attempt is forked from the supervisor, which still stands inside whatever surrounds the call. Unwinding here would
run those ``finally`` and ``with`` blocks, on files that the next attempt needs. So nothing above the call learns of it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from ckpt.elastic.failing import facts_of
from ckpt.elastic.processes.trainer import TrainerSeat
from ckpt.ipc.policy import Policy

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Where torchrun looks for what a rank died of."""


def dies_here(error: BaseException, seat: TrainerSeat | None, policy: Policy, *, outermost: bool) -> bool:
    """Whether ``error`` ends this process at the border; else it unwinds, as in a program without supervisor.

    It unwinds where nothing starts anew: in place, for an error that is final, where the policy allows no attempt after one.
    An inner decorated call unwinds into the outer one. A prepared trainer always dies: its elder needs what is around.
    """
    if seat is None:
        return False
    if not seat.attempt:
        return True
    return outermost and policy.same_error_max > 1 and not facts_of(error)["final"]


def die(error: BaseException, *, last_words: Callable[[], None]) -> NoReturn:
    """Say what Python would say, and end without any exit handler; ``last_words`` come after the traceback."""
    status = _told(error)
    _flush()
    try:
        last_words()
    except Exception as later:  # noqa: BLE001  told; the end comes anyway
        sys.excepthook(type(later), later, later.__traceback__)
    finally:
        _flush()
        os._exit(status)


def forget_older_error() -> None:
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
