"""When bytes may go, at a rate: a token bucket as a value. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

BURST_S = 0.05
"""How much of a second's bytes may go at once."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """``free_bytes`` may go at ``at_s``; below 0 so many were let go beyond that, and are owed. No ``rate`` (bytes a second):
    everything may go, and nothing is owed.
    """

    rate: float | None
    at_s: float
    free_bytes: float = 0.0

    def at(self, now_s: float) -> Bucket:
        """The same bucket later. It fills at its rate, up to BURST_S of it; a clock that stands still adds nothing."""
        if self.rate is None:
            return replace(self, at_s=now_s, free_bytes=0.0)
        more = max(0.0, now_s - self.at_s) * self.rate
        return replace(self, at_s=max(now_s, self.at_s), free_bytes=min(self.free_bytes + more, self.rate * BURST_S))

    def with_rate(self, rate: float | None) -> Bucket:
        """Filled at another rate from here on. What is owed stays owed."""
        return replace(self, rate=rate)

    def taken(self, size_bytes: int) -> Bucket:
        """After so many bytes went."""
        return self if self.rate is None else replace(self, free_bytes=self.free_bytes - size_bytes)

    @property
    def wait_s(self) -> float:
        """How long nothing may go yet. More than a burst goes at once when nothing is owed: blocks are not cut here."""
        return 0.0 if self.rate is None or self.free_bytes >= 0 else -self.free_bytes / self.rate
