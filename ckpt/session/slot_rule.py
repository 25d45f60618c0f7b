"""When a slot may be overwritten, so that all ranks always share a complete snapshot. Pure.

Ranks stage at different speeds, are killed at any moment, and see each other only through the
board. Each rank keeps the newest complete snapshot, and every newer one that may still become
complete. A newer one can no longer become complete in two cases: it was captured in an earlier
epoch, of which no trainer is alive; or another rank has passed it without holding it, since each
rank seals in ascending order. Without these two cases, snapshots that a rank refused or lost would
fill its peers' slots for ever.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from ckpt.values import SnapshotId

SEALED_WITHIN_STEPS = 2
"""A snapshot is sealed, if ever, before its rank has completed that many more steps: an overlapped
copy may still run during the next step.
"""


@dataclass(frozen=True, slots=True)
class BoardView:
    """What the board shows of each rank. All of ``passed`` must be read before any of ``sealed``.

    ``passed``: the rank has sealed, by then, every snapshot up to this one that it will ever hold.
    ``sealed``: what it holds. Because of the order of reading, a snapshot up to ``passed`` that is
    missing in ``sealed`` is missing for good and was not merely read too early.
    """

    passed: tuple[SnapshotId | None, ...]
    sealed: tuple[AbstractSet[SnapshotId], ...]

    @property
    def complete(self) -> SnapshotId | None:
        """The newest snapshot that every rank holds sealed."""
        if not self.sealed:
            return None
        first, *others = self.sealed
        return max(frozenset(first).intersection(*others), default=None)


def passed(
    pairs: Iterable[SnapshotId | None], *, completed: int | None, epoch: int
) -> SnapshotId | None:
    """How far a rank is, by what its slots hold and by the steps it has completed in
    ``epoch``.
    """
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
    """Why a slot that holds ``pair`` (None: nothing) must not be overwritten, or None if it may be.

    ``in_use``: an upload or another reader holds it. ``epoch``: the one that this rank captures in.
    ``resume``: the snapshot that it continues from. That one needs its own rule: a rank that just
    came to this node never held it, and so looks as if it had passed it.
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
        return "training continues from it, and nothing newer is complete"
    if pair.epoch < epoch or overtaken(pair, view):
        return None
    return "other ranks may still complete it"


def overtaken(pair: SnapshotId, view: BoardView) -> bool:
    """Whether a rank has passed this snapshot without holding it: it never will hold it."""
    return any(
        passed is not None and passed >= pair and pair not in sealed
        for passed, sealed in zip(view.passed, view.sealed, strict=True)
    )


def newest_of(pairs: Iterable[SnapshotId | None]) -> SnapshotId | None:
    """The newest of some snapshots, or None if there is none."""
    return max((pair for pair in pairs if pair is not None), default=None)
