"""Mirror placement: which peers keep copies of which node's state. Pure.

Given N nodes and m mirrors each, nodes form groups of m + 1 that hold each other's state if m + 1
divides N; else as many groups as possible, and a rest of up to 2m + 1 nodes in a ring. Only the
loss of a whole group loses state then: fewer sets of nodes are fatal than in one ring of all.
Groups spread over failure domains: the nodes, in the order of domains, are cut into m + 1 pieces,
and a group has the node at the same position of each piece. So no two of its members share a
domain, unless the domain is larger than a piece.

After a loss or a join, the old placement is repaired one mirror at a time, by the shortest chain of
moves: a mirror goes to a node that may take it; if that node has its load already, one of its
mirrors moves on to another node, and so on.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ckpt.errors import UsageError

CHAIN_MAX = 6
"""Moves in one chain of a repair; beyond that a fresh placement is as good."""


@dataclass(frozen=True, slots=True)
class MirrorRules:
    """The constraints of a placement: each node's domain and parallel group, and the number of
    mirrors, which is below the number of nodes."""

    domains: Mapping[str, str]
    groups: Mapping[str, str]
    mirrors: int

    @property
    def apart(self) -> bool:
        """Whether there are domains enough to keep all copies of a node in different ones."""
        return max(Counter(self.domains.values()).values()) <= len(self.domains) // (
            self.mirrors + 1
        )


class _Draft:
    """A placement under repair: ``peers`` hold a node's mirrors; ``held`` are the nodes whose
    mirrors a peer holds."""

    def __init__(self, rules: MirrorRules, kept: Mapping[str, Iterable[str]]) -> None:
        self.rules = rules
        self.apart = rules.apart
        self.peers: dict[str, list[str]] = {node: [] for node in sorted(rules.domains)}
        self.held: dict[str, list[str]] = {node: [] for node in sorted(rules.domains)}
        for node in self.peers:
            for peer in kept.get(node, ()):
                # A repair keeps what the rules allow; a peer with too many loses the last ones.
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
        others = [node, *(other for other in self.peers[node] if other != instead)]
        return domains[peer] not in {domains[other] for other in others}

    def has_room(self, peer: str) -> bool:
        return len(self.held[peer]) < self.rules.mirrors

    def give(self, node: str, peer: str) -> None:
        self.peers[node].append(peer)
        self.held[peer].append(node)

    def take(self, node: str, peer: str) -> None:
        self.peers[node].remove(peer)
        self.held[peer].remove(node)

    def is_right(self) -> bool:
        """Whether the whole placement keeps to the rules. ``may`` checks the moves of a chain one
        by one, so that together they may break a rule."""
        domains = self.rules.domains
        for node, peers in self.peers.items():
            copies = {node, *peers}
            if len(copies) != self.rules.mirrors + 1 or len(self.held[node]) != self.rules.mirrors:
                return False
            if self.apart and len({domains[copy] for copy in copies}) != len(copies):
                return False
        return True

    def add_mirror(self, node: str, free: list[str]) -> bool:
        """Give ``node`` one more mirror, by the shortest chain of moves (breadth first) that ends
        at a node of ``free``; False if there is none."""
        # For each node that a chain reached: whose mirror it would take, and from which node ("":
        # a new one). Read backwards from the end, it is the chain.
        reached: dict[str, tuple[str, str]] = {}
        if self._end_chain(node, "", free, reached):
            return True
        todo: deque[tuple[str, str, int]] = deque([(node, "", 1)])
        while todo:
            moving, leaving, length = todo.popleft()
            for peer in self.held:
                if peer in reached or not self.may(moving, peer, leaving):
                    continue
                reached[peer] = (moving, leaving)
                for further in self.held[peer]:
                    if further != moving and self._end_chain(further, peer, free, reached):
                        return True
                    if length < CHAIN_MAX:
                        todo.append((further, peer, length + 1))
        return False

    def _end_chain(
        self, moving: str, leaving: str, free: list[str], reached: dict[str, tuple[str, str]]
    ) -> bool:
        """Whether a node with room may take this mirror; then the moves of the chain are made."""
        for peer in free:
            if peer not in reached and self.may(moving, peer, leaving):
                reached[peer] = (moving, leaving)
                self._make_moves(peer, reached)
                return True
        return False

    def _make_moves(self, end: str, reached: Mapping[str, tuple[str, str]]) -> None:
        peer = end
        while True:
            node, leaving = reached[peer]
            if leaving:
                self.take(node, leaving)
            self.give(node, peer)
            if not leaving:
                return
            peer = leaving


def repair_placement(
    rules: MirrorRules, kept: Mapping[str, Iterable[str]]
) -> dict[str, tuple[str, ...]] | None:
    """``kept``, repaired with few moves; None if no short chain of moves repairs it."""
    draft = _Draft(rules, kept)
    for node in draft.peers:
        while len(draft.peers[node]) < rules.mirrors:
            free = [peer for peer in draft.held if draft.has_room(peer)]
            if not draft.add_mirror(node, free):
                return None
    _leave_groups(draft)
    return {node: tuple(peers) for node, peers in draft.peers.items()} if draft.is_right() else None


def _leave_groups(draft: _Draft) -> None:
    """Swap one peer of a node with another node's if all of its copies are in its own parallel
    group, which may be lost as one."""
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
                    after = [kept for kept in theirs if kept != further] + [peer]
                    if not _all_in_group(groups, other, after):
                        draft.take(node, peer)
                        draft.take(other, further)
                        draft.give(node, further)
                        draft.give(other, peer)
                        return


def _all_in_group(groups: Mapping[str, str], node: str, peers: Iterable[str]) -> bool:
    return bool(groups[node]) and all(groups[peer] == groups[node] for peer in peers)


# ---- placement

MirrorPlacement = Mapping[str, tuple[str, ...]]
"""For each node the peers that hold its mirrors."""


@dataclass(frozen=True, slots=True)
class RankHolder:
    """A node that holds ranks. ``group``: its parallel group, which may be lost, or wrong, as one;
    empty: none."""

    node: str
    domain: str
    group: str = ""


def place_mirrors(
    holders: Sequence[RankHolder], mirrors: int, *, before: MirrorPlacement | None = None
) -> MirrorPlacement:
    """The peers that hold each node's mirrors: ``mirrors`` of them, or all others if there are
    fewer. Equal input gives equal output.

    A node's copies are in different failure domains if the largest domain has at most
    ``N // (mirrors + 1)`` nodes. Each node holds as many mirrors as any other, or one more. If
    possible, at least one copy is outside the node's own parallel group. ``before``: the current
    placement, of which as much as possible stays.

    Raises UsageError for duplicate nodes or a negative number. About O(N log N); a repair costs
    O(N) for each mirror that moves.
    """
    nodes = [holder.node for holder in holders]
    if mirrors < 0 or len(set(nodes)) != len(nodes):
        raise UsageError(
            f"can't place mirrors of duplicate nodes, or a negative number. nodes={len(nodes)} "
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
        for position, node in enumerate(group):
            placed[node] = tuple(group[position + 1 :] + group[:position])
    if rest:
        placed |= _ring(rules, rest)
    # Groups and ring know nothing of parallel groups, nor of a domain that spans two pieces.
    repaired = repair_placement(rules, placed)
    return repaired if repaired is not None else {node: placed[node] for node in sorted(placed)}


def _split(rules: MirrorRules) -> tuple[list[list[str]], list[str]]:
    """Groups of ``mirrors + 1`` nodes, and the rest if that does not divide their number; the rest
    is taken from the largest domains, evenly."""
    size = rules.mirrors + 1
    by_domain: defaultdict[str, list[str]] = defaultdict(list)
    for node in sorted(
        rules.domains, key=lambda node: (rules.domains[node], rules.groups[node], node)
    ):
        by_domain[rules.domains[node]].append(node)
    over = len(rules.domains) % size
    rest: list[str] = []
    rest_size = size + over if over else 0
    while len(rest) < rest_size:  # one node of each domain, the largest first, until it is full
        for domain in sorted(by_domain, key=lambda domain: (-len(by_domain[domain]), domain)):
            if len(rest) < rest_size and by_domain[domain]:
                rest.append(by_domain[domain].pop())
    order = [node for domain in sorted(by_domain) for node in by_domain[domain]]
    pieces = len(order) // size
    groups = [
        [order[position + piece * pieces] for piece in range(size)] for position in range(pieces)
    ]
    return groups, rest


def _ring(rules: MirrorRules, rest: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Each node's mirrors are on the nodes that follow it in a ring."""
    ring = sorted(rest, key=lambda node: (rules.domains[node], node))
    return {
        node: tuple(ring[(position + ahead) % len(ring)] for ahead in range(1, rules.mirrors + 1))
        for position, node in enumerate(ring)
    }


# ---- standbys


def standby_copies(placed: Iterable[str], standbys: Iterable[str]) -> Mapping[str, str]:
    """The standby that keeps a copy of each node's state, so that it has that state when it takes a
    lost node's place. Empty if there are no standbys.

    Each standby keeps as many copies as any other, or one more. They come on top of the mirrors: a
    standby with too little memory keeps what it can, and no node waits for it.
    """
    ready = sorted(standbys)
    if not ready:
        return {}
    return {node: ready[number % len(ready)] for number, node in enumerate(sorted(placed))}
