"""What the persisters of one node's ranks tell each other: they are threads of one process.

The first of them is the node's *head*. Each gives it what its rank wrote; the head writes one part for all, speaks for them to
the head of rank 0's node, and tells them what became of the snapshot.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from ckpt.errors import UnavailableError
from ckpt.manifest.part import Part
from ckpt.persist.channel import STOP_LOOK_S
from ckpt.persist.receipts import Outcome, Receipt

MATE_WAIT_S = 7200.0
"""How long one waits for another's word on a snapshot."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank wrote, and where it lies; no part where it failed."""

    receipt: Receipt
    part: Part | None = None


class Mates:
    """The node's ranks: ``ranks`` of them, from ``rank`` on. Snapshots are numbered alike by all. Thread-safe."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank = rank
        self.ranks = ranks
        self._changed = threading.Condition()
        self._shares: dict[int, dict[int, Share]] = {}
        self._outcomes: dict[int, Outcome] = {}

    def give(self, n: int, share: Share) -> None:
        """A rank has done with its share of snapshot ``n``; its slot is free."""
        with self._changed:
            self._shares.setdefault(n, {})[share.receipt.rank] = share
            self._changed.notify_all()

    def shares(self, n: int, stop: Callable[[], bool]) -> tuple[Share, ...]:
        """For the head, once: the shares of all ranks, in rank order. Each has then seen the outcome of ``n - 1``.

        Raises UnavailableError as soon as ``stop()`` is true.
        """
        with self._changed:
            self._wait(lambda: len(self._shares.get(n, ())) == self.ranks, stop, f"shares of snapshot {n}")
            self._outcomes.pop(n - 1, None)
            return tuple(share for _, share in sorted(self._shares.pop(n).items()))

    def tell(self, n: int, outcome: Outcome) -> None:
        """From the head: what became of snapshot ``n``."""
        with self._changed:
            self._outcomes[n] = outcome
            self._changed.notify_all()

    def outcome(self, n: int, stop: Callable[[], bool]) -> Outcome:
        """What became of snapshot ``n``. Raises UnavailableError as soon as ``stop()`` is true."""
        with self._changed:
            self._wait(lambda: n in self._outcomes, stop, f"the outcome of snapshot {n}")
            return self._outcomes[n]

    def _wait(self, there: Callable[[], bool], stop: Callable[[], bool], what: str) -> None:
        until_s = time.monotonic() + MATE_WAIT_S
        while not there():
            if stop() or time.monotonic() > until_s:
                raise UnavailableError(f"stopped while waiting for {what} of this node's ranks. first_rank={self.rank}")
            self._changed.wait(STOP_LOOK_S)
