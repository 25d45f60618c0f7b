"""Restoring from staged memory: the slots of all ranks, read as if they were a store. No torch.

The data area of rank r's slot is one object, ``slot/<r>``, and ``staged_index`` says where each
chunk is in it, raw. So planning, fetching, and above all the check of every chunk against the
digest that its trainer made, are the same as for a store.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ckpt.backends.base import Buffer, Capabilities, Stat
from ckpt.errors import IntegrityError, NotFoundError, UsageError
from ckpt.format.index import SnapshotIndex
from ckpt.format.keys import part_key, writer_name
from ckpt.format.manifest import Manifest, PartRef
from ckpt.format.part import Part, StoredShard, chunk_sizes
from ckpt.staging.header import generation_of, header_bytes_of, read_slot, read_summary
from ckpt.values import CHUNK_BYTES, ChunkLocation, Codec, SnapshotId, StagedIndex, StagedShard

SLOT_PREFIX = "slot/"
"""No key of a store begins so: a chunk's location tells whether it was read from memory."""

JOINED_BYTES_MAX = 64 << 10
"""Neighbours are joined up to this: one more copy of so little costs less than a call for each."""

READERS_MAX = 8
"""More threads than this don't read memory any faster."""

_BOOT = "0" * 16


def slot_key(rank: int) -> str:
    """The key of the slot of ``rank``."""
    return f"{SLOT_PREFIX}{rank}"


class SlotStore:
    """A read-only ``Backend`` over one sealed slot of each rank, all of one snapshot. Thread-safe.

    Memory may be overwritten while it is read. Digests detect that; ``unchanged`` tells it
    afterwards for all that was read.
    """

    def __init__(self, snapshot: SnapshotId, slots: Mapping[int, memoryview]) -> None:
        """``slots`` is the whole memory of one slot a rank. Raises IntegrityError if one does not
        hold ``snapshot``.
        """
        self.snapshot = snapshot
        self._slots = dict(slots)
        self._data: dict[str, memoryview] = {}
        self._generations: dict[int, int] = {}
        indexes = []
        """What the slots hold, in rank order."""
        for rank, memory in sorted(slots.items()):
            sealed, header_bytes = read_slot(memory), header_bytes_of(memory)
            if (
                sealed is None
                or header_bytes is None
                or (sealed[0].snapshot, sealed[0].rank) != (snapshot, rank)
            ):
                holds = (
                    "nothing"
                    if sealed is None
                    else f"{sealed[0].snapshot} of rank {sealed[0].rank}"
                )
                raise IntegrityError(
                    f"a slot does not hold the snapshot. snapshot={snapshot} rank={rank} "
                    f"holds={holds}"
                )
            indexes.append(sealed[0])
            self._generations[rank] = sealed[1]
            self._data[slot_key(rank)] = memory[header_bytes:]
        self.indexes: tuple[StagedIndex, ...] = tuple(indexes)
        """What the slots hold, in rank order."""

    @classmethod
    def find(cls, snapshot: SnapshotId, memories: Mapping[int, Sequence[memoryview]]) -> SlotStore:
        """A store of the slot that holds ``snapshot`` among those of each rank.

        Raises IntegrityError if a rank has none: it was overwritten or is damaged.
        """
        return cls(
            snapshot,
            {rank: _holder(snapshot, rank, candidates) for rank, candidates in memories.items()},
        )

    @property
    def url(self) -> str:
        return f"slots:{self.snapshot.key}"

    def unchanged(self) -> bool:
        """Whether every slot still holds what it held when this store was made: then all that was
        read is whole.
        """
        return all(
            generation_of(self._slots[rank]) == begun for rank, begun in self._generations.items()
        )

    def capabilities(self) -> Capabilities:
        readers = min(READERS_MAX, os.cpu_count() or 1)
        return Capabilities(
            create_only=False, read_bytes_best=JOINED_BYTES_MAX, concurrency_best=readers
        )

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        raise UsageError(f"slot store is read-only. key={key} store={self.url}")

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        data = self._find(key)
        stop = offset_bytes + out.nbytes
        if offset_bytes < 0 or stop > len(data):
            raise IntegrityError(
                f"the slot ends too early. key={key} offset_bytes={offset_bytes} "
                f"wanted_bytes={out.nbytes} "
                f"has_bytes={len(data)}"
            )
        # numpy copies without the GIL, so that readers scale over cores.
        np.copyto(np.frombuffer(out, np.uint8), np.frombuffer(data[offset_bytes:stop], np.uint8))

    def stat(self, key: str) -> Stat | None:
        data = self._data.get(key)
        return None if data is None else Stat(key, len(data), 0.0)

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        for key in sorted(self._data):
            if key.startswith(prefix) and key > after:
                yield Stat(key, len(self._data[key]), 0.0)

    def delete(self, key: str) -> None:
        raise UsageError(f"slot store is read-only. key={key} store={self.url}")

    def close(self) -> None:
        """Release the memory; nothing can be read any more. Idempotent."""
        self._data.clear()
        self._slots.clear()
        self._generations.clear()

    def _find(self, key: str) -> memoryview:
        data = self._data.get(key)
        if data is None:
            raise NotFoundError(f"no such slot. key={key} store={self.url}")
        return data


