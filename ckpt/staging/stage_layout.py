"""Where shards lie in a slot. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from ckpt.values import PAGE_BYTES

SMALL_ALIGN_BYTES = 64
"""Alignment of shards smaller than a page: a cache line, so that the copying of one never touches another's."""


def lay_out(sizes_bytes: Sequence[int], *, start: int = 0) -> tuple[list[int], int]:
    """Offsets for shards of these sizes from ``start`` on, and where the last one ends.

    A shard of a page or more starts on a page, so that direct I/O can take it as it lies; smaller ones are packed together
    behind them, and empty ones lie at ``start``. Within both groups the order is the one given.
    """
    offsets = [start] * len(sizes_bytes)
    at = _up(start, PAGE_BYTES)
    end = start
    for small, align in ((False, PAGE_BYTES), (True, SMALL_ALIGN_BYTES)):
        for i, size in enumerate(sizes_bytes):
            if size and (size < PAGE_BYTES) == small:
                offsets[i] = at
                end = at + size
                at = _up(end, align)
        at = _up(at, PAGE_BYTES)
    return offsets, end


def _up(value: int, step: int) -> int:
    return -(-value // step) * step
