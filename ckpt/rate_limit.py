"""How fast this node may send."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from ckpt.errors import UsageError

# When bytes may go, at a rate: a token bucket as a value. Pure.

BURST_S = 0.05
"""How much of a second's bytes may go at once."""


@dataclass(frozen=True, slots=True)
class TokenBucket:
    """``free_bytes`` may go at ``at_s``; below 0 so many were let go beyond that, and are owed. No
    ``rate`` (bytes a second): everything may go, and nothing is owed.
    """

    rate: float | None
    at_s: float
    free_bytes: float = 0.0

    def at(self, now_s: float) -> TokenBucket:
        """The same bucket later. It fills at its rate, up to BURST_S of it; a clock that stands
        still adds nothing."""
        if self.rate is None:
            return replace(self, at_s=now_s, free_bytes=0.0)
        more = max(0.0, now_s - self.at_s) * self.rate
        return replace(
            self,
            at_s=max(now_s, self.at_s),
            free_bytes=min(self.free_bytes + more, self.rate * BURST_S),
        )

    def with_rate(self, rate: float | None) -> TokenBucket:
        """Filled at another rate from here on. What is owed stays owed."""
        return replace(self, rate=rate)

    def taken(self, size_bytes: int) -> TokenBucket:
        """After so many bytes went."""
        return self if self.rate is None else replace(self, free_bytes=self.free_bytes - size_bytes)

    @property
    def wait_s(self) -> float:
        """How long nothing may go yet. More than a burst goes at once when nothing is owed: blocks
        are not cut here."""
        return 0.0 if self.rate is None or self.free_bytes >= 0 else -self.free_bytes / self.rate


RATE_BYTES_MIN = 1 << 20
"""Least rate of a cap, in bytes a second: below it servers would take this node for one that
stalls."""

BLOCK_BYTES_MIN = 64 << 10


class RateLimit:
    """At most so many bytes a second for all that share it, as a token bucket. None: no limit.
    Thread-safe."""

    def __init__(
        self, bytes_per_s: float | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._change = threading.Condition()
        self._bucket = TokenBucket(_checked(bytes_per_s), clock())

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
        """Wait until ``size_bytes`` may go; returns seconds waited. More than a burst is let go
        once nothing is owed."""
        began_s = self._clock()
        with self._change:
            while (wait_s := self._now().wait_s) > 0:
                self._change.wait(wait_s)
            self._bucket = self._bucket.taken(size_bytes)
        return self._clock() - began_s

    def _now(self) -> TokenBucket:
        self._bucket = self._bucket.at(self._clock())
        return self._bucket


def _checked(bytes_per_s: float | None) -> float | None:
    if bytes_per_s is not None and not bytes_per_s >= RATE_BYTES_MIN:
        raise UsageError(
            f"a rate cap is too low. bytes_per_s={bytes_per_s} least={RATE_BYTES_MIN}; pass None "
            "for no cap"
        )
    return bytes_per_s


# A rate as people write it: ``50MiB`` is so much in a second. Pure.

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?(?:/s)?", re.IGNORECASE)
_POWERS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_rate(text: str) -> float:
    """Bytes a second. Raises UsageError."""
    found = _SIZE.fullmatch(text.strip())
    if found is None or float(found[1]) <= 0:
        raise UsageError(f"not a rate. rate={text}; write 50MiB, for so much in a second")
    return float(found[1]) * 2.0 ** _POWERS[found[2].upper()]
