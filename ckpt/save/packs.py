"""One rank's share of a snapshot: from a sealed slot to packs and a part in a store.

Nothing is recorded here. Until a commit names them, nothing reads these bytes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass

from ckpt.backends.base import Backend
from ckpt.backends.checked import MultiStoreBackend
from ckpt.errors import CkptError, IntegrityError, UsageError
from ckpt.format.canonical import digest, digest_hex
from ckpt.format.codec import encode_chunk
from ckpt.format.keys import copy_key, pack_key, part_key
from ckpt.format.manifest import PartRef
from ckpt.format.part import Part, StoredShard, chunk_sizes, encode_part, merge_parts
from ckpt.save.chunks import (
    GAP_BYTES_MAX,
    NO_COMPRESSION,
    PACK_BYTES_MAX,
    Chunk,
    Compression,
    CompressionDecision,
    CompressionSample,
    PackPlan,
    decide_compression,
    may_compress,
    new_chunks,
    plan_packs,
    raw_offsets,
)
from ckpt.threads import start_thread
from ckpt.values import PAGE_BYTES, ChunkLocation, Codec, Digest, StagedIndex, StagedShard

# ---- a pack's bytes: extents of the slot, or compressed chunks

SAMPLE_BYTES = 512 << 10
"""Bytes that are compressed to see whether it pays: 0.5 ms, and enough for zstd to show its
ratio."""


@dataclass(frozen=True, slots=True)
class BuiltPack:
    """The bytes to put at ``key``, and the location of each chunk in them."""

    key: str
    buffers: tuple[bytes | memoryview, ...]
    locations: dict[Digest, ChunkLocation]

    @property
    def size_bytes(self) -> int:
        """The object's size."""
        return sum(len(buffer) for buffer in self.buffers)


def verify_chunks(pack: PackPlan, data: memoryview) -> None:
    """Compare each chunk with its staged digest. 30 GB/s. Raises IntegrityError that names the
    leaf."""
    for chunk in pack.chunks:
        if digest(data[chunk.offset_bytes : chunk.offset_bytes + chunk.raw_bytes]) != chunk.digest:
            raise IntegrityError(
                f"staged bytes changed after they were copied. leaf={chunk.leaf} "
                f"offset_bytes={chunk.offset_bytes} "
                "the snapshot is given up; another writer overwrote this memory, or the memory is "
                "faulty"
            )


def raw_pack(key: str, pack: PackPlan, data: memoryview) -> BuiltPack:
    """The pack as page-aligned extents of the slot, without a copy."""
    locations = {
        chunk.digest: ChunkLocation(key, offset, chunk.raw_bytes, chunk.raw_bytes, Codec.RAW)
        for chunk, offset in zip(pack.chunks, raw_offsets(pack), strict=True)
    }
    return BuiltPack(
        key, tuple(data[extent.start : extent.stop] for extent in pack.extents), locations
    )


def encoded_pack(
    key: str, pack: PackPlan, data: memoryview, *, level: int, wanted: Callable[[Chunk], bool]
) -> BuiltPack:
    """The pack with each ``wanted`` chunk compressed and the others raw. Allocates the compressed
    ones."""
    buffers: list[bytes | memoryview] = []
    locations: dict[Digest, ChunkLocation] = {}
    at = 0
    for chunk in pack.chunks:
        raw = data[chunk.offset_bytes : chunk.offset_bytes + chunk.raw_bytes]
        encoded = (
            encode_chunk(raw, itemsize_bytes=chunk.itemsize_bytes, level=level)
            if wanted(chunk)
            else None
        )
        if encoded is None:
            buffers.append(raw)
            location = ChunkLocation(key, at, len(raw), len(raw), Codec.RAW)
        else:
            buffers.append(encoded.data)
            location = ChunkLocation(
                key, at, len(encoded.data), len(raw), encoded.codec, encoded.itemsize_bytes
            )
        locations[chunk.digest] = location
        at += location.stored_bytes
    return BuiltPack(key, tuple(buffers), locations)


