"""Looks at a store's snapshots, decides which go, and records it. The bytes are for ``sweep``."""

from __future__ import annotations

from collections.abc import Callable

from ckpt.backends.base import Backend
from ckpt.errors import (
    ConflictError,
    FencedError,
    FormatVersionError,
    IntegrityError,
    NotFoundError,
)
from ckpt.format.records import DROPS_MAX, Record
from ckpt.log.access import LogAccess
from ckpt.log.catalog import load_index, snapshots
from ckpt.log.journal import Journal
from ckpt.log.reader import LogNote, read_all
from ckpt.log.sequencers import Appended, KeyTaken, WriteUnknown
from ckpt.log.state import LogState
from ckpt.maintenance.gc.plan import GcPlan, plan_gc, restore_order
from ckpt.maintenance.gc.sweep import require_known
from ckpt.maintenance.retention import KeepPolicy
from ckpt.values import SnapshotId

RACES_MAX = 8
"""How often a plan is made anew because the log changed under it, before the conflict is raised."""


def preview(
    backend: Backend, state: LogState, policy: KeepPolicy | None, *, now_unix_s: float
) -> GcPlan:
    """What ``policy`` (None: keep all) makes of the snapshots of ``state`` at ``now_unix_s``.
    Changes nothing.

    Raises IntegrityError or UnavailableError where the log can't be known. Cost: every manifest is
    read; of the newest snapshot (and older ones, until one is whole) the parts too, and one request
    a pack.
    """
    require_known(state)
    infos = snapshots(backend, state)
    return plan_gc(
        state, infos, policy, now_unix_s=now_unix_s, intact=newest_intact(backend, state)
    )


def drop(
    backend: Backend,
    journal: Journal,
    policy: KeepPolicy | None,
    *,
    now_unix_s: float,
    approved: GcPlan | None = None,
) -> tuple[GcPlan, LogState]:
    """Record what ``look`` decides; the plan that was recorded, and the state after it.

    ``agreed``: a plan that somebody said yes to; nothing is dropped that it does not drop. A
    snapshot that was tagged or became the newest meanwhile stays. What is decided rests on records
    that count for good: a commit that comes to nothing replaces no other. Raises as ``look`` and
    ``Journal.append`` do.
    """
    for races in range(RACES_MAX + 1):
        require_known(journal.refresh())
        state = journal.refresh_confirmed()
        plan = preview(backend, state, policy, now_unix_s=now_unix_s)
        plan = plan if approved is None else plan.restricted_to(approved.drops)
        try:
            return plan, _record(journal, state, plan.drops, plan.floor)
        except FencedError:
            raise
        except ConflictError:
            if races == RACES_MAX:
                raise
    raise AssertionError("the last race is raised")


def newest_intact(backend: Backend, state: LogState) -> SnapshotId | None:
    """The best snapshot for a restore whose records can be read and whose packs are all there, long
    enough; or None.

    Bytes are not compared with their digests: that is ``verify``'s work. Raises UnavailableError.
    """
    return next((pair for pair in restore_order(state) if _whole(backend, state, pair)), None)


def _record(
    journal: Journal, state: LogState, drops: tuple[SnapshotId, ...], floor: SnapshotId | None
) -> LogState:
    for start in range(0, len(drops), DROPS_MAX):
        last = start + DROPS_MAX >= len(drops)
        state = journal.drop(drops[start : start + DROPS_MAX], floor=floor if last else None)
    return journal.drop((), floor=floor) if not drops and floor is not None else state


def _whole(backend: Backend, state: LogState, pair: SnapshotId) -> bool:
    try:
        index = load_index(backend, state, pair)
    except (IntegrityError, FormatVersionError, NotFoundError):
        return False
    ends: dict[str, int] = {}
    for part in index.parts:
        for shard in part.shards:
            for place in shard.locations:
                ends[place.pack] = max(
                    ends.get(place.pack, 0), place.offset_bytes + place.stored_bytes
                )
    return all(read_all(sorted(ends.items()), _is_there(backend)))


def _is_there(backend: Backend) -> Callable[[tuple[str, int]], bool]:
    def there(end: tuple[str, int]) -> bool:
        try:
            stat = backend.stat(end[0])
        except IntegrityError:  # of an impossible length, where stores are encrypted
            return False
        return stat is not None and stat.size_bytes >= end[1]

    return there


# A log that is written only while one's own epoch is the newest: whoever was overtaken drops
# nothing any more.


def fenced_journal(backend: Backend, epoch: Callable[[], int]) -> Journal:
    """The log of the stores behind ``backend``, for a writer whose epoch is ``epoch()``.

    Each append raises FencedError where a newer epoch is open. It is looked at in the very state
    that the record follows, and a place in the log is given once, so no epoch can be opened between
    the look and the record. Raises as ``Journal.open``.
    """
    return Journal(FencedLogAccess(Journal.open(backend).access, epoch), backend.url)


class FencedLogAccess:
    """A ``LogAccess`` that gives no place to a writer who was overtaken."""

    __slots__ = ("_epoch", "_inner")

    def __init__(self, inner: LogAccess, epoch: Callable[[], int]) -> None:
        self._inner = inner
        self._epoch = epoch

    def append(self, state: LogState, record: Record) -> Appended | KeyTaken | WriteUnknown:
        """See LogAccess. Raises FencedError where ``state`` has a newer epoch than the writer's."""
        require_newest_epoch(state, self._epoch())
        return self._inner.append(state, record)

    @property
    def job(self) -> str:
        """See LogAccess."""
        return self._inner.job

    @property
    def log_id(self) -> str:
        """See LogAccess."""
        return self._inner.log_id

    def read_start(self) -> tuple[LogState, tuple[LogNote, ...]]:
        """See LogAccess."""
        return self._inner.read_start()

    def read_new(self, state: LogState) -> LogState:
        """See LogAccess."""
        return self._inner.read_new(state)

    def record_at(self, seq: int) -> bytes:
        """See LogAccess."""
        return self._inner.record_at(seq)

    def require_sequencer(self, state: LogState) -> None:
        """See LogAccess."""
        self._inner.require_sequencer(state)

    def confirm_last(self, state: LogState) -> KeyTaken | WriteUnknown | None:
        """See LogAccess."""
        return self._inner.confirm_last(state)

    def put_fold(self, key: str, data: bytes) -> Appended | KeyTaken | WriteUnknown:
        """See LogAccess."""
        return self._inner.put_fold(key, data)

    def put_manifest(self, key: str, data: bytes) -> Appended | KeyTaken | WriteUnknown:
        """See LogAccess."""
        return self._inner.put_manifest(key, data)


def require_newest_epoch(state: LogState, epoch: int) -> None:
    """Raises FencedError where ``state`` has a newer epoch than ``epoch``."""
    if state.epoch > epoch:
        raise FencedError(
            f"a newer epoch is open. writer={epoch} newest={state.epoch} what to keep is its "
            "writer's choice"
        )
