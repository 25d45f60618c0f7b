"""What the nodes of a job hold in memory, and which pairs are complete over all of them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckpt.fleet.words import Holding
from ckpt.values import SnapshotId

PAIRS_MAX = 8
"""So many complete pairs are offered to restore from: more are never needed, each slot holds one."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A pair that can be restored from memory: of a world of ``world_size`` ranks, each rank's share at some nodes.

    ``sources``: for each rank the nodes that have it, those that have it in a slot before those that hold a mirror.
    """

    snapshot: SnapshotId
    origin: str
    world_size: int
    sources: tuple[tuple[str, ...], ...]


def complete(held: Mapping[str, Sequence[Holding]]) -> list[Pair]:
    """The pairs of which every rank's share is somewhere, newest first. ``held``: what each node says that it holds."""
    groups: dict[tuple[SnapshotId, str, int], dict[int, list[tuple[bool, str]]]] = {}
    for node, holdings in held.items():
        for one in holdings:
            if 0 <= one.rank < one.world_size:
                ranks = groups.setdefault((one.snapshot, one.origin, one.world_size), {})
                ranks.setdefault(one.rank, []).append((one.mirror, node))
    found = [
        Pair(snapshot, origin, size, tuple(tuple(node for _, node in sorted(ranks[rank])) for rank in range(size)))
        for (snapshot, origin, size), ranks in groups.items()
        if len(ranks) == size
    ]
    # An epoch's number may have been given out twice: the log says which of the two origins counts.
    return sorted(found, key=lambda pair: (pair.snapshot, pair.origin, pair.world_size), reverse=True)[:PAIRS_MAX]


def lost(held: Mapping[str, Sequence[Holding]]) -> dict[SnapshotId, tuple[int, ...]]:
    """Of the pairs that are not complete: the ranks whose share nobody has. For people."""
    ranks: dict[tuple[SnapshotId, int], set[int]] = {}
    for holdings in held.values():
        for one in holdings:
            ranks.setdefault((one.snapshot, one.world_size), set()).add(one.rank)
    return {
        snapshot: tuple(rank for rank in range(size) if rank not in there)
        for (snapshot, size), there in sorted(ranks.items(), reverse=True)
        if len(there) < size
    }
