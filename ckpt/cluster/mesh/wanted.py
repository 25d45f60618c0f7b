"""A node to which a line is wanted: where it is called, and when next."""

from __future__ import annotations

from dataclasses import dataclass

RETRY_FIRST_S = 0.05
RETRY_LAST_S = 2.0


@dataclass(slots=True)
class Wanted:
    """See the module. Owned by the lines."""

    address: str
    doubtful: bool = True
    """Nobody has answered at its address yet, or since its line broke."""
    reached: bool = False
    """It was called there, and answered."""
    due_s: float = 0.0
    pause_s: float = RETRY_FIRST_S

    def wait(self, now_s: float) -> None:
        """A call was tried: the next comes later and later."""
        self.due_s, self.pause_s = now_s + self.pause_s, min(2 * self.pause_s, RETRY_LAST_S)
