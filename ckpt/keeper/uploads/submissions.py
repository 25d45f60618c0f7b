"""Which rank has submitted which snapshots. Every rank submits the same sequence; each of its
places is one submission. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from ckpt.errors import CkptError
from ckpt.values import SnapshotId, StagedIndex


@dataclass(slots=True)
class Submission:
    """One snapshot in flight: the shares of the ranks that submitted it, and which ranks are done
    with it."""

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
"""A submission as other nodes receive it: its number, the snapshot, the tags."""

TAIL_MAX = 64
"""How many of the last submissions are remembered; slots allow far fewer in flight."""


class Submissions:
    """The submissions that some rank is not done with. Each node has its own, all in the same
    order.

    ``tail``: the last submissions, completed or not.
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
        """Whether all ranks have submitted equally many."""
        return len(set(self._next)) == 1

    @property
    def count(self) -> int:
        """How many the rank that has submitted the most has submitted."""
        return max(self._next)

    def find(self, snapshot: SnapshotId) -> Submission | None:
        """The submission of ``snapshot`` that is in flight, or None."""
        return next(
            (submission for submission in self._open.values() if submission.snapshot == snapshot),
            None,
        )

    def submit(
        self, rank: int, snapshot: SnapshotId, tags: tuple[str, ...], share: StagedIndex | CkptError
    ) -> Submission:
        """Note what ``rank`` submits next: its share, or why it has none."""
        n = self._next[rank]
        self._next[rank] += 1
        if n not in self._open:
            # The first rank to reach a place names its snapshot; the others submit the same
            # sequence.
            self._open[n] = Submission(n, snapshot, tags)
            self.tail.append((n, snapshot, tags))
        submission = self._open[n]
        submission.submitted.add(rank)
        if isinstance(share, CkptError):
            submission.refused = submission.refused or share
        else:
            submission.indexes[rank] = share
        return submission

    def settle(self, rank: int, submission: Submission, error: CkptError | None) -> bool:
        """``rank`` is done with a submission, which failed with ``error`` (None: it did not); True
        if it was the last."""
        submission.settled.add(rank)
        submission.error = submission.error or error
        if len(submission.settled) < self._ranks:
            return False
        # Open until the last rank is done: the final flush finds it, and does not submit it twice.
        self._open.pop(submission.n, None)
        return True

    def uneven(self) -> Iterator[tuple[Submission, tuple[int, ...]]]:
        """The submissions that some rank has not made, in order, each with those ranks."""
        for n in range(min(self._next), max(self._next)):
            submission = self._open[n]
            yield (
                submission,
                tuple(rank for rank in range(self._ranks) if rank not in submission.submitted),
            )
