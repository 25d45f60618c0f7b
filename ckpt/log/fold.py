"""The commit log as a pure function: records in, the state that they mean out. Pure.

Each record either counts and changes the state, or is void: it stays in the log and keeps its seq,
but changes nothing. ``void_reason`` holds the rules; what they guarantee:

* An ``open`` exceeds all epochs before it, and fences the writers of lower epochs: their later
  commits are void. So a writer that was paused and resumed can write bytes, but they do not count.
* Of a job with several nodes, an ``open`` of a membership epoch below the last of its line that
  opened one is void: the nodes have another writer by then.
* A commit refers only to a base that exists at its position. Dropping the base of a snapshot that
  is already committed is allowed: references lead straight to packs, and a pack is kept by any
  snapshot that refers to it.
* Steps grow within one captured epoch, so a dropped snapshot cannot come back.
* Writing the same record twice is one record.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ckpt.errors import ConflictError, FencedError, SupersededError
from ckpt.format.records import Commit, Drop, Open, Record, Stores, Tag, Untag
from ckpt.log.state import (
    RECENT_MAX,
    Committed,
    Hole,
    LogIndex,
    LogState,
    OpenedEpoch,
    StoreSet,
    TagEntry,
    Void,
    VoidCode,
    superseded,
)
from ckpt.values import MembershipEpoch, SnapshotId

__all__ = [
    "LogState",
    "Unreadable",
    "empty",
    "fold",
    "require_counted",
    "void_error",
    "void_if_appended",
]

# ---- state: indexed while the fold runs


class FoldBuilder:
    """A fold in progress: the state with its lists indexed, changed record by record.

    It shares the state's index until a record changes it, and copies it then: O(1) to make and for
    a record that is void, one copy of a dict for the first one that counts. Used in this module
    only, once each. It has one attribute for each field of ``LogState``, hence so many.
    """

    __slots__ = (
        "_own_steps",
        "_owned",
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
        index = state.index
        self.opens: dict[int, OpenedEpoch] = index.opens
        self.epoch = state.epoch
        self.snapshots: dict[SnapshotId, Committed] = index.snapshots
        self.steps: dict[int, dict[int, None]] = index.steps
        self._owned = False
        self._own_steps: set[int] = set()
        self.tags: dict[str, SnapshotId] = state.tags
        self.floor = state.floor
        self.stores: StoreSet | None = state.stores
        self.voids: deque[Void] = deque(state.voids, maxlen=RECENT_MAX)
        self.voids_total = state.voids_total
        self._recent: deque[str] = deque(state.recent)
        self._write_ids = Counter(state.recent)

    def freeze(self, before: LogState) -> LogState:
        """The state as it is now. The last call: the state shares the dicts from here on."""
        if self._owned:
            opens, snapshots = tuple(self.opens.values()), tuple(self.snapshots.values())
            index = LogIndex(opens, snapshots, self.opens, self.snapshots, self.steps)
        else:
            opens, snapshots, index = before.opens, before.snapshots, before.index
        return replace(
            before,
            next_seq=self.next_seq,
            head_digest=self.head_digest,
            opens=opens,
            snapshots=snapshots,
            tagged=tuple(TagEntry(name, self.tags[name]) for name in sorted(self.tags)),
            floor=self.floor,
            stores=self.stores,
            voids=tuple(self.voids),
            voids_total=self.voids_total,
            recent=tuple(self._recent),
            _index=index,
        )

    def advance(self, record: Record) -> None:
        """Move the head past ``record`` and remember its write id."""
        self.next_seq = record.seq + 1
        self.head_digest = record.digest
        self._recent.append(record.write_id)
        self._write_ids[record.write_id] += 1
        if len(self._recent) > RECENT_MAX:
            # Void records may repeat a write id, so ids are counted, not only remembered.
            oldest = self._recent.popleft()
            self._write_ids[oldest] -= 1
            if not self._write_ids[oldest]:
                del self._write_ids[oldest]

    def has_write_id(self, write_id: str) -> bool:
        """Whether one of the last 1,024 records had this write id."""
        return write_id in self._write_ids

    def void(self, seq: int, code: VoidCode, reason: str) -> None:
        """Record that the record at ``seq`` is void."""
        self.voids.append(Void(seq, code, reason))
        self.voids_total += 1

    def open(self, opened: OpenedEpoch) -> None:
        """Apply an ``open`` that counts."""
        self._own()
        self.opens[opened.epoch] = opened
        self.epoch = opened.epoch

    def commit(self, entry: Committed) -> None:
        """Apply a ``commit`` that counts."""
        pair = entry.snapshot
        self._own_captured(pair.epoch)
        self.snapshots[pair] = entry
        self.steps[pair.epoch][pair.step] = None
        self.opens[pair.epoch] = replace(self.opens[pair.epoch], last_step=pair.step)

    def drop(self, pair: SnapshotId) -> None:
        """Remove a snapshot."""
        self._own_captured(pair.epoch)
        del self.snapshots[pair]
        del self.steps[pair.epoch][pair.step]

    def last_membership(self, line: str) -> MembershipEpoch | None:
        """The last membership epoch of ``line`` that opened an epoch here. O(opens)."""
        every = (opened.membership for opened in reversed(self.opens.values()))
        return next((found for found in every if found is not None and found.line == line), None)

    def protected_snapshot(self) -> SnapshotId | None:
        """The snapshot that no drop may remove: the newest on the lineage, or the greatest of all.

        The second case is an empty lineage. Without it, a job that was started afresh could drop
        everything it has before its first commit.
        """
        index = LogIndex((), (), self.opens, self.snapshots, self.steps)
        return index.newest(self.epoch) or max(self.snapshots, default=None)

    def _own(self) -> None:
        """Make the dicts this fold's own to change."""
        if not self._owned:
            self.opens = self.opens.copy()
            self.snapshots = self.snapshots.copy()
            self.steps = self.steps.copy()
            self._owned = True

    def _own_captured(self, epoch: int) -> None:
        """Make the dicts, and the steps of one captured epoch, this fold's own to change."""
        self._own()
        if epoch not in self._own_steps:
            self.steps[epoch] = self.steps.get(epoch, {}).copy()
            self._own_steps.add(epoch)


