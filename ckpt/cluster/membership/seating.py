"""Which node takes which place. Pure, and the same answer for the same input.

A lost place goes to the standby that holds most of its ranks' state, so that the fewest bytes move; else to one of the failure
domain that has the fewest nodes in the epoch. Ties go by place, then by node id.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from ckpt.cluster.membership.records import Member, Place


def in_order(members: Sequence[Member]) -> list[Member]:
    """Neighbours beside each other: by failure domain, host and node id."""
    return sorted(members, key=lambda one: (one.info.failure_domain, one.info.host, one.node))


def fill(
    places: Sequence[Place], live: Mapping[str, Member], standbys: Sequence[Member]
) -> tuple[tuple[Place, ...], list[Member]]:
    """``places`` with those of nodes that don't live given to standbys of as many slots, and the standbys that are left.

    A place that none fits is left out, and the ranks after it move up. O((places + standbys + holdings) * log).
    """
    lost = [number for number, place in enumerate(places) if place.node not in live]
    taken = _by_holdings(places, lost, standbys)
    used = set(taken.values())
    domains: Counter[str] = Counter(live[place.node].info.failure_domain for place in places if place.node in live)
    by_node = {member.node: member for member in standbys}
    domains.update(by_node[node].info.failure_domain for node in used)
    free = _Free([member for member in standbys if member.node not in used], domains)
    for number in lost:
        if number not in taken and (node := free.take(places[number].slots)) is not None:
            taken[number] = node
    filled = tuple(
        Place(taken.get(number, place.node), place.slots)
        for number, place in enumerate(places)
        if place.node in live or number in taken
    )
    used = set(taken.values())
    return filled, [member for member in standbys if member.node not in used]


def seat_all(live: Sequence[Member], old: Sequence[Place], *, nodes_max: int) -> tuple[Place, ...]:
    """Places for a world of which nobody lives: whoever holds state of the ``old`` one's ranks takes them, then the rest.

    The world keeps its shape where there are nodes for all of its places; else nodes are placed side by side.
    """
    if 0 < len(old) <= nodes_max:
        filled, left = fill(old, {}, live)
        if len(filled) == len(old):
            more = in_order(left)[: nodes_max - len(filled)]
            return (*filled, *(Place(member.node, member.info.slots) for member in more))
    return tuple(Place(member.node, member.info.slots) for member in in_order(live)[:nodes_max])


def _by_holdings(places: Sequence[Place], lost: Sequence[int], standbys: Sequence[Member]) -> dict[int, str]:
    """Lost places and who takes them, where somebody holds state of their ranks: the greatest holding first."""
    world_size = sum(place.slots for place in places)
    of_rank: dict[int, int] = {}
    first = 0
    wanted = set(lost)
    for number, place in enumerate(places):
        if number in wanted:
            of_rank.update((rank, number) for rank in range(first, first + place.slots))
        first += place.slots
    held: defaultdict[tuple[int, str], int] = defaultdict(int)
    for member in standbys:
        if member.holdings is None or member.holdings.world_size != world_size:
            continue
        for rank, size_bytes in member.holdings.size_bytes.items():
            if rank in of_rank and places[of_rank[rank]].slots == member.info.slots:
                held[of_rank[rank], member.node] += size_bytes
    taken: dict[int, str] = {}
    used: set[str] = set()
    for (number, node), size_bytes in sorted(held.items(), key=lambda item: (-item[1], item[0])):
        if size_bytes > 0 and number not in taken and node not in used:
            taken[number] = node
            used.add(node)
    return taken


class _Free:
    """Standbys by slots and failure domain; the domain with the fewest nodes in the epoch gives the next one."""

    def __init__(self, standbys: Sequence[Member], domains: Counter[str]) -> None:
        self._domains = domains
        self._nodes: defaultdict[tuple[int, str], list[str]] = defaultdict(list)
        for member in sorted(standbys, key=lambda one: one.node, reverse=True):
            self._nodes[member.info.slots, member.info.failure_domain].append(member.node)
        self._heaps: defaultdict[int, list[tuple[int, str, str]]] = defaultdict(list)
        for (slots, domain), nodes in self._nodes.items():
            heapq.heappush(self._heaps[slots], (domains[domain], nodes[-1], domain))

    def take(self, slots: int) -> str | None:
        """The next standby of so many slots."""
        heap = self._heaps[slots]
        while heap:
            count, node, domain = heapq.heappop(heap)
            if count != self._domains[domain]:  # another number of slots took one of this domain meanwhile
                heapq.heappush(heap, (self._domains[domain], node, domain))
                continue
            nodes = self._nodes[slots, domain]
            nodes.pop()
            self._domains[domain] += 1
            if nodes:
                heapq.heappush(heap, (self._domains[domain], nodes[-1], domain))
            return node
        return None
