"""Which SIGTERM asks, which is the same one again, and which means now."""

from __future__ import annotations

import enum
import time

SAME_TERM_S = 2.0
"""A SIGTERM this soon after the first is that one again: schedulers signal every process, and launchers pass it on."""


class Term(enum.Enum):
    """What one SIGTERM means."""

    FIRST = "first"
    SAME = "same"
    NOW = "now"


class Terms:
    """Those that came to this process. For a signal handler: it takes no lock."""

    def __init__(self) -> None:
        self._first_s: float | None = None

    def came(self) -> Term:
        """One came now."""
        now_s = time.monotonic()
        if self._first_s is None:
            self._first_s = now_s
            return Term.FIRST
        return Term.SAME if now_s - self._first_s < SAME_TERM_S else Term.NOW
