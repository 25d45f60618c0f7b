"""Notices that the keeper's loop stood still: nothing is told to other nodes meanwhile, and nobody here is served."""

from __future__ import annotations

import time
from collections.abc import Callable

from ckpt.events import Event, Tell

STALL_S = 0.5
"""A turn of the loop takes a few milliseconds; leases last for seconds."""


class Stalls:
    """Call ``turn`` once in each turn of the loop, in its thread.

    ``clock`` and ``computed`` are seconds: of the world, and of the processor's that this thread took.
    """

    def __init__(
        self, tell: Tell, clock: Callable[[], float] = time.monotonic, computed: Callable[[], float] = time.thread_time
    ) -> None:
        self._tell = tell
        self._clock = clock
        self._computed = computed
        self._before: tuple[float, float] | None = None

    def turn(self, waits_s: float) -> None:
        """The loop is about to wait, for ``waits_s`` at most."""
        now_s, computed_s = self._clock(), self._computed()
        if self._before is not None and now_s - self._before[0] > STALL_S:
            stood_s, busy_s = now_s - self._before[0], computed_s - self._before[1]
            text = (
                f"the keeper stood still for {stood_s:.1f} s, of which it computed for {busy_s:.1f} s; the rest it waited, "
                "for a processor of this machine or for a disk"
            )
            self._tell(Event("stalled", text, {"seconds": round(stood_s, 3), "computed_s": round(busy_s, 3)}))
        self._before = (now_s + max(0.0, waits_s), computed_s)
