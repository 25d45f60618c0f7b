"""What the copies of one object are worth, and which of them to write anew from which. Pure.

An object is either *whole*, known by one digest of all its bytes (a manifest, a part), or a *pack*, known by the digests of
the chunks that existing snapshots refer to: bytes between and behind them have no meaning, and no digest.
"""

from __future__ import annotations

import enum
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from ckpt.values import ChunkLocation, Digest

Place = tuple[Digest, ChunkLocation]
"""One chunk that some snapshot needs: its digest, and where it lies."""


class What(str, enum.Enum):
    """What one store's copy of an object is."""

    OK = "ok"
    MISSING = "missing"
    DAMAGED = "damaged"
    """Too short, not decodable, or with bytes that differ from their digest."""
    UNREADABLE = "unreadable"
    """The store did not answer, so nothing is known."""


@dataclass(frozen=True, slots=True)
class Whole:
    """An object that one digest (32 hex digits) is for."""

    key: str
    digest: str
    size_bytes: int | None = None
    """None where nobody recorded it."""


@dataclass(frozen=True, slots=True)
class Pack:
    """A pack and the chunks in it that are referred to, in order of their offset."""

    key: str
    places: tuple[Place, ...]
    size_bytes: int | None = None
    """The object's length, where a copy that is trusted has told it."""

    @property
    def end_bytes(self) -> int:
        """No copy that is shorter can be right."""
        return max((at.offset_bytes + at.stored_bytes for _, at in self.places), default=0)

    @property
    def stored_bytes(self) -> int:
        """What reading all its chunks once carries."""
        return sum(at.stored_bytes for _, at in self.places)


@dataclass(frozen=True, slots=True)
class Copy:
    """What was found of an object at one store. ``bad`` names a pack's chunks that are not right there; see ``all_bad``."""

    what: What
    message: str = ""
    bad: frozenset[Place] = frozenset()
    all_bad: bool = False

    def has(self, place: Place) -> bool:
        """Whether this copy holds ``place`` rightly."""
        return not self.all_bad and place not in self.bad


OK = Copy(What.OK)


@dataclass(frozen=True, slots=True)
class Mend:
    """Write the object to the stores ``targets``: the copy at ``source``, with ``patches`` taken from other stores' copies."""

    source: int
    targets: tuple[int, ...]
    patches: tuple[tuple[Place, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Lost:
    """No store has it right. ``places`` are a pack's chunks that are nowhere right; none for a whole object."""

    places: tuple[Place, ...] = ()


@dataclass(frozen=True, slots=True)
class Unknown:
    """No store that answered has it right, and one that did not answer may."""

    places: tuple[Place, ...] = ()


@dataclass(frozen=True, slots=True)
class Well:
    """Nothing needs to be written, or nothing may."""


Decision = Mend | Lost | Unknown | Well


def decide_whole(copies: Sequence[Copy], *, writable: Container[int]) -> Decision:
    """What to do about an object that one digest is for; ``copies`` has one entry a store, in their order."""
    targets = _targets(copies, writable)
    source = next((store for store, copy in enumerate(copies) if copy.what is What.OK), None)
    if source is not None:
        return Mend(source, targets) if targets else Well()
    return Unknown() if _silent(copies) else Lost()


def decide_pack(pack: Pack, copies: Sequence[Copy], *, writable: Container[int]) -> Decision:
    """What to do about a pack: copied from a copy that is whole, or put together from several that are whole together.

    A pack of which one chunk is right nowhere is copied nowhere: what is written is right, or it isn't written.
    """
    whole = next((store for store, copy in enumerate(copies) if copy.what is What.OK), None)
    targets = _targets(copies, writable)
    if whole is not None:
        return Mend(whole, targets) if targets else Well()
    known = [store for store, copy in enumerate(copies) if copy.what is not What.UNREADABLE]
    if not known:
        return Unknown(pack.places)
    base = min(known, key=lambda store: _badness(pack, copies[store]))
    patches: list[tuple[Place, int]] = []
    nowhere: list[Place] = []
    for place in pack.places:
        if copies[base].has(place):
            continue
        other = next((store for store in known if copies[store].has(place)), None)
        if other is None:
            nowhere.append(place)
        else:
            patches.append((place, other))
    if nowhere:
        return Unknown(tuple(nowhere)) if _silent(copies) else Lost(tuple(nowhere))
    return Mend(base, targets, tuple(patches)) if targets else Well()


def sorted_places(places: Iterable[Place]) -> tuple[Place, ...]:
    """``places`` in order of their offset, equal ones in one order everywhere."""
    return tuple(sorted(places, key=lambda place: (place[1].offset_bytes, place[1].stored_bytes, place[0])))


def _targets(copies: Sequence[Copy], writable: Container[int]) -> tuple[int, ...]:
    return tuple(
        store for store, copy in enumerate(copies) if copy.what in (What.MISSING, What.DAMAGED) and store in writable
    )


def _silent(copies: Sequence[Copy]) -> bool:
    return any(copy.what is What.UNREADABLE for copy in copies)


def _badness(pack: Pack, copy: Copy) -> int:
    return len(pack.places) + 1 if copy.all_bad else len(copy.bad)
