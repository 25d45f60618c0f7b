"""Which rank stages which part of a leaf that several ranks hold alike; the same answer on every
rank. Pure.

The leaves of one replica group are laid end to end and cut into as many equal shares as the group
has ranks; the lowest rank takes the first share. A cut may only fall between rows: a row is what
one step along the first dimension longer than 1 holds. If the end of a leaf is within
1/CUT_SHIFT_DIVISOR of a share from the ideal cut, the cut falls there, else on the 4 MiB chunk grid
of the leaf, so that both sides keep the chunks (and digests) that the uncut leaf has. If neither is
near, it falls on the nearest row.
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
"""A cut moves by at most 1/200 of a share for a better position, so two cuts unbalance a share by
at most 1 %.
"""


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
    """The leaves of one group end to end: ``starts[i]`` is where the ``i``-th begins, in bytes, and
    one more for the end.
    """

    leaves: tuple[ReplicatedBox, ...]
    starts: tuple[int, ...]


def owned_boxes(leaves: Sequence[ReplicatedBox], *, rank: int) -> list[OwnedBox]:
    """What ``rank`` stages of the ``leaves`` that it holds, in their order; leaves of which it
    stages nothing are left out.

    All ranks of a group must pass that group's leaves in the same order; other leaves may come
    between. Then each element is owned by exactly one rank of its group, and shares differ by at
    most one row, or 1 %. Empty leaves go to the lowest rank. Raises UsageError if ``rank`` is not
    among a leaf's replicas. O(leaves + groups * log leaves).
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, leaf in enumerate(leaves):
        if rank not in leaf.replicas:
            raise UsageError(
                f"a leaf that this rank doesn't hold. index={index} rank={rank} "
                f"replicas={leaf.replicas}"
            )
        groups.setdefault(tuple(sorted(set(leaf.replicas))), []).append(index)
    boxes: list[OwnedBox] = []
    for ranks, indices in groups.items():
        boxes += _owned_in_group(
            [leaves[i] for i in indices], indices, ranks.index(rank), len(ranks)
        )
    return sorted(boxes, key=lambda box: box.index)


class LeafShares:
    """``leaves`` laid end to end, to be cut into equal shares. Made in O(leaves)."""

    __slots__ = ("_layout",)

    def __init__(self, leaves: Sequence[ReplicatedBox]) -> None:
        self._layout = _laid_out(leaves)

    def boxes(self, number: int, count: int) -> list[OwnedBox]:
        """The ``number``-th of ``count`` shares, in the leaves' order; nothing if a share is less
        than a row and falls between two. Empty leaves are in none. O(log leaves + result).
        """
        layout = self._layout
        start, stop = _cut(layout, number, count), _cut(layout, number + 1, count)
        boxes: list[OwnedBox] = []
        if start == stop:
            return boxes
        for index in range(bisect.bisect_right(layout.starts, start) - 1, len(layout.leaves)):
            low, high = layout.starts[index], layout.starts[index + 1]
            if low >= stop:
                break
            if low < high:
                leaf = layout.leaves[index]
                rows = _rows(leaf, max(low, start) - low, min(high, stop) - low)
                boxes.append(OwnedBox(index, rows))
        return boxes


def _laid_out(leaves: Sequence[ReplicatedBox]) -> _GroupLayout:
    sizes = (leaf.box.elements * leaf.itemsize_bytes for leaf in leaves)
    return _GroupLayout(tuple(leaves), tuple(itertools.accumulate(sizes, initial=0)))


def _owned_in_group(
    leaves: list[ReplicatedBox], indices: list[int], position: int, count: int
) -> list[OwnedBox]:
    layout = _laid_out(leaves)
    start, stop = _cut(layout, position, count), _cut(layout, position + 1, count)
    boxes = []
    for index, leaf, low, high in zip(
        indices, leaves, layout.starts, layout.starts[1:], strict=False
    ):
        if low == high:
            if position == 0:
                boxes.append(OwnedBox(index, leaf.box))
        elif max(low, start) < min(high, stop):
            boxes.append(OwnedBox(index, _rows(leaf, max(low, start) - low, min(high, stop) - low)))
    return boxes


def _cut(layout: _GroupLayout, place: int, count: int) -> int:
    """Where share ``place`` starts. Never decreases with ``place``.

    All candidates are between rows, and the nearest of one fixed set of positions keeps its order;
    preferred positions are nearer than half a share.
    """
    total = layout.starts[-1]
    if total == 0 or place in (0, count):
        return total if place else 0
    ideal = total * place // count
    index = bisect.bisect_right(layout.starts, ideal) - 1
    start, stop = layout.starts[index], layout.starts[index + 1]
    reach = total // count // CUT_SHIFT_DIVISOR
    end = _nearest(ideal, start, stop)
    if abs(end - ideal) <= reach:
        return end
    row = _row_bytes(layout.leaves[index])
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
