"""Sealed slots as trainers make them: memfds with a header and a few bytes."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ckpt.format.canonical import digest
from ckpt.staging.header import Header
from ckpt.staging.layout import lay_out
from ckpt.values import (
    CHUNK_BYTES,
    PAGE_BYTES,
    Box,
    Leaf,
    LeafKind,
    SnapshotId,
    StagedIndex,
    StagedShard,
)

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
        return self.header.begin()

    def seal(self, snapshot: SnapshotId, *, rank: int = 0, ranks: int = 2, origin: str = "") -> int:
        """Hold ``snapshot``; the generation."""
        generation = self.header.begin()
        data = bytes([snapshot.step % 251]) * PAGE_BYTES
        self.memory[HEADER_BYTES : HEADER_BYTES + PAGE_BYTES] = data
        leaf = Leaf(name="w", kind=LeafKind.TENSOR, dtype="uint8", shape=(ranks, PAGE_BYTES))
        shard = StagedShard(
            leaf=leaf,
            box=Box((rank, 0), (1, PAGE_BYTES)),
            offset_bytes=0,
            size_bytes=PAGE_BYTES,
            digests=(digest(data),),
        )
        index = StagedIndex(
            snapshot=snapshot, rank=rank, world_size=ranks, shards=(shard,), origin=origin
        )
        self.header.seal(index)
        return generation

    def seal_leaves(
        self, snapshot: SnapshotId, bodies: Sequence[bytes], *, rank: int = 0, ranks: int = 2
    ) -> int:
        """Hold ``snapshot``, of one leaf of this rank for each body; the generation. What is
        between shards stays as it was."""
        generation = self.header.begin()
        offsets, _ = lay_out([len(body) for body in bodies])
        shards = []
        for number, (offset, body) in enumerate(zip(offsets, bodies, strict=True)):
            self.memory[HEADER_BYTES + offset : HEADER_BYTES + offset + len(body)] = body
            leaf = Leaf(
                name=f"w/{number}",
                kind=LeafKind.TENSOR,
                dtype="uint8",
                shape=(len(body),),
                rank=rank,
            )
            digests = tuple(
                digest(body[at : at + CHUNK_BYTES]) for at in range(0, len(body), CHUNK_BYTES)
            )
            shards.append(
                StagedShard(
                    leaf=leaf,
                    box=Box.whole(leaf.shape),
                    offset_bytes=offset,
                    size_bytes=len(body),
                    digests=digests,
                )
            )
        self.header.seal(
            StagedIndex(snapshot=snapshot, rank=rank, world_size=ranks, shards=tuple(shards))
        )
        return generation

    def given(self) -> int:
        """A descriptor to give away."""
        return os.dup(self.fd)

    def close(self) -> None:
        """Unmap and close."""
        del self.header
        self.memory.release()
        os.close(self.fd)


def descriptors(made: Iterable[MadeSlot]) -> int:
    """How many of this process lead to these slots' memory."""
    return sum(leading_to(one.fd) for one in made)


def leading_to(fd: int) -> int:
    """How many descriptors of this process lead where ``fd`` leads. Others come and go with what
    other tests left behind."""
    wanted = os.fstat(fd)
    found = 0
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            here = path.stat()
            found += (here.st_dev, here.st_ino) == (wanted.st_dev, wanted.st_ino)
    return found
