"""Values that packages pass to each other: snapshot ids, boxes, leaves, chunks. Pure.

All are frozen and compute nothing beyond arithmetic on their own fields.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

CHUNK_BYTES = 4 << 20
"""The fixed grid that cuts a shard's bytes: the unit of digest, dedup, compression and transfer."""

DIGEST_BYTES = 16
"""Length of an xxh3-128 digest."""

PAGE_BYTES = 4096
"""Alignment of memory, file offsets and lengths that direct I/O needs."""

Digest = bytes
"""A 16-byte xxh3-128 digest (big-endian, as ``xxhash.xxh3_128_digest`` returns it)."""


@dataclass(frozen=True, slots=True, order=True)
class SnapshotId:
    """The pair (captured epoch, step) that names a snapshot. Ordered by epoch, then step."""

    epoch: int
    step: int

    @property
    def key(self) -> str:
        """Fixed-width text for object keys; sorts as the pair does."""
        return f"{self.epoch:010d}-{self.step:014d}"

    def __str__(self) -> str:
        return f"epoch {self.epoch} step {self.step}"


@dataclass(frozen=True, slots=True)
class MembershipEpoch:
    """An epoch of a job's membership, as the log names it. Numbers of one ``line`` grow and are
    comparable; another line is another membership, perhaps another job's."""

    line: str
    number: int

    def supersedes(self, other: MembershipEpoch | None) -> bool:
        """Whether this is a later epoch of the line of ``other``."""
        return other is not None and other.line == self.line and other.number < self.number


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
        """The number of elements inside (1 for a 0-d box)."""
        return math.prod(self.sizes)

    def intersect(self, other: Box) -> Box | None:
        """The common region; None if it holds no element. Two 0-d boxes share one element."""
        if self == other:  # the usual case, when a restore has the layout of the save
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
    ``rank`` is the rank that the leaf belongs to; None: all ranks share it. ``dtype`` is torch's
    name without the prefix (``"bfloat16"``) and ``shape`` the global shape in elements; an object
    leaf has dtype ``"uint8"`` and its length as shape. ``alias_of`` names the leaf (of the same
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
    """One shard in a slot: its leaf and box, its place in the slot's data area, its chunks'
    digests.

    ``digests`` holds one digest per chunk of the 4 MiB grid, in order; empty for an empty shard.
    ``offset_bytes`` counts from the start of the data area.
    """

    leaf: Leaf
    box: Box
    offset_bytes: int
    size_bytes: int
    digests: tuple[Digest, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedIndex:
    """What a sealed slot holds: one rank's shards of one snapshot, and its aliases."""

    snapshot: SnapshotId
    rank: int
    world_size: int
    shards: tuple[StagedShard, ...]
    aliases: tuple[Leaf, ...] = ()
    metadata: Mapping[str, float | int | str | bool | None] = field(default_factory=dict)
    origin: str = ""
    """The write id of the record that opened the captured epoch, if the writer knew it.

    The number alone does not name an epoch: several keepers may give out the same one before the
    log decides.
    """


class Codec(enum.IntEnum):
    """How a chunk's bytes are stored."""

    RAW = 0
    ZSTD = 1
    PLANES_ZSTD = 2
    """Bytes regrouped by their position in the element (byte planes), then zstd."""


@dataclass(frozen=True, slots=True)
class ChunkLocation:
    """Where one chunk is stored: a pack's key, the byte range in it, and the encoding."""

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

    ``size_bytes`` is the state's size, ``new_bytes`` what this snapshot added to the store.
    ``created_unix_s`` is the committing machine's clock: for people, never for decisions.
    ``maybe_stale``: a newer snapshot may exist, because the log could not be read to its end.
    ``problem`` says why the manifest cannot be read; the sizes are then 0.
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


_DTYPES: Mapping[int, str] = {
    16: "complex128",
    8: "float64 complex64 int64 uint64",
    4: "float32 complex32 int32 uint32",
    2: "float16 bfloat16 int16 uint16",
    1: "int8 uint8 bool float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu "
    "float4_e2m1fn_x2 int1 int2 int3 int4 int5 int6 int7 uint1 uint2 uint3 uint4 uint5 uint6 uint7",
}

DTYPE_BYTES: Mapping[str, int] = {
    dtype: size_bytes for size_bytes, dtypes in _DTYPES.items() for dtype in dtypes.split()
}
"""Bytes one element takes, by torch's dtype name; torch keeps sub-byte dtypes one to a byte."""


class TrainerPhase(enum.IntEnum):
    """What a trainer is doing: how long it may stand still depends on it."""

    STARTING = 0
    BUILDING = 1
    TRAINING = 2
    PAUSED = 3
    DEBUGGING = 4
    FINISHED = 5
