"""Which snapshots to drop, why each other one stays, and the floor to set. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from ckpt.log.state import LogState
from ckpt.maintenance.retention import KeepPolicy, Tagged
from ckpt.values import SnapshotId, SnapshotInfo

NEWEST = "newest"
WHOLE = "newest found whole"
NO_POLICY = "nothing is to be dropped"
NONE_WHOLE = "no snapshot was found whole"
NOT_AGREED = "only now to be dropped: nobody has agreed to it"


@dataclass(frozen=True, slots=True)
class Judged:
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
    """Every snapshot in log order, judged; and the ``floor`` to set, below which no commit counts any more (None: as it is)."""

    judged: tuple[Judged, ...]
    floor: SnapshotId | None

    @property
    def drops(self) -> tuple[SnapshotId, ...]:
        """What to drop, ascending."""
        return tuple(sorted(one.info.id for one in self.judged if not one.kept))

    def only(self, agreed: Collection[SnapshotId]) -> GcPlan:
        """The same plan, without the drops that are not among ``agreed``."""
        judged = tuple(
            one if one.kept or one.info.id in agreed else replace(one, why=(NOT_AGREED,)) for one in self.judged
        )
        return replace(self, judged=judged)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to record."""
        return not self.drops and self.floor is None


def by_worth(state: LogState) -> tuple[SnapshotId, ...]:
    """What a restore would want, best first: the newest line; where it holds nothing, all there is."""
    return state.line or tuple(sorted((entry.snapshot for entry in state.snapshots), reverse=True))


def plan_gc(
    state: LogState,
    infos: Sequence[SnapshotInfo],
    policy: KeepPolicy | None,
    *,
    now_unix_s: float,
    whole: SnapshotId | None,
) -> GcPlan:
    """Judge every snapshot of ``infos`` (those of ``state``, in log order) by ``policy``; None keeps all.

    ``whole`` is the first of ``by_worth(state)`` whose bytes were found to be there. It stays beside the newest, or a job whose
    newest snapshot is damaged would lose the one that it falls back to; where there is none, nothing is dropped. It is also the
    floor: what is older than it and was never committed is wanted no more.
    """
    best = by_worth(state)
    line = frozenset(state.line)
    reasons = {} if policy is None else policy.reasons(infos, line=state.line, now_unix_s=now_unix_s)
    judged: list[Judged] = []
    for info in infos:
        why = [NEWEST] if best[:1] == (info.id,) else []
        why += [WHOLE] if info.id == whole and not why else []
        why += [f"tagged {', '.join(info.tags)}"] if info.tags else []
        why += [rule for rule in reasons.get(info.id, ()) if rule != str(Tagged())]
        why += [NO_POLICY] if policy is None else []
        why += [NONE_WHOLE] if whole is None and not why else []
        judged.append(Judged(info, info.id in line, tuple(why)))
    rises = whole is not None and (state.floor is None or whole > state.floor)
    return GcPlan(tuple(judged), whole if rises else None)
