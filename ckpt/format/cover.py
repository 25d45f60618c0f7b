"""Whether boxes cover a tensor exactly once. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ckpt.values import Box


def cover_problem(shape: tuple[int, ...], boxes: Sequence[Box]) -> str | None:
    """None where the boxes that hold elements cover ``shape`` without gap or overlap, else what is wrong.

    Boxes must lie inside ``shape``. O(n log n) for rows or columns, O(n * m) where up to m boxes share one offset range
    along the dimension that is cut most.
    """
    filled = [box for box in boxes if box.elements]
    total = sum(box.elements for box in filled)
    whole = math.prod(shape)
    if total > whole:
        return f"shards overlap. elements={total} whole={whole}"
    if total < whole:
        return f"shards leave a gap. elements={total} whole={whole}"
    if len(filled) < 2:
        return None
    # Equal volume and no overlap is an exact cover, so only overlap is left to look for: a sweep along the dimension
    # with most cuts, comparing each box with those that reach into its range.
    dim = max(range(len(shape)), key=lambda d: len({box.offsets[d] for box in filled}), default=None)
    if dim is None:
        return "a 0-d leaf has two shards"
    active: list[Box] = []
    for box in sorted(filled, key=lambda b: b.offsets[dim]):
        active = [other for other in active if other.offsets[dim] + other.sizes[dim] > box.offsets[dim]]
        for other in active:
            if box.intersect(other) is not None:
                return f"shards overlap. one={other} other={box}"
        active.append(box)
    return None
