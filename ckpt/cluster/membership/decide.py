"""What the leader does about what it sees. Pure: a view, what was noticed and the clock in; a new
epoch, or why none.

Survivors keep their ranks. Lost places go to standbys of as many slots; where there is none the
world shrinks, if the job's minimum allows, or waits. A node that comes is a standby: it disturbs
nobody until the caller says that training stands at a boundary where the world may grow. The same
view always gives the same epoch.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckpt.cluster.membership.records import (
    REASON_CHARS_MAX,
    REMOVED_MAX,
    EpochRecord,
    Member,
    NodePlacement,
    RemovedNode,
    View,
)
from ckpt.errors import UsageError
from ckpt.values import SnapshotId

# Which node takes which place. Pure, and the same answer for the same input.
#
# A lost place goes to the standby that holds most of its ranks' state, so that the fewest bytes
# move; else to one of the failure domain that has the fewest nodes in the epoch. Ties go by
# place, then by node id.


def sorted_by_domain(members: Sequence[Member]) -> list[Member]:
    """Neighbours beside each other: by failure domain, host and node id."""
    return sorted(members, key=lambda one: (one.info.failure_domain, one.info.host, one.node))


def fill_placements(
    places: Sequence[NodePlacement], live: Mapping[str, Member], standbys: Sequence[Member]
) -> tuple[tuple[NodePlacement, ...], list[Member]]:
    """``places`` with those of nodes that don't live given to standbys of as many slots, and the
    standbys that are left.

    A place that none fits is left out, and the ranks after it move up. O((places + standbys +
    holdings) * log).
    """
    lost = [number for number, place in enumerate(places) if place.node not in live]
    taken = _by_holdings(places, lost, standbys)
    used = set(taken.values())
    domains: Counter[str] = Counter(
        live[place.node].info.failure_domain for place in places if place.node in live
    )
    by_node = {member.node: member for member in standbys}
    domains.update(by_node[node].info.failure_domain for node in used)
    free = _Free([member for member in standbys if member.node not in used], domains)
    for number in lost:
        if number not in taken and (node := free.take(places[number].slots)) is not None:
            taken[number] = node
    filled = tuple(
        NodePlacement(taken.get(number, place.node), place.slots)
        for number, place in enumerate(places)
        if place.node in live or number in taken
    )
    used = set(taken.values())
    return filled, [member for member in standbys if member.node not in used]


def place_all(
    live: Sequence[Member], old: Sequence[NodePlacement], *, nodes_max: int
) -> tuple[NodePlacement, ...]:
    """Places for a world of which nobody lives: whoever holds state of the ``old`` one's ranks
    takes them, then the rest.

    The world keeps its shape where there are nodes for all of its places; else nodes are placed
    side by side.
    """
    if 0 < len(old) <= nodes_max:
        filled, left = fill_placements(old, {}, live)
        if len(filled) == len(old):
            more = sorted_by_domain(left)[: nodes_max - len(filled)]
            return (*filled, *(NodePlacement(member.node, member.info.slots) for member in more))
    return tuple(
        NodePlacement(member.node, member.info.slots)
        for member in sorted_by_domain(live)[:nodes_max]
    )


def _by_holdings(
    places: Sequence[NodePlacement], lost: Sequence[int], standbys: Sequence[Member]
) -> dict[int, str]:
    """Lost places and who takes them, where somebody holds state of their ranks: the greatest
    holding first."""
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
        if member.inventory is None or member.inventory.world_size != world_size:
            continue
        for rank, size_bytes in member.inventory.size_bytes.items():
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
    """Standbys by slots and failure domain; the domain with the fewest nodes in the epoch gives the
    next one."""

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
            if (
                count != self._domains[domain]
            ):  # another number of slots took one of this domain meanwhile
                heapq.heappush(heap, (self._domains[domain], node, domain))
                continue
            nodes = self._nodes[slots, domain]
            nodes.pop()
            self._domains[domain] += 1
            if nodes:
                heapq.heappush(heap, (self._domains[domain], nodes[-1], domain))
            return node
        return None


# Whose death is certain enough. Pure: the words of witnesses in, the nodes to be taken out and
# why.
#
# One witness may be cut off itself. Two that agree are enough, since being wrong costs an epoch
# and no state. Where two halves of a job suspect each other, taking out everybody that has two
# accusers would leave nobody: so the most accused goes first, and with it goes its own word.


def confirmed_suspects(view: View, witnesses_min: int) -> Mapping[str, str]:
    """The members that enough others suspect, and why. Words of nodes that are no members, or are
    taken out, don't count.

    O(suspicions * nodes taken out). Of equally accused nodes a leader goes last, else the one with
    the greatest id first.
    """
    accusers: dict[str, dict[str, str]] = {}
    for one in view.suspicions:
        if one.node in view.by_node and one.by in view.by_node and one.node != one.by:
            accusers.setdefault(one.node, {})[one.by] = one.reason
    leader = view.leader.node if view.leader is not None else ""
    out: dict[str, str] = {}
    while accusers:
        node = max(accusers, key=lambda name: (len(accusers[name]), name != leader, name))
        words = accusers.pop(node)
        if len(words) < witnesses_min:
            break
        out[node] = _why(words)
        for of in [of for of, by in accusers.items() if node in by]:
            accusers[of].pop(node)
            if not accusers[of]:
                accusers.pop(of)
    return out


def _why(words: Mapping[str, str]) -> str:
    first = min(words)
    return f"suspected by {len(words)} nodes, as {first} says: {words[first]}"


def doubted_members(view: View, witnesses_min: int) -> tuple[str, ...]:
    """Members that somebody suspects, but too few."""
    out = confirmed_suspects(view, witnesses_min)
    words = {
        one.node
        for one in view.suspicions
        if one.by in view.by_node and one.by not in out and one.by != one.node
    }
    return tuple(sorted(node for node in words if node in view.by_node and node not in out))


EXPIRED_REASON = "its lease expired, or it left"


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipOptions:
    """What a job allows. Times in seconds.

    ``last_call_s``: how long the first epoch waits for more nodes once it has the minimum.
    ``shrink_wait_s``: how long a lost node may take to come back before the world shrinks.
    ``may_grow``: training stands at a boundary where it may be started anew with more nodes.
    ``epoch_floor``: the greatest epoch seen anywhere else, in stores and keepers. ``resumes``: the
    hint that a new epoch carries.
    """

    nodes_min: int
    nodes_max: int
    last_call_s: float = 5.0
    shrink_wait_s: float = 0.0
    witnesses_min: int = 2
    may_grow: bool = False
    epoch_floor: int = 0
    resumes: SnapshotId | None = None

    def __post_init__(self) -> None:
        if (
            not 1 <= self.nodes_min <= self.nodes_max
            or self.witnesses_min < 1
            or self.epoch_floor < 0
        ):
            raise UsageError(f"not what a job can allow. options={self}")


@dataclass(frozen=True, slots=True)
class WaitTimers:
    """Since when the leader sees that there are enough nodes for a first epoch, and since when one
    of the epoch's is lost."""

    enough_since_s: float | None = None
    lost_since_s: float | None = None


