"""The keys under which nodes lend memory to each other. Pure."""

from __future__ import annotations

import re

from ckpt.values import SnapshotId

SLOTS_PREFIX = "slots/"
"""What a node's own slots hold: ``slots/<epoch>-<step>/<rank>``."""
MIRRORS_PREFIX = "mirrors/"
"""What it keeps for others: ``mirrors/<epoch>-<step>/<rank>``."""

_REST = re.compile(r"(\d{1,19})-(\d{1,19})/(\d{1,9})", re.ASCII)


def slot_key(snapshot: SnapshotId, rank: int) -> str:
    """Where the share of ``rank`` is that its own node staged."""
    return f"{SLOTS_PREFIX}{snapshot.epoch}-{snapshot.step}/{rank}"


def mirror_key(snapshot: SnapshotId, rank: int) -> str:
    """Where it is on a node that keeps it for that one."""
    return f"{MIRRORS_PREFIX}{snapshot.epoch}-{snapshot.step}/{rank}"


def parse_slot_key(key: str) -> tuple[SnapshotId, int] | None:
    """The pair and rank of a slot's key, or None."""
    return _parsed(key, SLOTS_PREFIX)


def parse_mirror_key(key: str) -> tuple[SnapshotId, int] | None:
    """The pair and rank of a mirror's key, or None."""
    return _parsed(key, MIRRORS_PREFIX)


def _parsed(key: str, prefix: str) -> tuple[SnapshotId, int] | None:
    found = _REST.fullmatch(key.removeprefix(prefix)) if key.startswith(prefix) else None
    return None if found is None else (SnapshotId(int(found[1]), int(found[2])), int(found[3]))
