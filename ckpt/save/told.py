"""The events of a snapshot on its way to a store, in one form for whoever tells them."""

from __future__ import annotations

from ckpt.errors import CkptError
from ckpt.events import Event
from ckpt.values import SnapshotId, SnapshotInfo


def durable_event(info: SnapshotInfo, *, seconds: float) -> Event:
    """A snapshot is committed, ``seconds`` after it was handed in."""
    facts = {"epoch": info.epoch, "step": info.step, "size_bytes": info.size_bytes, "new_bytes": info.new_bytes}
    return Event("durable", f"{info.id} is durable", {**facts, "seconds": round(seconds, 3)})


def failed_event(snapshot: SnapshotId, error: CkptError) -> Event:
    """A snapshot did not become durable."""
    text = f"the snapshot of {snapshot} is not durable: {error}"
    return Event("save-failed", text, {"epoch": snapshot.epoch, "step": snapshot.step, "code": error.code}, alarm=True)


def untagged_event(info: SnapshotInfo, error: CkptError) -> Event:
    """A snapshot is durable, but lacks a tag."""
    return Event("tag-failed", str(error), {"step": info.step, "code": error.code}, alarm=True)