@dataclass(frozen=True, slots=True)
class NewEpoch:
    """Publish ``record`` and delete what ``remove`` wrote, in one transaction."""

    record: EpochRecord
    remove: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class KeepEpoch:
    """The epoch holds."""

    reason: str


@dataclass(frozen=True, slots=True)
class WaitForNodes:
    """Not now: look again when the view changes, at the latest at ``until_s``."""

    until_s: float
    reason: str


MembershipDecision = NewEpoch | KeepEpoch | WaitForNodes


@dataclass(frozen=True, slots=True)
class _Seen:
    """A view, sorted: who is out and why, who lives, which places are lost."""

    view: View
    out: Mapping[str, str]
    live: Mapping[str, Member]
    lost: tuple[NodePlacement, ...]
    standbys: tuple[Member, ...]

    @property
    def gathers(self) -> bool:
        """Whether nobody holds a rank, so that an epoch is made of whoever is there."""
        epoch = self.view.epoch
        return epoch is None or len(self.lost) == len(epoch.places)


def update_timers(
    noticed: WaitTimers, view: View, options: MembershipOptions, now_s: float
) -> WaitTimers:
    """What is to be remembered from one view to the next: since when nodes are enough, or lost.
    Start with ``WaitTimers()``."""
    seen = _see(view, options)
    enough = seen.gathers and len(seen.live) >= options.nodes_min
    lost = not seen.gathers and bool(seen.lost)
    return WaitTimers(
        enough_since_s=(now_s if noticed.enough_since_s is None else noticed.enough_since_s)
        if enough
        else None,
        lost_since_s=(now_s if noticed.lost_since_s is None else noticed.lost_since_s)
        if lost
        else None,
    )


def decide(
    view: View, noticed: WaitTimers, options: MembershipOptions, now_s: float
) -> MembershipDecision:
    """What the leader of ``view`` does. ``noticed`` is what ``notice`` made of the same view."""
    if view.leader is None:
        return WaitForNodes(math.inf, "nobody leads")
    seen = _see(view, options)
    if seen.gathers:
        return _gather(seen, noticed, options, now_s)
    if seen.lost:
        return _recover(seen, noticed, options, now_s)
    return _grow_or_keep(seen, options)


