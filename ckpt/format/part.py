"""Where the chunks of a keeper's ranks are, or of one that has none: msgpack inside one zstd frame,
chunks in columns.

A part may list 100,000 chunks and more, so what there is one of per chunk lies in columns of fixed
width. What follows from the rest (a chunk's raw size, how many chunks a shard has) is not stored,
so it can't be wrong.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec
import zstandard

from ckpt.errors import IntegrityError, UsageError
from ckpt.format.canonical import check_version, prepare_decoders
from ckpt.format.part_rules import problem
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

PART_VERSION = 2
PART_RAW_BYTES_MAX = 256 << 20
"""Refused above this before anything is allocated: room for seven million chunks, 28 TB of
state."""
ZSTD_LEVEL = 3

_CODECS = {codec.value: codec for codec in Codec}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredShard:
    """One shard as it is stored: ``digests[i]`` and ``locations[i]`` are those of its ``i``-th 4
    MiB chunk.

    ``size_bytes`` is the raw size of the whole box; an empty shard has no chunks.
    """

    leaf: Leaf
    box: Box
    size_bytes: int
    digests: tuple[Digest, ...]
    locations: tuple[ChunkLocation, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What ``ranks`` ranks, from ``rank`` on, stored of one snapshot: all that a keeper has, or one
    where there is no keeper.

    ``writer`` names the process start that wrote it (``keys.writer_name``).
    """

    snapshot: SnapshotId
    writer: str
    rank: int
    world_size: int
    ranks: int = 1
    shards: tuple[StoredShard, ...]
    aliases: tuple[Leaf, ...] = ()


def chunk_sizes(size_bytes: int) -> Iterator[int]:
    """Raw sizes of the chunks that a shard of ``size_bytes`` is cut into: 4 MiB each, the last what
    is left."""
    for start in range(0, size_bytes, CHUNK_BYTES):
        yield min(CHUNK_BYTES, size_bytes - start)


def encode_part(part: Part) -> bytes:
    """The stored bytes. Equal parts give equal bytes under one zstd release (the digest covers the
    stored bytes).

    Raises UsageError where a field is out of range or the part is too large, naming it.
    """
    if why := problem(part):
        raise UsageError(f"not a part that can be written. {why}")
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
    """The part in ``data``, which is not trusted. Raises IntegrityError or FormatVersionError."""
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
    if why := problem(part):
        raise IntegrityError(f"part contradicts itself. {why}")
    return part


def _decompress(data: bytes) -> bytes:
    try:
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
        _ShardWire(leaves.setdefault(s.leaf, len(leaves)), s.box.offsets, s.box.sizes, s.size_bytes)
        for s in part.shards
    ]
    places = [location for shard in part.shards for location in shard.locations]
    count = len(places)
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
        pack_index=struct.pack(
            f"<{count}I", *(packs.setdefault(p.pack, len(packs)) for p in places)
        ),
        packs=list(packs),
        digests=b"".join(digest for shard in part.shards for digest in shard.digests),
        offset_bytes=struct.pack(f"<{count}Q", *(p.offset_bytes for p in places)),
        stored_bytes=struct.pack(f"<{count}I", *(p.stored_bytes for p in places)),
        codec=bytes(p.codec for p in places),
        itemsize_bytes=bytes(p.itemsize_bytes for p in places),
    )


def _from_wire(wire: _PartWire) -> Part:
    leaves = [_leaf(leaf) for leaf in wire.leaves]
    shapes = [
        (_at(leaves, s.leaf, "leaf"), Box(s.offsets, s.sizes), s.size_bytes) for s in wire.shards
    ]
    if any(size < 0 for _, _, size in shapes):
        raise IntegrityError("negative size. what=part")
    digests, places = _chunks(wire, [size for _, _, size in shapes])
    _first_use([shard.leaf for shard in wire.shards], len(leaves), "leaves")
    if len(set(leaves)) != len(leaves) or len(set(wire.packs)) != len(wire.packs):
        raise IntegrityError("a leaf or pack is listed twice. what=part")
    shards = []
    at = 0
    for leaf, box, size in shapes:
        end = at - (-size // CHUNK_BYTES)
        shards.append(
            StoredShard(
                leaf=leaf,
                box=box,
                size_bytes=size,
                digests=digests[at:end],
                locations=places[at:end],
            )
        )
        at = end
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
    """Digests and places of all chunks in order; raw sizes follow from the shards' sizes."""
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
        places = tuple(
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
    return digests, places


def _column(blob: bytes, code: str, count: int, name: str) -> tuple[int, ...]:
    if len(blob) != count * struct.calcsize(f"<{code}"):
        raise IntegrityError(
            f"column of another length. column={name} chunks={count} size_bytes={len(blob)}"
        )
    return struct.unpack(f"<{count}{code}", blob)


def _first_use(indices: list[int] | tuple[int, ...], count: int, what: str) -> None:
    """Tables are in order of first use and hold nothing unused, so that one part has one
    spelling."""
    seen = 0
    for index in indices:
        if index > seen or index < 0:
            raise IntegrityError(f"table not in order of first use. table={what} index={index}")
        seen += index == seen
    if seen != count:
        raise IntegrityError(
            f"table holds what nothing uses. table={what} used={seen} listed={count}"
        )


def _at(leaves: list[Leaf], index: int, what: str) -> Leaf:
    if not 0 <= index < len(leaves):
        raise IntegrityError(f"no such entry. table={what} index={index} entries={len(leaves)}")
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


# One part of several: what the ranks of a node stored, as one list. Pure.


def merge_parts(parts: Sequence[Part], *, writer: str) -> Part:
    """The part of all ranks of ``parts``, which follow each other, in the name of ``writer``.

    Shards stay in the order of ranks. Each alias of a leaf that all ranks share is in every rank's
    part, and in this one once. Raises UsageError where the parts are of several snapshots or
    worlds, or their ranks do not follow each other. O(shards).
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
