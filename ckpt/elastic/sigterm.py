"""SIGTERM where no supervisor hears it: finish the step, make it durable, exit."""

from __future__ import annotations

import enum
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

# Which SIGTERM asks, which is the same one again, and which means now.

REPEAT_S = 2.0
"""A SIGTERM this soon after the first is that one again: schedulers signal every process, and
launchers pass it on."""


class SigtermMeaning(enum.Enum):
    """What one SIGTERM means."""

    FIRST = "first"
    REPEAT = "same"
    NOW = "now"


class SigtermHistory:
    """Those that came to this process. For a signal handler: it takes no lock."""

    def __init__(self) -> None:
        self._first_s: float | None = None

    def classify(self) -> SigtermMeaning:
        """One came now."""
        now_s = time.monotonic()
        if self._first_s is None:
            self._first_s = now_s
            return SigtermMeaning.FIRST
        return SigtermMeaning.REPEAT if now_s - self._first_s < REPEAT_S else SigtermMeaning.NOW


class InPlaceSigterm:
    """While it is entered, the first SIGTERM asks to stop; a later one, or one that nobody can
    obey, ends the process.

    Does nothing beside the main thread, or where the program has a handler of its own. ``ask`` is
    called in a thread, since a signal handler must not wait; it says whether the request could be
    made.
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
        if os.getpid() != self._pid:  # a child of this process, which has nothing to finish
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
