"""Which chunks are new, and how they make packs. Pure."""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ckpt.errors import UsageError
from ckpt.values import (
    CHUNK_BYTES,
    DTYPE_BYTES,
    PAGE_BYTES,
    ChunkLocation,
    Digest,
    LeafKind,
    StagedIndex,
    StagedShard,
)

PACK_BYTES_MAX = 256 << 20
"""A pack's usual largest size. A pack is swept only when nothing refers to any of its chunks, so
smaller is tidier; packs go up side by side, so a gigabyte should make several; and 256 MiB is where
object stores reach full speed for one object."""

GAP_BYTES_MAX = 4 * PAGE_BYTES
"""Known bytes between two new chunks that are written along: a further stretch costs a write of its
own."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk to write: its digest and where it lies in the data area. ``leaf`` names it in
    errors, ``kind`` what its bytes are like (for samples of how they compress)."""

    digest: Digest
    offset_bytes: int
    raw_bytes: int
    itemsize_bytes: int
    leaf: str
    kind: str


@dataclass(frozen=True, slots=True)
class SlotExtent:
    """A half-open byte range of the data area, on page boundaries (but for the end of the area)."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class PackPlan:
    """One pack: its chunks by their place in the slot, and the extents that hold them, in that
    order."""

    chunks: tuple[Chunk, ...]
    extents: tuple[SlotExtent, ...]

    @property
    def size_bytes(self) -> int:
        """The pack's size when it is written raw."""
        return sum(extent.stop - extent.start for extent in self.extents)


def new_chunks(staged: StagedIndex, stored_chunks: Container[Digest]) -> list[Chunk]:
    """The chunks that are stored nowhere yet, by their place in the slot; of equal ones the first
    met. O(chunks log chunks)."""
    found: dict[Digest, Chunk] = {}
    for shard in staged.shards:
        fresh = [
            n
            for n, digest in enumerate(shard.digests)
            if digest not in stored_chunks and digest not in found
        ]
        if not fresh:
            continue
        itemsize, kind = _nature(shard)
        for number in fresh:
            digest, start = shard.digests[number], number * CHUNK_BYTES
            size = min(CHUNK_BYTES, shard.size_bytes - start)
            found.setdefault(
                digest,
                Chunk(digest, shard.offset_bytes + start, size, itemsize, shard.leaf.name, kind),
            )
    return sorted(found.values(), key=lambda chunk: chunk.offset_bytes)


def plan_packs(
    chunks: Sequence[Chunk],
    *,
    data_bytes: int,
    pack_bytes_max: int = PACK_BYTES_MAX,
    first_bytes_max: int | None = None,
) -> list[PackPlan]:
    """Cut ``chunks`` (by offset) into packs of at most ``pack_bytes_max``; one chunk alone may
    exceed it.

    Each pack is whole pages of the slot, so it can be written as it lies, past the page cache.
    ``data_bytes`` ends the last extent; ``first_bytes_max`` limits the first pack, which measures
    the link.
    """
    packs: list[PackPlan] = []
    members: list[Chunk] = []
    extents: list[SlotExtent] = []
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


