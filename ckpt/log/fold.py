"""Whether a record counts, given all before it; and if so, what it changes. Pure.

A record that does not count stays in the log and holds its seq; it is void. Each rule says why it
is one.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ckpt.errors import ConflictError, FencedError
from ckpt.format.records import Commit, Drop, Open, Record, Stores, Tag, Untag
from ckpt.log.state import (
    RECENT_MAX,
    Committed,
    Hole,
    LineageSegment,
    LogState,
    OpenedEpoch,
    StoreSet,
    TagEntry,
    Void,
    VoidCode,
    lineage_segments,
    whole_epoch,
)
from ckpt.values import SnapshotId

# The fold's own workbench: the state with its lists indexed, changed record by record, then
# frozen again.


class FoldBuilder:
    """One fold in progress. Never leaves this room; O(state) to make and to freeze, O(1) for most
    records."""

    __slots__ = (
        "_recent",
        "_write_ids",
        "epoch",
        "floor",
        "head_digest",
        "next_seq",
        "opens",
        "snapshots",
        "steps",
        "stores",
        "tags",
        "voids",
        "voids_total",
    )

    def __init__(self, state: LogState) -> None:
        self.next_seq = state.next_seq
        self.head_digest = state.head_digest
        self.opens: dict[int, OpenedEpoch] = {opened.epoch: opened for opened in state.opens}
        self.epoch = state.epoch
        self.snapshots: dict[SnapshotId, Committed] = {}
        self.steps: dict[int, dict[int, None]] = {}
        """Per captured epoch the steps that exist, ascending, for that is how they were
        committed."""
        for entry in state.snapshots:
            self._put(entry)
        self.tags: dict[str, SnapshotId] = state.tags
        self.floor = state.floor
        self.stores: StoreSet | None = state.stores
        self.voids: deque[Void] = deque(state.voids, maxlen=RECENT_MAX)
        self.voids_total = state.voids_total
        self._recent: deque[str] = deque(state.recent)
        self._write_ids = Counter(state.recent)

    def freeze(self, before: LogState) -> LogState:
        """The state as it now is."""
        return replace(
            before,
            next_seq=self.next_seq,
            head_digest=self.head_digest,
            opens=tuple(self.opens.values()),
            snapshots=tuple(self.snapshots.values()),
            tagged=tuple(TagEntry(name, self.tags[name]) for name in sorted(self.tags)),
            floor=self.floor,
            stores=self.stores,
            voids=tuple(self.voids),
            voids_total=self.voids_total,
            recent=tuple(self._recent),
        )

    def advance(self, record: Record) -> None:
        """Move the head past ``record`` and remember its write id."""
        self.next_seq = record.seq + 1
        self.head_digest = record.digest
        self._recent.append(record.write_id)
        self._write_ids[record.write_id] += 1
        if len(self._recent) > RECENT_MAX:
            gone = self._recent.popleft()
            self._write_ids[gone] -= 1
            if not self._write_ids[gone]:
                del self._write_ids[gone]

    def has_write_id(self, write_id: str) -> bool:
        """Whether one of the last 1,024 records had this write id."""
        return write_id in self._write_ids

    def void(self, seq: int, code: VoidCode, reason: str) -> None:
        """Note that the record at ``seq`` counts for nothing."""
        self.voids.append(Void(seq, code, reason))
        self.voids_total += 1

    def open(self, opened: OpenedEpoch) -> None:
        """Count an ``open``."""
        self.opens[opened.epoch] = opened
        self.epoch = opened.epoch

    def commit(self, entry: Committed) -> None:
        """Count a ``commit``."""
        pair = entry.snapshot
        self._put(entry)
        self.opens[pair.epoch] = replace(self.opens[pair.epoch], last_step=pair.step)

    def drop(self, pair: SnapshotId) -> None:
        """Forget a snapshot."""
        del self.snapshots[pair]
        del self.steps[pair.epoch][pair.step]

    def protected_snapshot(self) -> SnapshotId | None:
        """The snapshot that no drop may take: the newest on the line, or where the line holds none
        the greatest of all.

        Without the second half, a job that was started afresh could drop all that it has before its
        first commit.
        """
        for segment in lineage_segments(self.opens, whole_epoch(self.epoch)):
            if (step := self._last_up_to(segment)) is not None:
                return SnapshotId(segment.epoch, step)
        return max(self.snapshots, default=None)

    def _last_up_to(self, segment: LineageSegment) -> int | None:
        for step in reversed(self.steps.get(segment.epoch, {})):
            if segment.last_step is None or step <= segment.last_step:
                return step
        return None

    def _put(self, entry: Committed) -> None:
        self.snapshots[entry.snapshot] = entry
        self.steps.setdefault(entry.snapshot.epoch, {})[entry.snapshot.step] = None


VoidReason = tuple[VoidCode, str]


def void_reason(log: FoldBuilder, record: Record) -> VoidReason | None:
    """Why ``record`` counts for nothing after ``log``, or None where it counts."""
    if log.has_write_id(record.write_id):
        # A put whose reply was lost, and that was repeated at a later place.
        return "repeat", f"this write was recorded before. write_id={record.write_id}"
    match record.body:
        case Open() as body:
            return _refuse_open(log, record.epoch, body)
        case Commit() as body:
            return _refuse_commit(log, record.epoch, body)
        case Drop() as body:
            return _refuse_drop(log, body)
        case Tag(name, snapshot):
            if snapshot not in log.snapshots:
                return (
                    "not-committed",
                    f"tag of a snapshot that does not exist. tag={name!r} snapshot={snapshot}",
                )
            return None
        case Untag(name):
            if name not in log.tags:
                return "no-such-tag", f"no such tag. tag={name!r}"
            return None
        case Stores():
            if record.epoch < log.epoch:
                # Whoever trains now may be about to write to other stores than this writer knows
                # of.
                return "fenced", f"a newer epoch is open. writer={record.epoch} newest={log.epoch}"
            return None


def apply(log: FoldBuilder, record: Record) -> None:
    """Change ``log`` by a record that counts."""
    match record.body:
        case Open(epoch, resume):
            log.open(OpenedEpoch(epoch, record.seq, resume))
        case Commit(snapshot, manifest_digest, base):
            log.commit(Committed(snapshot, manifest_digest, base, record.seq, record.epoch))
        case Drop(snapshots, floor):
            for pair in snapshots:
                if pair in log.snapshots:
                    log.drop(pair)
            if floor is not None:
                log.floor = floor if log.floor is None else max(log.floor, floor)
        case Tag(name, snapshot):
            log.tags[name] = snapshot
        case Untag(name):
            del log.tags[name]
        case Stores(ids, write_quorum, sequencer):
            log.stores = StoreSet(ids, write_quorum, sequencer)


def _refuse_open(log: FoldBuilder, writer_epoch: int, body: Open) -> VoidReason | None:
    if writer_epoch != body.epoch:
        # Its writer claims to act in one epoch and opens another: no honest writer does.
        return (
            "epoch-not-new",
            f"opened by a writer of another epoch. epoch={body.epoch} writer={writer_epoch}",
        )
    if body.epoch <= log.epoch:
        return (
            "epoch-not-new",
            f"epoch does not exceed all seen. epoch={body.epoch} newest={log.epoch}",
        )
    if body.resume is not None and body.resume.epoch not in log.opens:
        # The pair itself need not be committed: training may resume what was only staged.
        return "resume-unknown", f"resumes an epoch that was never opened. from={body.resume}"
    return None


def _refuse_commit(log: FoldBuilder, writer_epoch: int, body: Commit) -> VoidReason | None:
    pair = body.snapshot
    if writer_epoch < log.epoch:
        return "fenced", f"a newer epoch is open. writer={writer_epoch} newest={log.epoch}"
    if writer_epoch > log.epoch:
        return (
            "epoch-not-open",
            f"the writer's epoch was never opened. writer={writer_epoch} newest={log.epoch}",
        )
    captured = log.opens.get(pair.epoch)
    if captured is None:
        return (
            "captured-epoch-unknown",
            f"captured in an epoch that was never opened. snapshot={pair}",
        )
    if (known := log.snapshots.get(pair)) is not None:
        if known.manifest_digest == body.manifest_digest:
            return "repeat", f"this snapshot was committed before. snapshot={pair} seq={known.seq}"
        return (
            "pair-taken",
            f"another manifest was committed for this pair. snapshot={pair} seq={known.seq}",
        )
    if captured.last_step is not None and pair.step <= captured.last_step:
        # Also what keeps a dropped snapshot from coming back.
        return (
            "step-not-newer",
            f"steps grow within an epoch. snapshot={pair} last_step={captured.last_step}",
        )
    if log.floor is not None and pair < log.floor:
        return (
            "below-floor",
            f"captured below the floor of a drop. snapshot={pair} floor={log.floor}",
        )
    if body.base is not None and body.base not in log.snapshots:
        # Its chunks may be deleted at any time, or never existed.
        return (
            "base-gone",
            f"the snapshot whose chunks it refers to does not exist. snapshot={pair} "
            f"base={body.base}",
        )
    return None


def _refuse_drop(log: FoldBuilder, body: Drop) -> VoidReason | None:
    kept = log.protected_snapshot()
    if kept is not None and kept in body.snapshots:
        return "newest-kept", f"the newest snapshot is never dropped. snapshot={kept}"
    named = {pair: tag for tag, pair in log.tags.items()}
    for pair in body.snapshots:
        if pair in named:
            return (
                "tag-kept",
                f"a tagged snapshot is never dropped. snapshot={pair} tag={named[pair]!r}",
            )
    if body.floor is not None and (kept is None or body.floor > kept):
        # A floor above the newest would make commits void that nothing has replaced.
        return (
            "floor-too-high",
            f"floor above the newest snapshot. floor={body.floor} newest={kept}",
        )
    lifts = body.floor is not None and (log.floor is None or body.floor > log.floor)
    if not lifts and not any(pair in log.snapshots for pair in body.snapshots):
        # Some gone already is no harm (two sweeps met); all gone is a mistake worth telling.
        return "nothing-to-drop", f"none of these snapshots exists. snapshots={len(body.snapshots)}"
    return None


# The log as a pure function: records in, what they mean out.
#
# Dropping the base of a snapshot that is already committed is allowed: references lead straight
# to packs, and packs are kept by what refers to them. Dropping it before the commit makes the
# commit void. Writing the same record twice is one record.

__all__ = ["LogState", "Unreadable", "empty", "fold", "void_if_appended"]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A place in the log whose bytes are missing or are no valid record."""

    seq: int
    reason: str


