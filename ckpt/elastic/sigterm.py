"""SIGTERM where no supervisor hears it: finish the step, make it durable, exit."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

from ckpt.elastic.terms import Term, Terms


class TermInPlace:
    """While it is entered, the first SIGTERM asks to stop; a later one, or one that nobody can obey, ends the process.

    Does nothing beside the main thread, or where the program has a handler of its own. ``ask`` is called in a thread, since a
    signal handler must not wait; it says whether the request could be made.
    """

    def __init__(self, ask: Callable[[], bool]) -> None:
        self._ask = ask
        self._pid = os.getpid()
        self._installed = False
        self._terms = Terms()
        self._refused = False

    def __enter__(self) -> None:
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._on_term)
            self._installed = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed and signal.getsignal(signal.SIGTERM) == self._on_term:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a child of this process, which has nothing to finish
            self._end()
            return
        match self._terms.came():
            case Term.FIRST:
                threading.Thread(target=self._try, name="ckpt-term", daemon=True).start()
            case Term.NOW:
                self._end()
            case Term.SAME if self._refused:
                self._end()

    def _try(self) -> None:
        if not self._ask():
            self._refused = True
            os.kill(self._pid, signal.SIGTERM)

    def _end(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
