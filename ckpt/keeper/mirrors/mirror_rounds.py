"""Which pair all nodes keep on others next: one for all, named by the node of rank 0. Pure.

Were each node to keep the newest that it knows of, two nodes' mirrors might be of different pairs, and after a loss none would
be whole. So one pair is named, every node keeps it (in its own memory beside the slots, and on its peers), and only when all
have it the next one is named and older ones go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ckpt.values import SnapshotId


@dataclass(frozen=True, slots=True)
class Round:
    """``named``: the pair that all nodes keep now; ``kept``: the newest that all have."""

    named: SnapshotId | None = None
    kept: SnapshotId | None = None


@dataclass(frozen=True, slots=True)
class Word:
    """What a node says: the last named pair that it has kept everywhere, and the last one that it could not."""

    mirrored: SnapshotId | None = None
    missed: SnapshotId | None = None


def next_round(now: Round, words: Sequence[Word | None], complete: SnapshotId | None) -> Round:
    """The round that follows. ``words``: of every node, None from those that said nothing yet; ``complete``: the newest pair.

    A pair that a node could not keep, because its slot had gone on or a peer had no room, is passed over for a newer one.
    """
    if now.named is not None and all(word is not None and word.mirrored == now.named for word in words):
        now = replace(now, kept=now.named)
    over = (
        now.named is None
        or now.kept == now.named
        or any(word is not None and word.missed == now.named for word in words)
    )
    if over and complete is not None and (now.named is None or complete > now.named):
        return replace(now, named=complete)
    return now


def retained(now: Round, before: frozenset[SnapshotId]) -> frozenset[SnapshotId]:
    """The pairs of which mirrors stay. ``before``: those that were there when the epoch began, for until something is kept."""
    named = {now.named} if now.named is not None else set()
    return frozenset(named | ({now.kept} if now.kept is not None else before))
