"""How much a sync may take, and what it did."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from ckpt.log.state import Hole
from ckpt.save.chunks import PACK_BYTES_MAX

BUDGET_BYTES = 2 * PACK_BYTES_MAX
"""Memory for copies in flight, when the caller names no limit: two of the largest packs."""

Progress = Callable[[int], None]
"""Told how many bytes were just copied; called by one thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """What a sync may take. ``threads`` objects are copied at once, as far as they fit into ``budget_bytes`` together;
    ``rate_bytes_per_s`` bounds what is read and written (None: not at all); setting ``stop`` ends it early."""

    threads: int = 4
    budget_bytes: int = BUDGET_BYTES
    rate_bytes_per_s: float | None = None
    stop: threading.Event | None = None


USUAL = Effort()
"""What a sync takes that nobody waits for, and nothing is in the way of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What was copied. ``next_seq``: the replica holds the log below it. ``damaged``: objects, with the reason, that the source
    has nowhere rightly, so that the replica lacks them too; ``hole``: where the source's log can't be read on."""

    complete: bool
    store_id: str
    next_seq: int
    rounds: int
    copied_objects: int
    copied_bytes: int
    present_objects: int
    records: int
    folds: int
    damaged: tuple[tuple[str, str], ...]
    hole: Hole | None

    @property
    def ok(self) -> bool:
        """Whether the replica holds everything that the source's log named when it was last read."""
        return self.complete and not self.damaged and self.hole is None
