"""A part: where the chunks of a node's ranks are, as msgpack in one zstd frame. Pure.

A part may list 100,000 chunks and more, so per-chunk values are columns of fixed width. What
follows from other values (a chunk's raw size, the number of a shard's chunks) is not stored, so it
cannot be wrong.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import msgspec
import zstandard

from ckpt.errors import IntegrityError, UsageError
from ckpt.format.canonical import check_version, prepare_decoders
from ckpt.format.part_rules import Part, StoredShard, problem
from ckpt.values import (
    CHUNK_BYTES,
    DIGEST_BYTES,
    Box,
    ChunkLocation,
    Codec,
    Digest,
    Leaf,
    LeafKind,
    SnapshotId,
)

__all__ = [
    "PART_RAW_BYTES_MAX",
    "PART_VERSION",
    "Part",
    "StoredShard",
    "chunk_sizes",
    "decode_part",
    "encode_part",
    "merge_parts",
]

PART_VERSION = 2
PART_RAW_BYTES_MAX = 256 << 20
"""Larger parts are refused before memory is allocated: room for seven million chunks, 28 TB of
state."""
ZSTD_LEVEL = 3

_CODECS = {codec.value: codec for codec in Codec}


def chunk_sizes(size_bytes: int) -> Iterator[int]:
    """Raw sizes of the chunks of a shard of ``size_bytes``: 4 MiB each, the last one the rest."""
    for start in range(0, size_bytes, CHUNK_BYTES):
        yield min(CHUNK_BYTES, size_bytes - start)


def encode_part(part: Part) -> bytes:
    """The stored bytes. Equal parts give equal bytes under one zstd release.

    The part's digest is of these bytes. Raises UsageError that names a field out of range, or if
    the part is too large.
    """
    if reason := problem(part):
        raise UsageError(f"not a part that can be written: {reason}")
    try:
        raw = msgspec.msgpack.encode(_to_wire(part))
    except UnicodeError as error:
        raise UsageError(f"a leaf's name is not Unicode text. why={error}") from error
    if len(raw) > PART_RAW_BYTES_MAX:
        raise UsageError(f"part too large. size_bytes={len(raw)} limit_bytes={PART_RAW_BYTES_MAX}")
    return zstandard.ZstdCompressor(
        level=ZSTD_LEVEL, write_checksum=True, write_content_size=True
    ).compress(raw)


def decode_part(data: bytes) -> Part:
    """The part in untrusted ``data``. Raises IntegrityError or FormatVersionError."""
    raw = _decompress(data)
    try:
        check_version(
            msgspec.msgpack.decode(raw, type=_Version).v, supported=PART_VERSION, label="part"
        )
        wire = msgspec.msgpack.decode(raw, type=_PartWire)
        if msgspec.msgpack.encode(wire) != raw:
            raise IntegrityError("not the canonical spelling. what=part")
    except (msgspec.MsgspecError, UnicodeError, OverflowError, RecursionError) as error:
        raise IntegrityError(f"not a valid record. what=part why={error}") from error
    part = _from_wire(wire)
    if reason := problem(part):
        raise IntegrityError(f"part contradicts itself: {reason}")
    return part


def _decompress(data: bytes) -> bytes:
    try:
        # The declared size is checked first: a few bytes may declare gigabytes.
        frame = zstandard.get_frame_parameters(data)
        if frame.content_size in (zstandard.CONTENTSIZE_UNKNOWN, zstandard.CONTENTSIZE_ERROR):
            raise IntegrityError("zstd frame does not say its size. what=part")
        if frame.content_size > PART_RAW_BYTES_MAX:
            raise IntegrityError(
                f"declares too large a size. what=part size_bytes={frame.content_size} "
                f"limit_bytes={PART_RAW_BYTES_MAX}"
            )
        if not frame.has_checksum or frame.dict_id:
            raise IntegrityError("zstd frame has no checksum or wants a dictionary. what=part")
        raw = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise IntegrityError(f"not a zstd frame. what=part why={error}") from error
    if len(raw) != frame.content_size:
        raise IntegrityError(
            f"zstd frame of another size. what=part declared={frame.content_size} found={len(raw)}"
        )
    return raw


class _Version(msgspec.Struct):
    v: int


class _LeafWire(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    name: str
    kind: LeafKind
    dtype: str
    shape: tuple[int, ...]
    rank: int | None
    alias_of: str | None


class _ShardWire(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    leaf: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    size_bytes: int


class _PartWire(msgspec.Struct, forbid_unknown_fields=True):
    v: int
    epoch: int
    step: int
    writer: str
    rank: int
    ranks: int
    world_size: int
    leaves: list[_LeafWire]
    shards: list[_ShardWire]
    aliases: list[_LeafWire]
    packs: list[str]
    digests: bytes
    pack_index: bytes
    offset_bytes: bytes
    stored_bytes: bytes
    codec: bytes
    itemsize_bytes: bytes


def _to_wire(part: Part) -> _PartWire:
    leaves: dict[Leaf, int] = {}
    packs: dict[str, int] = {}
    shards = [
        _ShardWire(
            leaves.setdefault(shard.leaf, len(leaves)),
            shard.box.offsets,
            shard.box.sizes,
            shard.size_bytes,
        )
        for shard in part.shards
    ]
    locations = [location for shard in part.shards for location in shard.locations]
    chunks = len(locations)
    return _PartWire(
        v=PART_VERSION,
        epoch=part.snapshot.epoch,
        step=part.snapshot.step,
        writer=part.writer,
        rank=part.rank,
        ranks=part.ranks,
        world_size=part.world_size,
        leaves=[_leaf_wire(leaf) for leaf in leaves],
        shards=shards,
        aliases=[_leaf_wire(leaf) for leaf in part.aliases],
        # ``pack_index`` fills ``packs``, so it is computed before that is listed.
        pack_index=struct.pack(
            f"<{chunks}I", *(packs.setdefault(location.pack, len(packs)) for location in locations)
        ),
        packs=list(packs),
        digests=b"".join(digest for shard in part.shards for digest in shard.digests),
        offset_bytes=struct.pack(f"<{chunks}Q", *(location.offset_bytes for location in locations)),
        stored_bytes=struct.pack(f"<{chunks}I", *(location.stored_bytes for location in locations)),
        codec=bytes(location.codec for location in locations),
        itemsize_bytes=bytes(location.itemsize_bytes for location in locations),
    )


def _from_wire(wire: _PartWire) -> Part:
    leaves = [_leaf(leaf) for leaf in wire.leaves]
    shapes = [
        (_at(leaves, s.leaf, "leaf"), Box(s.offsets, s.sizes), s.size_bytes) for s in wire.shards
    ]
    if any(size < 0 for _, _, size in shapes):
        raise IntegrityError("negative size. what=part")
    digests, locations = _chunks(wire, [size for _, _, size in shapes])
    _first_use([shard.leaf for shard in wire.shards], len(leaves), "leaves")
    if len(set(leaves)) != len(leaves) or len(set(wire.packs)) != len(wire.packs):
        raise IntegrityError("a leaf or pack is listed twice. what=part")
    shards = []
    first = 0
    for leaf, box, size in shapes:
        end = first - (-size // CHUNK_BYTES)
        shards.append(
            StoredShard(
                leaf=leaf,
                box=box,
                size_bytes=size,
                digests=digests[first:end],
                locations=locations[first:end],
            )
        )
        first = end
    return Part(
        snapshot=SnapshotId(wire.epoch, wire.step),
        writer=wire.writer,
        rank=wire.rank,
        ranks=wire.ranks,
        world_size=wire.world_size,
        shards=tuple(shards),
        aliases=tuple(_leaf(leaf) for leaf in wire.aliases),
    )


def _chunks(
    wire: _PartWire, sizes: list[int]
) -> tuple[tuple[Digest, ...], tuple[ChunkLocation, ...]]:
    """Digests and locations of all chunks in order; raw sizes follow from the shards' sizes."""
    count = sum(-(-size // CHUNK_BYTES) for size in sizes)
    if len(wire.digests) != count * DIGEST_BYTES:
        raise IntegrityError(
            f"not one digest a chunk. chunks={count} size_bytes={len(wire.digests)}"
        )
    pack_index = _column(wire.pack_index, "I", count, "pack_index")
    offsets = _column(wire.offset_bytes, "Q", count, "offset_bytes")
    stored = _column(wire.stored_bytes, "I", count, "stored_bytes")
    codecs = _column(wire.codec, "B", count, "codec")
    items = _column(wire.itemsize_bytes, "B", count, "itemsize_bytes")
    _first_use(pack_index, len(wire.packs), "packs")
    raws = (raw for size in sizes for raw in chunk_sizes(size))
    try:
        locations = tuple(
            ChunkLocation(wire.packs[pack], offset, size, raw, _CODECS[codec], item)
            for pack, offset, size, raw, codec, item in zip(
                pack_index, offsets, stored, raws, codecs, items, strict=True
            )
        )
    except KeyError as error:
        raise IntegrityError(f"unknown codec. what=part codec={error}") from error
    digests = tuple(
        wire.digests[i : i + DIGEST_BYTES] for i in range(0, len(wire.digests), DIGEST_BYTES)
    )
    return digests, locations


def _column(blob: bytes, code: str, count: int, name: str) -> tuple[int, ...]:
    if len(blob) != count * struct.calcsize(f"<{code}"):
        raise IntegrityError(
            f"column of another length. column={name} chunks={count} size_bytes={len(blob)}"
        )
    return struct.unpack(f"<{count}{code}", blob)


def _first_use(indices: list[int] | tuple[int, ...], count: int, table: str) -> None:
    """Check that a table is in order of first use without unused entries: a part has one
    spelling."""
    used = 0
    for index in indices:
        if index > used or index < 0:
            raise IntegrityError(f"table not in order of first use. table={table} index={index}")
        used += index == used
    if used != count:
        raise IntegrityError(
            f"table holds what nothing uses. table={table} used={used} listed={count}"
        )


def _at(leaves: list[Leaf], index: int, table: str) -> Leaf:
    if not 0 <= index < len(leaves):
        raise IntegrityError(f"no such entry. table={table} index={index} entries={len(leaves)}")
    return leaves[index]


def _leaf_wire(leaf: Leaf) -> _LeafWire:
    return _LeafWire(leaf.name, leaf.kind, leaf.dtype, leaf.shape, leaf.rank, leaf.alias_of)


def _leaf(wire: _LeafWire) -> Leaf:
    return Leaf(
        name=wire.name,
        kind=wire.kind,
        dtype=wire.dtype,
        shape=wire.shape,
        rank=wire.rank,
        alias_of=wire.alias_of,
    )


prepare_decoders(_Version, _PartWire)


# ---- merge: one part for all ranks of a node


def merge_parts(parts: Sequence[Part], *, writer: str) -> Part:
    """One part for all ranks of ``parts``, which follow each other, in the name of ``writer``.

    Shards stay in the order of ranks. An alias of a shared leaf is in every rank's part, and once
    in this one. Raises UsageError if the parts are of several snapshots or worlds, or their ranks
    do not follow each other. O(shards).
    """
    if not parts:
        raise UsageError("a part of no rank.")
    first = parts[0]
    rank = first.rank
    aliases: dict[Leaf, None] = {}
    for part in parts:
        if (part.snapshot, part.world_size, part.rank) != (first.snapshot, first.world_size, rank):
            raise UsageError(
                f"parts that make no part together. snapshot={part.snapshot} rank={part.rank} "
                f"world_size={part.world_size} "
                f"expected={first.snapshot} rank {rank} of {first.world_size}"
            )
        rank += part.ranks
        aliases.update(dict.fromkeys(part.aliases))
    return Part(
        snapshot=first.snapshot,
        writer=writer,
        rank=first.rank,
        ranks=rank - first.rank,
        world_size=first.world_size,
        shards=tuple(shard for part in parts for shard in part.shards),
        aliases=tuple(aliases),
    )
