"""What must hold inside one part. Pure: each rule answers with what is wrong, or None."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

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
"""An encoded chunk is never longer than this; a codec that doesn't pay is not used."""
WORLD_MAX = 2**24


class ShardLike(Protocol):
    """What the rules read of a stored shard."""

    @property
    def leaf(self) -> Leaf: ...
    @property
    def box(self) -> Box: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def digests(self) -> tuple[Digest, ...]: ...
    @property
    def locations(self) -> tuple[ChunkLocation, ...]: ...


class PartLike(Protocol):
    """What the rules read of a part."""

    @property
    def snapshot(self) -> SnapshotId: ...
    @property
    def writer(self) -> str: ...
    @property
    def rank(self) -> int: ...
    @property
    def ranks(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def shards(self) -> Sequence[ShardLike]: ...
    @property
    def aliases(self) -> tuple[Leaf, ...]: ...


def problem(part: PartLike) -> str | None:
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
        return f"ranks outside their world. rank={part.rank} ranks={part.ranks} world_size={part.world_size}"
    checked: set[Leaf] = set()
    packs: set[str] = set()
    for shard in part.shards:
        if shard.leaf not in checked:
            if why := _leaf_problem(part, shard.leaf, alias=False):
                return why
            checked.add(shard.leaf)
        if why := _shard_problem(shard, packs):
            return f"{why} leaf={shard.leaf.name!r}"
    for alias in part.aliases:
        if why := _leaf_problem(part, alias, alias=True):
            return why
    if len(set(part.aliases)) != len(part.aliases):
        return "an alias is listed twice"
    return None


def _leaf_problem(part: PartLike, leaf: Leaf, *, alias: bool) -> str | None:
    if leaf.rank is not None and not part.rank <= leaf.rank < part.rank + part.ranks:
        return f"leaf of another part's rank. leaf={leaf.name!r} rank={leaf.rank} part={part.rank} ranks={part.ranks}"
    return leaf_problem(leaf, world_size=part.world_size, alias=alias)


def leaf_problem(leaf: Leaf, *, world_size: int, alias: bool) -> str | None:
    """What makes a leaf invalid; ``alias`` says which of both lists it stands in."""
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
        return f"leaf of a rank outside the world. leaf={leaf.name!r} rank={leaf.rank} world_size={world_size}"
    if alias != (leaf.alias_of is not None):
        return f"aliases and shards are listed apart. leaf={leaf.name!r} alias_of={leaf.alias_of!r}"
    if leaf.alias_of == leaf.name:
        return f"an alias of itself. leaf={leaf.name!r}"
    return None


def _shard_problem(shard: ShardLike, packs: set[str]) -> str | None:
    box, shape = shard.box, shard.leaf.shape
    if not len(box.offsets) == len(box.sizes) == len(shape):
        return f"box of other dimensions than its leaf. box={len(box.sizes)} shape={len(shape)}"
    for offset, size, whole in zip(box.offsets, box.sizes, shape, strict=True):
        if offset < 0 or size < 0 or offset + size > whole:
            return f"box outside its leaf. offset={offset} size={size} whole={whole}"
    if shard.size_bytes != box.elements * DTYPE_BYTES[shard.leaf.dtype]:
        return f"size differs from box and dtype. size_bytes={shard.size_bytes} elements={box.elements}"
    chunks = -(-shard.size_bytes // CHUNK_BYTES)
    if len(shard.digests) != chunks or len(shard.locations) != chunks:
        return f"not one digest and place a chunk. chunks={chunks} digests={len(shard.digests)}"
    left = shard.size_bytes
    for digest, place in zip(shard.digests, shard.locations, strict=True):
        if len(digest) != DIGEST_BYTES:
            return f"digest of another length. bytes={len(digest)}"
        if place.raw_bytes != min(CHUNK_BYTES, left):
            return (
                f"chunk off the grid. raw_bytes={place.raw_bytes} expected={min(CHUNK_BYTES, left)}"
            )
        left -= place.raw_bytes
        if why := place_problem(place, packs):
            return why
    return None


def place_problem(place: ChunkLocation, packs: set[str]) -> str | None:
    """What makes a chunk's place invalid; ``packs`` remembers keys that were found good."""
    if place.pack not in packs:
        if keys.parse_pack_key(place.pack) is None:
            return f"not a pack's key. pack={place.pack[:200]!r}"
        packs.add(place.pack)
    if place.offset_bytes < 0 or place.offset_bytes + place.stored_bytes > INT_MAX:
        return f"chunk outside any pack. offset_bytes={place.offset_bytes}"
    if not 0 < place.stored_bytes <= STORED_BYTES_MAX:
        return f"stored size out of range. stored_bytes={place.stored_bytes}"
    if place.codec is Codec.RAW and place.stored_bytes != place.raw_bytes:
        return f"a raw chunk of another size. stored_bytes={place.stored_bytes} raw_bytes={place.raw_bytes}"
    if place.codec is Codec.PLANES_ZSTD:
        if not 1 <= place.itemsize_bytes <= 16 or place.raw_bytes % place.itemsize_bytes:
            return f"byte planes of an odd size. itemsize_bytes={place.itemsize_bytes} raw_bytes={place.raw_bytes}"
    elif place.itemsize_bytes != 1:
        return f"element size without byte planes. itemsize_bytes={place.itemsize_bytes}"
    return None


# Whether boxes cover a tensor exactly once. Pure.


def cover_problem(shape: tuple[int, ...], boxes: Sequence[Box]) -> str | None:
    """None where the boxes that hold elements cover ``shape`` without gap or overlap, else what is
    wrong.

    Boxes must lie inside ``shape``. O(n log n) for rows or columns, O(n * m) where up to m boxes
    share one offset range along the dimension that is cut most.
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
    # Equal volume and no overlap is an exact cover, so only overlap is left to look for: a sweep
    # along the dimension with most cuts, comparing each box with those that reach into its range.
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
