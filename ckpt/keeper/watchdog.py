"""Ends a keeper whose loop hangs: its supervisors start another, which gets all that they hold for it.

Its lease is kept alive by a thread of its own, so a node whose loop hangs would look well to all others, and do nothing.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable

LOOK_S = 1.0
LOOKS_MAX = 300
"""Longer than anything keeps a loop that will go on: to leave a membership that doesn't answer takes up to three minutes.

Looks count, not seconds: a machine that slept wakes well.
"""

WRITE_S = 5.0
"""How long its last words may take."""


class Watchdog:
    """Call ``turn`` in each turn of the loop, and ``stop`` after the last. ``hung``: what follows where none came."""

    def __init__(self, hung: Callable[[], object], *, look_s: float = LOOK_S, looks_max: int = LOOKS_MAX) -> None:
        self._hung = hung
        self._look_s = look_s
        self._looks_max = looks_max
        self._turned = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ckpt-watchdog", daemon=True)
        self._thread.start()

    def turn(self) -> None:
        """The loop goes on."""
        self._turned.set()

    def stop(self) -> None:
        """There is no loop any more."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        looks = 0
        while not self._stopped.wait(self._look_s):
            looks = 0 if self._turned.is_set() else looks + 1
            self._turned.clear()
            if looks >= self._looks_max:
                self._hung()
                return


def end_hung_process() -> None:
    """Say where each thread stands, in the log, and be gone as if killed: nothing here can be trusted to end well.

    The loop may hang in writing that very log, so another one's clock runs that needs nothing of Python. A loop that hangs and
    keeps the interpreter's lock is not found.
    """
    faulthandler.dump_traceback_later(WRITE_S, exit=True)
    try:
        text = f"the keeper's loop has hung for some {LOOKS_MAX * LOOK_S:.0f} s; it ends, and its threads stood here:\n"
        os.write(sys.stderr.fileno(), text.encode())
        faulthandler.dump_traceback(sys.stderr)
    finally:
        os.kill(os.getpid(), signal.SIGKILL)  # not abort: a core would hold all slots
