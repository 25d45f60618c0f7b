"""Snapshots that only memory holds: at which boundaries, told once for the job by rank 0 through the board.

At the end of each boundary rank 0 publishes its word on the next one. A rank that comes to that boundary has left the one
before, and in any training whose ranks depend on each other no rank completes a step that rank 0 has not begun; so the word is
there in time and nobody waits. A rank that finds none (its ranks run apart) takes none: its slots still hold an older complete
pair.

With several nodes the word travels through keepers, so it is given one boundary earlier; and what other nodes hold is known a
moment late, so the next snapshot waits until the last one is known to be complete.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ckpt.ipc.board import Phase
from ckpt.ipc.link_board import Board

STAGE = 1
"""The flag of a decision: stage this boundary."""


AHEAD = 2
"""For which boundary rank 0 gives its word to other nodes: the one after the next."""

GIVE_UP_S = 2.0
"""A snapshot that is not complete on all nodes by then never will be: a rank had no slot for it."""


class MemoryTier:
    """One rank's view of the board. ``every``: boundaries from one staged snapshot to the next; 0 for none.

    ``rank`` is this node's; ``leads``: it is rank 0 of the job. ``pass_on`` brings its words to other nodes (None: there are
    none): a boundary, and what all ranks do there.
    """

    def __init__(
        self, board: Board, *, rank: int, every: int, leads: bool | None = None,
        pass_on: Callable[[int, int], object] | None = None,
    ) -> None:  # fmt: skip
        self._board = board
        self._mine = board.rank(rank)
        self._leads = rank == 0 if leads is None else leads
        self._pass_on = pass_on
        self._every = every
        self._staged_at: int | None = None
        self._at = 0
        self._told = 0
        self._told_stage = 0
        self._told_stage_s = 0.0

    def begin(self, completed: int) -> None:
        """Training starts: ``completed`` steps are done."""
        self._staged_at = self._at = self._told = self._told_stage = completed
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
        if not self._leads or not self._every:
            return
        assert self._staged_at is not None, "begun"
        if self._pass_on is not None:
            self._announce_to_all(completed, self._pass_on)
            return
        due = completed + 1 - self._staged_at >= self._every
        self._board.decide(completed + 1, STAGE if due and self._slowest() >= self._at else 0)

    def _announce_to_all(self, completed: int, pass_on: Callable[[int, int], object]) -> None:
        for boundary in range(max(self._told, completed) + 1, completed + AHEAD + 1):
            due = boundary - self._told_stage >= self._every and self._last_is_settled()
            flags = STAGE if due else 0
            self._board.decide(boundary, flags)
            pass_on(boundary, flags)
            self._told = boundary
            if due:
                self._told_stage, self._told_stage_s = boundary, time.monotonic()

    def _last_is_settled(self) -> bool:
        """Whether the last snapshot is complete on all nodes, or never will be."""
        if not self._told_stage_s or time.monotonic() - self._told_stage_s > GIVE_UP_S:
            return True
        # How far all are is read before what they hold: who is past that boundary without the snapshot did not take it, for
        # instance because the word came late.
        done = [one.completed for one in self._board.everyone()]
        complete = self._board.complete()
        if complete is not None and complete.step >= self._told_stage:
            return True
        return all(one is not None and one > self._told_stage for one in done)

    def _slowest(self) -> int:
        """Where the slowest rank is. One that is behind this one's last boundary would have the others fill all their slots."""
        done = [one.completed for one in self._board.everyone()]
        return min(self._at if one is None else one for one in done)
