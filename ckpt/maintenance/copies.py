"""What the copies of one object are worth, and which of them to write anew from which. Pure.

An object is either *whole*, known by one digest of all its bytes (a manifest, a part), or a *pack*,
known by the digests of the chunks that existing snapshots refer to: bytes between and behind them
have no meaning, and no digest.
"""

from __future__ import annotations

import enum
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field

from ckpt.format.part import Part
from ckpt.values import ChunkLocation, Digest

ChunkRef = tuple[Digest, ChunkLocation]
"""One chunk that some snapshot needs: its digest, and where it lies."""


class CopyStatus(str, enum.Enum):
    """What one store's copy of an object is."""

    OK = "ok"
    MISSING = "missing"
    DAMAGED = "damaged"
    """Too short, not decodable, or with bytes that differ from their digest."""
    UNREADABLE = "unreadable"
    """The store did not answer, so nothing is known."""


@dataclass(frozen=True, slots=True)
class WholeObject:
    """An object that one digest (32 hex digits) is for."""

    key: str
    digest: str
    size_bytes: int | None = None
    """None where nobody recorded it."""


@dataclass(frozen=True, slots=True)
class Pack:
    """A pack and the chunks in it that are referred to, in order of their offset."""

    key: str
    chunks: tuple[ChunkRef, ...]
    size_bytes: int | None = None
    """The object's length, where a copy that is trusted has told it."""

    @property
    def end_bytes(self) -> int:
        """No copy that is shorter can be right."""
        return max((at.offset_bytes + at.stored_bytes for _, at in self.chunks), default=0)

    @property
    def stored_bytes(self) -> int:
        """What reading all its chunks once carries."""
        return sum(at.stored_bytes for _, at in self.chunks)


@dataclass(frozen=True, slots=True)
class CopyCheck:
    """What was found of an object at one store. ``bad`` names a pack's chunks that are not right
    there; see ``all_bad``."""

    status: CopyStatus
    message: str = ""
    bad_chunks: frozenset[ChunkRef] = frozenset()
    all_bad: bool = False

    def has(self, place: ChunkRef) -> bool:
        """Whether this copy holds ``place`` rightly."""
        return not self.all_bad and place not in self.bad_chunks


OK = CopyCheck(CopyStatus.OK)


@dataclass(frozen=True, slots=True)
class CopyRepair:
    """Write the object to the stores ``targets``: the copy at ``source``, with ``patches`` taken
    from other stores' copies."""

    source: int
    targets: tuple[int, ...]
    patches: tuple[tuple[ChunkRef, int], ...] = ()


@dataclass(frozen=True, slots=True)
class CopyLost:
    """No store has it right. ``places`` are a pack's chunks that are nowhere right; none for a
    whole object."""

    chunks: tuple[ChunkRef, ...] = ()


@dataclass(frozen=True, slots=True)
class CopyUnknown:
    """No store that answered has it right, and one that did not answer may."""

    chunks: tuple[ChunkRef, ...] = ()


@dataclass(frozen=True, slots=True)
class NothingToRepair:
    """Nothing needs to be written, or nothing may."""


CopyDecision = CopyRepair | CopyLost | CopyUnknown | NothingToRepair


def decide_whole(copies: Sequence[CopyCheck], *, writable: Container[int]) -> CopyDecision:
    """What to do about an object that one digest is for; ``copies`` has one entry a store, in their
    order."""
    targets = _targets(copies, writable)
    source = next(
        (store for store, copy in enumerate(copies) if copy.status is CopyStatus.OK), None
    )
    if source is not None:
        return CopyRepair(source, targets) if targets else NothingToRepair()
    return CopyUnknown() if _silent(copies) else CopyLost()


