"""One chunk's bytes, compressed and decompressed. The decoder trusts none of its input. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import zstandard

from ckpt.errors import IntegrityError
from ckpt.values import CHUNK_BYTES, ChunkLocation, Codec

Buffer = bytes | bytearray | memoryview

ITEMSIZE_MAX = 16
"""Largest element that is regrouped by byte planes (complex128)."""

_WINDOW_BYTES_MAX = 128 << 20
"""No frame of one chunk needs a larger window; a larger one is refused before memory is
allocated."""


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """A chunk in its stored form; always shorter than the raw bytes."""

    data: bytes
    codec: Codec
    itemsize_bytes: int


def encode_chunk(raw: memoryview, *, itemsize_bytes: int, level: int = 1) -> EncodedChunk | None:
    """``raw`` compressed, or None if it does not get shorter.

    Elements of ``itemsize_bytes`` are regrouped by byte planes first. About 1 GiB/s at level 1 for
    floating-point numbers; allocates two chunks. Releases the GIL while compressing.
    """
    planes = 1 < itemsize_bytes <= ITEMSIZE_MAX and len(raw) % itemsize_bytes == 0
    source: Buffer = raw
    if planes:
        # Plane k holds byte k of every element: bytes of sign and exponent, which repeat, are
        # apart from those of the mantissa, which hardly do.
        table = np.frombuffer(raw, dtype=np.uint8).reshape(-1, itemsize_bytes)
        source = np.ascontiguousarray(table.T).data.cast("B") if len(raw) else raw
    data = zstandard.ZstdCompressor(level=level, write_content_size=True).compress(source)
    if len(data) >= len(raw):
        return None
    return EncodedChunk(
        data, Codec.PLANES_ZSTD if planes else Codec.ZSTD, itemsize_bytes if planes else 1
    )


def decode_chunk(stored: Buffer, location: ChunkLocation, out: memoryview) -> None:
    """Fill ``out``, of ``location.raw_bytes``, from the ``stored`` bytes of one chunk.

    Raises IntegrityError if sizes differ from the location, or the bytes are not exactly one frame
    of that size. Allocates at most two chunks, whatever ``stored`` claims. The caller checks the
    digest, which is of ``out``.
    """
    if len(out) != location.raw_bytes or not 0 <= location.raw_bytes <= CHUNK_BYTES:
        raise IntegrityError(
            f"a chunk of another size. raw_bytes={location.raw_bytes} expected={len(out)}"
        )
    if len(stored) != location.stored_bytes:
        raise IntegrityError(
            f"stored bytes of another length. expected={location.stored_bytes} found={len(stored)}"
        )
    match location.codec:
        case Codec.RAW:
            if len(stored) != len(out):
                raise IntegrityError(
                    f"a raw chunk of another size. expected={len(out)} found={len(stored)}"
                )
            out[:] = stored
        case Codec.ZSTD:
            out[:] = _decompress(stored, len(out))
        case Codec.PLANES_ZSTD:
            _join_planes(_decompress(stored, len(out)), location.itemsize_bytes, out)


def _join_planes(planes: bytes, itemsize: int, out: memoryview) -> None:
    if not 1 <= itemsize <= ITEMSIZE_MAX or len(out) % itemsize:
        raise IntegrityError(
            f"byte planes of an odd size. itemsize_bytes={itemsize} raw_bytes={len(out)}"
        )
    if len(out):
        target = np.frombuffer(out, dtype=np.uint8).reshape(-1, itemsize)
        target[:] = np.frombuffer(planes, dtype=np.uint8).reshape(itemsize, -1).T


def _decompress(stored: Buffer, raw_bytes: int) -> bytes:
    try:
        # The declared sizes are checked first: a few bytes may declare gigabytes.
        frame = zstandard.get_frame_parameters(stored)
        if (
            frame.content_size != raw_bytes
            or frame.window_size > _WINDOW_BYTES_MAX
            or frame.dict_id
        ):
            raise IntegrityError(
                f"not a frame of this chunk. declared={frame.content_size} expected={raw_bytes}"
            )
        raw = zstandard.ZstdDecompressor().decompress(stored, allow_extra_data=False)
    except (zstandard.ZstdError, ValueError) as error:
        raise IntegrityError(f"not a zstd frame. why={error}") from error
    if len(raw) != raw_bytes:
        raise IntegrityError(f"a frame of another size. declared={raw_bytes} found={len(raw)}")
    return raw
