"""A part's values, and what must hold inside one: each rule returns what is wrong, or None. Pure.

Apart from ``part``, which encodes them, so that ``staging`` checks leaves without zstandard.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ckpt.format import keys
from ckpt.values import (
    CHUNK_BYTES,
    DIGEST_BYTES,
    DTYPE_BYTES,
    Box,
    ChunkLocation,
    Codec,
    Digest,
    Leaf,
    LeafKind,
    SnapshotId,
)

INT_MAX = 2**63 - 1
DIMS_MAX = 64
NAME_CHARS_MAX = 4096
STORED_BYTES_MAX = 2 * CHUNK_BYTES
"""Longest encoded chunk; a codec that does not shrink a chunk is not used."""
WORLD_MAX = 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredShard:
    """One shard as stored: ``digests[i]`` and ``locations[i]`` are of its ``i``-th 4 MiB chunk.

    ``size_bytes`` is the raw size of the whole box; an empty shard has no chunks.
    """

    leaf: Leaf
    box: Box
    size_bytes: int
    digests: tuple[Digest, ...]
    locations: tuple[ChunkLocation, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What ``ranks`` ranks, from ``rank`` on, stored of one snapshot: all ranks of a keeper, or
    one.

    ``writer`` names the process start that wrote it (``keys.writer_name``).
    """

    snapshot: SnapshotId
    writer: str
    rank: int
    world_size: int
    ranks: int = 1
    shards: tuple[StoredShard, ...]
    aliases: tuple[Leaf, ...] = ()


def problem(part: Part) -> str | None:
    """What makes ``part`` invalid, as ``fact. key=value``, or None."""
    if not keys.is_snapshot_id(part.snapshot):
        return f"epoch or step out of range. epoch={part.snapshot.epoch} step={part.snapshot.step}"
    if not keys.is_writer(part.writer):
        return f"not a writer's name. writer={part.writer!r}"
    if (
        part.rank < 0
        or part.ranks < 1
        or not part.rank + part.ranks <= part.world_size <= WORLD_MAX
    ):
        return (
            f"ranks outside their world. rank={part.rank} ranks={part.ranks} "
            f"world_size={part.world_size}"
        )
    checked: set[Leaf] = set()
    packs: set[str] = set()
    for shard in part.shards:
        if shard.leaf not in checked:
            if reason := _leaf_problem(part, shard.leaf, alias=False):
                return reason
            checked.add(shard.leaf)
        if reason := _shard_problem(shard, packs):
            return f"{reason} leaf={shard.leaf.name!r}"
    for alias in part.aliases:
        if reason := _leaf_problem(part, alias, alias=True):
            return reason
    if len(set(part.aliases)) != len(part.aliases):
        return "an alias is listed twice"
    return None


def _leaf_problem(part: Part, leaf: Leaf, *, alias: bool) -> str | None:
    if leaf.rank is not None and not part.rank <= leaf.rank < part.rank + part.ranks:
        return (
            f"leaf of another part's rank. leaf={leaf.name!r} rank={leaf.rank} part={part.rank} "
            f"ranks={part.ranks}"
        )
    return leaf_problem(leaf, world_size=part.world_size, alias=alias)


def leaf_problem(leaf: Leaf, *, world_size: int, alias: bool) -> str | None:
    """What makes a leaf invalid, or None; ``alias``: whether it is in the list of aliases."""
    if not 0 < len(leaf.name) <= NAME_CHARS_MAX:
        return f"leaf name empty or too long. name={leaf.name[:80]!r} limit_chars={NAME_CHARS_MAX}"
    if leaf.dtype not in DTYPE_BYTES:
        return f"unknown dtype. dtype={leaf.dtype[:80]!r} leaf={leaf.name!r}"
    if len(leaf.shape) > DIMS_MAX or any(not 0 <= size <= INT_MAX for size in leaf.shape):
        return f"shape out of range. leaf={leaf.name!r}"
    if math.prod(leaf.shape) * DTYPE_BYTES[leaf.dtype] > INT_MAX:
        return f"leaf larger than 2^63 bytes. leaf={leaf.name!r}"
    if leaf.kind is LeafKind.OBJECT and (leaf.dtype != "uint8" or len(leaf.shape) != 1):
        return f"an object leaf is one row of uint8. leaf={leaf.name!r}"
    if leaf.rank is not None and not 0 <= leaf.rank < world_size:
        return (
            f"leaf of a rank outside the world. leaf={leaf.name!r} rank={leaf.rank} "
            f"world_size={world_size}"
        )
    if alias != (leaf.alias_of is not None):
        return f"aliases and shards are listed apart. leaf={leaf.name!r} alias_of={leaf.alias_of!r}"
    if leaf.alias_of == leaf.name:
        return f"an alias of itself. leaf={leaf.name!r}"
    return None


