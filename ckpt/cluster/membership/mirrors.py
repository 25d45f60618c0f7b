"""Making a placement of mirrors right again with few moves. Pure.

A placement is right where each node has its mirrors on others, loads are even, and copies are apart. What a loss or a newcomer
leaves is made right one mirror at a time, each by the shortest chain of moves: a mirror goes to a node that may take it; if
that one has its load already, one that it holds goes on to another, and so on.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

CHAIN_MAX = 6
"""How long a chain of moves may be; beyond that a fresh placement is as good."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a placement must keep to. Domains and parallel groups by node; ``mirrors`` < nodes."""

    domains: Mapping[str, str]
    groups: Mapping[str, str]
    mirrors: int

    @property
    def apart(self) -> bool:
        """Whether domains suffice to keep all copies of a node in different ones."""
        return max(Counter(self.domains.values()).values()) <= len(self.domains) // (self.mirrors + 1)


class _Draft:
    """A placement that is being changed."""

    def __init__(self, rules: Rules, kept: Mapping[str, Iterable[str]]) -> None:
        self.rules = rules
        self.apart = rules.apart
        self.peers: dict[str, list[str]] = {node: [] for node in sorted(rules.domains)}
        self.held: dict[str, list[str]] = {node: [] for node in sorted(rules.domains)}
        for node in self.peers:
            for peer in kept.get(node, ()):
                # A repair keeps what may stay; who holds more than its part lets the latest go.
                if len(self.peers[node]) < rules.mirrors and self.may(node, peer) and self.has_room(peer):
                    self.give(node, peer)

    def may(self, node: str, peer: str, instead: str = "") -> bool:
        """Whether ``peer`` may hold a mirror of ``node``, in place of ``instead``."""
        if peer == node or peer not in self.held or peer in self.peers[node]:
            return False
        if not self.apart:
            return True
        domains = self.rules.domains
        others = [node, *(one for one in self.peers[node] if one != instead)]
        return domains[peer] not in {domains[one] for one in others}

    def has_room(self, peer: str) -> bool:
        return len(self.held[peer]) < self.rules.mirrors

    def give(self, node: str, peer: str) -> None:
        self.peers[node].append(peer)
        self.held[peer].append(node)

    def take(self, node: str, peer: str) -> None:
        self.peers[node].remove(peer)
        self.held[peer].remove(node)

    def is_right(self) -> bool:
        """Whether it keeps to the rules: moves of one chain are looked at one by one."""
        domains = self.rules.domains
        for node, peers in self.peers.items():
            copies = {node, *peers}
            if len(copies) != self.rules.mirrors + 1 or len(self.held[node]) != self.rules.mirrors:
                return False
            if self.apart and len({domains[one] for one in copies}) != len(copies):
                return False
        return True

    def place_one(self, node: str, free: list[str]) -> bool:
        """Give ``node`` one more mirror, by the shortest chain of moves to one of those that have room."""
        came: dict[
            str, tuple[str, str]
        ] = {}  # who was reached: whose mirror it would take, and from whom ("": a new one)
        if self._ends(node, "", free, came):
            return True
        todo: deque[tuple[str, str, int]] = deque([(node, "", 1)])
        while todo:
            moving, leaving, length = todo.popleft()
            for peer in self.held:
                if peer in came or not self.may(moving, peer, leaving):
                    continue
                came[peer] = (moving, leaving)
                for further in self.held[peer]:
                    if further != moving and self._ends(further, peer, free, came):
                        return True
                    if length < CHAIN_MAX:
                        todo.append((further, peer, length + 1))
        return False

    def _ends(self, moving: str, leaving: str, free: list[str], came: dict[str, tuple[str, str]]) -> bool:
        """Whether the chain ends here, since one of those that have room may take this mirror; then it is gone through."""
        for peer in free:
            if peer not in came and self.may(moving, peer, leaving):
                came[peer] = (moving, leaving)
                self._move(peer, came)
                return True
        return False

    def _move(self, end: str, came: Mapping[str, tuple[str, str]]) -> None:
        peer = end
        while True:
            node, leaving = came[peer]
            if leaving:
                self.take(node, leaving)
            self.give(node, peer)
            if not leaving:
                return
            peer = leaving


def repaired(rules: Rules, kept: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, ...]] | None:
    """``kept`` made right with few moves, or None where no short chain of moves does it."""
    draft = _Draft(rules, kept)
    for node in draft.peers:
        while len(draft.peers[node]) < rules.mirrors:
            free = [peer for peer in draft.held if draft.has_room(peer)]
            if not draft.place_one(node, free):
                return None
    _leave_groups(draft)
    return {node: tuple(peers) for node, peers in draft.peers.items()} if draft.is_right() else None


def _leave_groups(draft: _Draft) -> None:
    """Where all of a node's copies are in its own parallel group, swap one of its peers with another node's."""
    groups = draft.rules.groups
    for node, peers in draft.peers.items():
        if _inside(groups, node, peers):
            _swap(draft, node)


def _swap(draft: _Draft, node: str) -> None:
    groups = draft.rules.groups
    for peer in list(draft.peers[node]):
        for other, theirs in draft.peers.items():
            for further in list(theirs):
                if groups[further] == groups[node] or other == node:
                    continue
                if draft.may(node, further, peer) and draft.may(other, peer, further):
                    after = [one for one in theirs if one != further] + [peer]
                    if not _inside(groups, other, after):
                        draft.take(node, peer)
                        draft.take(other, further)
                        draft.give(node, further)
                        draft.give(other, peer)
                        return


def _inside(groups: Mapping[str, str], node: str, peers: Iterable[str]) -> bool:
    return bool(groups[node]) and all(groups[peer] == groups[node] for peer in peers)
