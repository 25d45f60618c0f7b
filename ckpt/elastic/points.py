"""When this trainer reached the points of its start, for the account of a recovery."""

from __future__ import annotations

import time
from collections.abc import Callable


class Points:
    """Notes points; hands each on once somebody listens. Names are those of ``messages.Phase``."""

    def __init__(self) -> None:
        self._noted: list[tuple[str, float]] = []
        self._names: set[str] = set()

    def reach(self, name: str) -> None:
        """This point is reached now; only the first time counts."""
        if name not in self._names:
            self._names.add(name)
            self._noted.append((name, time.monotonic()))

    def hand_on(self, tell: Callable[[str, float], None]) -> None:
        """Tell what was noted since the last call."""
        noted, self._noted = self._noted, []
        for name, at_s in noted:
            tell(name, at_s)