def _shard_problem(shard: StoredShard, packs: set[str]) -> str | None:
    box, shape = shard.box, shard.leaf.shape
    if not len(box.offsets) == len(box.sizes) == len(shape):
        return f"box of other dimensions than its leaf. box={len(box.sizes)} shape={len(shape)}"
    for offset, size, whole in zip(box.offsets, box.sizes, shape, strict=True):
        if offset < 0 or size < 0 or offset + size > whole:
            return f"box outside its leaf. offset={offset} size={size} whole={whole}"
    if shard.size_bytes != box.elements * DTYPE_BYTES[shard.leaf.dtype]:
        return (
            f"size differs from box and dtype. size_bytes={shard.size_bytes} "
            f"elements={box.elements}"
        )
    chunks = -(-shard.size_bytes // CHUNK_BYTES)
    if len(shard.digests) != chunks or len(shard.locations) != chunks:
        return f"not one digest and place a chunk. chunks={chunks} digests={len(shard.digests)}"
    left = shard.size_bytes
    for digest, location in zip(shard.digests, shard.locations, strict=True):
        if len(digest) != DIGEST_BYTES:
            return f"digest of another length. bytes={len(digest)}"
        if location.raw_bytes != min(CHUNK_BYTES, left):
            return (
                f"chunk off the grid. raw_bytes={location.raw_bytes} "
                f"expected={min(CHUNK_BYTES, left)}"
            )
        left -= location.raw_bytes
        if reason := place_problem(location, packs):
            return reason
    return None


def place_problem(location: ChunkLocation, packs: set[str]) -> str | None:
    """What makes a chunk's location invalid, or None; ``packs`` remembers valid pack keys."""
    if location.pack not in packs:
        if keys.parse_pack_key(location.pack) is None:
            return f"not a pack's key. pack={location.pack[:200]!r}"
        packs.add(location.pack)
    if location.offset_bytes < 0 or location.offset_bytes + location.stored_bytes > INT_MAX:
        return f"chunk outside any pack. offset_bytes={location.offset_bytes}"
    if not 0 < location.stored_bytes <= STORED_BYTES_MAX:
        return f"stored size out of range. stored_bytes={location.stored_bytes}"
    if location.codec is Codec.RAW and location.stored_bytes != location.raw_bytes:
        return (
            f"a raw chunk of another size. stored_bytes={location.stored_bytes} "
            f"raw_bytes={location.raw_bytes}"
        )
    if location.codec is Codec.PLANES_ZSTD:
        if not 1 <= location.itemsize_bytes <= 16 or location.raw_bytes % location.itemsize_bytes:
            return (
                f"byte planes of an odd size. itemsize_bytes={location.itemsize_bytes} "
                f"raw_bytes={location.raw_bytes}"
            )
    elif location.itemsize_bytes != 1:
        return f"element size without byte planes. itemsize_bytes={location.itemsize_bytes}"
    return None


# ---- cover: whether boxes cover a tensor exactly once


def cover_problem(shape: tuple[int, ...], boxes: Sequence[Box]) -> str | None:
    """None if the boxes that hold elements cover ``shape`` without gap or overlap, else what is
    wrong.

    Boxes must lie inside ``shape``. O(n log n) for rows or columns; O(n * m) if up to m boxes share
    one offset range along the dimension that is cut most.
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
    # With the right volume, a cover is exact if no boxes overlap. Sweep along the dimension with
    # the most cuts, and compare each box with those that reach into its range.
    dim = max(
        range(len(shape)), key=lambda d: len({box.offsets[d] for box in filled}), default=None
    )
    if dim is None:
        return "a 0-d leaf has two shards"
    active: list[Box] = []
    for box in sorted(filled, key=lambda b: b.offsets[dim]):
        active = [
            other for other in active if other.offsets[dim] + other.sizes[dim] > box.offsets[dim]
        ]
        for other in active:
            if box.intersect(other) is not None:
                return f"shards overlap. one={other} other={box}"
        active.append(box)
    return None
