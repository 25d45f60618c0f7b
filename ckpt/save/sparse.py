"""Which known chunks to write anew, so that packs of which little is still needed can go. Pure.

A pack is deleted as a whole. Without this a pack would be kept for ever by one chunk that never changes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ckpt.save.chunks import GAP_BYTES_MAX
from ckpt.values import PAGE_BYTES, ChunkLocation, Digest

LIVE_MIN = 0.5
"""A pack of which less is needed is sparse: what is stored stays below twice what is needed, and a chunk is moved only after
half of the pack around it has changed."""

BUDGET_SHARE = 0.1
"""How much of a snapshot's bytes one save may write anew for tidiness: then it takes a tenth longer than without, at most."""

BUDGET_BYTES_MIN = 256 << 20
"""That much may be written in any case: one pack's worth, so that the sparsest pack always fits."""


@dataclass(frozen=True, slots=True)
class SparsePack:
    """A pack that is given up: its size, and how much of it a rewriting takes."""

    pack: str
    size_bytes: int
    live_bytes: int


@dataclass(frozen=True, slots=True)
class Thinned:
    """``known`` without the chunks of the packs given up, sparsest first; and the bytes that are written anew for that."""

    known: Mapping[Digest, ChunkLocation]
    given_up: tuple[SparsePack, ...]
    rewritten_bytes: int


def default_budget_bytes(size_bytes: int) -> int:
    """How much a save of a state of ``size_bytes`` may write anew by default."""
    return max(BUDGET_BYTES_MIN, int(size_bytes * BUDGET_SHARE))


def thin(
    known: Mapping[Digest, ChunkLocation],
    wanted: Collection[Digest],
    pack_bytes: Mapping[str, int],
    *,
    budget_bytes: int,
    live_min: float = LIVE_MIN,
) -> Thinned:
    """Leave out of ``known`` the chunks of sparse packs, as far as ``budget_bytes`` reaches.

    ``wanted`` are the digests of the new snapshot, ``pack_bytes`` the sizes of packs; one whose size is not there is not
    judged. Needed is what lies between the first and last byte of a wanted chunk, with gaps as short as a writer leaves them,
    so that a pack never looks sparse to the save after the one that wrote it. Equal arguments give equal answers, in whatever
    order they come. O(known + wanted + chunks log chunks).
    """
    by_pack: dict[str, list[Digest]] = {}
    for digest in wanted if isinstance(wanted, frozenset | set) else dict.fromkeys(wanted):
        place = known.get(digest)
        if place is not None and place.pack in pack_bytes:
            by_pack.setdefault(place.pack, []).append(digest)
    sparse: list[SparsePack] = []
    for pack, digests in by_pack.items():
        live = _live_bytes([known[digest] for digest in digests])
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
        return Thinned(known, (), 0)
    gone = {digest for one in given_up for digest in by_pack[one.pack]}
    rest = {digest: place for digest, place in known.items() if digest not in gone}
    return Thinned(rest, tuple(given_up), budget_bytes - left)


def _live_bytes(places: Sequence[ChunkLocation]) -> int:
    """The bytes that a pack of just these chunks would take: whole pages, and short gaps along."""
    total = stop = 0
    for start, end in sorted((place.offset_bytes, place.offset_bytes + place.stored_bytes) for place in places):
        low, high = start // PAGE_BYTES * PAGE_BYTES, -(-end // PAGE_BYTES) * PAGE_BYTES
        if total and low <= stop + GAP_BYTES_MAX:
            total += max(high, stop) - stop
        else:
            total += high - low
        stop = max(stop, high)
    return total
