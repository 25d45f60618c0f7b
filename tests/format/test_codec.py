"""What goes in comes out; what is forged is refused."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from ckpt.errors import IntegrityError
from ckpt.format.codec import EncodedChunk, decode_chunk, encode_chunk
from ckpt.values import CHUNK_BYTES, ChunkLocation, Codec


def place(encoded: EncodedChunk, raw_bytes: int) -> ChunkLocation:
    return ChunkLocation(
        "p", 0, len(encoded.data), raw_bytes, encoded.codec, encoded.itemsize_bytes
    )


def decode(stored: bytes, location: ChunkLocation) -> bytes:
    out = bytearray(location.raw_bytes)
    decode_chunk(stored, location, memoryview(out))
    return bytes(out)


@given(st.binary(max_size=64), st.integers(1, 300), st.sampled_from([1, 2, 4, 8, 16, 3, 32]))
def test_encoded_chunk_decodes_to_itself(unit: bytes, times: int, itemsize: int) -> None:
    raw = unit * times
    encoded = encode_chunk(memoryview(raw), itemsize_bytes=itemsize)
    if encoded is not None:
        assert len(encoded.data) < len(raw)
        assert decode(encoded.data, place(encoded, len(raw))) == raw


def test_byte_planes_shrink_what_zstd_alone_does_not() -> None:
    raw = memoryview(
        np.random.default_rng(0).normal(0, 0.02, CHUNK_BYTES // 4).astype(np.float32).tobytes()
    )
    planes, plain = encode_chunk(raw, itemsize_bytes=4), encode_chunk(raw, itemsize_bytes=1)
    assert planes is not None
    assert planes.codec is Codec.PLANES_ZSTD
    assert len(planes.data) < 0.9 * len(raw)
    assert plain is None or len(plain.data) > len(planes.data)
    assert decode(planes.data, place(planes, len(raw))) == bytes(raw)


def test_noise_stays_raw() -> None:
    noise = np.random.default_rng(0).bytes(10000)
    assert encode_chunk(memoryview(noise), itemsize_bytes=4) is None
    assert decode(noise, ChunkLocation("p", 0, 10000, 10000, Codec.RAW)) == noise


RAW = bytes(range(64)) * 100
GOOD = encode_chunk(memoryview(RAW), itemsize_bytes=4)
assert GOOD is not None
AT = place(GOOD, len(RAW))


@given(st.integers(0, len(GOOD.data) - 1), st.integers(0, 7))
def test_flipped_bit_gives_that_size_or_an_integrity_error(at: int, bit: int) -> None:
    data = bytearray(GOOD.data)
    data[at] ^= 1 << bit
    with contextlib.suppress(IntegrityError):
        assert len(decode(bytes(data), AT)) == len(RAW)


@given(
    st.binary(max_size=200),
    st.sampled_from(list(Codec)),
    st.integers(0, 20),
    st.integers(0, CHUNK_BYTES + 1),
)
def test_garbage_is_refused(data: bytes, codec: Codec, itemsize: int, raw_bytes: int) -> None:
    location = ChunkLocation("p", 0, len(data), raw_bytes, codec, itemsize)
    if codec is Codec.RAW and len(data) == raw_bytes:
        return
    with pytest.raises(IntegrityError):
        decode(data, location)


def test_frame_that_claims_more_than_the_chunk_is_refused() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    for codec in (Codec.ZSTD, Codec.PLANES_ZSTD):
        with pytest.raises(IntegrityError, match="not a frame of this chunk"):
            decode(bomb, ChunkLocation("p", 0, len(bomb), 4096, codec, 1))


def test_frame_with_more_behind_it_is_refused() -> None:
    longer = GOOD.data + b"\0"
    with pytest.raises(IntegrityError):
        decode(longer, replace(AT, stored_bytes=len(longer)))


def test_sizes_that_differ_from_the_location_are_refused() -> None:
    with pytest.raises(IntegrityError, match="another length"):
        decode(GOOD.data[:-1], AT)
    with pytest.raises(IntegrityError, match="another size"):
        decode_chunk(GOOD.data, AT, memoryview(bytearray(len(RAW) - 1)))
    with pytest.raises(IntegrityError, match="odd size"):
        decode(GOOD.data, replace(AT, itemsize_bytes=7))
