"""What the nodes of a job hold in memory, and which pairs are complete over all of them. Pure.

A node's ranks follow each other, and so do the shares that it holds: what it says is of spans of ranks, and so is what is
worked out of it. So its cost grows with the number of nodes, not of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from msgspec import structs

from ckpt.cluster.mesh.messages import Holding, Sources
from ckpt.format.part_rules import WORLD_MAX
from ckpt.values import SnapshotId

PAIRS_MAX = 8
"""So many complete pairs are offered to restore from: more are never needed, each slot holds one."""


@dataclass(frozen=True, slots=True)
class Span:
    """``ranks`` ranks that follow each other, whose shares the same nodes have: in a slot before as a mirror."""

    ranks: int
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """A pair that can be restored from memory: of a world of ``world_size`` ranks, each rank's share at some nodes.

    ``spans``: all its ranks, from 0 on.
    """

    snapshot: SnapshotId
    origin: str
    world_size: int
    spans: tuple[Span, ...]

    @property
    def sources(self) -> tuple[tuple[str, ...], ...]:
        """For each rank the nodes that have its share."""
        return tuple(span.nodes for span in self.spans for _ in range(span.ranks))


def joined(holdings: Iterable[Holding]) -> list[Holding]:
    """The same, where ranks that follow each other are one."""
    found: list[Holding] = []
    for one in sorted(holdings, key=lambda one: (one.snapshot, one.origin, one.world_size, one.mirror, one.rank)):
        last = found[-1] if found else one
        alike = structs.replace(last, rank=one.rank, ranks=one.ranks) == one
        if found and alike and one.rank <= last.rank + last.ranks:
            found[-1] = structs.replace(last, ranks=max(last.ranks, one.rank + one.ranks - last.rank))
        else:
            found.append(one)
    return found


def complete(held: Mapping[str, Sequence[Holding]]) -> list[Pair]:
    """The pairs of which every rank's share is somewhere, newest first. ``held``: what each node says that it holds."""
    found = []
    for (snapshot, origin, size), segments in _segments(held, with_origin=True).items():
        if all(nodes for _, _, nodes in segments):
            found.append(Pair(snapshot, origin, size, _spans(segments)))
    # An epoch's number may have been given out twice: the log says which of the two origins counts.
    return sorted(found, key=lambda pair: (pair.snapshot, pair.origin, pair.world_size), reverse=True)[:PAIRS_MAX]


def lost(held: Mapping[str, Sequence[Holding]]) -> dict[SnapshotId, tuple[range, ...]]:
    """Of the pairs that are not complete: the ranks whose share nobody has. For people."""
    found = {}
    for (snapshot, _, _), segments in sorted(_segments(held, with_origin=False).items(), reverse=True):
        missing = tuple(range(start, end) for start, end, nodes in segments if not nodes)
        if missing:
            found[snapshot] = missing
    return found


def to_word(attempt: int, pairs: Sequence[Pair]) -> Sources:
    """What all nodes are told: each node's name once."""
    names = {node: None for pair in pairs for span in pair.spans for node in span.nodes}
    numbers = {node: number for number, node in enumerate(names)}
    return Sources(
        attempt=attempt, nodes=tuple(names),
        pairs=tuple(
            (
                pair.snapshot, pair.world_size,
                tuple((span.ranks, tuple(numbers[node] for node in span.nodes)) for span in pair.spans),
            )
            for pair in pairs
        ),
    )  # fmt: skip


def from_word(word: Sources) -> dict[SnapshotId, tuple[Span, ...]]:
    """Where the shares of each pair are. A pair of which the word contradicts itself is none.

    Of one number that was given out twice the first counts, as in what is offered to restore.
    """
    found: dict[SnapshotId, tuple[Span, ...]] = {}
    for snapshot, size, spans in word.pairs:
        sound = all(
            ranks > 0 and nodes and all(0 <= node < len(word.nodes) for node in nodes) for ranks, nodes in spans
        )
        if sound and size <= WORLD_MAX and sum(ranks for ranks, _ in spans) == size:
            named = tuple(Span(ranks, tuple(word.nodes[node] for node in nodes)) for ranks, nodes in spans)
            found.setdefault(snapshot, named)
    return found


_Segment = tuple[int, int, tuple[str, ...]]
"""Ranks from one up to another, and the nodes that have their shares."""


def _segments(
    held: Mapping[str, Sequence[Holding]], *, with_origin: bool
) -> dict[tuple[SnapshotId, str, int], list[_Segment]]:
    """Of each pair that somebody has a share of: the whole world in segments, each at the same nodes everywhere."""
    changes: dict[tuple[SnapshotId, str, int], dict[int, list[tuple[bool, bool, str]]]] = {}
    for node, holdings in held.items():
        for one in holdings:
            end = one.rank + one.ranks
            if one.rank < 0 or one.ranks < 1 or not end <= one.world_size <= WORLD_MAX:
                continue
            at = changes.setdefault((one.snapshot, one.origin if with_origin else "", one.world_size), {})
            at.setdefault(one.rank, []).append((True, one.mirror, node))
            at.setdefault(end, []).append((False, one.mirror, node))
    return {pair: _sweep(pair[2], at) for pair, at in changes.items()}


def _sweep(size: int, changes: dict[int, list[tuple[bool, bool, str]]]) -> list[_Segment]:
    """``changes``: at which rank a node's share begins (True) or ends."""
    found: list[_Segment] = []
    there: dict[tuple[bool, str], int] = {}
    ranks = sorted({0, size, *changes})
    for start, end in pairwise(ranks):
        for begins, mirror, node in changes.get(start, ()):
            count = there.get((mirror, node), 0) + (1 if begins else -1)
            there[mirror, node] = count
            if not count:
                del there[mirror, node]
        found.append((start, end, tuple(dict.fromkeys(node for _, node in sorted(there)))))
    return found


def _spans(segments: Sequence[_Segment]) -> tuple[Span, ...]:
    found: list[Span] = []
    for start, end, nodes in segments:
        if found and found[-1].nodes == nodes:
            found[-1] = Span(found[-1].ranks + end - start, nodes)
        else:
            found.append(Span(end - start, nodes))
    return tuple(found)
