from __future__ import annotations

import contextlib

import msgspec
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt.errors import FormatVersionError, IntegrityError, UsageError
from ckpt.format import keys, part
from ckpt.format.part import Part, StoredShard, chunk_sizes, decode_part, encode_part
from ckpt.values import (
    CHUNK_BYTES,
    DTYPE_BYTES,
    Box,
    ChunkLocation,
    Codec,
    Leaf,
    LeafKind,
    SnapshotId,
)

WRITER = keys.writer_name("node-a", "0123456789abcdef")
PAIR = SnapshotId(3, 40)


@st.composite
def locations(draw: st.DrawFn, raw: int, itemsize: int) -> ChunkLocation:
    pack = keys.pack_key(PAIR, WRITER, draw(st.integers(0, 3)))
    offset = draw(st.integers(0, 2**40))
    codec = draw(st.sampled_from(Codec))
    stored = raw if codec is Codec.RAW else draw(st.integers(1, 2 * CHUNK_BYTES))
    planes = itemsize if codec is Codec.PLANES_ZSTD else 1
    return ChunkLocation(pack, offset, stored, raw, codec, planes)


@st.composite
def shards(draw: st.DrawFn, rank: int, ranks: int) -> StoredShard:
    kind = draw(st.sampled_from(LeafKind))
    dtype = "uint8" if kind is LeafKind.OBJECT else draw(st.sampled_from(sorted(DTYPE_BYTES)))
    sizes = (
        draw(st.lists(st.sampled_from([0, 1, 2, 7, 1300]), max_size=3))
        if kind is LeafKind.TENSOR
        else [draw(st.integers(0, 9 << 20))]
    )
    offsets = [draw(st.integers(0, 5)) for _ in sizes]
    leaf = Leaf(
        name=draw(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)),
        kind=kind,
        dtype=dtype,
        shape=tuple(o + n + draw(st.integers(0, 3)) for o, n in zip(offsets, sizes, strict=True)),
        rank=draw(st.none() | st.integers(rank, rank + ranks - 1)),
    )
    box = Box(tuple(offsets), tuple(sizes))
    size = box.elements * DTYPE_BYTES[dtype]
    raws = list(chunk_sizes(size))[:20]
    if len(list(chunk_sizes(size))) > 20:
        box, size, raws = Box(tuple(offsets), (0,) * len(sizes)), 0, []
    places = tuple(draw(locations(raw, DTYPE_BYTES[dtype])) for raw in raws)
    digests = tuple(draw(st.binary(min_size=16, max_size=16)) for _ in raws)
    return StoredShard(leaf=leaf, box=box, size_bytes=size, digests=digests, locations=places)


@st.composite
def parts(draw: st.DrawFn) -> Part:
    world = draw(st.integers(1, 5))
    rank = draw(st.integers(0, world - 1))
    ranks = draw(st.integers(1, world - rank))
    found = draw(st.lists(shards(rank, ranks), max_size=4))
    alias = Leaf(name="other", kind=LeafKind.TENSOR, dtype="int8", shape=(2,), alias_of="x")
    return Part(
        snapshot=SnapshotId(
            draw(st.integers(0, keys.EPOCH_MAX)), draw(st.integers(0, keys.STEP_MAX))
        ),
        writer=WRITER,
        rank=rank,
        ranks=ranks,
        world_size=world,
        shards=tuple(found),
        aliases=draw(st.sampled_from([(), (alias,)])),
    )


def small_part() -> Part:
    leaf = Leaf(name="model/w", kind=LeafKind.TENSOR, dtype="float32", shape=(4, 3))
    place = ChunkLocation(keys.pack_key(PAIR, WRITER, 0), 4096, 48, 48, Codec.RAW)
    shard = StoredShard(
        leaf=leaf, box=Box.whole((4, 3)), size_bytes=48, digests=(b"d" * 16,), locations=(place,)
    )
    alias = Leaf(
        name="model/tied", kind=LeafKind.TENSOR, dtype="float32", shape=(4, 3), alias_of="model/w"
    )
    return Part(
        snapshot=PAIR, writer=WRITER, rank=0, world_size=2, shards=(shard,), aliases=(alias,)
    )


def wire_of(value: Part) -> dict[str, object]:
    raw = zstandard.ZstdDecompressor().decompress(encode_part(value))
    found: dict[str, object] = msgspec.msgpack.decode(raw)
    return found