class Sampler:
    """Remembers for each kind of bytes whether compression pays; samples the first chunk of a
    kind."""

    def __init__(self, compression: Compression, data: memoryview) -> None:
        self._compression = compression
        self._data = data
        self._samples: dict[str, CompressionSample] = {}

    def decide(self, chunk: Chunk, *, link_bytes_per_s: float | None) -> CompressionDecision:
        """Whether to compress ``chunk``. Compresses a sample for the first of its kind."""
        if chunk.kind not in self._samples:
            self._samples[chunk.kind] = self._sample(chunk)
        return decide_compression(
            self._compression, self._samples[chunk.kind], link_bytes_per_s=link_bytes_per_s
        )

    def _sample(self, chunk: Chunk) -> CompressionSample:
        length = min(chunk.raw_bytes, SAMPLE_BYTES) // chunk.itemsize_bytes * chunk.itemsize_bytes
        raw = self._data[chunk.offset_bytes : chunk.offset_bytes + length]
        start = time.perf_counter()
        encoded = encode_chunk(
            raw, itemsize_bytes=chunk.itemsize_bytes, level=self._compression.level
        )
        taken_s = time.perf_counter() - start
        return CompressionSample(length, length if encoded is None else len(encoded.data), taken_s)


PUTS_MAX = 4
"""Packs being written at once: enough for the links measured; also limits compressed packs'
memory."""

ENCODED_BYTES_MAX = 256 << 20
"""Memory that all compressed packs together may take."""

PROBE_BYTES = 16 << 20
"""Size of the first pack, which is written raw to measure the link."""

