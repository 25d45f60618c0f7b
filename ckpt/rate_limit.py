"""How fast this node may send."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ckpt.errors import UsageError
from ckpt.pacing import BURST_S, Bucket

RATE_BYTES_MIN = 1 << 20
"""Least rate of a cap, in bytes a second: below it servers would take this node for one that stalls."""

BLOCK_BYTES_MIN = 64 << 10


class RateCap:
    """At most so many bytes a second for all that share it, as a token bucket. None: no limit. Thread-safe."""

    def __init__(self, bytes_per_s: float | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._change = threading.Condition()
        self._bucket = Bucket(_checked(bytes_per_s), clock())

    @property
    def bytes_per_s(self) -> float | None:
        """The cap in force."""
        return self._bucket.rate

    def set(self, bytes_per_s: float | None) -> None:
        """Change the cap, also for those who wait now."""
        with self._change:
            self._bucket = self._bucket.at(self._clock()).with_rate(_checked(bytes_per_s))
            self._change.notify_all()

    def block_bytes(self, most: int) -> int:
        """How much to send at once, ``most`` at most, so that the rate is even."""
        rate = self._bucket.rate
        return most if rate is None else min(most, max(BLOCK_BYTES_MIN, int(rate * BURST_S)))

    def take(self, size_bytes: int) -> float:
        """Wait until ``size_bytes`` may go; returns seconds waited. More than a burst is let go once nothing is owed."""
        began_s = self._clock()
        with self._change:
            while (wait_s := self._now().wait_s) > 0:
                self._change.wait(wait_s)
            self._bucket = self._bucket.taken(size_bytes)
        return self._clock() - began_s

    def _now(self) -> Bucket:
        self._bucket = self._bucket.at(self._clock())
        return self._bucket


def _checked(bytes_per_s: float | None) -> float | None:
    if bytes_per_s is not None and not bytes_per_s >= RATE_BYTES_MIN:
        raise UsageError(
            f"a rate cap is too low. bytes_per_s={bytes_per_s} least={RATE_BYTES_MIN}; pass None for no cap"
        )
    return bytes_per_s
