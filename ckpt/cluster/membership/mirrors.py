"""Making a placement of mirrors right again with few moves. Pure.

A placement is right where each node has its mirrors on others, loads are even, and copies are
apart. What a loss or a newcomer leaves is made right one mirror at a time, each by the shortest
chain of moves: a mirror goes to a node that may take it; if that one has its load already, one that
it holds goes on to another, and so on.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ckpt.errors import UsageError

CHAIN_MAX = 6
"""How long a chain of moves may be; beyond that a fresh placement is as good."""


@dataclass(frozen=True, slots=True)
class MirrorRules:
    """What a placement must keep to. Domains and parallel groups by node; ``mirrors`` < nodes."""

    domains: Mapping[str, str]
    groups: Mapping[str, str]
    mirrors: int

    @property
    def apart(self) -> bool:
        """Whether domains suffice to keep all copies of a node in different ones."""
        return max(Counter(self.domains.values()).values()) <= len(self.domains) // (
            self.mirrors + 1
        )


class _Draft:
    """A placement that is being changed."""

    def __init__(self, rules: MirrorRules, kept: Mapping[str, Iterable[str]]) -> None:
        self.rules = rules
        self.apart = rules.apart
        self.peers: dict[str, list[str]] = {node: [] for node in sorted(rules.domains)}
        self.held: dict[str, list[str]] = {node: [] for node in sorted(rules.domains)}
        for node in self.peers:
            for peer in kept.get(node, ()):
                # A repair keeps what may stay; who holds more than its part lets the latest go.
                if (
                    len(self.peers[node]) < rules.mirrors
                    and self.may(node, peer)
                    and self.has_room(peer)
                ):
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
        """Give ``node`` one more mirror, by the shortest chain of moves to one of those that have
        room."""
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

    def _ends(
        self, moving: str, leaving: str, free: list[str], came: dict[str, tuple[str, str]]
    ) -> bool:
        """Whether the chain ends here, since one of those that have room may take this mirror; then
        it is gone through."""
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


def repair_placement(
    rules: MirrorRules, kept: Mapping[str, Iterable[str]]
) -> dict[str, tuple[str, ...]] | None:
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
    """Where all of a node's copies are in its own parallel group, swap one of its peers with
    another node's."""
    groups = draft.rules.groups
    for node, peers in draft.peers.items():
        if _all_in_group(groups, node, peers):
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
                    if not _all_in_group(groups, other, after):
                        draft.take(node, peer)
                        draft.take(other, further)
                        draft.give(node, further)
                        draft.give(other, peer)
                        return


def _all_in_group(groups: Mapping[str, str], node: str, peers: Iterable[str]) -> bool:
    return bool(groups[node]) and all(groups[peer] == groups[node] for peer in peers)


# Which peers hold whose mirror. Pure, and the same answer for the same input.
#
# N nodes, m mirrors each. Where m + 1 divides N the nodes form groups of m + 1 that hold each
# other's state; else as many groups as can be, and a rest of up to 2m + 1 nodes in a ring. Fewer
# sets of nodes lose something that way than in one ring of all: only the loss of a whole group
# does. Groups spread over failure domains: in the order of domains, cut into m + 1 pieces, the
# members of a group stand at the same place of each piece, so that no two share a domain that is
# no greater than a piece.

MirrorPlacement = Mapping[str, tuple[str, ...]]
"""For each node the peers that hold its mirrors."""


@dataclass(frozen=True, slots=True)
class RankHolder:
    """A node that holds ranks. ``group``: a parallel group that may be lost or wrong as one; empty:
    none."""

    node: str
    domain: str
    group: str = ""


def place_mirrors(
    holders: Sequence[RankHolder], mirrors: int, *, before: MirrorPlacement | None = None
) -> MirrorPlacement:
    """The peers that hold each node's mirrors: ``mirrors`` of them, or all others where there are
    fewer.

    No node's copies share a failure domain where domains suffice: where the greatest has no more
    than ``N // (mirrors + 1)`` nodes. Each node holds as many mirrors as any other, or one more.
    Copies lie outside the node's own parallel group too, one at least, where that can be had.
    ``before``: what holds now; what need not move then stays.

    Raises UsageError for doubled nodes or a negative number. About O(N log N); a repair costs O(N)
    for each mirror that moves.
    """
    nodes = [holder.node for holder in holders]
    if mirrors < 0 or len(set(nodes)) != len(nodes):
        raise UsageError(
            f"can't place mirrors of doubled nodes, or a negative number. nodes={len(nodes)} "
            f"mirrors={mirrors}"
        )
    count = min(mirrors, max(0, len(nodes) - 1))
    rules = MirrorRules(
        domains={holder.node: holder.domain for holder in holders},
        groups={holder.node: holder.group for holder in holders},
        mirrors=count,
    )
    if count == 0:
        return dict.fromkeys(sorted(nodes), ())
    if before is not None and (kept := repair_placement(rules, before)) is not None:
        return kept
    placed: dict[str, tuple[str, ...]] = {}
    grouped, rest = _split(rules)
    for group in grouped:
        for place, node in enumerate(group):
            placed[node] = tuple(group[place + 1 :] + group[:place])
    if rest:
        placed |= _ring(rules, rest)
    mended = repair_placement(rules, placed)
    return mended if mended is not None else {node: placed[node] for node in sorted(placed)}


def rename_nodes(placement: MirrorPlacement, successors: Mapping[str, str]) -> MirrorPlacement:
    """A placement in which nodes took over from others: what a lost node held, its successor is to
    hold."""
    name = {old: new for old, new in successors.items() if old in placement}
    return {
        name.get(node, node): tuple(name.get(one, one) for one in peers)
        for node, peers in placement.items()
    }


def _split(rules: MirrorRules) -> tuple[list[list[str]], list[str]]:
    """Groups of ``mirrors + 1``, and the rest where that does not divide their number; no domain
    outweighs in either."""
    size = rules.mirrors + 1
    by_domain: defaultdict[str, list[str]] = defaultdict(list)
    for node in sorted(rules.domains, key=lambda one: (rules.domains[one], rules.groups[one], one)):
        by_domain[rules.domains[node]].append(node)
    over = len(rules.domains) % size
    rest: list[str] = []
    wanted = size + over if over else 0
    while len(rest) < wanted:  # one of each domain, the greatest first, until there are enough
        for domain in sorted(by_domain, key=lambda one: (-len(by_domain[one]), one)):
            if len(rest) < wanted and by_domain[domain]:
                rest.append(by_domain[domain].pop())
    order = [node for domain in sorted(by_domain) for node in by_domain[domain]]
    pieces = len(order) // size
    return [
        [order[place + piece * pieces] for piece in range(size)] for place in range(pieces)
    ], rest


def _ring(rules: MirrorRules, rest: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Each holds those of the nodes before it in the ring."""
    ring = sorted(rest, key=lambda node: (rules.domains[node], node))
    return {
        node: tuple(ring[(place + further) % len(ring)] for further in range(1, rules.mirrors + 1))
        for place, node in enumerate(ring)
    }


# Which standby keeps which nodes' state as well, so that it has it when it takes a place. Pure.


def standby_copies(placed: Iterable[str], standbys: Iterable[str]) -> Mapping[str, str]:
    """For each node that holds ranks the standby that keeps its state; nothing where there are
    none.

    In turn, so that each standby keeps as many as any other, or one more. These copies come on top
    of the mirrors: a standby that has no room for all keeps what it can, and nobody waits for it.
    """
    ready = sorted(standbys)
    return {node: ready[at % len(ready)] for at, node in enumerate(sorted(placed))} if ready else {}
