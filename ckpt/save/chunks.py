"""Which chunks of a snapshot are new, how they are packed, and whether to compress them. Pure."""

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
"""The usual largest size of a pack.

A pack is deleted only when nothing refers to any of its chunks, so smaller packs are freed sooner.
Packs are uploaded in parallel, so a gigabyte should make several. Object stores reach full speed
for one object at about 256 MiB.
"""

GAP_BYTES_MAX = 4 * PAGE_BYTES
"""Stored chunks between two new ones that are written again: a further extent would cost a
write."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk to write: its digest and its place in the slot's data area.

    ``leaf`` names it in errors. ``kind`` groups chunks whose bytes compress alike.
    """

    digest: Digest
    offset_bytes: int
    raw_bytes: int
    itemsize_bytes: int
    leaf: str
    kind: str


@dataclass(frozen=True, slots=True)
class SlotExtent:
    """A half-open byte range of the data area, on page boundaries (except at the end of the
    area)."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class PackPlan:
    """One pack: its chunks by their offset in the slot, and the extents that hold them, in that
    order."""

    chunks: tuple[Chunk, ...]
    extents: tuple[SlotExtent, ...]

    @property
    def size_bytes(self) -> int:
        """The pack's size if it is written raw."""
        return sum(extent.stop - extent.start for extent in self.extents)


def new_chunks(staged: StagedIndex, stored_chunks: Container[Digest]) -> list[Chunk]:
    """The chunks that are stored nowhere yet, by their offset; the first of equal ones.

    O(chunks log chunks).
    """
    chunks: dict[Digest, Chunk] = {}
    for shard in staged.shards:
        fresh = [
            n
            for n, digest in enumerate(shard.digests)
            if digest not in stored_chunks and digest not in chunks
        ]
        if not fresh:
            continue
        itemsize, kind = _nature(shard)
        for number in fresh:
            digest, start = shard.digests[number], number * CHUNK_BYTES
            size = min(CHUNK_BYTES, shard.size_bytes - start)
            chunks.setdefault(  # a shard may hold equal chunks
                digest,
                Chunk(digest, shard.offset_bytes + start, size, itemsize, shard.leaf.name, kind),
            )
    return sorted(chunks.values(), key=lambda chunk: chunk.offset_bytes)


def plan_packs(
    chunks: Sequence[Chunk],
    *,
    data_bytes: int,
    pack_bytes_max: int = PACK_BYTES_MAX,
    first_bytes_max: int | None = None,
) -> list[PackPlan]:
    """Cut ``chunks`` (sorted by offset) into packs of at most ``pack_bytes_max``.

    A single chunk may exceed it. Each pack is whole pages of the slot, so it can be written without
    a copy, past the page cache. ``data_bytes`` ends the last extent. ``first_bytes_max`` limits the
    first pack, which measures the link.
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
    """The offset of each chunk of ``pack`` in the object that its extents make."""
    offsets: list[int] = []
    before = at = 0
    for chunk in pack.chunks:
        while chunk.offset_bytes >= pack.extents[at].stop:
            before += pack.extents[at].stop - pack.extents[at].start
            at += 1
        offsets.append(before + chunk.offset_bytes - pack.extents[at].start)
    return offsets


def _grow(last: SlotExtent | None, chunk: Chunk, data_bytes: int) -> tuple[SlotExtent, int]:
    """The extent that holds ``chunk``, and how many bytes it adds: ``last`` made longer if near, or
    new."""
    start = chunk.offset_bytes // PAGE_BYTES * PAGE_BYTES
    stop = min(-(-(chunk.offset_bytes + chunk.raw_bytes) // PAGE_BYTES) * PAGE_BYTES, data_bytes)
    if last is not None and start <= last.stop + GAP_BYTES_MAX:
        longer = SlotExtent(last.start, max(stop, last.stop))
        return longer, longer.stop - last.stop
    return SlotExtent(start, stop), stop - start


def _nature(shard: StagedShard) -> tuple[int, str]:
    """Element size, and a name for bytes that compress alike.

    Adam's moments compress unlike weights of the same dtype, so the last part of the name counts.
    """
    if shard.leaf.kind is LeafKind.OBJECT:
        return 1, "object"
    return DTYPE_BYTES[
        shard.leaf.dtype
    ], f"{shard.leaf.dtype}/{shard.leaf.name.rsplit('/', 1)[-1].rsplit('.', 1)[-1]}"


# ---- repacking: rewrite chunks of sparse packs

LIVE_MIN = 0.5
"""A pack of which a smaller share is needed is sparse.

So a store holds less than twice what is needed, and a chunk is moved only after half of the pack
around it has changed.
"""

BUDGET_SHARE = 0.1
"""The share of a snapshot's bytes that one save may rewrite: it takes at most a tenth longer."""

BUDGET_BYTES_MIN = 256 << 20
"""The least budget: one pack, so that the sparsest pack always fits."""

REFERENCE_AGE_MAX_S = 6 * 3600.0
"""An older pack is written anew although nothing in it changed.

Without a limit all snapshots share one copy of what never changes, and one bad sector under it
takes all of them. Six hours cost a save in ten minutes less than 3 % of the unchanged bytes.
"""


@dataclass(frozen=True, slots=True)
class SparsePack:
    """A pack that is given up, sparse or old: its size, and how many bytes of it are rewritten."""

    pack: str
    size_bytes: int
    live_bytes: int


