"""A planned pack's bytes: stretches of the slot as they lie, or compressed chunks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from ckpt.errors import IntegrityError
from ckpt.format.codec import encode_chunk
from ckpt.format.digest import digest
from ckpt.save.choose import Compression, Decision, Sample, decide
from ckpt.save.chunks import Chunk, PackPlan, raw_offsets
from ckpt.values import ChunkLocation, Codec, Digest

SAMPLE_BYTES = 512 << 10
"""Compressed to see whether it pays: 0.5 ms, and long enough for zstd to show its ratio."""


@dataclass(frozen=True, slots=True)
class BuiltPack:
    """What to put at ``key``, and where each chunk then lies."""

    key: str
    buffers: tuple[bytes | memoryview, ...]
    locations: dict[Digest, ChunkLocation]

    @property
    def size_bytes(self) -> int:
        """The object's size."""
        return sum(len(buffer) for buffer in self.buffers)


def verify_chunks(pack: PackPlan, data: memoryview) -> None:
    """Compare each chunk with the digest made while it was staged. Raises IntegrityError naming the leaf. 30 GB/s."""
    for chunk in pack.chunks:
        if digest(data[chunk.offset_bytes : chunk.offset_bytes + chunk.raw_bytes]) != chunk.digest:
            raise IntegrityError(
                f"staged bytes changed after they were copied. leaf={chunk.leaf} offset_bytes={chunk.offset_bytes} "
                "the snapshot is given up; something writes into memory that isn't its own, or the memory is faulty"
            )


def raw_pack(key: str, pack: PackPlan, data: memoryview) -> BuiltPack:
    """The pack as page-aligned stretches of the slot, with no copy."""
    places = {
        chunk.digest: ChunkLocation(key, offset, chunk.raw_bytes, chunk.raw_bytes, Codec.RAW)
        for chunk, offset in zip(pack.chunks, raw_offsets(pack), strict=True)
    }
    return BuiltPack(key, tuple(data[extent.start : extent.stop] for extent in pack.extents), places)


def encoded_pack(
    key: str, pack: PackPlan, data: memoryview, *, level: int, wanted: Callable[[Chunk], bool]
) -> BuiltPack:
    """The pack with every ``wanted`` chunk compressed and the others as they lie. Takes memory for what is compressed."""
    buffers: list[bytes | memoryview] = []
    places: dict[Digest, ChunkLocation] = {}
    at = 0
    for chunk in pack.chunks:
        raw = data[chunk.offset_bytes : chunk.offset_bytes + chunk.raw_bytes]
        encoded = encode_chunk(raw, itemsize_bytes=chunk.itemsize_bytes, level=level) if wanted(chunk) else None
        if encoded is None:
            buffers.append(raw)
            place = ChunkLocation(key, at, len(raw), len(raw), Codec.RAW)
        else:
            buffers.append(encoded.data)
            place = ChunkLocation(key, at, len(encoded.data), len(raw), encoded.codec, encoded.itemsize_bytes)
        places[chunk.digest] = place
        at += place.stored_bytes
    return BuiltPack(key, tuple(buffers), places)


class Sampler:
    """Remembers, for each kind of bytes, whether compressing pays; asks a sample of the first chunk of the kind."""

    def __init__(self, compression: Compression, data: memoryview) -> None:
        self._compression = compression
        self._data = data
        self._samples: dict[str, Sample] = {}

    def decide(self, chunk: Chunk, *, link_bytes_per_s: float | None) -> Decision:
        """Whether to compress ``chunk``. Costs a sample for the first of its kind."""
        if chunk.kind not in self._samples:
            self._samples[chunk.kind] = self._sample(chunk)
        return decide(self._compression, self._samples[chunk.kind], link_bytes_per_s=link_bytes_per_s)

    def _sample(self, chunk: Chunk) -> Sample:
        length = min(chunk.raw_bytes, SAMPLE_BYTES) // chunk.itemsize_bytes * chunk.itemsize_bytes
        raw = self._data[chunk.offset_bytes : chunk.offset_bytes + length]
        start = time.perf_counter()
        encoded = encode_chunk(raw, itemsize_bytes=chunk.itemsize_bytes, level=self._compression.level)
        taken = time.perf_counter() - start
        return Sample(length, length if encoded is None else len(encoded.data), taken)
