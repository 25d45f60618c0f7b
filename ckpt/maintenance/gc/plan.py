"""Garbage collection decisions: what to drop, when to run, which objects are garbage. Pure.

A *drop* is a log record: the snapshots it names no longer exist. A *sweep* deletes the bytes that
no snapshot needs. Packs, parts and manifests name the snapshot that they were written for. An
object is garbage once no commit of that snapshot can count any more and no existing snapshot refers
to it. Both stay true in every later state of the log, so a sweep may act on an old state; the proof
is in docs/dev/design/011-retention-and-sweep.md.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ckpt.backends.base import Stat
from ckpt.format import keys
from ckpt.log.state import LogState
from ckpt.maintenance.retention import KeepPolicy, Tagged, metrics_of
from ckpt.values import SnapshotId, SnapshotInfo

NEWEST = "newest"
NEWEST_INTACT = "newest of full length, not read"
NEWEST_VERIFIED = "newest whose bytes were read and are right"
NO_POLICY = "nothing is to be dropped"
NONE_INTACT = "no snapshot was found whole"
CLOCK_DOUBTED = "the clock may have been set"
NO_METRIC = "no snapshot has the metric of a rule"
METRICS_SHOWN_MAX = 20
NOT_APPROVED = "to be dropped only since the plan was approved"


@dataclass(frozen=True, slots=True)
class SnapshotDecision:
    """One snapshot and the reasons to keep it; with no reason it is to be dropped."""

    info: SnapshotInfo
    on_line: bool
    reasons: tuple[str, ...]

    @property
    def kept(self) -> bool:
        """Whether the snapshot stays."""
        return bool(self.reasons)


@dataclass(frozen=True, slots=True)
class GcPlan:
    """A decision for each snapshot, in log order, and the new ``floor`` (None: unchanged).

    Below the floor no commit counts any more. ``problems``: why a rule could not be applied, so
    that it drops nothing.
    """

    decisions: tuple[SnapshotDecision, ...]
    floor: SnapshotId | None
    problems: tuple[str, ...] = ()

    @property
    def drops(self) -> tuple[SnapshotId, ...]:
        """The snapshots to drop, ascending."""
        return tuple(sorted(entry.info.id for entry in self.decisions if not entry.kept))

    def restricted_to(self, approved: Collection[SnapshotId]) -> GcPlan:
        """The same plan with only those drops that are in ``approved``."""
        decisions = tuple(
            entry
            if entry.kept or entry.info.id in approved
            else replace(entry, reasons=(NOT_APPROVED,))
            for entry in self.decisions
        )
        return replace(self, decisions=decisions)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to record."""
        return not self.drops and self.floor is None


def restore_order(state: LogState) -> tuple[SnapshotId, ...]:
    """The snapshots in the order in which a restore prefers them.

    That is the newest lineage; if it has no snapshot, all that exist, newest first.
    """
    return state.lineage or tuple(
        sorted((entry.snapshot for entry in state.snapshots), reverse=True)
    )


