"""One chunk's bytes, compressed and back. The reader trusts nothing that it is given."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import zstandard

from ckpt.errors import IntegrityError
from ckpt.values import CHUNK_BYTES, ChunkLocation, Codec

Buffer = bytes | bytearray | memoryview

ITEMSIZE_MAX = 16
"""Largest element that byte planes are cut for (complex128)."""

_WINDOW_BYTES_MAX = 128 << 20
"""No frame of one chunk needs a larger window; one that asks for it is refused before memory is
taken."""


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """A chunk as it is to be stored; always shorter than the raw bytes."""

    data: bytes
    codec: Codec
    itemsize_bytes: int


def encode_chunk(raw: memoryview, *, itemsize_bytes: int, level: int = 1) -> EncodedChunk | None:
    """``raw`` compressed, elements of ``itemsize_bytes`` regrouped by byte planes first; None where
    it doesn't get shorter.

    About 1 GiB/s at level 1 for floating-point numbers; takes two chunks of scratch. Releases the
    GIL while compressing.
    """
    planes = 1 < itemsize_bytes <= ITEMSIZE_MAX and len(raw) % itemsize_bytes == 0
    source: Buffer = raw
    if planes:
        table = np.frombuffer(raw, dtype=np.uint8).reshape(-1, itemsize_bytes)
        source = np.ascontiguousarray(table.T).data.cast("B") if len(raw) else raw
    data = zstandard.ZstdCompressor(level=level, write_content_size=True).compress(source)
    if len(data) >= len(raw):
        return None
    return EncodedChunk(
        data, Codec.PLANES_ZSTD if planes else Codec.ZSTD, itemsize_bytes if planes else 1
    )


def decode_chunk(stored: Buffer, location: ChunkLocation, out: memoryview) -> None:
    """Fill ``out``, which has ``location.raw_bytes``, from the ``stored`` bytes of one chunk.

    Raises IntegrityError where sizes differ from the location or the bytes are not exactly one
    frame of that size. Never takes more memory than two chunks, whatever ``stored`` claims. The
    digest is the caller's to check: it is of ``out``.
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
