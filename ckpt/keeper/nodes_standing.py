"""What ranks have in common: how far all of them are, and what all of them hold. Pure but for reading the board."""

from __future__ import annotations

from collections.abc import Sequence

from ckpt.fleet.words import Standing
from ckpt.keeper.mirror_rounds import Round, Word
from ckpt.link.board import RankBoard
from ckpt.values import SnapshotId

NO_ROUND = Round()


def standing_of(ranks: Sequence[RankBoard], attempt: int, word: Word) -> Standing:
    """The standing of some ranks of this node. How far they are is read before what they hold."""
    done = [-1 if one.completed is None else one.completed for one in ranks]
    held = [one.pairs() for one in ranks]
    return Standing(
        attempt=attempt,
        sealed=_all_hold(held),
        completed=min(done, default=-1),
        mirrored=word.mirrored,
        missed=word.missed,
    )


def common(standings: Sequence[Standing | None], attempt: int, now: Round = NO_ROUND) -> Standing:
    """Of several nodes as one, in the round ``now``; where one has not told its own yet they have nothing."""
    known = [one for one in standings if one is not None]
    if len(known) < len(standings) or not known:
        return Standing(attempt=attempt, sealed=(), completed=-1, mirrored=now.kept, named=now.named)
    return Standing(
        attempt=attempt,
        sealed=_all_hold([frozenset(one.sealed) for one in known]),
        completed=min(one.completed for one in known),
        mirrored=now.kept,
        named=now.named,
    )


def _all_hold(held: Sequence[frozenset[SnapshotId]]) -> tuple[SnapshotId, ...]:
    return tuple(sorted(frozenset.intersection(*held), reverse=True)) if held else ()
