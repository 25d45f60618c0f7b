"""What a keeper tells tools about itself and its job."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ckpt.values import SnapshotId, SnapshotInfo

Fact = str | int | float | bool | None


class SlotReport(msgspec.Struct, frozen=True, kw_only=True):
    """One slot: what it holds sealed (None: nothing), and whether an upload holds it."""

    index: int
    size_bytes: int
    snapshot: SnapshotId | None
    held: bool


class RankReport(msgspec.Struct, frozen=True, kw_only=True):
    """One rank as its keeper sees it. ``idle_s``: since its last boundary."""

    rank: int
    supervisor_pid: int
    trainer_pid: int
    completed: int
    phase: str
    idle_s: float
    staged: int
    skipped: int
    slots: tuple[SlotReport, ...]


class NodeReport(msgspec.Struct, frozen=True, kw_only=True):
    """One node of the job's newest epoch; ``first_rank`` -1 and no ``ranks``: a standby. ``here``: the keeper's own node.

    ``mirrored``: the newest pair that all nodes have on others; of a standby the newest of which it has all that it is to keep
    (None: nothing, or not known to this keeper).
    """

    node: str
    here: bool
    first_rank: int
    ranks: int
    mirrored: SnapshotId | None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One keeper. ``recoveries``: the last ones, oldest first, as facts. ``rss_bytes``: its own memory besides slots."""

    job: str
    store: str
    pid: int
    boot: str
    launch: str
    attempt: int
    epoch: int
    state: str
    since_s: float
    complete: SnapshotId | None
    durable: SnapshotInfo | None
    uploads: int
    slot_bytes: int
    rss_bytes: int
    ranks: tuple[RankReport, ...]
    recoveries: tuple[Mapping[str, Fact], ...]
    nodes: tuple[NodeReport, ...] = ()
    mirror_bytes: int = 0
    """Of several nodes: what this one has sent to others so far, to be kept there, and came."""
    refused: Mapping[str, int] = {}
    """Of several nodes: what was turned away, by kind; ``line`` counts connections, the others requests for lent memory."""
