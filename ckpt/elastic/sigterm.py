"""SIGTERM: what each one means, and its handling in a process without a supervisor."""

from __future__ import annotations

import enum
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

REPEAT_S = 2.0
"""A SIGTERM this soon after the first is a repetition of it.

Schedulers signal every process, and launchers forward the signal.
"""


class SigtermMeaning(enum.Enum):
    """What one SIGTERM means: stop at a boundary, a repetition of the first, or end at once."""

    FIRST = "first"
    REPEAT = "same"
    NOW = "now"


class SigtermHistory:
    """The SIGTERMs that this process received. Takes no lock, so a signal handler may use it."""

    def __init__(self) -> None:
        self._first_s: float | None = None

    def classify(self) -> SigtermMeaning:
        """A SIGTERM was received now; what it means."""
        now_s = time.monotonic()
        if self._first_s is None:
            self._first_s = now_s
            return SigtermMeaning.FIRST
        return SigtermMeaning.REPEAT if now_s - self._first_s < REPEAT_S else SigtermMeaning.NOW


class InPlaceSigterm:
    """A SIGTERM handler for training in place, installed while the context is entered.

    The first SIGTERM calls ``ask``, which requests a stop at a boundary and returns false if that
    is impossible; it runs in a thread, since a signal handler must not wait. A second SIGTERM, or
    the first one if the request is impossible, ends the process. Does nothing outside the main
    thread, or if the program has its own handler.
    """

    def __init__(self, ask: Callable[[], bool]) -> None:
        self._ask = ask
        self._pid = os.getpid()
        self._installed = False
        self._terms = SigtermHistory()
        self._refused = False

    def __enter__(self) -> None:
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._on_term)
            self._installed = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._installed and signal.getsignal(signal.SIGTERM) == self._on_term:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        # In a forked child, such as a data loader's worker, there is nothing to finish.
        if os.getpid() != self._pid:
            self._end()
            return
        match self._terms.classify():
            case SigtermMeaning.FIRST:
                threading.Thread(target=self._try, name="ckpt-term", daemon=True).start()
            case SigtermMeaning.NOW:
                self._end()
            case SigtermMeaning.REPEAT if self._refused:
                self._end()

    def _try(self) -> None:
        if not self._ask():
            self._refused = True
            os.kill(self._pid, signal.SIGTERM)

    def _end(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
