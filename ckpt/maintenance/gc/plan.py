"""Which objects of a store are garbage for good. Pure; the proof is in
docs/dev/design/011-retention-and-sweep.md.

Packs, parts and manifests name the pair that they were written for. An object is garbage once no
commit of that pair can count any more and no snapshot that exists refers to it. Both stay true in
every later state of the log.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from ckpt.backends.base import Stat
from ckpt.format import keys
from ckpt.log.state import LogState
from ckpt.maintenance.retention import KeepPolicy, Tagged
from ckpt.values import SnapshotId, SnapshotInfo

# Which snapshots to drop, why each other one stays, and the floor to set. Pure.

NEWEST = "newest"
NEWEST_INTACT = "newest found whole"
NO_POLICY = "nothing is to be dropped"
NONE_INTACT = "no snapshot was found whole"
NOT_APPROVED = "only now to be dropped: nobody has agreed to it"


@dataclass(frozen=True, slots=True)
class SnapshotDecision:
    """One snapshot and what keeps it; ``why`` is empty where it is to be dropped."""

    info: SnapshotInfo
    on_line: bool
    why: tuple[str, ...]

    @property
    def kept(self) -> bool:
        """Whether the snapshot stays."""
        return bool(self.why)


@dataclass(frozen=True, slots=True)
class GcPlan:
    """Every snapshot in log order, judged; and the ``floor`` to set, below which no commit counts
    any more (None: as it is)."""

    judged: tuple[SnapshotDecision, ...]
    floor: SnapshotId | None

    @property
    def drops(self) -> tuple[SnapshotId, ...]:
        """What to drop, ascending."""
        return tuple(sorted(one.info.id for one in self.judged if not one.kept))

    def restricted_to(self, approved: Collection[SnapshotId]) -> GcPlan:
        """The same plan, without the drops that are not among ``agreed``."""
        judged = tuple(
            one if one.kept or one.info.id in approved else replace(one, why=(NOT_APPROVED,))
            for one in self.judged
        )
        return replace(self, judged=judged)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to record."""
        return not self.drops and self.floor is None


def restore_order(state: LogState) -> tuple[SnapshotId, ...]:
    """What a restore would want, best first: the newest line; where it holds nothing, all there
    is."""
    return state.lineage or tuple(
        sorted((entry.snapshot for entry in state.snapshots), reverse=True)
    )


def plan_gc(
    state: LogState,
    infos: Sequence[SnapshotInfo],
    policy: KeepPolicy | None,
    *,
    now_unix_s: float,
    intact: SnapshotId | None,
) -> GcPlan:
    """Judge every snapshot of ``infos`` (those of ``state``, in log order) by ``policy``; None
    keeps all.

    ``whole`` is the first of ``by_worth(state)`` whose bytes were found to be there. It stays
    beside the newest, or a job whose newest snapshot is damaged would lose the one that it falls
    back to; where there is none, nothing is dropped. It is also the floor: what is older than it
    and was never committed is wanted no more.
    """
    best = restore_order(state)
    line = frozenset(state.lineage)
    reasons = (
        {} if policy is None else policy.reasons(infos, line=state.lineage, now_unix_s=now_unix_s)
    )
    judged: list[SnapshotDecision] = []
    for info in infos:
        why = [NEWEST] if best[:1] == (info.id,) else []
        why += [NEWEST_INTACT] if info.id == intact and not why else []
        why += [f"tagged {', '.join(info.tags)}"] if info.tags else []
        why += [rule for rule in reasons.get(info.id, ()) if rule != str(Tagged())]
        why += [NO_POLICY] if policy is None else []
        why += [NONE_INTACT] if intact is None and not why else []
        judged.append(SnapshotDecision(info, info.id in line, tuple(why)))
    rises = intact is not None and (state.floor is None or intact > state.floor)
    return GcPlan(tuple(judged), intact if rises else None)


# When snapshots are looked through beside a job that trains, and when bytes are deleted. Pure.

ROUND_S = 10.0
"""The least time from the end of one round to the next, however often snapshots are committed."""

REST_FACTOR = 9.0
"""A round is followed by a rest of so many times its own length, so that stores are asked a tenth
of the time at most."""

