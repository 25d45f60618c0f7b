"""Which chunks of which packs existing snapshots refer to, gathered from their parts in bounded memory. Pure.

A store of petabytes has more chunks than memory has room for. So what is gathered is cut by key: when there are too many, the
packs with the greatest keys are forgotten, and the parts are gone through once more for them when the others are done.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ckpt.format.part import Part
from ckpt.maintenance.copies import Pack, Place, sorted_places

PLACE_BYTES = 480
"""Memory that one gathered chunk takes: measured, digest, location and dictionary entry together."""


@dataclass(slots=True)
class Gathered:
    """The chunks of the packs whose keys lie between ``after`` and ``before`` (None: no end), both exclusive.

    ``places_max`` bounds how many are held, but for those of one pack, which always fit.
    """

    places_max: int
    after: str = ""
    before: str | None = None
    _packs: dict[str, dict[Place, None]] = field(default_factory=dict)
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
        return Pack(key, sorted_places(self._packs[key]))

    def users(self, key: str) -> frozenset[int]:
        """The numbers of the snapshots that refer to the pack."""
        return frozenset(self._users[key])

    def next_round(self) -> Gathered:
        """Empty, for the packs that were forgotten; its ``after`` is exclusive too."""
        return Gathered(self.places_max, after=max(self._packs, default=self.after))

    def _add(self, place: Place, user: int) -> None:
        key = place[1].pack
        if key <= self.after or (self.before is not None and key >= self.before):
            return
        places = self._packs.setdefault(key, {})
        if place not in places:
            places[place] = None
            self._count += 1
        self._users.setdefault(key, set()).add(user)

    def _forget(self) -> None:
        if self._count <= self.places_max:
            return
        # Down to half, or the next part would make it sort again.
        for key in sorted(self._packs, reverse=True):
            if self._count <= self.places_max // 2 or len(self._packs) == 1:
                return
            self._count -= len(self._packs.pop(key))
            del self._users[key]
            self.before = key
