"""Frozen nouns that travel between rooms. No I/O, no torch, no behaviour beyond arithmetic on their
own fields."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

CHUNK_BYTES = 4 << 20
"""The fixed grid on which a shard's bytes are cut: unit of digest, dedup, compression and
transfer."""

DIGEST_BYTES = 16
"""Length of an xxh3-128 digest."""

PAGE_BYTES = 4096
"""Alignment that direct I/O needs, for memory, file offsets and lengths."""

Digest = bytes
"""A 16-byte xxh3-128 digest (big-endian, as ``xxhash.xxh3_128_digest`` returns it)."""


@dataclass(frozen=True, slots=True, order=True)
class SnapshotId:
    """The pair (captured epoch, step) that names a snapshot; ordered epoch first."""

    epoch: int
    step: int

    @property
    def key(self) -> str:
        """Fixed-width text form used in object keys; sorts as the pair does."""
        return f"{self.epoch:010d}-{self.step:014d}"

    def __str__(self) -> str:
        return f"epoch {self.epoch} step {self.step}"


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular region of a tensor: per dimension an offset and a size, in elements."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Box:
        """The box that covers a tensor of ``shape``."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def elements(self) -> int:
        """How many elements lie inside (1 for a 0-d box)."""
        return math.prod(self.sizes)

    def intersect(self, other: Box) -> Box | None:
        """The common region, or None where it holds no element. Two 0-d boxes intersect in one
        element."""
        if self == other:
            return None if 0 in self.sizes else self
        lows = tuple(max(a, b) for a, b in zip(self.offsets, other.offsets, strict=True))
        highs = tuple(
            min(a + m, b + n)
            for a, m, b, n in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        )
        if any(high <= low for low, high in zip(lows, highs, strict=True)):
            return None
        return Box(lows, tuple(high - low for low, high in zip(lows, highs, strict=True)))


class LeafKind(str, enum.Enum):
    """What a leaf's bytes are."""

    TENSOR = "tensor"
    OBJECT = "object"


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """One named tensor or object of the state, as it is recorded.

    ``name`` is a ``/``-separated path that starts with the user's name for the tracked item.
    ``rank`` is None for a leaf that is one for all ranks, else the rank it belongs to. ``dtype`` is
    torch's name without the prefix (``"bfloat16"``) and ``shape`` the global shape in elements; an
    object leaf has dtype ``"uint8"`` and its length as shape. ``alias_of`` names the leaf (same
    rank) whose memory this one shares exactly; an alias has no shards.
    """

    name: str
    kind: LeafKind
    dtype: str
    shape: tuple[int, ...]
    rank: int | None = None
    alias_of: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedShard:
    """One shard in a slot: which leaf and box, where in the slot's data area, and the digests of
    its chunks.

    ``digests`` holds one digest per chunk of the 4 MiB grid, in order; empty for an empty shard.
    ``offset_bytes`` is relative to the start of the data area.
    """

    leaf: Leaf
    box: Box
    offset_bytes: int
    size_bytes: int
    digests: tuple[Digest, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedIndex:
    """What a valid slot holds: one rank's shards of one snapshot, and the leaves that are
    aliases."""

    snapshot: SnapshotId
    rank: int
    world_size: int
    shards: tuple[StagedShard, ...]
    aliases: tuple[Leaf, ...] = ()
    metadata: Mapping[str, float | int | str | bool | None] = field(default_factory=dict)
    origin: str = ""
    """The write id of the record that opened the captured epoch, as far as the writer was told:
    numbers alone are given out by several keepers at once."""


class Codec(enum.IntEnum):
    """How a chunk's bytes are stored."""

    RAW = 0
    ZSTD = 1
    PLANES_ZSTD = 2
    """Bytes regrouped by their position in the element (byte planes), then zstd."""


@dataclass(frozen=True, slots=True)
class ChunkLocation:
    """Where one chunk lies: a pack's key, the byte range in it, and how it is stored."""

    pack: str
    offset_bytes: int
    stored_bytes: int
    raw_bytes: int
    codec: Codec
    itemsize_bytes: int = 1
    """Element size that the byte planes were cut with (1 for other codecs)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotInfo:
    """What users see of a committed snapshot.

    ``size_bytes`` is the state's size, ``new_bytes`` what this snapshot added to the store (the
    rest was already there). ``created_unix_s`` is the committing machine's clock: for people, never
    for decisions. ``maybe_stale``: the log goes on but can't be read, so a newer one may exist.
    ``problem`` says why its manifest can't be read; its sizes are then 0.
    """

    epoch: int
    step: int
    world_size: int
    size_bytes: int
    new_bytes: int
    created_unix_s: float
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, float | int | str | bool | None] = field(default_factory=dict)
    maybe_stale: bool = False
    problem: str | None = None

    @property
    def id(self) -> SnapshotId:
        """The pair (captured epoch, step)."""
        return SnapshotId(self.epoch, self.step)


DTYPE_BYTES: Mapping[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
    **{f"{sign}int{bits}": 1 for sign in ("", "u") for bits in range(1, 8)},
}
"""Bytes one element takes, by torch's dtype name; torch keeps sub-byte dtypes one to a byte."""
