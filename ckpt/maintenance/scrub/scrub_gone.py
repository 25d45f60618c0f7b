"""Whether what is missing was dropped while the scrub went on: then a sweep took it, and nothing is wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ckpt.log.state import Committed, LogState

FRESH_S = 60.0
"""A log that was read so long ago is read again before damage is believed: sweeps wait for hours between drop and deletion."""


class Gone:
    """The log of a while ago, read on when it is asked. ``read_on`` gives the state after what it is given."""

    def __init__(
        self, state: LogState, read_on: Callable[[LogState], LogState], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._state = state
        self._read_on = read_on
        self._clock = clock
        self._read_at = clock()

    def all_gone(self, entries: Sequence[Committed]) -> bool:
        """Whether none of these snapshots exists any more."""
        if self._clock() - self._read_at > FRESH_S:
            self._state = self._read_on(self._state)
            self._read_at = self._clock()
        exist = set(self._state.snapshots)
        return not any(entry in exist for entry in entries)
