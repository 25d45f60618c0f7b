"""How long a peer is waited for. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """A peer moves ``bytes_per_s_min`` and may be late by ``grace_s``, as a leaky bucket: speed makes up for lateness and never
    earns more. So neither silence nor a trickle holds anybody up, whatever went before.
    """

    grace_s: float = 10.0
    bytes_per_s_min: int = 64 << 10

    def late_s(self, late_s: float, *, took_s: float, moved_bytes: int) -> float:
        """How late a peer is that was ``late_s``, and then took ``took_s`` to move ``moved_bytes``."""
        return max(0.0, late_s + took_s - moved_bytes / self.bytes_per_s_min)
