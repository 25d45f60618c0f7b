"""Copies of one stored object: what each is worth, and which to rewrite from which. Pure.

An object is either *whole*, known by one digest of all its bytes (a manifest, a part), or a
*pack*, known by the digests of the chunks that existing snapshots refer to. The bytes between and
behind those chunks have no digest and no meaning, so two right copies of a pack may differ in them.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field

from ckpt.format.part import Part
from ckpt.values import ChunkLocation, Digest

ChunkRef = tuple[Digest, ChunkLocation]
"""One chunk that a snapshot needs: its digest and its location."""


class CopyStatus(str, enum.Enum):
    """The state of one store's copy of an object."""

    OK = "ok"
    MISSING = "missing"
    DAMAGED = "damaged"
    """Too short, not decodable, or with bytes that differ from their digest."""
    UNREADABLE = "unreadable"
    """The store did not answer, or nothing proves which bytes are right: nothing is known."""


@dataclass(frozen=True, slots=True)
class WholeObject:
    """An object that one digest (32 hex digits) covers."""

    key: str
    digest: str
    size_bytes: int | None = None
    """None if no record names the length."""


@dataclass(frozen=True, slots=True)
class Pack:
    """A pack and its referenced chunks, in order of their offset."""

    key: str
    chunks: tuple[ChunkRef, ...]
    size_bytes: int | None = None
    """The object's length, if a trusted copy gave it."""

    @property
    def end_bytes(self) -> int:
        """End of the last referenced chunk: a shorter copy cannot be right."""
        return max((at.offset_bytes + at.stored_bytes for _, at in self.chunks), default=0)

    @property
    def stored_bytes(self) -> int:
        """Stored bytes of all referenced chunks."""
        return sum(at.stored_bytes for _, at in self.chunks)


@dataclass(frozen=True, slots=True)
class CopyCheck:
    """The result of checking one store's copy. ``bad_chunks`` are a pack's wrong chunks there.

    ``all_bad``: no chunk of the copy is usable, whatever ``bad_chunks`` holds.
    """

    status: CopyStatus
    message: str = ""
    bad_chunks: frozenset[ChunkRef] = frozenset()
    all_bad: bool = False

    def has(self, chunk: ChunkRef) -> bool:
        """Whether this copy holds ``chunk`` with the right bytes."""
        return not self.all_bad and chunk not in self.bad_chunks


OK = CopyCheck(CopyStatus.OK)

BYTE_SEARCH_MAX = 4 << 10
"""Largest object for which every value of every byte is tried: about a second for a record of this
length."""
BIT_SEARCH_MAX = 32 << 10
"""Largest object for which every flipped bit is tried."""


def flip_back(data: bytes, is_right: Callable[[bytes], bool]) -> bytes | None:
    """``data`` with one byte changed so that ``is_right`` accepts it; None if there is none.

    Disks and memory mostly damage one bit, and a digest tells which. Single bits are tried first,
    in objects of up to BIT_SEARCH_MAX bytes; any value of a byte in objects of up to
    BYTE_SEARCH_MAX. Cost: up to 255 calls of ``is_right`` for each byte.
    """
    if len(data) > BIT_SEARCH_MAX:
        return None
    trial = bytearray(data)
    bits = [1 << bit for bit in range(8)]
    others = [mask for mask in range(1, 256) if mask not in bits]
    for masks in (bits, others if len(data) <= BYTE_SEARCH_MAX else []):
        for at in range(len(trial)) if masks else ():
            for mask in masks:
                trial[at] ^= mask
                if is_right(bytes(trial)):
                    return bytes(trial)
                trial[at] ^= mask
    return None


@dataclass(frozen=True, slots=True)
class CopyRepair:
    """Write the copy at ``source`` to ``targets``, with the chunks ``patches`` of other stores."""

    source: int
    targets: tuple[int, ...]
    patches: tuple[tuple[ChunkRef, int], ...] = ()


@dataclass(frozen=True, slots=True)
class CopyLost:
    """No store has a right copy. ``chunks``: a pack's chunks that are right in no store."""

    chunks: tuple[ChunkRef, ...] = ()


@dataclass(frozen=True, slots=True)
class CopyUnknown:
    """No store that answered has a right copy; one that did not answer may have it."""

    chunks: tuple[ChunkRef, ...] = ()


@dataclass(frozen=True, slots=True)
class NothingToRepair:
    """All copies are right, or the wrong ones are in stores that may not be written."""


CopyDecision = CopyRepair | CopyLost | CopyUnknown | NothingToRepair


def decide_whole(copies: Sequence[CopyCheck], *, writable: Container[int]) -> CopyDecision:
    """What to do about a whole object. ``copies`` has one entry for each store, in their order."""
    targets = _targets(copies, writable)
    source = _first_ok(copies)
    if source is not None:
        return CopyRepair(source, targets) if targets else NothingToRepair()
    return CopyUnknown() if _any_unreadable(copies) else CopyLost()


