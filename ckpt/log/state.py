"""What a reader knows after folding the log up to some record. Pure.

All values are frozen, and small enough that the state is stored itself (``stored_fold``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from ckpt.format.records import BY_STORES
from ckpt.values import MembershipEpoch, SnapshotId

RECENT_MAX = 1024
"""How many write ids of the last records a state remembers, and how many voids.

A write whose reply was lost must be repeated within that many records; later it would count twice.
"""

VoidCode = Literal[
    "repeat",
    "fenced",
    "superseded",
    "epoch-not-open",
    "epoch-not-new",
    "resume-unknown",
    "captured-epoch-unknown",
    "pair-taken",
    "step-not-newer",
    "below-floor",
    "base-gone",
    "newest-kept",
    "tag-kept",
    "nothing-to-drop",
    "floor-too-high",
    "not-committed",
    "no-such-tag",
]
"""Why a record is void. ``fold`` explains each code where it decides it."""


@dataclass(frozen=True, slots=True)
class Void:
    """A record that is void, and why: ``code`` for programs, ``reason`` for people."""

    seq: int
    code: VoidCode
    reason: str


@dataclass(frozen=True, slots=True)
class Hole:
    """The first position of the log that cannot be read although a later record exists.

    Nothing from there on is folded.
    """

    seq: int
    reason: str


@dataclass(frozen=True, slots=True)
class OpenedEpoch:
    """A counted ``open``: the epoch, its record's seq, the pair it resumed, its last committed
    step, and the membership epoch in whose name it was opened, if it named one."""

    epoch: int
    seq: int
    resume: SnapshotId | None
    last_step: int | None = None
    membership: MembershipEpoch | None = None


@dataclass(frozen=True, slots=True)
class Committed:
    """A snapshot that exists: its manifest's digest, base, record's seq and writer's epoch."""

    snapshot: SnapshotId
    manifest_digest: str
    base: SnapshotId | None
    seq: int
    writer_epoch: int


@dataclass(frozen=True, slots=True)
class TagEntry:
    """A tag and the snapshot that it names."""

    name: str
    snapshot: SnapshotId


@dataclass(frozen=True, slots=True)
class StoreSet:
    """The stores of the log, the write quorum and the sequencer, as the last ``stores`` record set
    them."""

    ids: tuple[str, ...]
    write_quorum: int
    sequencer: str = BY_STORES

    @property
    def answers_min(self) -> int:
        """How many stores must answer to know what is newest: any R - W + 1 stores share one with
        any W."""
        return len(self.ids) - self.write_quorum + 1


@dataclass(frozen=True, slots=True)
class LineageSegment:
    """The part of one captured epoch on a lineage: steps up to and including ``last_step`` (None:
    all)."""

    epoch: int
    last_step: int | None