@dataclass(frozen=True, slots=True)
class Repacking:
    """``stored_chunks`` without those of the packs given up, sparsest first, then the oldest; and
    the bytes to rewrite."""

    stored_chunks: Mapping[Digest, ChunkLocation]
    given_up: tuple[SparsePack, ...]
    rewritten_bytes: int


def default_budget_bytes(size_bytes: int) -> int:
    """How many bytes a save of a state of ``size_bytes`` may rewrite by default."""
    return max(BUDGET_BYTES_MIN, int(size_bytes * BUDGET_SHARE))


def plan_repacking(
    stored_chunks: Mapping[Digest, ChunkLocation],
    wanted: Collection[Digest],
    pack_bytes: Mapping[str, int],
    *,
    budget_bytes: int,
    live_min: float = LIVE_MIN,
    ages_s: Mapping[str, float] | None = None,
) -> Repacking:
    """Leave the chunks of sparse and old packs out of ``stored_chunks``, within ``budget_bytes``.

    The caller then writes these chunks anew, so that the sparse packs can be deleted: a pack is
    deleted as a whole, and without this one unchanging chunk would keep it forever. ``wanted`` are
    the digests of the new snapshot, ``pack_bytes`` the sizes of packs; a pack of unknown size is
    left alone. A pack's needed bytes include gaps as short as ``plan_packs`` leaves them, so that
    it never looks sparse right after it was written. ``ages_s`` are the packs' ages: what is left
    of the budget goes to those above REFERENCE_AGE_MAX_S, the oldest first, so that snapshots do
    not all depend on one copy; a pack of unknown age is not old. Equal arguments give equal results
    in whatever order they are. O(stored_chunks + wanted + chunks log chunks).
    """
    by_pack: dict[str, list[Digest]] = {}
    for digest in wanted if isinstance(wanted, frozenset | set) else dict.fromkeys(wanted):
        location = stored_chunks.get(digest)
        if location is not None and location.pack in pack_bytes:
            by_pack.setdefault(location.pack, []).append(digest)
    sparse: list[SparsePack] = []
    old: list[tuple[float, str, SparsePack]] = []
    for pack, digests in by_pack.items():
        live = _live_bytes([stored_chunks[digest] for digest in digests])
        found = SparsePack(pack, pack_bytes[pack], live)
        if live < live_min * pack_bytes[pack]:
            sparse.append(found)
        elif ages_s is not None and ages_s.get(pack, 0.0) > REFERENCE_AGE_MAX_S:
            old.append((-ages_s[pack], pack, found))
    sparse.sort(key=lambda entry: (entry.live_bytes / entry.size_bytes, entry.pack))
    given_up: list[SparsePack] = []
    left = budget_bytes
    for entry in (*sparse, *(found for _, _, found in sorted(old, key=lambda one: one[:2]))):
        if entry.live_bytes <= left:
            given_up.append(entry)
            left -= entry.live_bytes
    if not given_up:
        return Repacking(stored_chunks, (), 0)
    moved = {digest for entry in given_up for digest in by_pack[entry.pack]}
    rest = {digest: location for digest, location in stored_chunks.items() if digest not in moved}
    return Repacking(rest, tuple(given_up), budget_bytes - left)


def _live_bytes(locations: Sequence[ChunkLocation]) -> int:
    """The bytes that a pack of just these chunks would take: whole pages, with short gaps."""
    total = stop = 0
    for start, end in sorted(
        (location.offset_bytes, location.offset_bytes + location.stored_bytes)
        for location in locations
    ):
        low, high = start // PAGE_BYTES * PAGE_BYTES, -(-end // PAGE_BYTES) * PAGE_BYTES
        if total and low <= stop + GAP_BYTES_MAX:
            total += max(high, stop) - stop
        else:
            total += high - low
        stop = max(stop, high)
    return total


# ---- compression: whether it pays

PAYS_FROM = 1.1
"""Compression must make writing this much faster, because it takes a core from training."""

LEVEL_MAX = 22
"""zstd's highest level."""


@dataclass(frozen=True, slots=True)
class Compression:
    """What a user asks for.

    ``mode``: ``off``; ``on``: compress whatever shrinks; ``auto``: compress if a sample shows that
    it makes writing faster. ``level`` is zstd's. ``link_bytes_per_s`` is the speed to the store;
    None: it is measured while writing. Raises UsageError for anything else.
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
    """The result of compressing some bytes."""

    raw_bytes: int
    stored_bytes: int
    encode_s: float


@dataclass(frozen=True, slots=True)
class CompressionDecision:
    """Whether to compress bytes like the sampled ones, and the reason."""

    compress: bool
    reason: str


def may_compress(compression: Compression, *, local: bool) -> bool:
    """Whether a sample is worth taking: never if off, and in ``auto`` not for a local disk."""
    return compression.mode == "on" or (compression.mode == "auto" and not local)


def decide_compression(
    compression: Compression, sample: CompressionSample, *, link_bytes_per_s: float | None
) -> CompressionDecision:
    """Whether to compress bytes like ``sample``: one core encodes while the link sends the last
    pack."""
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
    ratio = sample.raw_bytes / sample.stored_bytes
    # Encoding and sending overlap, so the slower of the two sets the speed, in raw bytes a second.
    speed = min(encode, link * sample.raw_bytes / sample.stored_bytes)
    numbers = f"encode_bytes_per_s={encode:.3g} link_bytes_per_s={link:.3g} ratio={ratio:.2f}"
    return CompressionDecision(speed >= PAYS_FROM * link, numbers)