def _grow(last: SlotExtent | None, chunk: Chunk, data_bytes: int) -> tuple[SlotExtent, int]:
    """The extent that holds ``chunk``: ``last`` made longer where it is near, else a new one; and
    how many bytes that adds."""
    start = chunk.offset_bytes // PAGE_BYTES * PAGE_BYTES
    stop = min(-(-(chunk.offset_bytes + chunk.raw_bytes) // PAGE_BYTES) * PAGE_BYTES, data_bytes)
    if last is not None and start <= last.stop + GAP_BYTES_MAX:
        longer = SlotExtent(last.start, max(stop, last.stop))
        return longer, longer.stop - last.stop
    return SlotExtent(start, stop), stop - start


def _nature(shard: StagedShard) -> tuple[int, str]:
    """Element size, and a word for what the bytes are like: Adam's moments compress unlike weights
    of the same dtype."""
    if shard.leaf.kind is LeafKind.OBJECT:
        return 1, "object"
    return DTYPE_BYTES[
        shard.leaf.dtype
    ], f"{shard.leaf.dtype}/{shard.leaf.name.rsplit('/', 1)[-1].rsplit('.', 1)[-1]}"


# Which known chunks to write anew, so that packs of which little is still needed can go. Pure.
#
# A pack is deleted as a whole. Without this a pack would be kept for ever by one chunk that never
# changes.

LIVE_MIN = 0.5
"""A pack of which less is needed is sparse: what is stored stays below twice what is needed, and a
chunk is moved only after half of the pack around it has changed."""

BUDGET_SHARE = 0.1
"""How much of a snapshot's bytes one save may write anew for tidiness: then it takes a tenth longer
than without, at most."""

BUDGET_BYTES_MIN = 256 << 20
"""That much may be written in any case: one pack's worth, so that the sparsest pack always fits."""


@dataclass(frozen=True, slots=True)
class SparsePack:
    """A pack that is given up: its size, and how much of it a rewriting takes."""

    pack: str
    size_bytes: int
    live_bytes: int


@dataclass(frozen=True, slots=True)
class Repacking:
    """``known`` without the chunks of the packs given up, sparsest first; and the bytes that are
    written anew for that."""

    stored_chunks: Mapping[Digest, ChunkLocation]
    given_up: tuple[SparsePack, ...]
    rewritten_bytes: int


def default_budget_bytes(size_bytes: int) -> int:
    """How much a save of a state of ``size_bytes`` may write anew by default."""
    return max(BUDGET_BYTES_MIN, int(size_bytes * BUDGET_SHARE))


def plan_repacking(
    stored_chunks: Mapping[Digest, ChunkLocation],
    wanted: Collection[Digest],
    pack_bytes: Mapping[str, int],
    *,
    budget_bytes: int,
    live_min: float = LIVE_MIN,
) -> Repacking:
    """Leave out of ``known`` the chunks of sparse packs, as far as ``budget_bytes`` reaches.

    ``wanted`` are the digests of the new snapshot, ``pack_bytes`` the sizes of packs; one whose
    size is not there is not judged. Needed is what lies between the first and last byte of a wanted
    chunk, with gaps as short as a writer leaves them, so that a pack never looks sparse to the save
    after the one that wrote it. Equal arguments give equal answers, in whatever order they come.
    O(known + wanted + chunks log chunks).
    """
    by_pack: dict[str, list[Digest]] = {}
    for digest in wanted if isinstance(wanted, frozenset | set) else dict.fromkeys(wanted):
        place = stored_chunks.get(digest)
        if place is not None and place.pack in pack_bytes:
            by_pack.setdefault(place.pack, []).append(digest)
    sparse: list[SparsePack] = []
    for pack, digests in by_pack.items():
        live = _live_bytes([stored_chunks[digest] for digest in digests])
        if live < live_min * pack_bytes[pack]:
            sparse.append(SparsePack(pack, pack_bytes[pack], live))
    sparse.sort(key=lambda one: (one.live_bytes / one.size_bytes, one.pack))
    given_up: list[SparsePack] = []
    left = budget_bytes
    for one in sparse:
        if one.live_bytes <= left:
            given_up.append(one)
            left -= one.live_bytes
    if not given_up:
        return Repacking(stored_chunks, (), 0)
    gone = {digest for one in given_up for digest in by_pack[one.pack]}
    rest = {digest: place for digest, place in stored_chunks.items() if digest not in gone}
    return Repacking(rest, tuple(given_up), budget_bytes - left)


def _live_bytes(places: Sequence[ChunkLocation]) -> int:
    """The bytes that a pack of just these chunks would take: whole pages, and short gaps along."""
    total = stop = 0
    for start, end in sorted(
        (place.offset_bytes, place.offset_bytes + place.stored_bytes) for place in places
    ):
        low, high = start // PAGE_BYTES * PAGE_BYTES, -(-end // PAGE_BYTES) * PAGE_BYTES
        if total and low <= stop + GAP_BYTES_MAX:
            total += max(high, stop) - stop
        else:
            total += high - low
        stop = max(stop, high)
    return total


# Whether compression pays. Pure.

PAYS_FROM = 1.1
"""Compression must make the writing this much faster: it takes a core that training could use."""

LEVEL_MAX = 22


@dataclass(frozen=True, slots=True)
class Compression:
    """What a user asks for. ``auto`` compresses where a sample says that it makes writing faster,
    ``on`` wherever bytes shrink.

    ``level`` is zstd's. ``link_bytes_per_s`` is the speed of the way to the store; None: it is
    measured while writing.
    """

    mode: Literal["off", "auto", "on"] = "auto"
    level: int = 1
    link_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("off", "auto", "on"):
            raise UsageError(f"compression is off, auto or on. mode={self.mode!r}")
        if not 1 <= self.level <= LEVEL_MAX:
            raise UsageError(f"zstd's level out of range. level={self.level} (1..{LEVEL_MAX})")


NO_COMPRESSION = Compression("off")


@dataclass(frozen=True, slots=True)
class CompressionSample:
    """What compressing some bytes came to."""

    raw_bytes: int
    stored_bytes: int
    encode_s: float


@dataclass(frozen=True, slots=True)
class CompressionDecision:
    """Whether to compress bytes like the sampled ones, and why."""

    compress: bool
    reason: str


def may_compress(compression: Compression, *, local: bool) -> bool:
    """Whether compression is worth a sample at all: never when off, and never to a local disk in
    ``auto``."""
    return compression.mode == "on" or (compression.mode == "auto" and not local)


def decide_compression(
    compression: Compression, sample: CompressionSample, *, link_bytes_per_s: float | None
) -> CompressionDecision:
    """Compress bytes like ``sample``? One core encodes while the link carries what was encoded
    before."""
    match compression.mode:
        case "off":
            return CompressionDecision(False, "off")
        case "on":
            shrinks = sample.stored_bytes < sample.raw_bytes
            return CompressionDecision(shrinks, "on" if shrinks else "the sample does not shrink")
        case "auto":
            return _auto(sample, link_bytes_per_s)


def _auto(sample: CompressionSample, link: float | None) -> CompressionDecision:
    if link is None or link <= 0:
        return CompressionDecision(False, "the link's speed is not known yet")
    if sample.stored_bytes >= sample.raw_bytes:
        return CompressionDecision(False, "the sample does not shrink")
    encode = sample.raw_bytes / sample.encode_s if sample.encode_s > 0 else float("inf")
    speed = min(encode, link * sample.raw_bytes / sample.stored_bytes)
    what = f"encode_bytes_per_s={encode:.3g} link_bytes_per_s={link:.3g} ratio={sample.raw_bytes / sample.stored_bytes:.2f}"
    return CompressionDecision(speed >= PAYS_FROM * link, what)