def decide_pack(
    pack: Pack, copies: Sequence[CopyCheck], *, writable: Container[int]
) -> CopyDecision:
    """What to do about a pack: copied from a copy that is whole, or put together from several that
    are whole together.

    A pack of which one chunk is right nowhere is copied nowhere: what is written is right, or it
    isn't written.
    """
    whole = next((store for store, copy in enumerate(copies) if copy.status is CopyStatus.OK), None)
    targets = _targets(copies, writable)
    if whole is not None:
        return CopyRepair(whole, targets) if targets else NothingToRepair()
    known = [store for store, copy in enumerate(copies) if copy.status is not CopyStatus.UNREADABLE]
    if not known:
        return CopyUnknown(pack.chunks)
    base = min(known, key=lambda store: _badness(pack, copies[store]))
    patches: list[tuple[ChunkRef, int]] = []
    nowhere: list[ChunkRef] = []
    for place in pack.chunks:
        if copies[base].has(place):
            continue
        other = next((store for store in known if copies[store].has(place)), None)
        if other is None:
            nowhere.append(place)
        else:
            patches.append((place, other))
    if nowhere:
        return CopyUnknown(tuple(nowhere)) if _silent(copies) else CopyLost(tuple(nowhere))
    return CopyRepair(base, targets, tuple(patches)) if targets else NothingToRepair()


def sorted_chunks(places: Iterable[ChunkRef]) -> tuple[ChunkRef, ...]:
    """``places`` in order of their offset, equal ones in one order everywhere."""
    return tuple(
        sorted(places, key=lambda place: (place[1].offset_bytes, place[1].stored_bytes, place[0]))
    )


def _targets(copies: Sequence[CopyCheck], writable: Container[int]) -> tuple[int, ...]:
    return tuple(
        store
        for store, copy in enumerate(copies)
        if copy.status in (CopyStatus.MISSING, CopyStatus.DAMAGED) and store in writable
    )


def _silent(copies: Sequence[CopyCheck]) -> bool:
    return any(copy.status is CopyStatus.UNREADABLE for copy in copies)


def _badness(pack: Pack, copy: CopyCheck) -> int:
    return len(pack.chunks) + 1 if copy.all_bad else len(copy.bad_chunks)


# Which chunks of which packs existing snapshots refer to, gathered from their parts in bounded
# memory. Pure.
#
# A store of petabytes has more chunks than memory has room for. So what is gathered is cut by
# key: when there are too many, the packs with the greatest keys are forgotten, and the parts are
# gone through once more for them when the others are done.

CHUNK_REF_BYTES = 480
"""Memory that one gathered chunk takes: measured, digest, location and dictionary entry
together."""


@dataclass(slots=True)
class PackReferences:
    """The chunks of the packs whose keys lie between ``after`` and ``before`` (None: no end), both
    exclusive.

    ``places_max`` bounds how many are held, but for those of one pack, which always fit.
    """

    chunks_max: int
    after: str = ""
    before: str | None = None
    _packs: dict[str, dict[ChunkRef, None]] = field(default_factory=dict)
    _users: dict[str, set[int]] = field(default_factory=dict)
    _count: int = 0

    @property
    def complete(self) -> bool:
        """Whether nothing was forgotten: no further round is needed."""
        return self.before is None

    def add(self, part: Part, user: int) -> None:
        """Take in what ``part`` refers to; ``user`` numbers its snapshot. O(chunks of the part)."""
        for shard in part.shards:
            for place in zip(shard.digests, shard.locations, strict=True):
                self._add(place, user)
        self._forget()

    def packs(self) -> list[str]:
        """The keys, ascending."""
        return sorted(self._packs)

    def pack(self, key: str) -> Pack:
        """What is referred to in one pack."""
        return Pack(key, sorted_chunks(self._packs[key]))

    def users(self, key: str) -> frozenset[int]:
        """The numbers of the snapshots that refer to the pack."""
        return frozenset(self._users[key])

    def next_round(self) -> PackReferences:
        """Empty, for the packs that were forgotten; its ``after`` is exclusive too."""
        return PackReferences(self.chunks_max, after=max(self._packs, default=self.after))

    def _add(self, place: ChunkRef, user: int) -> None:
        key = place[1].pack
        if key <= self.after or (self.before is not None and key >= self.before):
            return
        places = self._packs.setdefault(key, {})
        if place not in places:
            places[place] = None
            self._count += 1
        self._users.setdefault(key, set()).add(user)

    def _forget(self) -> None:
        if self._count <= self.chunks_max:
            return
        # Down to half, or the next part would make it sort again.
        for key in sorted(self._packs, reverse=True):
            if self._count <= self.chunks_max // 2 or len(self._packs) == 1:
                return
            self._count -= len(self._packs.pop(key))
            del self._users[key]
            self.before = key