def plan_gc(
    state: LogState,
    infos: Sequence[SnapshotInfo],
    policy: KeepPolicy | None,
    *,
    ages_s: Mapping[SnapshotId, float],
    intact: SnapshotId | None,
    verified: SnapshotId | None = None,
    problems: Sequence[str] = (),
) -> GcPlan:
    """Decide for each snapshot of ``infos`` (those of ``state``, in log order).

    ``ages_s`` are the snapshots' ages, as far as they are known, and ``problems`` why they are not.
    Nothing is dropped while no snapshot has the metric that a rule keeps by, or while a pause makes
    it doubtful that ages are right. ``policy`` None keeps all. ``intact`` is the first of
    ``restore_order(state)`` that was found complete, by its lengths. It is kept beside the newest:
    a job whose newest snapshot is damaged falls back to it. If there is none, nothing is dropped.
    It also becomes the floor: nothing older that was never committed is needed. ``verified`` is the
    first that the last scrub read and found right (None: none is known). It is kept too, for
    lengths say nothing of a rotten sector.
    """
    preferred = restore_order(state)
    lineage = frozenset(state.lineage)
    by_rule = {} if policy is None else policy.reasons(infos, line=state.lineage, ages_s=ages_s)
    decisions: list[SnapshotDecision] = []
    for info in infos:
        reasons = [NEWEST] if preferred[:1] == (info.id,) else []
        if not reasons and info.id == verified:
            reasons = [NEWEST_VERIFIED]
        elif not reasons and info.id == intact:
            reasons = [NEWEST_INTACT]
        reasons += [f"tagged {', '.join(info.tags)}"] if info.tags else []
        reasons += [rule for rule in by_rule.get(info.id, ()) if rule != str(Tagged())]
        reasons += [NO_POLICY] if policy is None else []
        reasons += [NONE_INTACT] if intact is None and not reasons else []
        decisions.append(SnapshotDecision(info, info.id in lineage, tuple(reasons)))
    told = list(problems)
    doubt = "" if policy is None else policy.pause_doubt(infos, ages_s)
    if doubt and not all(entry.kept for entry in decisions):
        decisions = [
            entry if entry.kept else replace(entry, reasons=(CLOCK_DOUBTED,)) for entry in decisions
        ]
        told.append(doubt)
    metric = None if policy is None else policy.missing_metric(infos)
    if metric is not None and not all(entry.kept for entry in decisions):
        decisions = [
            entry if entry.kept else replace(entry, reasons=(NO_METRIC,)) for entry in decisions
        ]
        names = ", ".join(map(repr, metrics_of(infos)[:METRICS_SHOWN_MAX])) or "none"
        told.append(
            f"no snapshot has the metric that a rule keeps by, so nothing is dropped. "
            f"metric={metric!r} metrics={names}; log it with run.log or as metadata, or name one "
            "of these"
        )
    rises = intact is not None and (state.floor is None or intact > state.floor)
    return GcPlan(tuple(decisions), intact if rises else None, tuple(told))


# ---- when a round beside a training job is due, and when it also sweeps

ROUND_S = 10.0
"""The least time from the end of one round to the next, however often snapshots are committed."""

REST_FACTOR = 9.0
"""Rest after a round, in multiples of its duration: stores are busy a tenth of the time at most."""

SWEEPS_PER_GRACE = 24
"""Sweeps within one grace period: bytes stay at most this fraction of the grace too long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GcHistory:
    """What was done so far. Times are monotonic seconds; None: never.

    ``commits``: the commits that the last successful round has seen. ``round_started_s``,
    ``round_ended_s``: the last round, successful or not. ``sweep_started_s``: the start of the last
    completed sweep.
    """

    commits: int = 0
    round_started_s: float = 0.0
    round_ended_s: float | None = None
    sweep_started_s: float | None = None


@dataclass(frozen=True, slots=True)
class GcRound:
    """Run a round now. ``sweep``: also delete bytes."""

    sweep: bool


@dataclass(frozen=True, slots=True)
class GcIdle:
    """Do nothing for ``seconds`` (None: for ever), or until a snapshot is committed."""

    seconds: float | None


def next_round(
    history: GcHistory, now_s: float, *, commits: int, grace_s: float, hurry: bool = False
) -> GcRound | GcIdle:
    """What to do at ``now_s`` after ``commits`` snapshots were committed.

    ``hurry``: the job is over, so resting gains nothing. Nothing is done before the first commit:
    only then it is certain that the job continues from where it resumed.
    """
    if commits == 0:
        return GcIdle(None)
    has_new_commits = commits > history.commits
    sweep_due_s = (
        history.sweep_started_s + sweep_every_s(grace_s)
        if history.sweep_started_s is not None
        else now_s
    )
    if hurry:
        # Without a grace, what this round drops can be deleted now. With one it is left to the next
        # run's sweep.
        sweep = sweep_due_s <= now_s or (has_new_commits and grace_s <= 0)
        return GcRound(sweep) if has_new_commits or sweep else GcIdle(None)
    if history.round_ended_s is None:
        rested_s = now_s
    else:
        round_s = history.round_ended_s - history.round_started_s
        rested_s = history.round_ended_s + max(ROUND_S, REST_FACTOR * round_s)
    due_s = max(rested_s, now_s if has_new_commits else sweep_due_s)
    return GcIdle(due_s - now_s) if due_s > now_s else GcRound(sweep_due_s <= now_s)


def sweep_every_s(grace_s: float) -> float:
    """The time from the start of one sweep to the next."""
    return max(ROUND_S, grace_s / SWEEPS_PER_GRACE)


# ---- which objects are garbage

PREFIXES = (keys.MANIFESTS, keys.PARTS, keys.PACKS)
"""What a sweep lists, in deletion order: an object goes before the objects that it names."""


class ObjectStatus(enum.Enum):
    """A sweep's classification of one object."""

    LIVE = "live"
    """An existing snapshot refers to it."""
    GRACE = "grace"
    """A snapshot dropped within the grace refers to it; a restore may still be reading it."""
    OPEN = "open"
    """It was written for a snapshot that may yet be committed."""
    YOUNG = "young"
    """Garbage that is younger than the grace."""
    HELD = "held"
    """A snapshot's records are unreadable, so it is unknown what that snapshot refers to."""
    FOREIGN = "foreign"
    """Its key is not one of ours."""
    GARBAGE = "garbage"