def decide_pack(
    pack: Pack, copies: Sequence[CopyCheck], *, writable: Container[int]
) -> CopyDecision:
    """What to do about a pack: copy a right one, or assemble one from several damaged copies.

    If one chunk is right in no store, the pack is written nowhere. A partly right pack would look
    new and spread damage; it would save redundancy only when two copies are damaged at once.
    """
    whole = _first_ok(copies)
    targets = _targets(copies, writable)
    if whole is not None:
        return CopyRepair(whole, targets) if targets else NothingToRepair()
    readable = [
        store for store, copy in enumerate(copies) if copy.status is not CopyStatus.UNREADABLE
    ]
    if not readable:
        return CopyUnknown(pack.chunks)
    # The copy with the least damage is the base, so that the fewest chunks come from elsewhere.
    base = min(readable, key=lambda store: _badness(pack, copies[store]))
    patches: list[tuple[ChunkRef, int]] = []
    bad_everywhere: list[ChunkRef] = []
    for chunk in pack.chunks:
        if copies[base].has(chunk):
            continue
        donor = next((store for store in readable if copies[store].has(chunk)), None)
        if donor is None:
            bad_everywhere.append(chunk)
        else:
            patches.append((chunk, donor))
    if bad_everywhere:
        chunks = tuple(bad_everywhere)
        return CopyUnknown(chunks) if _any_unreadable(copies) else CopyLost(chunks)
    return CopyRepair(base, targets, tuple(patches)) if targets else NothingToRepair()


def sorted_chunks(chunks: Iterable[ChunkRef]) -> tuple[ChunkRef, ...]:
    """``chunks`` by offset; ties are broken by length and digest, the same in every process."""
    return tuple(
        sorted(chunks, key=lambda chunk: (chunk[1].offset_bytes, chunk[1].stored_bytes, chunk[0]))
    )


def _first_ok(copies: Sequence[CopyCheck]) -> int | None:
    return next((store for store, copy in enumerate(copies) if copy.status is CopyStatus.OK), None)


def _targets(copies: Sequence[CopyCheck], writable: Container[int]) -> tuple[int, ...]:
    wrong = (CopyStatus.MISSING, CopyStatus.DAMAGED)
    return tuple(
        store for store, copy in enumerate(copies) if copy.status in wrong and store in writable
    )


def _any_unreadable(copies: Sequence[CopyCheck]) -> bool:
    return any(copy.status is CopyStatus.UNREADABLE for copy in copies)


def _badness(pack: Pack, copy: CopyCheck) -> int:
    return len(pack.chunks) + 1 if copy.all_bad else len(copy.bad_chunks)


# ---- PackReferences: the chunks that snapshots refer to, in bounded memory
#
# A store of petabytes has more chunks than fit into memory. So the references are gathered in
# rounds by key: at the limit the packs with the greatest keys are forgotten, and after the smaller
# keys are done, the parts are read again for the forgotten ones.

CHUNK_REF_BYTES = 480
"""Memory of one gathered chunk, measured: digest, location and dictionary entry together."""


@dataclass(slots=True)
class PackReferences:
    """The referenced chunks of packs whose keys are between ``after`` and ``before``, exclusive.

    ``before`` None means no upper end. ``chunks_max`` bounds how many chunks are kept; the chunks
    of a single pack are always kept.
    """

    chunks_max: int
    after: str = ""
    before: str | None = None
    _packs: dict[str, dict[ChunkRef, None]] = field(default_factory=dict)
    _users: dict[str, set[int]] = field(default_factory=dict)
    _count: int = 0

    @property
    def complete(self) -> bool:
        """Whether no pack was forgotten, so that no further round is needed."""
        return self.before is None

    def add(self, part: Part, user: int) -> None:
        """Add what ``part`` refers to; ``user`` is its snapshot's number. O(chunks of the part)."""
        for shard in part.shards:
            for chunk in zip(shard.digests, shard.locations, strict=True):
                self._add(chunk, user)
        self._forget()

    def packs(self) -> list[str]:
        """The keys of the gathered packs, ascending."""
        return sorted(self._packs)

    def pack(self, key: str) -> Pack:
        """The pack with its referenced chunks."""
        return Pack(key, sorted_chunks(self._packs[key]))

    def users(self, key: str) -> frozenset[int]:
        """The numbers of the snapshots that refer to the pack."""
        return frozenset(self._users[key])

    def next_round(self) -> PackReferences:
        """An empty instance for the packs that were forgotten."""
        return PackReferences(self.chunks_max, after=max(self._packs, default=self.after))

    def _add(self, chunk: ChunkRef, user: int) -> None:
        key = chunk[1].pack
        if key <= self.after or (self.before is not None and key >= self.before):
            return
        chunks = self._packs.setdefault(key, {})
        if chunk not in chunks:
            chunks[chunk] = None
            self._count += 1
        self._users.setdefault(key, set()).add(user)

    def _forget(self) -> None:
        if self._count <= self.chunks_max:
            return
        # Down to half of the limit: otherwise each further part would sort and forget again.
        for key in sorted(self._packs, reverse=True):
            if self._count <= self.chunks_max // 2 or len(self._packs) == 1:
                return
            self._count -= len(self._packs.pop(key))
            del self._users[key]
            self.before = key