# ---- rules: whether a record counts, and what it changes

VoidReason = tuple[VoidCode, str]


def void_reason(log: FoldBuilder, record: Record) -> VoidReason | None:
    """Why ``record`` is void after ``log``, or None if it counts."""
    if log.has_write_id(record.write_id):
        # A write whose reply was lost was repeated, and landed at a later position too.
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
                # The newest epoch may just be changing the set; a zombie must not undo that.
                return "fenced", f"a newer epoch is open. writer={record.epoch} newest={log.epoch}"
            return None


def apply(log: FoldBuilder, record: Record) -> None:
    """Change ``log`` by a record that counts."""
    match record.body:
        case Open(epoch, resume, membership):
            log.open(OpenedEpoch(epoch, record.seq, resume, membership=membership))
        case Commit(snapshot, manifest_digest, base):
            log.commit(Committed(snapshot, manifest_digest, base, record.seq, record.epoch))
        case Drop(snapshots, floor):
            for pair in snapshots:
                if pair in log.snapshots:
                    log.drop(pair)
            if floor is not None:  # the floor only rises
                log.floor = floor if log.floor is None else max(log.floor, floor)
        case Tag(name, snapshot):
            log.tags[name] = snapshot
        case Untag(name):
            del log.tags[name]
        case Stores(ids, write_quorum, sequencer):
            log.stores = StoreSet(ids, write_quorum, sequencer)


def _refuse_open(log: FoldBuilder, writer_epoch: int, body: Open) -> VoidReason | None:
    if writer_epoch != body.epoch:
        # The writer of an ``open`` acts in the epoch that it opens; this record is forged or
        # broken.
        return (
            "epoch-not-new",
            f"opened by a writer of another epoch. epoch={body.epoch} writer={writer_epoch}",
        )
    # Of the same line: what another one opened since says nothing about this one.
    last = None if body.membership is None else log.last_membership(body.membership.line)
    if last is not None and last.supersedes(body.membership):
        # Its writer was paused, or waited for the store, while the job's nodes got another one.
        return (
            "superseded",
            f"a later membership epoch opened one. membership={body.membership} newest={last}",
        )
    if body.epoch <= log.epoch:
        return (
            "epoch-not-new",
            f"epoch does not exceed all seen. epoch={body.epoch} newest={log.epoch}",
        )
    if body.resume is not None and body.resume.epoch not in log.opens:
        # Only the epoch must exist. The pair need not be committed: training may resume a snapshot
        # that was only staged, and it may become durable later under the new epoch.
        return "resume-unknown", f"resumes an epoch that was never opened. from={body.resume}"
    return None


