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
