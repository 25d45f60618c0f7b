"""A snapshot in memory: a real index over captured tensors, and a reader of it that copies
boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from ckpt.capture.leaves import Capture
from ckpt.format import keys
from ckpt.format.canonical import digest
from ckpt.format.index import SnapshotIndex
from ckpt.format.manifest import Manifest, PartRef
from ckpt.format.part import Part, StoredShard
from ckpt.restore.plan import Want
from ckpt.values import CHUNK_BYTES, DTYPE_BYTES, Box, ChunkLocation, Codec, Leaf, SnapshotId

SNAPSHOT = SnapshotId(1, 7)
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """A tensor's elements in C order, whatever its dtype and strides."""
    bits = torch.empty(0, dtype=BITS[tensor.element_size()])
    bits.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
    return bits.clone(memory_format=torch.contiguous_format).numpy().tobytes()


class MemorySnapshot:
    """What was captured on each rank, copied at once; ``reads`` counts the calls of ``read``."""

    def __init__(self, captures: Sequence[Capture]) -> None:
        self.reads = 0
        self._data: dict[tuple[str, int | None], list[tuple[Box, bytes]]] = {}
        parts = [self._part(rank, one, len(captures)) for rank, one in enumerate(captures)]
        refs = tuple(
            PartRef(
                key=keys.part_key(SNAPSHOT, part.writer),
                digest="0" * 32,
                size_bytes=1,
                rank=part.rank,
            )
            for part in parts
        )
        manifest = Manifest(
            job="job",
            snapshot=SNAPSHOT,
            world_size=len(captures),
            parts=refs,
            size_bytes=1,
            new_bytes=1,
            created_unix_s=0.0,
        )
        self.index = SnapshotIndex(manifest, parts)

    def _part(self, rank: int, capture: Capture, world_size: int) -> Part:
        writer = f"node-{rank:016x}"
        shards = [
            self._shard(item.leaf, item.box, raw_bytes(item.tensor), writer)
            for item in capture.tensors
            if item.leaf.alias_of is None and item.replicas[0] == rank
        ]
        shards += [
            self._shard(one.leaf, Box.whole(one.leaf.shape), one.data, writer)
            for one in capture.objects
        ]
        aliases = tuple(item.leaf for item in capture.tensors if item.leaf.alias_of is not None)
        return Part(
            snapshot=SNAPSHOT,
            writer=writer,
            rank=rank,
            world_size=world_size,
            shards=tuple(shards),
            aliases=aliases,
        )

    def _shard(self, leaf: Leaf, box: Box, data: bytes, writer: str) -> StoredShard:
        self._data.setdefault((leaf.name, leaf.rank), []).append((box, data))
        chunks = [data[i : i + CHUNK_BYTES] for i in range(0, len(data), CHUNK_BYTES)]
        pack = keys.pack_key(SNAPSHOT, writer, 0)
        locations = tuple(ChunkLocation(pack, 0, len(one), len(one), Codec.RAW) for one in chunks)
        return StoredShard(
            leaf=leaf,
            box=box,
            size_bytes=len(data),
            digests=tuple(map(digest, chunks)),
            locations=locations,
        )

    def read(self, wants: Sequence[Want], outputs: Sequence[memoryview]) -> None:
        """The reader that ``apply`` is given."""
        self.reads += 1
        for want, output in zip(wants, outputs, strict=True):
            leaf = self.index.target(want.leaf, want.rank)
            assert leaf is not None, want
            whole = np.zeros((*leaf.shape, DTYPE_BYTES[leaf.dtype]), np.uint8)
            for box, data in self._data[leaf.name, leaf.rank]:
                whole[_at(box)] = np.frombuffer(data, np.uint8).reshape(
                    *box.sizes, DTYPE_BYTES[leaf.dtype]
                )
            output[:] = whole[_at(want.box)].tobytes()


def _at(box: Box) -> tuple[slice, ...]:
    return tuple(
        slice(offset, offset + size) for offset, size in zip(box.offsets, box.sizes, strict=True)
    )


@pytest.fixture
def store() -> Callable[..., MemorySnapshot]:
    """Makes a ``MemorySnapshot`` of one capture a rank."""
    return lambda *captures: MemorySnapshot(captures)
