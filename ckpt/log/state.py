"""What a reader knows after folding the log up to some record. Frozen, and small enough to be
stored itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ckpt.format.records import BY_STORES
from ckpt.values import SnapshotId

RECENT_MAX = 1024
"""How many of the last records a state remembers: their write ids, and as many voids."""

VoidCode = Literal[
    "repeat",
    "fenced",
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
"""Why a record counts for nothing; each is explained where it is decided (``judge``)."""


@dataclass(frozen=True, slots=True)
class Void:
    """A record that counts for nothing, and why: ``code`` for programs, ``reason`` for people."""

    seq: int
    code: VoidCode
    reason: str


@dataclass(frozen=True, slots=True)
class Hole:
    """The first place in the log that cannot be read although it must exist. Nothing from there on
    is folded."""

    seq: int
    reason: str


@dataclass(frozen=True, slots=True)
class OpenedEpoch:
    """A counted ``open``: the epoch, its record's seq, the pair it resumed, and the last step
    committed of it."""

    epoch: int
    seq: int
    resume: SnapshotId | None
    last_step: int | None = None


@dataclass(frozen=True, slots=True)
class Committed:
    """A snapshot that exists: its manifest's digest, its base, its record's seq and the epoch of
    that record's writer."""

    snapshot: SnapshotId
    manifest_digest: str
    base: SnapshotId | None
    seq: int
    writer_epoch: int


@dataclass(frozen=True, slots=True)
class TagEntry:
    """A tag and what it names."""

    name: str
    snapshot: SnapshotId


@dataclass(frozen=True, slots=True)
class StoreSet:
    """The stores of the log, the write quorum, and who gives out places, as the last ``stores``
    record fixed them."""

    ids: tuple[str, ...]
    write_quorum: int
    sequencer: str = BY_STORES

    @property
    def answers_min(self) -> int:
        """Of how many stores an answer is needed to know what is newest: any so many share one with
        any W."""
        return len(self.ids) - self.write_quorum + 1


@dataclass(frozen=True, slots=True)
class LineageSegment:
    """What a line takes of one captured epoch: steps up to and with ``last_step``, or all
    (None)."""

    epoch: int
    last_step: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LogState:
    """The fold of the records ``0 .. next_seq - 1``.

    ``opens`` ascend by epoch, ``snapshots`` by seq (only those that exist: dropped ones are gone),
    ``tagged`` by name. ``voids`` holds the last 1,024, ``voids_total`` counts all; ``recent`` the
    write ids of the last 1,024 records. ``hole`` says that the log goes on but can't be read,
    ``short`` why too few stores answered: then what is newest can't be known.
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

    @property
    def stale_reason(self) -> str:
        """Why a newer snapshot may exist than the newest one here; empty where it can't."""
        return self.hole.reason if self.hole is not None else self.short

    @property
    def epoch(self) -> int:
        """The newest open epoch, 0 where none is."""
        return self.opens[-1].epoch if self.opens else 0

    @property
    def tags(self) -> dict[str, SnapshotId]:
        """Each tag and what it names."""
        return {tag.name: tag.snapshot for tag in self.tagged}

    @property
    def lineage(self) -> tuple[SnapshotId, ...]:
        """The snapshots on the line of the newest open epoch, newest first. O(snapshots +
        epochs)."""
        return self.lineage_from(None)

    def lineage_from(self, start: SnapshotId | None) -> tuple[SnapshotId, ...]:
        """The snapshots on the line that ends at ``start`` (None: the newest open epoch's), newest
        first."""
        by_epoch: dict[int, list[int]] = {}
        for entry in self.snapshots:
            by_epoch.setdefault(entry.snapshot.epoch, []).append(entry.snapshot.step)
        opens = {opened.epoch: opened for opened in self.opens}
        return tuple(
            SnapshotId(segment.epoch, step)
            for segment in lineage_segments(opens, start or whole_epoch(self.epoch))
            for step in reversed(by_epoch.get(segment.epoch, ()))
            if segment.last_step is None or step <= segment.last_step
        )

    def newest(self) -> SnapshotId | None:
        """The greatest pair on the line of the newest open epoch, or None where the line holds
        none."""
        line = self.lineage
        return line[0] if line else None

    def find(self, snapshot: SnapshotId) -> Committed | None:
        """The snapshot's commit, or None where it was never committed or is dropped."""
        return next((entry for entry in self.snapshots if entry.snapshot == snapshot), None)

    def seq_of(self, write_id: str) -> int | None:
        """Where the record with this write id first stands among the last 1,024, or None."""
        if write_id not in self.recent:
            return None
        return self.next_seq - len(self.recent) + self.recent.index(write_id)

    def write_id_at(self, seq: int) -> str | None:
        """The write id of the record at ``seq``, or None where it is not among the last 1,024."""
        at = seq - (self.next_seq - len(self.recent))
        return self.recent[at] if 0 <= at < len(self.recent) else None

    def void_at(self, seq: int) -> Void | None:
        """Why the record at ``seq`` counts for nothing, or None where it counts (or is older than
        ``voids`` reaches)."""
        return next((void for void in self.voids if void.seq == seq), None)

    def without_hole(self) -> LogState:
        """The same state, ready to fold on where the hole was, should it have been mended, or more
        stores answer."""
        return replace(self, hole=None, short="")


def whole_epoch(epoch: int) -> LineageSegment:
    """All that ``epoch`` captured."""
    return LineageSegment(epoch, None)


def lineage_segments(
    opens: Mapping[int, OpenedEpoch], start: LineageSegment | SnapshotId
) -> Iterator[LineageSegment]:
    """The line that ends at ``start``, backwards: each epoch once, up to the pair that the next one
    resumed.

    An ``open`` resumes an epoch below its own, so the walk ends.
    """
    at: LineageSegment | SnapshotId | None = start
    while at is not None:
        segment = at if isinstance(at, LineageSegment) else LineageSegment(at.epoch, at.step)
        opened = opens.get(segment.epoch)
        if opened is None:
            return
        yield segment
        at = opened.resume
