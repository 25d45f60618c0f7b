"""Which peers hold whose mirror. Pure, and the same answer for the same input.

N nodes, m mirrors each. Where m + 1 divides N the nodes form groups of m + 1 that hold each other's state; else as many groups
as can be, and a rest of up to 2m + 1 nodes in a ring. Fewer sets of nodes lose something that way than in one ring of all: only
the loss of a whole group does. Groups spread over failure domains: in the order of domains, cut into m + 1 pieces, the members
of a group stand at the same place of each piece, so that no two share a domain that is no greater than a piece.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckpt.cluster.membership.mirrors import Rules, repaired
from ckpt.errors import UsageError

Placement = Mapping[str, tuple[str, ...]]
"""For each node the peers that hold its mirrors."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A node that holds ranks. ``group``: a parallel group that may be lost or wrong as one; empty: none."""

    node: str
    domain: str
    group: str = ""


def place_mirrors(holders: Sequence[Holder], mirrors: int, *, before: Placement | None = None) -> Placement:
    """The peers that hold each node's mirrors: ``mirrors`` of them, or all others where there are fewer.

    No node's copies share a failure domain where domains suffice: where the greatest has no more than ``N // (mirrors + 1)``
    nodes. Each node holds as many mirrors as any other, or one more. Copies lie outside the node's own parallel group too,
    one at least, where that can be had. ``before``: what holds now; what need not move then stays.

    Raises UsageError for doubled nodes or a negative number. About O(N log N); a repair costs O(N) for each mirror that moves.
    """
    nodes = [holder.node for holder in holders]
    if mirrors < 0 or len(set(nodes)) != len(nodes):
        raise UsageError(
            f"can't place mirrors of doubled nodes, or a negative number. nodes={len(nodes)} mirrors={mirrors}"
        )
    count = min(mirrors, max(0, len(nodes) - 1))
    rules = Rules(
        domains={holder.node: holder.domain for holder in holders},
        groups={holder.node: holder.group for holder in holders},
        mirrors=count,
    )
    if count == 0:
        return dict.fromkeys(sorted(nodes), ())
    if before is not None and (kept := repaired(rules, before)) is not None:
        return kept
    placed: dict[str, tuple[str, ...]] = {}
    grouped, rest = _split(rules)
    for group in grouped:
        for place, node in enumerate(group):
            placed[node] = tuple(group[place + 1 :] + group[:place])
    if rest:
        placed |= _ring(rules, rest)
    mended = repaired(rules, placed)
    return mended if mended is not None else {node: placed[node] for node in sorted(placed)}


def renamed(placement: Placement, successors: Mapping[str, str]) -> Placement:
    """A placement in which nodes took over from others: what a lost node held, its successor is to hold."""
    name = {old: new for old, new in successors.items() if old in placement}
    return {name.get(node, node): tuple(name.get(one, one) for one in peers) for node, peers in placement.items()}


def _split(rules: Rules) -> tuple[list[list[str]], list[str]]:
    """Groups of ``mirrors + 1``, and the rest where that does not divide their number; no domain outweighs in either."""
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
    return [[order[place + piece * pieces] for piece in range(size)] for place in range(pieces)], rest


def _ring(rules: Rules, rest: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Each holds those of the nodes before it in the ring."""
    ring = sorted(rest, key=lambda node: (rules.domains[node], node))
    return {
        node: tuple(ring[(place + further) % len(ring)] for further in range(1, rules.mirrors + 1))
        for place, node in enumerate(ring)
    }