def packed(wire: dict[str, object]) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(msgspec.msgpack.encode(wire))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(parts())
def test_a_part_comes_back_equal_and_spelled_alike(value: Part) -> None:
    data = encode_part(value)
    assert decode_part(data) == value
    assert encode_part(decode_part(data)) == data


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 255), st.integers(0, 40))
def test_mutated_stored_bytes_give_the_equal_part_or_an_integrity_error(
    at: int, byte: int, cut: int
) -> None:
    data = bytearray(encode_part(small_part()))
    data[at % len(data)] = byte
    if cut:
        del data[-cut:]
    with contextlib.suppress(IntegrityError, FormatVersionError):
        assert decode_part(bytes(data)) == small_part()


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_mutated_payload_gives_a_valid_part_or_an_integrity_error(
    changes: list[tuple[int, int]],
) -> None:
    raw = bytearray(zstandard.ZstdDecompressor().decompress(encode_part(small_part())))
    for at, byte in changes:
        raw[at % len(raw)] = byte
    try:
        found = decode_part(zstandard.ZstdCompressor(write_checksum=True).compress(bytes(raw)))
    except (IntegrityError, FormatVersionError):
        return
    assert decode_part(encode_part(found)) == found


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_an_integrity_error(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        decode_part(data)
    with pytest.raises(IntegrityError):
        decode_part(zstandard.ZstdCompressor(write_checksum=True).compress(data))


def test_a_declared_size_over_the_limit_is_refused_before_anything_is_allocated() -> None:
    # A frame header alone: magic, an 8-byte content size and a checksum flag; one single-segment
    # frame.
    header = (
        b"\x28\xb5\x2f\xfd"
        + bytes([0b11100100])
        + (part.PART_RAW_BYTES_MAX + 1).to_bytes(8, "little")
    )
    with pytest.raises(IntegrityError, match="declares too large"):
        decode_part(header + b"\x01\x00\x00" + b"\x00" * 4)


def test_a_frame_that_does_not_say_its_size_is_refused() -> None:
    raw = zstandard.ZstdDecompressor().decompress(encode_part(small_part()))
    frame = zstandard.ZstdCompressor(write_content_size=False, write_checksum=True).compress(raw)
    with pytest.raises(IntegrityError, match="does not say its size"):
        decode_part(frame)


def test_a_newer_version_names_both_versions_and_the_remedy() -> None:
    wire = wire_of(small_part()) | {"v": 7, "novelty": True}
    with pytest.raises(FormatVersionError, match=r"found=7 known=2 upgrade torch-ckpt"):
        decode_part(packed(wire))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epoch", -1),
        ("epoch", 2**64 - 1),
        ("step", 10**14),
        ("rank", 2),
        ("ranks", 0),
        ("ranks", 3),
        ("world_size", 0),
        ("world_size", True),
        ("writer", "../x-0123456789abcdef"),
        ("packs", ["packs/../../etc/passwd"]),
        ("packs", ["log/00000000000000000000.json"]),
        ("packs", [keys.pack_key(PAIR, WRITER, 0), keys.pack_key(PAIR, WRITER, 1)]),
        ("digests", b"short"),
        ("digests", b"d" * 32),
        ("pack_index", b"\x01\x00\x00\x00"),
        ("pack_index", b"\x00" * 8),
        ("offset_bytes", b"\xff" * 8),
        ("stored_bytes", b"\x00" * 4),
        ("stored_bytes", b"\x31\x00\x00\x00"),
        ("codec", b"\x09"),
        ("itemsize_bytes", b"\x04"),
        ("leaves", []),
        ("shards", []),
        ("shards", [[0, [0, 0], [4, 4], 64]]),
        ("shards", [[0, [-1, 0], [4, 3], 48]]),
        ("shards", [[0, [0, 0], [4, 3], 47]]),
        ("shards", [[0, [0, 0], [4, 3], -48]]),
        ("shards", [[-1, [0, 0], [4, 3], 48]]),
        ("shards", [[0, [0], [4], 48]]),
        ("shards", [[0, [0, 0], [4, 3], 2**63]]),
        ("leaves", [["model/w", "tensor", "float33", [4, 3], None, None]]),
        ("leaves", [["model/w", "tensor", "float32", [4, -3], None, None]]),
        ("leaves", [["model/w", "tensor", "float32", [4, 3], 2, None]]),
        ("leaves", [["model/w", "tensor", "float32", [4, 3], None, "model/x"]]),
        ("leaves", [["", "tensor", "float32", [4, 3], None, None]]),
        ("leaves", [["model/w", "object", "float32", [4, 3], None, None]]),
        ("aliases", [["model/w", "tensor", "float32", [4, 3], None, None]]),
        ("aliases", [["model/w", "tensor", "float32", [4, 3], None, "model/w"]]),
        ("aliases", "text"),
        ("novelty", 1),
    ],
)
def test_a_field_that_contradicts_is_an_integrity_error(field: str, value: object) -> None:
    with pytest.raises(IntegrityError):
        decode_part(packed(wire_of(small_part()) | {field: value}))


def test_a_doubled_member_is_an_integrity_error() -> None:
    raw = zstandard.ZstdDecompressor().decompress(encode_part(small_part()))
    doubled = bytes([raw[0], raw[1], raw[2] + 1]) if raw[0] == 0xDE else bytes([raw[0] + 1])
    body = (
        raw[len(doubled) :]
        + msgspec.msgpack.encode("v")
        + msgspec.msgpack.encode(part.PART_VERSION)
    )
    with pytest.raises(IntegrityError):
        decode_part(zstandard.ZstdCompressor(write_checksum=True).compress(doubled + body))


def test_an_invalid_part_is_refused_by_the_writer_too() -> None:
    bad = small_part().shards[0]
    with pytest.raises(UsageError, match="size differs"):
        encode_part(
            Part(
                snapshot=PAIR,
                writer=WRITER,
                rank=0,
                world_size=1,
                shards=(
                    StoredShard(
                        leaf=bad.leaf,
                        box=bad.box,
                        size_bytes=44,
                        digests=bad.digests,
                        locations=bad.locations,
                    ),
                ),
            )
        )