def _refuse_commit(log: FoldBuilder, writer_epoch: int, body: Commit) -> VoidReason | None:
    # ``writer_epoch`` is the epoch in which the record is written, ``pair.epoch`` the one in which
    # the state was captured. They differ when a snapshot that was staged before a failure becomes
    # durable after it. Only the writer is fenced.
    pair = body.snapshot
    if writer_epoch < log.epoch:
        return (
            "superseded" if superseded(log.opens, writer_epoch) else "fenced",
            f"a newer epoch is open. writer={writer_epoch} newest={log.epoch}",
        )
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
    if (committed := log.snapshots.get(pair)) is not None:
        if committed.manifest_digest == body.manifest_digest:
            return (
                "repeat",
                f"this snapshot was committed before. snapshot={pair} seq={committed.seq}",
            )
        return (
            "pair-taken",
            f"another manifest was committed for this pair. snapshot={pair} seq={committed.seq}",
        )
    if captured.last_step is not None and pair.step <= captured.last_step:
        # ``last_step`` is never lowered, so this also keeps a dropped snapshot from coming back.
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
        # Once the base is dropped, a sweep may delete its chunks at any time.
        return (
            "base-gone",
            f"the snapshot whose chunks it refers to does not exist. snapshot={pair} "
            f"base={body.base}",
        )
    return None


def _refuse_drop(log: FoldBuilder, body: Drop) -> VoidReason | None:
    protected = log.protected_snapshot()
    if protected is not None and protected in body.snapshots:
        return "newest-kept", f"the newest snapshot is never dropped. snapshot={protected}"
    tag_of = {pair: tag for tag, pair in log.tags.items()}
    for pair in body.snapshots:
        if pair in tag_of:
            return (
                "tag-kept",
                f"a tagged snapshot is never dropped. snapshot={pair} tag={tag_of[pair]!r}",
            )
    if body.floor is not None and (protected is None or body.floor > protected):
        # A floor above the newest would make commits void that nothing has replaced.
        return (
            "floor-too-high",
            f"floor above the newest snapshot. floor={body.floor} newest={protected}",
        )
    raises_floor = body.floor is not None and (log.floor is None or body.floor > log.floor)
    if not raises_floor and not any(pair in log.snapshots for pair in body.snapshots):
        # Two sweeps may drop the same snapshots, so some missing ones are harmless. If all are
        # missing, the caller is probably mistaken.
        return "nothing-to-drop", f"none of these snapshots exists. snapshots={len(body.snapshots)}"
    return None


# ---- fold: a hole ends it


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A position in the log whose bytes are missing or are no valid record."""

    seq: int
    reason: str


def empty(job: str) -> LogState:
    """The state before the first record of ``job``."""
    return LogState(job=job)


def fold(state: LogState, records: Sequence[Record | Unreadable]) -> LogState:
    """``state`` followed by ``records``, in order of their seq.

    Stops at the first position that is missing, unreadable, of another job or not chained to the
    record before it, and says so in ``hole``; a state with a hole folds nothing more.
    ``fold(fold(s, a), b) == fold(s, a + b)``. O(state + records).
    """
    if state.hole is not None or not records:
        return state
    log = FoldBuilder(state)
    for record in records:
        if (hole := _hole(state.job, log, record)) is not None:
            return replace(log.freeze(state), hole=hole)
        assert isinstance(record, Record)
        if (reason := void_reason(log, record)) is not None:
            log.void(record.seq, *reason)
        else:
            apply(log, record)
        log.advance(record)  # a void record keeps its seq and its place in the chain
    return log.freeze(state)


def void_if_appended(state: LogState, record: Record) -> Void | None:
    """Why ``record`` would be void as the next record after ``state``, or None if it would count.

    The caller ensures that seq and chain of ``record`` are right. O(state).
    """
    reason = void_reason(FoldBuilder(state), record)
    return None if reason is None else Void(record.seq, *reason)


def _hole(job: str, log: FoldBuilder, record: Record | Unreadable) -> Hole | None:
    seq = log.next_seq
    if record.seq != seq:
        return Hole(seq, f"record is missing. next_found={record.seq}")
    if isinstance(record, Unreadable):
        return Hole(seq, record.reason)
    if record.job != job:
        return Hole(seq, f"record of another job. expected={job!r} found={record.job!r}")
    if record.prev != log.head_digest:
        return Hole(
            seq,
            f"record does not follow the one before. expected={log.head_digest!r} "
            f"found={record.prev!r}",
        )
    return None


# ---- errors: what a void record means for its writer


def void_error(void: Void) -> ConflictError:
    """The error for a void record: FencedError if its writer must stop, SupersededError if it must
    look who the writer is now, else ConflictError."""
    match void.code:
        case "fenced":
            return FencedError(f"{void.reason} stop this writer: a newer one is active")
        case "superseded":
            return SupersededError(f"{void.reason} this node's attempt is over")
        case "base-gone":
            return ConflictError(f"{void.reason} snapshot again without that base")
        case "newest-kept" | "tag-kept":
            return ConflictError(f"{void.reason} leave it out, or remove what keeps it")
        case _:
            return ConflictError(f"{void.reason} code={void.code}")


def require_counted(state: LogState, seq: int) -> None:
    """Raise the fitting error if the record at ``seq`` is void in ``state``."""
    void = state.void_at(seq)
    if void is not None:
        raise void_error(void)
