"""Who handed in what. Every rank hands in the same sequence; a turn is one place in it. Pure
bookkeeping."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from ckpt.errors import CkptError
from ckpt.values import SnapshotId, StagedIndex


@dataclass(slots=True)
class Submission:
    """One snapshot on its way: what the ranks that handed it in hold, and who is done with it."""

    n: int
    snapshot: SnapshotId
    tags: tuple[str, ...] = ()
    indexes: dict[int, StagedIndex] = field(default_factory=dict)
    refused: CkptError | None = None
    error: CkptError | None = None
    """Why it is not durable, once a rank knows."""
    submitted: set[int] = field(default_factory=set)
    settled: set[int] = field(default_factory=set)


SubmissionEntry = tuple[int, SnapshotId, tuple[str, ...]]
"""A turn as other nodes hear of it: its number, the pair, the tags."""

TAIL_MAX = 64
"""So many of the last turns are remembered: slots allow far fewer in flight."""


class Submissions:
    """The turns that are not settled by all ranks yet. With several nodes each has its own, in the
    same order.

    ``tail``: the last turns, settled or not.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._next = [0] * ranks
        self._open: dict[int, Submission] = {}
        self.tail: deque[SubmissionEntry] = deque(maxlen=TAIL_MAX)

    def __len__(self) -> int:
        return len(self._open)

    @property
    def level(self) -> bool:
        """Whether all ranks handed in equally many."""
        return len(set(self._next)) == 1

    @property
    def count(self) -> int:
        """How many were handed in, by the rank that handed in the most."""
        return max(self._next)

    def find(self, snapshot: SnapshotId) -> Submission | None:
        """The turn that has ``snapshot`` in flight, or None."""
        return next((turn for turn in self._open.values() if turn.snapshot == snapshot), None)

    def submit(
        self, rank: int, snapshot: SnapshotId, tags: tuple[str, ...], what: StagedIndex | CkptError
    ) -> Submission:
        """Note what ``rank`` hands in next: its share, or why it has none."""
        n = self._next[rank]
        self._next[rank] += 1
        if n not in self._open:
            self._open[n] = Submission(n, snapshot, tags)
            self.tail.append((n, snapshot, tags))
        turn = self._open[n]
        turn.submitted.add(rank)
        if isinstance(what, CkptError):
            turn.refused = turn.refused or what
        else:
            turn.indexes[rank] = what
        return turn

    def settle(self, rank: int, turn: Submission, error: CkptError | None) -> bool:
        """``rank`` is done with ``turn``, which failed with ``error`` (None: it didn't); True where
        it was the last."""
        turn.settled.add(rank)
        turn.error = turn.error or error
        if len(turn.settled) < self._ranks:
            return False
        self._open.pop(turn.n, None)
        return True

    def uneven(self) -> Iterator[tuple[Submission, tuple[int, ...]]]:
        """The turns that some rank has not handed in, in order, each with those ranks."""
        for n in range(min(self._next), max(self._next)):
            turn = self._open[n]
            yield turn, tuple(rank for rank in range(self._ranks) if rank not in turn.submitted)
