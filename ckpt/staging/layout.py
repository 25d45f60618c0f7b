"""Where shards go in a slot, and what must hold inside a staged index: what is wrong, or None.
Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from ckpt.format.part_rules import leaf_problem
from ckpt.values import (
    CHUNK_BYTES,
    DIGEST_BYTES,
    DTYPE_BYTES,
    PAGE_BYTES,
    Leaf,
    StagedIndex,
    StagedShard,
)

SMALL_ALIGN_BYTES = 64
"""Alignment of shards smaller than a page: a cache line, so that copying one never touches
another's.
"""


def lay_out(sizes_bytes: Sequence[int], *, start: int = 0) -> tuple[list[int], int]:
    """Offsets for shards of these sizes from ``start`` on, and where the last one ends.

    A shard of a page or more starts on a page, so that direct I/O can take it as it is. Smaller
    ones are packed together behind them, and empty ones are put at ``start``. Within both groups
    the order is the one given.
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


def index_problem(index: StagedIndex, *, data_bytes: int) -> str | None:
    """What makes ``index`` unfit for a slot with ``data_bytes`` of data, as ``fact. key=value``, or
    None.
    """
    if not (0 <= index.rank < index.world_size):
        return f"rank outside its world. rank={index.rank} world_size={index.world_size}"
    if index.snapshot.epoch < 0 or index.snapshot.step < 0:
        return f"negative epoch or step. snapshot={index.snapshot}"
    checked: set[Leaf] = set()
    for shard in index.shards:
        if shard.leaf not in checked:
            if problem := leaf_problem(shard.leaf, world_size=index.world_size, alias=False):
                return problem
            checked.add(shard.leaf)
        if problem := _shard_problem(shard, data_bytes):
            return f"{problem} leaf={shard.leaf.name!r}"
    for alias in index.aliases:
        if problem := leaf_problem(alias, world_size=index.world_size, alias=True):
            return problem
    return None


def _shard_problem(shard: StagedShard, data_bytes: int) -> str | None:
    box, shape, size = shard.box, shard.leaf.shape, shard.size_bytes
    if not len(box.offsets) == len(box.sizes) == len(shape):
        return f"box of other dimensions than its leaf. box={len(box.sizes)} shape={len(shape)}"
    for offset, length, whole in zip(box.offsets, box.sizes, shape, strict=True):
        if offset < 0 or length < 0 or offset + length > whole:
            return f"box outside its leaf. offset={offset} size={length} whole={whole}"
    if size != box.elements * DTYPE_BYTES[shard.leaf.dtype]:
        return f"size differs from box and dtype. size_bytes={size} elements={box.elements}"
    if shard.offset_bytes < 0 or shard.offset_bytes + size > data_bytes:
        return f"shard outside the data area. offset_bytes={shard.offset_bytes} size_bytes={size}"
    if len(shard.digests) != -(-size // CHUNK_BYTES):
        return (
            f"chunks and digests differ in number. size_bytes={size} digests={len(shard.digests)}"
        )
    if any(len(digest) != DIGEST_BYTES for digest in shard.digests):
        return "digest of another length."
    return None