def empty(job: str) -> LogState:
    """The state before the first record of ``job``."""
    return LogState(job=job)


def fold(state: LogState, records: Sequence[Record | Unreadable]) -> LogState:
    """``state`` and then ``records``, in order of their seq.

    Stops at the first place that is missing, unreadable, of another job or not chained to the
    record before, and says so in ``hole``; a state with a hole folds nothing more. ``fold(fold(s,
    a), b) == fold(s, a + b)``. O(state + records).
    """
    if state.hole is not None or not records:
        return state
    log = FoldBuilder(state)
    for record in records:
        if (hole := _hole(state.job, log, record)) is not None:
            return replace(log.freeze(state), hole=hole)
        assert isinstance(record, Record)
        if (why := void_reason(log, record)) is not None:
            log.void(record.seq, *why)
        else:
            apply(log, record)
        log.advance(record)
    return log.freeze(state)


def void_if_appended(state: LogState, record: Record) -> Void | None:
    """Why ``record`` would count for nothing as the next record after ``state``, or None where it
    would count.

    The seq and chain of ``record`` are the caller's to get right. O(state).
    """
    why = void_reason(FoldBuilder(state), record)
    return None if why is None else Void(record.seq, *why)


def _hole(job: str, log: FoldBuilder, record: Record | Unreadable) -> Hole | None:
    at = log.next_seq
    if record.seq != at:
        return Hole(at, f"record is missing. next_found={record.seq}")
    if isinstance(record, Unreadable):
        return Hole(at, record.reason)
    if record.job != job:
        return Hole(at, f"record of another job. expected={job!r} found={record.job!r}")
    if record.prev != log.head_digest:
        return Hole(
            at,
            f"record does not follow the one before. expected={log.head_digest!r} "
            f"found={record.prev!r}",
        )
    return None


# What a record that counts for nothing means to who wrote it. Pure.


def void_error(void: Void) -> ConflictError:
    """The error for a record that is, or would be, void: FencedError where the writer must stop,
    else ConflictError."""
    match void.code:
        case "fenced":
            return FencedError(f"{void.reason} stop this writer: another one goes on")
        case "base-gone":
            return ConflictError(f"{void.reason} snapshot again without that base")
        case "newest-kept" | "tag-kept":
            return ConflictError(f"{void.reason} leave it out, or move what keeps it")
        case _:
            return ConflictError(f"{void.reason} code={void.code}")


def require_counted(state: LogState, seq: int) -> None:
    """Raises the fitting error where the record at ``seq`` is void in ``state``."""
    void = state.void_at(seq)
    if void is not None:
        raise void_error(void)
