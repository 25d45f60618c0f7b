"""The fold's own workbench: the state with its lists indexed, changed record by record, then frozen again."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import replace

from ckpt.format.records import Record
from ckpt.log.state import (
    RECENT_MAX,
    Committed,
    LogState,
    Opened,
    Segment,
    StoreSet,
    Tagged,
    Void,
    VoidCode,
    segments,
    whole,
)
from ckpt.values import SnapshotId


class Working:
    """One fold in progress. Never leaves this room; O(state) to make and to freeze, O(1) for most records."""

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
        self.opens: dict[int, Opened] = {opened.epoch: opened for opened in state.opens}
        self.epoch = state.epoch
        self.snapshots: dict[SnapshotId, Committed] = {}
        self.steps: dict[int, dict[int, None]] = {}
        """Per captured epoch the steps that exist, ascending, for that is how they were committed."""
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
            tagged=tuple(Tagged(name, self.tags[name]) for name in sorted(self.tags)),
            floor=self.floor,
            stores=self.stores,
            voids=tuple(self.voids),
            voids_total=self.voids_total,
            recent=tuple(self._recent),
        )

    def step_on(self, record: Record) -> None:
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

    def seen(self, write_id: str) -> bool:
        """Whether one of the last 1,024 records had this write id."""
        return write_id in self._write_ids

    def void(self, seq: int, code: VoidCode, reason: str) -> None:
        """Note that the record at ``seq`` counts for nothing."""
        self.voids.append(Void(seq, code, reason))
        self.voids_total += 1

    def open(self, opened: Opened) -> None:
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

    def kept(self) -> SnapshotId | None:
        """The snapshot that no drop may take: the newest on the line, or where the line holds none the greatest of all.

        Without the second half, a job that was started afresh could drop all that it has before its first commit.
        """
        for segment in segments(self.opens, whole(self.epoch)):
            if (step := self._last_up_to(segment)) is not None:
                return SnapshotId(segment.epoch, step)
        return max(self.snapshots, default=None)

    def _last_up_to(self, segment: Segment) -> int | None:
        for step in reversed(self.steps.get(segment.epoch, {})):
            if segment.last_step is None or step <= segment.last_step:
                return step
        return None

    def _put(self, entry: Committed) -> None:
        self.snapshots[entry.snapshot] = entry
        self.steps.setdefault(entry.snapshot.epoch, {})[entry.snapshot.step] = None
