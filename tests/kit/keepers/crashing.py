"""``python -m kit.keepers.crashing FOLDER``: a keeper that dies at its n-th change of the store or of a
slot's mark, once.

``KEEPER_CRASH`` is JSON: ``at`` (from 0; -1: never), ``mode`` of ``CrashMode``, and ``folder``. It counts
from the moment on that ``folder/armed`` exists, and removes that as it dies, so that the keeper
after it lives. What it counts is appended to ``folder/calls``, one name a line.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ckpt.backends.file.store import FileBackend
from ckpt.ipc.board import RankBoard
from ckpt.keeper.__main__ import main
from ckpt.keeper.uploads import store_log
from ckpt.testing.crashes import CrashMode, NumberedOps, OpCall, die

T = TypeVar("T")
MARKS = ("hold", "release", "clear", "publish")


class Points:
    """All changes of one keeper, in the order in which it makes them."""

    def __init__(self, *, at: int, mode: str, folder: str) -> None:
        self._at = at
        self._mode = CrashMode(mode)
        self._armed = Path(folder) / "armed"
        self._calls = Path(folder) / "calls"
        self._lock = threading.Lock()
        self._count = 0

    def around(self, call: OpCall, run: Callable[[], T], half: Callable[[], object]) -> T:
        """A system call of the store."""
        return self.change(call.name, run, half)

    def change(self, name: str, run: Callable[[], T], half: Callable[[], object]) -> T:
        """One change: die before, after or half-way through it, if it is its turn."""
        with self._lock:
            dies = self._armed.exists() and self._count == self._at
            if self._armed.exists():
                self._count += 1
                with self._calls.open("a") as calls:
                    print(name, file=calls)
        if dies:
            self._armed.unlink()
            if self._mode is CrashMode.TORN:
                half()
            if self._mode is not CrashMode.AFTER:
                die()
        try:
            return run()
        finally:
            if dies:
                die()


def number_marks(points: Points) -> None:
    """Make each change of a slot's entry on the board a point."""
    for name in MARKS:
        real = getattr(RankBoard, name)

        def change(*given: object, _name: str = name, _real: Callable[..., T] = real) -> T:
            return points.change(_name, lambda: _real(*given), lambda: None)

        setattr(RankBoard, name, change)


if __name__ == "__main__":
    crash = Points(**json.loads(os.environ["KEEPER_CRASH"]))
    number_marks(crash)
    store_log.open_job_of = lambda spec, emit: FileBackend(  # type: ignore[assignment]
        spec.store, ops=NumberedOps(crash.around)
    )
    sys.exit(main())
