"""Which objects of a store are garbage for good. Pure; the proof is in docs/design/011-retention-and-sweep.md.

Packs, parts and manifests name the pair that they were written for. An object is garbage once no commit of that pair can count
any more and no snapshot that exists refers to it. Both stay true in every later state of the log.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from ckpt.backends.base import Stat
from ckpt.format import keys
from ckpt.log.state import LogState
from ckpt.values import SnapshotId

PREFIXES = (keys.MANIFESTS, keys.PARTS, keys.PACKS)
"""What a sweep looks at, in the order in which it deletes: what names others goes first."""


class Verdict(enum.Enum):
    """What a sweep makes of one object."""

    LIVE = "live"
    """A snapshot that exists refers to it."""
    GRACE = "grace"
    """A snapshot that was dropped a short while ago refers to it, which a restore may still be reading."""
    OPEN = "open"
    """It was written for a snapshot that may yet be committed."""
    YOUNG = "young"
    """Garbage that is younger than the grace."""
    HELD = "held"
    """The records of a snapshot can't be read, so that nobody knows what it refers to."""
    FOREIGN = "foreign"
    """Not a key of ours."""
    GARBAGE = "garbage"


@dataclass(frozen=True, slots=True)
class Referred:
    """A snapshot and the keys that it needs: its manifest, its parts, their packs. ``problem``: why they can't be known."""

    snapshot: SnapshotId
    keys: frozenset[str] = frozenset()
    problem: str = ""


class Judge:
    """Gives the verdict on one object after another. Immutable; each verdict O(1).

    ``exist`` has what each snapshot of ``state`` refers to, ``dropped`` what those refer to that were dropped within the grace.
    """

    __slots__ = ("_dropped", "_grace", "_grace_s", "_last_step", "_live", "_opaque", "_state")

    def __init__(
        self, state: LogState, *, exist: Iterable[Referred], dropped: Iterable[Referred], grace_s: float
    ) -> None:
        known, recent = tuple(exist), tuple(dropped)
        assert {one.snapshot for one in known} == {entry.snapshot for entry in state.snapshots}
        self._state = state
        self._grace_s = grace_s
        self._last_step = {opened.epoch: opened.last_step for opened in state.opens}
        self._live = _union(known)
        self._grace = _union(recent)
        self._dropped = frozenset(one.snapshot for one in recent)
        self._opaque = frozenset(one.snapshot for one in (*known, *recent) if one.problem)

    def verdict(self, stat: Stat, *, now_unix_s: float) -> Verdict:
        """What to make of the object; ``now_unix_s`` is by the clock of its own store."""
        pair = pair_of(stat.key)
        if pair is None:
            return Verdict.FOREIGN
        if stat.key in self._live:
            return Verdict.LIVE
        if stat.key in self._grace:
            return Verdict.GRACE
        if self._opaque and (pair in self._opaque or stat.key.startswith(keys.PACKS)):
            return Verdict.HELD
        if not self.settled(pair):
            return Verdict.OPEN
        if pair in self._dropped:
            return Verdict.GRACE
        if max(0.0, now_unix_s - stat.modified_unix_s) < self._grace_s:
            return Verdict.YOUNG
        return Verdict.GARBAGE

    def settled(self, pair: SnapshotId) -> bool:
        """Whether no commit of ``pair`` can count any more, in this state or any later one.

        Each case is a rule of ``commit.judge``: a step not above all that were committed of its epoch (what exists or was
        dropped among them), a pair below the floor, an epoch that was never opened and can't be any more.
        """
        if pair.epoch in self._last_step:
            last = self._last_step[pair.epoch]
            if last is not None and pair.step <= last:
                return True
        elif pair.epoch <= self._state.epoch:
            return True
        return self._state.floor is not None and pair < self._state.floor


def pair_of(key: str) -> SnapshotId | None:
    """The pair that a pack, part or manifest was written for; None for any other key, whoever's it is."""
    for parsed in (keys.parse_pack_key(key), keys.parse_part_key(key), keys.parse_manifest_key(key)):
        if parsed is not None:
            return parsed[0]
    return None


def _union(some: Iterable[Referred]) -> frozenset[str]:
    return frozenset(key for one in some for key in one.keys)