@dataclass(frozen=True, slots=True)
class LogIndex:
    """Lookups over one state's ``opens`` and ``snapshots``. Never changed once a state has it.

    A fold copies it and changes the copy, so that one record costs no pass over all snapshots in
    Python. ``steps`` holds the existing steps of each captured epoch; they ascend, because commits
    do.
    """

    of_opens: tuple[OpenedEpoch, ...]
    of_snapshots: tuple[Committed, ...]
    opens: dict[int, OpenedEpoch]
    snapshots: dict[SnapshotId, Committed]
    steps: dict[int, dict[int, None]]

    @classmethod
    def build(cls, opens: tuple[OpenedEpoch, ...], snapshots: tuple[Committed, ...]) -> LogIndex:
        """O(opens + snapshots)."""
        steps: dict[int, dict[int, None]] = {}
        for entry in snapshots:
            steps.setdefault(entry.snapshot.epoch, {})[entry.snapshot.step] = None
        return cls(
            opens,
            snapshots,
            {opened.epoch: opened for opened in opens},
            {entry.snapshot: entry for entry in snapshots},
            steps,
        )

    def last_up_to(self, segment: LineageSegment) -> SnapshotId | None:
        """The newest snapshot of one lineage segment, or None."""
        for step in reversed(self.steps.get(segment.epoch, {})):
            if segment.last_step is None or step <= segment.last_step:
                return SnapshotId(segment.epoch, step)
        return None

    def newest(self, epoch: int) -> SnapshotId | None:
        """The newest snapshot on the lineage that ends with ``epoch``, or None."""
        for segment in lineage_segments(self.opens, whole_epoch(epoch)):
            if (snapshot := self.last_up_to(segment)) is not None:
                return snapshot
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class LogState:
    """The fold of the records ``0 .. next_seq - 1``.

    ``opens`` ascend by epoch, ``snapshots`` by seq (dropped ones are absent), ``tagged`` by name.
    ``voids`` holds the last 1,024, ``voids_total`` counts all. ``recent`` holds the write ids of
    the last 1,024 records. ``hole`` is set if the log continues but cannot be read, ``short`` says
    why too few stores answered; in both cases the newest snapshot cannot be known.
    """

    job: str
    next_seq: int = 0
    head_digest: str = ""
    opens: tuple[OpenedEpoch, ...] = ()
    snapshots: tuple[Committed, ...] = ()
    tagged: tuple[TagEntry, ...] = ()
    floor: SnapshotId | None = None
    stores: StoreSet | None = None
    voids: tuple[Void, ...] = ()
    voids_total: int = 0
    recent: tuple[str, ...] = ()
    hole: Hole | None = None
    short: str = ""
    _index: LogIndex | None = field(default=None, compare=False, repr=False)

    @property
    def index(self) -> LogIndex:
        """Lookups by pair and epoch. Made at the first use, O(snapshots); a fold hands it on."""
        index = self._index
        # ``replace`` copies the field also if it changes what the index was made of.
        if (
            index is None
            or index.of_opens is not self.opens
            or index.of_snapshots is not self.snapshots
        ):
            index = LogIndex.build(self.opens, self.snapshots)
            object.__setattr__(self, "_index", index)
        return index

    @property
    def stale_reason(self) -> str:
        """Why a newer snapshot may exist than the newest one here; empty if that is impossible."""
        return self.hole.reason if self.hole is not None else self.short

    @property
    def epoch(self) -> int:
        """The newest open epoch, or 0."""
        return self.opens[-1].epoch if self.opens else 0

    def superseded_since(self, epoch: int) -> bool:
        """Whether the newest epoch belongs to a later membership epoch of the job that opened
        ``epoch``."""
        return superseded(self.index.opens, epoch)

    @property
    def tags(self) -> dict[str, SnapshotId]:
        """Tag names and the snapshots that they name."""
        return {tag.name: tag.snapshot for tag in self.tagged}

    @property
    def lineage(self) -> tuple[SnapshotId, ...]:
        """The snapshots on the lineage of the newest open epoch, newest first. O(snapshots +
        epochs)."""
        return self.lineage_from(None)

    def lineage_from(self, start: SnapshotId | None) -> tuple[SnapshotId, ...]:
        """The snapshots on the lineage that ends at ``start``, newest first.

        ``start`` None means the end of the newest open epoch.
        """
        index = self.index
        return tuple(
            SnapshotId(segment.epoch, step)
            for segment in lineage_segments(index.opens, start or whole_epoch(self.epoch))
            for step in reversed(index.steps.get(segment.epoch, {}))
            if segment.last_step is None or step <= segment.last_step
        )

    def newest(self) -> SnapshotId | None:
        """The greatest pair on the lineage of the newest open epoch, or None. O(epochs)."""
        return self.index.newest(self.epoch)

    def find(self, snapshot: SnapshotId) -> Committed | None:
        """The snapshot's commit, or None if it was never committed or is dropped."""
        return self.index.snapshots.get(snapshot)

    @property
    def _first_recent_seq(self) -> int:
        # ``recent`` ends with the record before ``next_seq``.
        return self.next_seq - len(self.recent)

    def seq_of(self, write_id: str) -> int | None:
        """The first seq with this write id among the last 1,024 records, or None."""
        if write_id not in self.recent:
            return None
        return self._first_recent_seq + self.recent.index(write_id)

    def write_id_at(self, seq: int) -> str | None:
        """The write id of the record at ``seq``, or None if it is not among the last 1,024."""
        index = seq - self._first_recent_seq
        return self.recent[index] if 0 <= index < len(self.recent) else None

    def void_at(self, seq: int) -> Void | None:
        """Why the record at ``seq`` is void; None if it counts, or is older than ``voids``."""
        return next((void for void in self.voids if void.seq == seq), None)

    def without_hole(self) -> LogState:
        """The same state without hole and shortage, ready to fold more records.

        For a reader that looks again: the hole may have been repaired, or more stores may answer.
        """
        return replace(self, hole=None, short="")


def superseded(opens: dict[int, OpenedEpoch], epoch: int) -> bool:
    """Whether the newest of ``opens``, which ascend, belongs to a later membership epoch of the job
    that opened ``epoch``."""
    if epoch not in opens:
        return False
    later = opens[next(reversed(opens))].membership
    return later is not None and later.supersedes(opens[epoch].membership)


def whole_epoch(epoch: int) -> LineageSegment:
    """Everything that ``epoch`` captured."""
    return LineageSegment(epoch, None)


def lineage_segments(
    opens: Mapping[int, OpenedEpoch], start: LineageSegment | SnapshotId
) -> Iterator[LineageSegment]:
    """The lineage that ends at ``start``, backwards: each epoch up to the pair that the next
    resumed.

    The walk ends because an ``open`` always resumes an epoch below its own.
    """
    end: LineageSegment | SnapshotId | None = start
    while end is not None:
        segment = end if isinstance(end, LineageSegment) else LineageSegment(end.epoch, end.step)
        opened = opens.get(segment.epoch)
        if opened is None:
            return
        yield segment
        end = opened.resume
