"""What a node's peers have of its shares, as far as it is sure: the bases of what is sent next."""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass

from ckpt.cluster.peermem.changed import Stored
from ckpt.keeper.mirrors.mirror_delta import Share

BASES_MAX = 2
"""Shares of one rank that are remembered: a pair that another node could not keep goes, and the one before it stays."""

BEHIND_MAX = 64
"""So many shares in a row go as what changed, then one goes whole: memory that a peer no longer has right would else be carried
along as long as training lasts.
"""


@dataclass(frozen=True, slots=True)
class Base:
    """A share that came whole, under which name, and how many shares back its oldest bytes were sent."""

    stored: Stored
    share: Share
    behind: int


class Bases:
    """By node and rank, the newest first. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._epoch: int | None = None
        self._known: dict[str, dict[int, tuple[Base, ...]]] = {}

    def begin(self, epoch: int, nodes: Collection[str]) -> None:
        """Shares go to ``nodes`` now, in the name of ``epoch``: what was sent in another one, or to others, is forgotten."""
        with self._lock:
            kept = self._known if epoch == self._epoch else {}
            self._epoch, self._known = epoch, {node: kept.get(node, {}) for node in nodes}

    def of(self, node: str, rank: int) -> tuple[Base, ...]:
        """What ``node`` has of ``rank`` that may be a base; nothing where the next one is to go whole."""
        with self._lock:
            known = self._known.get(node, {}).get(rank, ())
            return () if known and known[0].behind >= BEHIND_MAX else known

    def add(self, node: str, rank: int, base: Base) -> None:
        """It came whole, and nothing was sent in its place meanwhile."""
        with self._lock:
            known = self._known.setdefault(node, {})
            others = [one for one in known.get(rank, ()) if one.stored.key != base.stored.key]
            known[rank] = (base, *others)[:BASES_MAX]

    def drop(self, node: str, rank: int, base: Base) -> None:
        """The node doesn't have it any more."""
        with self._lock:
            known = self._known.get(node, {})
            known[rank] = tuple(one for one in known.get(rank, ()) if one is not base)

    def retain(self, nodes: Collection[str]) -> None:
        """All went well with these nodes; of others nothing is sure."""
        with self._lock:
            self._known = {node: known for node, known in self._known.items() if node in nodes}
