"""Keys of the objects in a node's memory that peers can read. Pure."""

from __future__ import annotations

import re

from ckpt.values import SnapshotId

SLOTS_PREFIX = "slots/"
"""A node's own slots: ``slots/<epoch>-<step>/<rank>``."""
MIRRORS_PREFIX = "mirrors/"
"""Mirrors of other nodes' slots: ``mirrors/<epoch>-<step>/<rank>``."""

_REST = re.compile(r"(\d{1,19})-(\d{1,19})/(\d{1,9})", re.ASCII)


def slot_key(snapshot: SnapshotId, rank: int) -> str:
    """The key of a rank's share in a slot of its own node."""
    return f"{SLOTS_PREFIX}{snapshot.epoch}-{snapshot.step}/{rank}"


def mirror_key(snapshot: SnapshotId, rank: int) -> str:
    """The key of a rank's share on a node that mirrors it."""
    return f"{MIRRORS_PREFIX}{snapshot.epoch}-{snapshot.step}/{rank}"


def parse_slot_key(key: str) -> tuple[SnapshotId, int] | None:
    """Snapshot and rank in a slot's key; None for another key."""
    return _parsed(key, SLOTS_PREFIX)


def parse_mirror_key(key: str) -> tuple[SnapshotId, int] | None:
    """Snapshot and rank in a mirror's key; None for another key."""
    return _parsed(key, MIRRORS_PREFIX)


def _parsed(key: str, prefix: str) -> tuple[SnapshotId, int] | None:
    match = _REST.fullmatch(key.removeprefix(prefix)) if key.startswith(prefix) else None
    return None if match is None else (SnapshotId(int(match[1]), int(match[2])), int(match[3]))
