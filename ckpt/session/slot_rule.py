"""When a slot may be overwritten, so that all ranks always share a complete snapshot. Pure.

Ranks stage at different speeds, are killed at any moment, and see each other only through the
board. Each keeps the newest pair that is complete, and every newer one that may still become
complete. That one can't any more where it was captured in an earlier epoch (no trainer of it lives)
or where another rank has gone past it without holding it (each rank seals in ascending order).
Without these two, pairs that a rank refused or lost would fill its peers' slots for ever.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from ckpt.ipc.board import newest_common
from ckpt.values import SnapshotId

SEALED_WITHIN_STEPS = 2
"""A pair is sealed, if ever, before its rank has completed that many more steps: a copy may go on
beside the next one."""


@dataclass(frozen=True, slots=True)
class BoardView:
    """What the board said of each rank. All of ``passed`` was read before any of ``sealed``.

    ``passed``: every pair up to this one that the rank will ever hold was sealed by then.
    ``sealed``: what it holds. So a pair up to ``passed`` that is missing in ``sealed`` was not
    merely read too early.
    """

    passed: tuple[SnapshotId | None, ...]
    sealed: tuple[AbstractSet[SnapshotId], ...]

    @property
    def complete(self) -> SnapshotId | None:
        """The newest pair that every rank holds sealed."""
        return newest_common(self.sealed)


def passed(
    pairs: Iterable[SnapshotId | None], *, completed: int | None, epoch: int
) -> SnapshotId | None:
    """How far a rank has come, by what its slots hold and by how many steps it has completed in
    ``epoch``."""
    by_steps = None if completed is None else SnapshotId(epoch, completed - SEALED_WITHIN_STEPS)
    return newest_of([*pairs, by_steps])


def reason_kept(
    pair: SnapshotId | None,
    *,
    in_use: bool,
    view: BoardView,
    epoch: int,
    resume: SnapshotId | None = None,
) -> str | None:
    """Why a slot that holds ``pair`` (None: nothing) must not be overwritten, or None where it may
    be.

    ``in_use``: an upload or another reader holds it. ``epoch``: the one that this rank captures in.
    ``resume``: the pair that it goes on from; a rank that has just come to a node which never held
    it would have it look as if nobody needed it.
    """
    if in_use:
        return "it is in use"
    if pair is None:
        return None
    complete = view.complete
    if complete is not None and pair < complete:
        return None
    if pair == complete:
        return "it is the newest that all ranks hold"
    if pair == resume:
        return "training goes on from it, and nothing newer is complete"
    if pair.epoch < epoch or overtaken(pair, view):
        return None
    return "other ranks may still complete it"


def overtaken(pair: SnapshotId, view: BoardView) -> bool:
    """Whether some rank has gone past this pair and doesn't hold it: it never will."""
    return any(
        passed is not None and passed >= pair and pair not in sealed
        for passed, sealed in zip(view.passed, view.sealed, strict=True)
    )


def newest_of(pairs: Iterable[SnapshotId | None]) -> SnapshotId | None:
    """The newest of some pairs, or None where there is none."""
    return max((pair for pair in pairs if pair is not None), default=None)