SWEEPS_PER_GRACE = 24
"""Bytes are deleted so many times in one grace: they stay longer than they must by that part of it
at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GcHistory:
    """What was done so far. Times are monotonic seconds; None: never.

    ``commits``: how many commits the last round that went well has seen. ``began_s``, ``ended_s``:
    the last round, however it went. ``swept_s``: when the last sweep that came to its end was
    begun.
    """

    commits: int = 0
    began_s: float = 0.0
    ended_s: float | None = None
    swept_s: float | None = None


@dataclass(frozen=True, slots=True)
class GcRound:
    """Look through the snapshots now, and drop. ``sweep``: delete bytes too."""

    sweep: bool


@dataclass(frozen=True, slots=True)
class GcIdle:
    """Nothing to do for so many seconds, unless something is committed; None: until something
    is."""

    seconds: float | None


def next_round(
    past: GcHistory, now_s: float, *, commits: int, grace_s: float, hurry: bool = False
) -> GcRound | GcIdle:
    """What to do at ``now_s``, where ``commits`` snapshots were committed so far.

    ``hurry``: the job is over, so that nothing is gained by resting. Nothing is done before the
    first commit: only then it is certain that the job goes on from where it began.
    """
    if commits == 0:
        return GcIdle(None)
    owed = commits > past.commits
    sweep_s = past.swept_s + sweep_every_s(grace_s) if past.swept_s is not None else now_s
    if hurry:
        # Without a grace what is dropped now can go now; with one it can't, and is for the next
        # run.
        sweep = sweep_s <= now_s or (owed and grace_s <= 0)
        return GcRound(sweep) if owed or sweep else GcIdle(None)
    rested_s = (
        now_s
        if past.ended_s is None
        else past.ended_s + max(ROUND_S, REST_FACTOR * (past.ended_s - past.began_s))
    )
    due_s = max(rested_s, now_s if owed else sweep_s)
    return GcIdle(due_s - now_s) if due_s > now_s else GcRound(sweep_s <= now_s)


def sweep_every_s(grace_s: float) -> float:
    """How long after a sweep was begun the next one is due."""
    return max(ROUND_S, grace_s / SWEEPS_PER_GRACE)


PREFIXES = (keys.MANIFESTS, keys.PARTS, keys.PACKS)
"""What a sweep looks at, in the order in which it deletes: what names others goes first."""


class ObjectStatus(enum.Enum):
    """What a sweep makes of one object."""

    LIVE = "live"
    """A snapshot that exists refers to it."""
    GRACE = "grace"
    """A snapshot that was dropped a short while ago refers to it, which a restore may still be
    reading."""
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
class SnapshotReferences:
    """A snapshot and the keys that it needs: its manifest, its parts, their packs. ``problem``: why
    they can't be known."""

    snapshot: SnapshotId
    keys: frozenset[str] = frozenset()
    problem: str = ""


class GarbageClassifier:
    """Gives the verdict on one object after another. Immutable; each verdict O(1).

    ``exist`` has what each snapshot of ``state`` refers to, ``dropped`` what those refer to that
    were dropped within the grace.
    """

    __slots__ = ("_dropped", "_grace", "_grace_s", "_last_step", "_live", "_opaque", "_state")

    def __init__(
        self,
        state: LogState,
        *,
        existing: Iterable[SnapshotReferences],
        dropped: Iterable[SnapshotReferences],
        grace_s: float,
    ) -> None:
        known, recent = tuple(existing), tuple(dropped)
        assert {one.snapshot for one in known} == {entry.snapshot for entry in state.snapshots}
        self._state = state
        self._grace_s = grace_s
        self._last_step = {opened.epoch: opened.last_step for opened in state.opens}
        self._live = _union(known)
        self._grace = _union(recent)
        self._dropped = frozenset(one.snapshot for one in recent)
        self._opaque = frozenset(one.snapshot for one in (*known, *recent) if one.problem)

    def classify(self, stat: Stat, *, now_unix_s: float) -> ObjectStatus:
        """What to make of the object; ``now_unix_s`` is by the clock of its own store."""
        pair = snapshot_of(stat.key)
        if pair is None:
            return ObjectStatus.FOREIGN
        if stat.key in self._live:
            return ObjectStatus.LIVE
        if stat.key in self._grace:
            return ObjectStatus.GRACE
        if self._opaque and (pair in self._opaque or stat.key.startswith(keys.PACKS)):
            return ObjectStatus.HELD
        if not self.commit_impossible(pair):
            return ObjectStatus.OPEN
        if pair in self._dropped:
            return ObjectStatus.GRACE
        if max(0.0, now_unix_s - stat.modified_unix_s) < self._grace_s:
            return ObjectStatus.YOUNG
        return ObjectStatus.GARBAGE

    def commit_impossible(self, pair: SnapshotId) -> bool:
        """Whether no commit of ``pair`` can count any more, in this state or any later one.

        Each case is a rule of ``commit.judge``: a step not above all that were committed of its
        epoch (what exists or was dropped among them), a pair below the floor, an epoch that was
        never opened and can't be any more.
        """
        if pair.epoch in self._last_step:
            last = self._last_step[pair.epoch]
            if last is not None and pair.step <= last:
                return True
        elif pair.epoch <= self._state.epoch:
            return True
        return self._state.floor is not None and pair < self._state.floor


def snapshot_of(key: str) -> SnapshotId | None:
    """The pair that a pack, part or manifest was written for; None for any other key, whoever's it
    is."""
    for parsed in (
        keys.parse_pack_key(key),
        keys.parse_part_key(key),
        keys.parse_manifest_key(key),
    ):
        if parsed is not None:
            return parsed[0]
    return None


def _union(some: Iterable[SnapshotReferences]) -> frozenset[str]:
    return frozenset(key for one in some for key in one.keys)
