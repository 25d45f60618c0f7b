"""Which chunks are new, and how they make packs. Pure."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

from ckpt.values import CHUNK_BYTES, DTYPE_BYTES, PAGE_BYTES, Digest, LeafKind, StagedIndex, StagedShard

PACK_BYTES_MAX = 256 << 20
"""A pack's usual largest size. A pack is swept only when nothing refers to any of its chunks, so smaller is tidier; packs go up
side by side, so a gigabyte should make several; and 256 MiB is where object stores reach full speed for one object."""

GAP_BYTES_MAX = 4 * PAGE_BYTES
"""Known bytes between two new chunks that are written along: a further stretch costs a write of its own."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk to write: its digest and where it lies in the data area. ``leaf`` names it in errors, ``kind`` what its bytes
    are like (for samples of how they compress)."""

    digest: Digest
    offset_bytes: int
    raw_bytes: int
    itemsize_bytes: int
    leaf: str
    kind: str


@dataclass(frozen=True, slots=True)
class Extent:
    """A half-open byte range of the data area, on page boundaries (but for the end of the area)."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class PackPlan:
    """One pack: its chunks by their place in the slot, and the extents that hold them, in that order."""

    chunks: tuple[Chunk, ...]
    extents: tuple[Extent, ...]

    @property
    def size_bytes(self) -> int:
        """The pack's size when it is written raw."""
        return sum(extent.stop - extent.start for extent in self.extents)


def new_chunks(staged: StagedIndex, known: Container[Digest]) -> list[Chunk]:
    """The chunks that are stored nowhere yet, by their place in the slot; of equal ones the first met. O(chunks log chunks)."""
    found: dict[Digest, Chunk] = {}
    for shard in staged.shards:
        fresh = [n for n, digest in enumerate(shard.digests) if digest not in known and digest not in found]
        if not fresh:
            continue
        itemsize, kind = _nature(shard)
        for number in fresh:
            digest, start = shard.digests[number], number * CHUNK_BYTES
            size = min(CHUNK_BYTES, shard.size_bytes - start)
            found.setdefault(digest, Chunk(digest, shard.offset_bytes + start, size, itemsize, shard.leaf.name, kind))
    return sorted(found.values(), key=lambda chunk: chunk.offset_bytes)


def plan_packs(
    chunks: Sequence[Chunk],
    *,
    data_bytes: int,
    pack_bytes_max: int = PACK_BYTES_MAX,
    first_bytes_max: int | None = None,
) -> list[PackPlan]:
    """Cut ``chunks`` (by offset) into packs of at most ``pack_bytes_max``; one chunk alone may exceed it.

    Each pack is whole pages of the slot, so it can be written as it lies, past the page cache. ``data_bytes`` ends the last
    extent; ``first_bytes_max`` limits the first pack, which measures the link.
    """
    packs: list[PackPlan] = []
    members: list[Chunk] = []
    extents: list[Extent] = []
    size = 0
    limit = pack_bytes_max if first_bytes_max is None else min(first_bytes_max, pack_bytes_max)
    for chunk in chunks:
        grown, added = _grow(extents[-1] if extents else None, chunk, data_bytes)
        if members and size + added > limit:
            packs.append(PackPlan(tuple(members), tuple(extents)))
            members, extents, size, limit = [], [], 0, pack_bytes_max
            grown, added = _grow(None, chunk, data_bytes)
        if extents and grown.start == extents[-1].start:
            extents[-1] = grown
        else:
            extents.append(grown)
        members.append(chunk)
        size += added
    if members:
        packs.append(PackPlan(tuple(members), tuple(extents)))
    return packs


def raw_offsets(pack: PackPlan) -> list[int]:
    """Where each chunk of ``pack`` lies in the object that its extents make."""
    offsets: list[int] = []
    before = at = 0
    for chunk in pack.chunks:
        while chunk.offset_bytes >= pack.extents[at].stop:
            before += pack.extents[at].stop - pack.extents[at].start
            at += 1
        offsets.append(before + chunk.offset_bytes - pack.extents[at].start)
    return offsets


def _grow(last: Extent | None, chunk: Chunk, data_bytes: int) -> tuple[Extent, int]:
    """The extent that holds ``chunk``: ``last`` made longer where it is near, else a new one; and how many bytes that adds."""
    start = chunk.offset_bytes // PAGE_BYTES * PAGE_BYTES
    stop = min(-(-(chunk.offset_bytes + chunk.raw_bytes) // PAGE_BYTES) * PAGE_BYTES, data_bytes)
    if last is not None and start <= last.stop + GAP_BYTES_MAX:
        longer = Extent(last.start, max(stop, last.stop))
        return longer, longer.stop - last.stop
    return Extent(start, stop), stop - start


def _nature(shard: StagedShard) -> tuple[int, str]:
    """Element size, and a word for what the bytes are like: Adam's moments compress unlike weights of the same dtype."""
    if shard.leaf.kind is LeafKind.OBJECT:
        return 1, "object"
    return DTYPE_BYTES[shard.leaf.dtype], f"{shard.leaf.dtype}/{shard.leaf.name.rsplit('/', 1)[-1].rsplit('.', 1)[-1]}"
