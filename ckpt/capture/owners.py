"""Who stages which part of a leaf that several ranks hold alike. Pure, and the same answer on every
rank.

The leaves of one replica group are laid end to end and cut into as many equal shares as the group
has ranks; the lowest rank takes the first share. A cut may only fall between rows: a row is what
one step along the first dimension longer than 1 holds. Within CUT_SHIFT of a share around the ideal
cut it falls on a leaf's end, else on the 4 MiB chunk grid of the leaf, so that both sides keep the
chunks (and digests) that the uncut leaf has; only where neither is near, on the nearest row.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ckpt.errors import UsageError
from ckpt.values import CHUNK_BYTES, Box

CUT_SHIFT_DIVISOR = 200
"""A cut moves by at most 1/200 of a share for a better place, so two cuts unbalance a share by at
most 1 %."""


@dataclass(frozen=True, slots=True)
class ReplicatedBox:
    """A region of a leaf and the ranks that hold exactly it."""

    box: Box
    itemsize_bytes: int
    replicas: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class OwnedBox:
    """The part of the ``index``-th leaf that the asking rank stages, in the leaf's coordinates."""

    index: int
    box: Box


@dataclass(frozen=True, slots=True)
class _GroupLayout:
    """The leaves of one group end to end: ``starts[i]`` is where the ``i``-th begins, in bytes; one
    more than leaves."""

    leaves: tuple[ReplicatedBox, ...]
    starts: tuple[int, ...]


def owned_boxes(leaves: Sequence[ReplicatedBox], *, rank: int) -> list[OwnedBox]:
    """What ``rank`` stages of the ``leaves`` that it holds, in their order; a leaf it stages
    nothing of is left out.

    All ranks of a group must pass that group's leaves in the same order, other leaves may lie
    between. Then each element is owned by exactly one rank of its group and shares differ by at
    most one row, or 1 %. Empty leaves go to the lowest rank. Raises UsageError where ``rank`` is
    not among a leaf's replicas. O(leaves + groups * log leaves).
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, leaf in enumerate(leaves):
        if rank not in leaf.replicas:
            raise UsageError(
                f"a leaf that this rank doesn't hold. index={index} rank={rank} "
                f"replicas={leaf.replicas}"
            )
        groups.setdefault(tuple(sorted(set(leaf.replicas))), []).append(index)
    found: list[OwnedBox] = []
    for ranks, indices in groups.items():
        found += _owned_in_group([leaves[i] for i in indices], indices, ranks, rank)
    return sorted(found, key=lambda one: one.index)


def _owned_in_group(
    leaves: list[ReplicatedBox], indices: list[int], ranks: tuple[int, ...], rank: int
) -> list[OwnedBox]:
    sizes = (leaf.box.elements * leaf.itemsize_bytes for leaf in leaves)
    line = _GroupLayout(tuple(leaves), tuple(itertools.accumulate(sizes, initial=0)))
    place, count = ranks.index(rank), len(ranks)
    start, stop = _cut(line, place, count), _cut(line, place + 1, count)
    found = []
    for index, leaf, low, high in zip(indices, leaves, line.starts, line.starts[1:], strict=False):
        if low == high:
            if place == 0:
                found.append(OwnedBox(index, leaf.box))
        elif max(low, start) < min(high, stop):
            found.append(OwnedBox(index, _rows(leaf, max(low, start) - low, min(high, stop) - low)))
    return found


def _cut(line: _GroupLayout, place: int, count: int) -> int:
    """Where share ``place`` starts. Never decreases with ``place``: all candidates lie between
    rows, and the nearest of one fixed set of places keeps its order; preferred places are nearer
    than half a share."""
    total = line.starts[-1]
    if total == 0 or place in (0, count):
        return total if place else 0
    ideal = total * place // count
    index = bisect.bisect_right(line.starts, ideal) - 1
    start, stop = line.starts[index], line.starts[index + 1]
    reach = total // count // CUT_SHIFT_DIVISOR
    end = _nearest(ideal, start, stop)
    if abs(end - ideal) <= reach:
        return end
    row = _row_bytes(line.leaves[index])
    for step in (math.lcm(row, CHUNK_BYTES), row):
        low = start + (ideal - start) // step * step
        cut = _nearest(ideal, low, min(low + step, stop))
        if step == row or abs(cut - ideal) <= reach:
            return cut
    raise AssertionError("the row is always taken")


def _nearest(to: int, low: int, high: int) -> int:
    return low if to - low <= high - to else high


def _row_bytes(leaf: ReplicatedBox) -> int:
    dim = _row_dim(leaf.box)
    rows = 1 if dim is None else leaf.box.sizes[dim]
    return leaf.box.elements // rows * leaf.itemsize_bytes


def _row_dim(box: Box) -> int | None:
    return next((dim for dim, size in enumerate(box.sizes) if size > 1), None)


def _rows(leaf: ReplicatedBox, start_bytes: int, stop_bytes: int) -> Box:
    dim = _row_dim(leaf.box)
    if dim is None:
        return leaf.box
    row = _row_bytes(leaf)
    offsets, sizes = list(leaf.box.offsets), list(leaf.box.sizes)
    offsets[dim] += start_bytes // row
    sizes[dim] = (stop_bytes - start_bytes) // row
    return Box(tuple(offsets), tuple(sizes))
