"""What ranks have in common: how far all of them are, and what all of them hold. Pure but for reading the board."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from ckpt.cluster.mesh.messages import Standing
from ckpt.ipc.board import RankBoard
from ckpt.keeper.mirrors.mirror_rounds import Round, Word
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


def common_but_each(
    mine: Standing, others: Mapping[str, Standing | None], attempt: int, now: Round
) -> dict[str, Standing]:
    """For each of ``others``, what all but it have in common with ``mine``: ``common`` of the rest, in one pass for all."""
    nothing = common([None], attempt, now)
    silent = {node for node, one in others.items() if one is None}
    known = [mine, *(one for one in others.values() if one is not None)]
    holders = Counter(pair for one in known for pair in frozenset(one.sealed))
    nearly = {pair: count for pair, count in holders.items() if count >= len(known) - 1}
    least, *rest = sorted(one.completed for one in known)[:2]
    found = {}
    for node, own in others.items():
        if silent - {node}:
            found[node] = nothing
            continue
        held = frozenset(own.sealed if own is not None else ())
        needed = len(known) - (own is not None)
        sealed = sorted((pair for pair, count in nearly.items() if count - (pair in held) == needed), reverse=True)
        completed = rest[0] if own is not None and own.completed == least else least
        found[node] = replace(nothing, sealed=tuple(sealed), completed=completed)
    return found


def _all_hold(held: Sequence[frozenset[SnapshotId]]) -> tuple[SnapshotId, ...]:
    return tuple(sorted(frozenset.intersection(*held), reverse=True)) if held else ()