def _see(view: View, options: MembershipOptions) -> _Seen:
    out = confirmed_suspects(view, options.witnesses_min)
    live = {member.node: member for member in view.members if member.node not in out}
    places = view.epoch.places if view.epoch is not None else ()
    placed = {place.node for place in places}
    return _Seen(
        view,
        out,
        live,
        lost=tuple(place for place in places if place.node not in live),
        standbys=tuple(member for member in live.values() if member.node not in placed),
    )


def _gather(
    seen: _Seen, noticed: WaitTimers, options: MembershipOptions, now_s: float
) -> MembershipDecision:
    count = len(seen.live)
    if count < options.nodes_min:
        return WaitForNodes(math.inf, f"too few nodes. nodes={count} nodes_min={options.nodes_min}")
    if count < options.nodes_max:
        until_s = (
            now_s if noticed.enough_since_s is None else noticed.enough_since_s
        ) + options.last_call_s
        if now_s < until_s:
            return WaitForNodes(
                until_s, f"last call for more nodes. nodes={count} nodes_max={options.nodes_max}"
            )
    old = seen.view.epoch
    places = place_all(
        tuple(seen.live.values()),
        old.places if old is not None else (),
        nodes_max=options.nodes_max,
    )
    why = "the first epoch" if old is None else f"no node of epoch {old.number} is left"
    return _opened(seen, places, options, f"{why}. nodes={len(places)}")


def _recover(
    seen: _Seen, noticed: WaitTimers, options: MembershipOptions, now_s: float
) -> MembershipDecision:
    assert seen.view.epoch is not None
    old = seen.view.epoch.places
    names = _named(seen.lost)
    filled, left = fill_placements(old, seen.live, seen.standbys)
    limit = options.nodes_max if options.may_grow else min(len(old), options.nodes_max)
    places = _extended(filled, left, limit)
    if len(places) < options.nodes_min:
        return WaitForNodes(
            math.inf,
            f"{names} lost, too few nodes left. nodes={len(places)} nodes_min={options.nodes_min}",
        )
    if len(places) < len(old):
        until_s = (
            now_s if noticed.lost_since_s is None else noticed.lost_since_s
        ) + options.shrink_wait_s
        if now_s < until_s:
            return WaitForNodes(
                until_s, f"{names} lost, and no standby: it may come back before the world shrinks"
            )
        return _opened(
            seen,
            places,
            options,
            f"{names} lost, and no standby: {len(places)} nodes go on without",
        )
    return _opened(seen, places, options, f"{names} lost: standbys take over. nodes={len(places)}")


def _grow_or_keep(seen: _Seen, options: MembershipOptions) -> MembershipDecision:
    assert seen.view.epoch is not None
    epoch = seen.view.epoch
    places = _extended(epoch.places, seen.standbys, options.nodes_max)
    if len(places) > len(epoch.places):
        if options.may_grow:
            return _opened(
                seen, places, options, f"the world grows at a boundary. nodes={len(places)}"
            )
        return KeepEpoch(f"{len(seen.standbys)} standbys wait for a boundary")
    if doubts := doubted_members(seen.view, options.witnesses_min):
        return KeepEpoch(f"suspected by too few: {doubts[0]} and {len(doubts) - 1} others")
    return KeepEpoch(f"all nodes of epoch {epoch.number} live. standbys={len(seen.standbys)}")


def _extended(
    places: Sequence[NodePlacement], standbys: Sequence[Member], nodes_max: int
) -> tuple[NodePlacement, ...]:
    """``places`` and, after them, as many standbys as may be: those before them keep their
    ranks."""
    more = sorted_by_domain(standbys)[: max(0, nodes_max - len(places))]
    return (*places, *(NodePlacement(member.node, member.info.slots) for member in more))


def _opened(
    seen: _Seen, places: tuple[NodePlacement, ...], options: MembershipOptions, why: str
) -> NewEpoch:
    view = seen.view
    assert view.leader is not None
    greatest = max(options.epoch_floor, view.epoch.number if view.epoch is not None else 0)
    reasons = {place.node: EXPIRED_REASON for place in seen.lost} | dict(seen.out)
    removed = tuple(
        RemovedNode(node, _printable(reasons[node])) for node in sorted(reasons)[:REMOVED_MAX]
    )
    record = EpochRecord(
        job=view.job,
        number=greatest + 1,
        places=places,
        leader=view.leader.node,
        nodes_min=options.nodes_min,
        nodes_max=options.nodes_max,
        removed=removed,
        resumes=options.resumes,
    )
    return NewEpoch(record, tuple(sorted(seen.out)), why)


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:REASON_CHARS_MAX]


def _named(lost: Sequence[NodePlacement]) -> str:
    more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
    return f"node {lost[0].node}{more}"