MEASURED_BYTES_MIN = 4 << 20
"""Smaller packs measure a request's fixed cost rather than the link."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PersistLimits:
    """Limits of ``persist``: the largest pack, packs written at once, memory for compressed
    ones."""

    pack_bytes_max: int = PACK_BYTES_MAX
    puts_max: int = PUTS_MAX
    encoded_bytes_max: int = ENCODED_BYTES_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class Persisted:
    """What a rank's share of a snapshot became. ``part`` is stored nowhere yet: see ``put_part``.

    ``new_bytes`` is the stored size of its new chunks, ``packs`` the number of packs written and
    ``pack_bytes`` the size of each, ``locations`` where every chunk of the snapshot is (the next
    save's ``stored_chunks``), ``link_bytes_per_s`` the speed of the writes (None: nothing was
    written).
    """

    part: Part
    new_bytes: int
    packs: int
    pack_bytes: dict[str, int]
    locations: dict[Digest, ChunkLocation]
    link_bytes_per_s: float | None


def pack_numbers_max(staged: StagedIndex) -> int:
    """How many pack numbers ``persist`` can use for ``staged`` within the default limits.
    O(shards)."""
    chunks = sum(len(shard.digests) for shard in staged.shards)
    padded = sum(shard.size_bytes for shard in staged.shards) + chunks * (
        2 * PAGE_BYTES + GAP_BYTES_MAX
    )
    # Two successive packs together exceed a pack's limit (else they would be one), and the smallest
    # limit is the probe's.
    return min(chunks, 1 + 2 * padded // PROBE_BYTES)


def persist(  # noqa: PLR0913  one call wires five rooms; all but two are keywords
    staged: StagedIndex,
    data: memoryview,
    *,
    stored_chunks: Mapping[Digest, ChunkLocation],
    backend: Backend,
    writer: str,
    pack_start: int,
    compression: Compression,
    verify: bool = True,
    limits: PersistLimits = PersistLimits(),
) -> Persisted:
    """Write the chunks of ``staged`` that are not in ``stored_chunks``; returns where all of them
    are.

    ``data`` is the slot's data area, pinned by the caller. ``pack_start`` is the first pack number
    that ``writer`` never used; the result says how many were used, after an error up to
    ``pack_numbers_max``. ``verify`` compares each new chunk with its staged digest just before it
    is written: 0.05 s a GiB of one core beside the writing. Without it, a byte that changed in the
    slot would be called durable, and only the restore that needs it would find it.

    Raises what the store raises, with the snapshot named, and IntegrityError if the slot changed.
    Then nothing is recorded, older snapshots are unaffected, and a sweep deletes what was written.
    """
    if any(shard.offset_bytes + shard.size_bytes > len(data) for shard in staged.shards):
        raise UsageError(f"the data area is shorter than its index says. size_bytes={len(data)}")
    chunks = new_chunks(staged, stored_chunks)
    try:
        caps = backend.capabilities()
        compressing = may_compress(compression, local=caps.direct_io)
        puts = max(1, min(limits.puts_max, caps.concurrency_best))
        packs = _plan(
            chunks,
            len(data),
            limits,
            puts=puts,
            compression=compression if compressing else NO_COMPRESSION,
        )
        writing = _PackWriter(
            backend, data, compression=compression if compressing else NO_COMPRESSION, verify=verify
        )
        fresh = writing.write(
            {
                pack_key(staged.snapshot, writer, pack_start + n): pack
                for n, pack in enumerate(packs)
            },
            puts=puts,
        )
        part = _part(staged, writer, {**stored_chunks, **fresh})
    except CkptError as error:
        raise type(error)(
            f"{error} [snapshot={staged.snapshot} rank={staged.rank} store={backend.url}: not "
            "recorded, older ones stand]"
        ) from error
    return Persisted(
        part=part,
        new_bytes=sum(location.stored_bytes for location in fresh.values()),
        packs=len(packs),
        pack_bytes=writing.pack_bytes,
        locations={
            d: p
            for shard in part.shards
            for d, p in zip(shard.digests, shard.locations, strict=True)
        },
        link_bytes_per_s=writing.link_bytes_per_s,
    )


def _plan(
    chunks: Sequence[Chunk],
    data_bytes: int,
    limits: PersistLimits,
    *,
    puts: int,
    compression: Compression,
) -> list[PackPlan]:
    if compression.mode == "off":
        return plan_packs(chunks, data_bytes=data_bytes, pack_bytes_max=limits.pack_bytes_max)
    # Besides the ``puts`` packs being written one is being built; none gets larger by compression.
    most = min(limits.pack_bytes_max, limits.encoded_bytes_max // (puts + 1))
    first = PROBE_BYTES if _measures(compression) else None
    return plan_packs(chunks, data_bytes=data_bytes, pack_bytes_max=most, first_bytes_max=first)


def _measures(compression: Compression) -> bool:
    return compression.mode == "auto" and compression.link_bytes_per_s is None


class _PackWriter:
    """Writes packs: the next is verified and built while earlier ones are being written."""

    def __init__(
        self, backend: Backend, data: memoryview, *, compression: Compression, verify: bool
    ) -> None:
        self._backend = backend
        self._data = data
        self._compression = compression
        self._verify = verify
        self._sampler = Sampler(compression, data)
        self._seen_bytes_per_s: float | None = None
        self.pack_bytes: dict[str, int] = {}
        """The size of each pack that was built."""

    @property
    def link_bytes_per_s(self) -> float | None:
        """The link's speed: as configured, else the best measured so far."""
        return self._compression.link_bytes_per_s or self._seen_bytes_per_s

    def write(self, packs: Mapping[str, PackPlan], *, puts: int) -> dict[Digest, ChunkLocation]:
        """Put each pack at its key, at most ``puts`` at once. The first error ends it.

        Returns where each chunk is then.
        """
        locations: dict[Digest, ChunkLocation] = {}
        running: deque[Future[None]] = deque()
        if not packs:
            return locations
        try:
            for key, pack in packs.items():
                built = self._build(key, pack)
                self.pack_bytes[key] = built.size_bytes
                while len(running) >= puts:
                    running.popleft().result()
                running.append(self._start(built))
                locations.update(built.locations)
                if self.link_bytes_per_s is None and _measures(self._compression):
                    running.popleft().result()
            while running:
                running.popleft().result()
        finally:
            wait(running)  # after an error too: they read the slot, which the caller then releases
        return locations

    def _start(self, built: BuiltPack) -> Future[None]:
        return start_thread(lambda: self._put(built), name="ckpt-put")

    def _build(self, key: str, pack: PackPlan) -> BuiltPack:
        if self._verify:
            verify_chunks(pack, self._data)
        wanted = {chunk.digest for chunk in pack.chunks if self._wants(chunk)}
        if not wanted:
            return raw_pack(key, pack, self._data)
        level = self._compression.level
        return encoded_pack(
            key, pack, self._data, level=level, wanted=lambda chunk: chunk.digest in wanted
        )

    def _wants(self, chunk: Chunk) -> bool:
        if self._compression.mode == "off" or (
            _measures(self._compression) and self.link_bytes_per_s is None
        ):
            return False
        return self._sampler.decide(chunk, link_bytes_per_s=self.link_bytes_per_s).compress

    def _put(self, built: BuiltPack) -> None:
        start = time.perf_counter()
        self._backend.put(built.key, built.buffers)
        taken_s = time.perf_counter() - start
        if built.size_bytes >= MEASURED_BYTES_MIN and taken_s > 0:
            self._seen_bytes_per_s = max(self._seen_bytes_per_s or 0.0, built.size_bytes / taken_s)


