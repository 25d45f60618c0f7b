"""Snapshots that only memory holds: at which boundaries, told once for the job by rank 0 through the board.

At the end of each boundary rank 0 publishes its word on the next one. A rank that comes to that boundary has left the one
before, and in any training whose ranks depend on each other no rank completes a step that rank 0 has not begun; so the word is
there in time and nobody waits. A rank that finds none (its ranks run apart) takes none: its slots still hold an older complete
pair.
"""

from __future__ import annotations

from ckpt.link.board import Board, Phase

STAGE = 1
"""The flag of a decision: stage this boundary."""


class MemoryTier:
    """One rank's view of the board. ``every``: boundaries from one staged snapshot to the next; 0 for none."""

    def __init__(self, board: Board, *, rank: int, every: int) -> None:
        self._board = board
        self._mine = board.rank(rank)
        self._rank = rank
        self._every = every
        self._staged_at: int | None = None
        self._at = 0

    def begin(self, completed: int) -> None:
        """Training starts: ``completed`` steps are done."""
        self._staged_at = self._at = completed
        self._mine.attempt = self._board.attempt
        self._mine.phase = Phase.TRAINING
        self._mine.beat(completed)
        self._announce(completed)

    def wants(self, completed: int, *, since: int) -> bool:
        """Whether all ranks stage this boundary; ``since`` is the one before it."""
        return self._every > 0 and self._board.decision(since + 1) == STAGE and completed > since

    def passed(self, completed: int, *, staged: bool) -> None:
        """This boundary is done with; on rank 0, say what happens at the next one."""
        if staged:
            self._staged_at = completed
            self._mine.staged += 1
        self._mine.beat(completed)
        self._mine.first_step_done = True
        self._announce(completed)
        self._at = completed

    def skipped(self) -> None:
        """A boundary that was to be staged found no slot."""
        self._mine.skipped += 1

    def pause(self, phase: Phase) -> None:
        """Steps stand still for a reason, or go on (``Phase.TRAINING``)."""
        self._mine.phase = phase
        self._mine.beat(self._mine.completed or 0)

    def _announce(self, completed: int) -> None:
        if self._rank != 0 or not self._every:
            return
        assert self._staged_at is not None, "begun"
        due = completed + 1 - self._staged_at >= self._every
        self._board.decide(completed + 1, STAGE if due and self._slowest() >= self._at else 0)

    def _slowest(self) -> int:
        """Where the slowest rank is. One that is behind this one's last boundary would have the others fill all their slots."""
        done = [self._board.rank(rank).completed for rank in range(self._board.ranks)]
        return min(self._at if one is None else one for one in done)
