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
from ckpt.format.part import Part
from ckpt.ipc.mailbox import STOP_LOOK_S
from ckpt.save.receipts import Outcome, Receipt

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
        self._taken = -1
        """The last snapshot whose shares the head took, or gave up."""

    def give(self, n: int, share: Share) -> None:
        """A rank has done with its share of snapshot ``n``; its slot is free."""
        with self._changed:
            if n > self._taken:
                self._shares.setdefault(n, {})[share.receipt.rank] = share
            self._changed.notify_all()

    def shares(self, n: int, stop: Callable[[], bool]) -> tuple[Share, ...]:
        """For the head, once: the shares of all ranks, in rank order. Each has then seen the outcome of ``n - 1``.

        Raises UnavailableError as soon as ``stop()`` is true, and after MATE_WAIT_S; those that come later are dropped.
        """
        with self._changed:
            try:
                self._wait(lambda: len(self._shares.get(n, ())) == self.ranks, stop, lambda: self._missing(n))
            finally:
                self._taken = n
                found = self._shares.pop(n, {})
            self._outcomes = {later: outcome for later, outcome in self._outcomes.items() if later >= n}
            return tuple(share for _, share in sorted(found.items()))

    def tell(self, n: int, outcome: Outcome) -> None:
        """From the head: what became of snapshot ``n``."""
        with self._changed:
            self._outcomes[n] = outcome
            self._changed.notify_all()

    def outcome(self, n: int, stop: Callable[[], bool]) -> Outcome:
        """What became of snapshot ``n``. Raises UnavailableError as soon as ``stop()`` is true, and after MATE_WAIT_S."""
        with self._changed:
            self._wait(lambda: n in self._outcomes, stop, lambda: f"the outcome. first_rank={self.rank}")
            return self._outcomes[n]

    def _missing(self, n: int) -> str:
        there = self._shares.get(n, {})
        missing = [rank for rank in range(self.rank, self.rank + self.ranks) if rank not in there]
        return f"the shares of this node's other ranks. missing={','.join(map(str, missing))}"

    def _wait(self, there: Callable[[], bool], stop: Callable[[], bool], what: Callable[[], str]) -> None:
        until_s = time.monotonic() + MATE_WAIT_S
        while not there():
            if stop():
                raise UnavailableError(f"stopped while waiting for {what()}")
            if time.monotonic() > until_s:
                raise UnavailableError(
                    f"no word within the time limit while waiting for {what()} timeout_s={MATE_WAIT_S:g}; a rank is dead or "
                    "far behind: look at its log"
                )
            self._changed.wait(STOP_LOOK_S)