def _part(staged: StagedIndex, writer: str, locations: Mapping[Digest, ChunkLocation]) -> Part:
    return Part(
        snapshot=staged.snapshot,
        writer=writer,
        rank=staged.rank,
        world_size=staged.world_size,
        shards=tuple(_stored(shard, locations) for shard in staged.shards),
        aliases=staged.aliases,
    )


def _stored(shard: StagedShard, all_locations: Mapping[Digest, ChunkLocation]) -> StoredShard:
    locations = tuple(all_locations[digest] for digest in shard.digests)
    for location, raw_bytes in zip(locations, chunk_sizes(shard.size_bytes), strict=True):
        if location.raw_bytes != raw_bytes:
            raise IntegrityError(
                f"two chunks of different sizes have one digest. leaf={shard.leaf.name!r} "
                f"pack={location.pack} "
                f"raw_bytes={location.raw_bytes} expected={raw_bytes}; save once without known "
                "chunks"
            )
    return StoredShard(
        leaf=shard.leaf,
        box=shard.box,
        size_bytes=shard.size_bytes,
        digests=shard.digests,
        locations=locations,
    )


# ---- sizes of stored packs


class PackSizes:
    """The sizes and ages of one store's packs: those written here are known, others are queried
    once.

    ``clock`` is this machine's time since 1970: next to a store's stamps a wrong one only makes
    repacking earlier or later. For one thread.
    """

    def __init__(self, backend: Backend, *, clock: Callable[[], float] = time.time) -> None:
        self._backend = backend
        self._clock = clock
        self._sizes: dict[str, int] = {}
        self._stamps_unix_s: dict[str, float] = {}

    def of(self, packs: Iterable[str]) -> Mapping[str, int]:
        """The sizes of ``packs``; all others are forgotten. One request for each that is new.

        A pack that cannot be queried now is left out: repacking ignores it, and asks again next
        time.
        """
        sizes: dict[str, int] = {}
        for pack in dict.fromkeys(packs):
            size = self._sizes.get(pack)
            if size is None:
                size = self._ask(pack)
            if size is not None:
                sizes[pack] = size
        self._sizes = sizes
        self._stamps_unix_s = {pack: self._stamps_unix_s[pack] for pack in sizes}
        return sizes

    def ages_s(self) -> Mapping[str, float]:
        """The ages of the packs that ``of`` was last asked for."""
        now_unix_s = self._clock()
        return {pack: now_unix_s - stamp for pack, stamp in self._stamps_unix_s.items()}

    def note(self, sizes: Mapping[str, int]) -> None:
        """Remember packs that were just written."""
        self._sizes |= sizes
        self._stamps_unix_s |= dict.fromkeys(sizes, self._clock())

    def _ask(self, pack: str) -> int | None:
        try:
            stat = self._backend.stat(pack)
        except CkptError:
            return None  # a save must not fail because of repacking
        if stat is None:
            return None
        self._stamps_unix_s[pack] = stat.modified_unix_s
        return stat.size_bytes


# ---- the part of a node's ranks


def put_part(parts: Sequence[Part], *, backend: Backend, writer: str) -> PartRef:
    """Write one part for the ranks of ``parts``, whose ranks follow each other.

    ``writer`` must never have written a part of this snapshot. Raises what the store raises, with
    snapshot and ranks named, and UsageError if the parts do not fit together. O(chunks).
    """
    part = merge_parts(parts, writer=writer)
    encoded = encode_part(part)
    key = part_key(part.snapshot, writer)
    try:
        backend.put(key, [encoded])
        if not isinstance(backend, MultiStoreBackend):
            backend.put(copy_key(key), [encoded])  # no other store has one
    except CkptError as error:
        raise type(error)(
            f"{error} [snapshot={part.snapshot} part of ranks {part.rank} to "
            f"{part.rank + part.ranks - 1} "
            f"store={backend.url}: not recorded, older ones stand]"
        ) from error
    return PartRef(
        key=key,
        digest=digest_hex(encoded),
        size_bytes=len(encoded),
        rank=part.rank,
        ranks=part.ranks,
    )
