"""Sealed slots as trainers make them: memfds with a header and a few bytes."""

from __future__ import annotations

import mmap
import os

from ckpt.manifest.digest import digest
from ckpt.stage.slot_header import Header
from ckpt.values import PAGE_BYTES, Box, Leaf, LeafKind, SnapshotId, StagedIndex, StagedShard

SLOT_BYTES = 16 * PAGE_BYTES
HEADER_BYTES = 4 * PAGE_BYTES


class MadeSlot:
    """One memfd, mapped as its trainer maps it."""

    def __init__(self, size_bytes: int = SLOT_BYTES) -> None:
        self.fd = os.memfd_create("test-slot")
        os.ftruncate(self.fd, size_bytes)
        self._map = mmap.mmap(self.fd, size_bytes)
        self.memory = memoryview(self._map)
        self.header = Header(self.memory, header_bytes=HEADER_BYTES)
        self.size_bytes = size_bytes

    def begin(self) -> int:
        """Open the header: nothing is sealed."""
        return self.header.open()

    def seal(self, snapshot: SnapshotId, *, rank: int = 0, ranks: int = 2, origin: str = "") -> int:
        """Hold ``snapshot``; the generation."""
        generation = self.header.open()
        data = bytes([snapshot.step % 251]) * PAGE_BYTES
        self.memory[HEADER_BYTES : HEADER_BYTES + PAGE_BYTES] = data
        leaf = Leaf(name="w", kind=LeafKind.TENSOR, dtype="uint8", shape=(ranks, PAGE_BYTES))
        shard = StagedShard(
            leaf=leaf, box=Box((rank, 0), (1, PAGE_BYTES)), offset_bytes=0, size_bytes=PAGE_BYTES, digests=(digest(data),)
        )  # fmt: skip
        index = StagedIndex(snapshot=snapshot, rank=rank, world_size=ranks, shards=(shard,), origin=origin)
        self.header.close(index)
        return generation

    def given(self) -> int:
        """A descriptor to give away."""
        return os.dup(self.fd)

    def close(self) -> None:
        """Unmap and close."""
        del self.header
        self.memory.release()
        os.close(self.fd)