def staged_index(indexes: Sequence[StagedIndex], *, job: str) -> SnapshotIndex:
    """The index of a staged snapshot, as if it were stored: chunks are raw in ``slot_key(rank)``.

    ``indexes`` are those of all ranks. Raises IntegrityError if they are not one snapshot of one
    world, or don't cover a leaf exactly once.
    """
    ordered = sorted(indexes, key=lambda index: index.rank)
    if not ordered:
        raise IntegrityError("no slot holds the snapshot.")
    first = ordered[0]
    kinds = {
        (index.snapshot, index.world_size, index.origin) for index in ordered
    }  # an epoch's number alone may be given out twice
    if len(kinds) > 1 or [index.rank for index in ordered] != list(range(first.world_size)):
        listed = ", ".join(
            f"{index.snapshot} rank {index.rank}/{index.world_size}" for index in ordered
        )
        raise IntegrityError(f"slots that are not one snapshot. slots={listed}")
    parts = [_part(index) for index in ordered]
    refs = (
        PartRef(key=part_key(p.snapshot, p.writer), digest="", size_bytes=0, rank=p.rank)
        for p in parts
    )
    manifest = Manifest(
        job=job,
        snapshot=first.snapshot,
        world_size=first.world_size,
        parts=tuple(refs),
        new_bytes=0,
        created_unix_s=0.0,
        size_bytes=sum(shard.size_bytes for part in parts for shard in part.shards),
        metadata=first.metadata,
    )
    return SnapshotIndex(manifest, parts)


def _holder(snapshot: SnapshotId, rank: int, memories: Sequence[memoryview]) -> memoryview:
    damage: IntegrityError | None = None
    for memory in memories:
        try:
            sealed = read_summary(memory)
        except IntegrityError as error:
            damage = error
            continue
        if sealed is not None and (sealed[0].snapshot, sealed[0].rank) == (snapshot, rank):
            return memory
    raise IntegrityError(
        f"no slot of this rank holds the snapshot. snapshot={snapshot} rank={rank} "
        f"slots={len(memories)}"
    ) from damage


def _part(index: StagedIndex) -> Part:
    return Part(
        snapshot=index.snapshot,
        writer=writer_name(f"slot{index.rank}", _BOOT),
        rank=index.rank,
        world_size=index.world_size,
        shards=tuple(_stored(shard, slot_key(index.rank)) for shard in index.shards),
        aliases=index.aliases,
    )


def _stored(shard: StagedShard, key: str) -> StoredShard:
    places = tuple(
        ChunkLocation(key, shard.offset_bytes + number * CHUNK_BYTES, size, size, Codec.RAW)
        for number, size in enumerate(chunk_sizes(shard.size_bytes))
    )
    return StoredShard(
        leaf=shard.leaf,
        box=shard.box,
        size_bytes=shard.size_bytes,
        digests=shard.digests,
        locations=places,
    )