@dataclass(frozen=True, slots=True)
class SnapshotReferences:
    """A snapshot and the keys it needs: its manifest, its parts and their packs.

    ``problem``: why they are not all known; empty if they are.
    """

    snapshot: SnapshotId
    keys: frozenset[str] = frozenset()
    problem: str = ""


class GarbageClassifier:
    """Classifies objects one by one. Immutable; each takes O(1).

    ``existing`` has the references of each snapshot of ``state``, ``dropped`` those of snapshots
    dropped within the grace.
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
        live, recent = tuple(existing), tuple(dropped)
        # A snapshot that is missing here would have its live bytes deleted.
        assert {entry.snapshot for entry in live} == {entry.snapshot for entry in state.snapshots}
        self._state = state
        self._grace_s = grace_s
        self._last_step = {opened.epoch: opened.last_step for opened in state.opens}
        self._live = _union(live)
        self._grace = _union(recent)
        self._dropped = frozenset(entry.snapshot for entry in recent)
        self._opaque = frozenset(entry.snapshot for entry in (*live, *recent) if entry.problem)

    def classify(self, stat: Stat, *, now_unix_s: float) -> ObjectStatus:
        """The object's status; ``now_unix_s`` is by the clock of the store that holds it."""
        snapshot = snapshot_of(stat.key)
        if snapshot is None:
            return ObjectStatus.FOREIGN
        if stat.key in self._live:
            return ObjectStatus.LIVE
        if stat.key in self._grace:
            return ObjectStatus.GRACE
        # An unreadable snapshot may refer to any pack, and to records of its own only.
        if self._opaque and (snapshot in self._opaque or stat.key.startswith(keys.PACKS)):
            return ObjectStatus.HELD
        if not self.commit_impossible(snapshot):
            return ObjectStatus.OPEN
        # Everything of a snapshot that was dropped within the grace stays, referred to or not.
        if snapshot in self._dropped:
            return ObjectStatus.GRACE
        # An object stamped after the store's clock was read has a negative age: it counts as 0.
        if max(0.0, now_unix_s - stat.modified_unix_s) < self._grace_s:
            return ObjectStatus.YOUNG
        return ObjectStatus.GARBAGE

    def commit_impossible(self, snapshot: SnapshotId) -> bool:
        """Whether no commit of ``snapshot`` can count, in this state or any later one.

        Each case is a rule of the log's fold. The step is not above all steps committed of its
        epoch, the snapshot is below the floor, or its epoch was never opened and no longer can be.
        The last step of an epoch, the floor and the newest epoch only grow, so the answer never
        turns back to False.
        """
        if snapshot.epoch in self._last_step:
            last_step = self._last_step[snapshot.epoch]
            if last_step is not None and snapshot.step <= last_step:
                return True
        elif snapshot.epoch <= self._state.epoch:
            return True
        return self._state.floor is not None and snapshot < self._state.floor


def snapshot_of(key: str) -> SnapshotId | None:
    """The snapshot that a pack, part or manifest was written for; None for any other key."""
    for parsed in (
        keys.parse_pack_key(key),
        keys.parse_part_key(key),
        keys.parse_manifest_key(key),
    ):
        if parsed is not None:
            return parsed[0]
    return None


def _union(references: Iterable[SnapshotReferences]) -> frozenset[str]:
    return frozenset(key for entry in references for key in entry.keys)
