"""The leader's decision: from a view of the membership to the next epoch, or the reason why there
is none. Pure.

Survivors keep their ranks. A lost placement goes to a standby with as many slots. If there is none,
the world shrinks if the job's minimum allows it, else the leader waits. A node that joins is a
standby: it gets ranks only if a place is free, or once the caller allows the world to grow. The
same view always gives the same epoch.
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

# ---- placement: which node takes which place
#
# A lost place goes to the standby that holds most of its ranks' state, so that the fewest bytes
# move; else to a standby of the failure domain with the fewest nodes in the epoch. Ties are
# resolved by place, then by node id.


def sorted_by_domain(members: Sequence[Member]) -> list[Member]:
    """Sorted by failure domain, host and node id, so that nodes near each other get neighbouring
    ranks.
    """
    return sorted(
        members, key=lambda member: (member.info.failure_domain, member.info.host, member.node)
    )


def fill_placements(
    places: Sequence[NodePlacement], live: Mapping[str, Member], standbys: Sequence[Member]
) -> tuple[tuple[NodePlacement, ...], list[Member]]:
    """``places`` with those of dead nodes given to standbys with as many slots, and the standbys
    that remain.

    A place that no standby fits is left out, and the ranks after it move up. O(n log n) in places,
    standbys and the ranks in their inventories.
    """
    lost = [number for number, place in enumerate(places) if place.node not in live]
    taken = _by_inventory(places, lost, standbys)
    used = set(taken.values())
    domains: Counter[str] = Counter(
        live[place.node].info.failure_domain for place in places if place.node in live
    )
    by_node = {member.node: member for member in standbys}
    domains.update(by_node[node].info.failure_domain for node in used)
    free = _FreeStandbys([member for member in standbys if member.node not in used], domains)
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
    """Places for a world with no survivor.

    Nodes that hold state of the ``old`` ranks take those, then the others.

    The world keeps its shape if there are nodes for all of its places; else the nodes are placed in
    sorted order.
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


def _by_inventory(
    places: Sequence[NodePlacement], lost: Sequence[int], standbys: Sequence[Member]
) -> dict[int, str]:
    """Which standby takes which lost place, of those that have state of its ranks in memory; the
    most bytes first.
    """
    world_size = sum(place.slots for place in places)
    place_of_rank: dict[int, int] = {}
    first = 0
    lost_places = set(lost)
    for number, place in enumerate(places):
        if number in lost_places:
            place_of_rank.update((rank, number) for rank in range(first, first + place.slots))
        first += place.slots
    bytes_in_memory: defaultdict[tuple[int, str], int] = defaultdict(int)
    for member in standbys:
        if member.inventory is None or member.inventory.world_size != world_size:
            continue
        for rank, size_bytes in member.inventory.size_bytes.items():
            if rank in place_of_rank and places[place_of_rank[rank]].slots == member.info.slots:
                bytes_in_memory[place_of_rank[rank], member.node] += size_bytes
    taken: dict[int, str] = {}
    used: set[str] = set()
    by_size = sorted(bytes_in_memory.items(), key=lambda item: (-item[1], item[0]))
    for (number, node), size_bytes in by_size:
        if size_bytes > 0 and number not in taken and node not in used:
            taken[number] = node
            used.add(node)
    return taken


class _FreeStandbys:
    """Unplaced standbys by slots and failure domain.

    The next one is of the domain with the fewest nodes in the epoch.

    One heap for each number of slots; its entries may be outdated in the count of their domain, and
    are corrected when they are popped. So taking a node is O(log n), not a pass over all domains.
    """

    def __init__(self, standbys: Sequence[Member], domains: Counter[str]) -> None:
        self._domains = domains
        self._nodes: defaultdict[tuple[int, str], list[str]] = defaultdict(list)
        for member in sorted(standbys, key=lambda member: member.node, reverse=True):
            self._nodes[member.info.slots, member.info.failure_domain].append(member.node)
        self._heaps: defaultdict[int, list[tuple[int, str, str]]] = defaultdict(list)
        for (slots, domain), nodes in self._nodes.items():
            heapq.heappush(self._heaps[slots], (domains[domain], nodes[-1], domain))

    def take(self, slots: int) -> str | None:
        """The next standby with exactly so many slots, or None."""
        heap = self._heaps[slots]
        while heap:
            count, node, domain = heapq.heappop(heap)
            if (
                count != self._domains[domain]
            ):  # a take for another number of slots used this domain
                heapq.heappush(heap, (self._domains[domain], node, domain))
                continue
            nodes = self._nodes[slots, domain]
            nodes.pop()
            self._domains[domain] += 1
            if nodes:
                heapq.heappush(heap, (self._domains[domain], nodes[-1], domain))
            return node
        return None


# ---- suspicions: whose death is certain enough to open an epoch without it
#
# One witness may be cut off itself. Two that agree are enough: being wrong costs one warm restart,
# and never state. If two halves of a job suspect each other, removing every node with two accusers
# would leave none. So the most accused node is removed first, and its own suspicions with it, until
# no node has enough accusers: one half is left.


def confirmed_suspects(view: View, witnesses_min: int) -> Mapping[str, str]:
    """The members that enough others suspect, and why.

    Suspicions by non-members, and by removed nodes, don't count.

    Of equally accused nodes the leader is removed last, else the one with the greatest id first.
    O(suspicions * removed nodes).
    """
    accusers: dict[str, dict[str, str]] = {}
    for suspicion in view.suspicions:
        node, by = suspicion.node, suspicion.by
        if node in view.by_node and by in view.by_node and node != by:
            accusers.setdefault(node, {})[by] = suspicion.reason
    leader = view.leader.node if view.leader is not None else ""
    suspects: dict[str, str] = {}
    while accusers:
        node = max(accusers, key=lambda name: (len(accusers[name]), name != leader, name))
        reasons = accusers.pop(node)
        if len(reasons) < witnesses_min:
            break
        first = min(reasons)
        suspects[node] = f"suspected by {len(reasons)} nodes, as {first} says: {reasons[first]}"
        for other in [other for other, by in accusers.items() if node in by]:
            accusers[other].pop(node)
            if not accusers[other]:
                accusers.pop(other)
    return suspects


def doubted_members(view: View, witnesses_min: int) -> tuple[str, ...]:
    """Members that some others suspect, but fewer than ``witnesses_min``."""
    confirmed = confirmed_suspects(view, witnesses_min)
    suspected = {
        suspicion.node
        for suspicion in view.suspicions
        if suspicion.by in view.by_node
        and suspicion.by not in confirmed
        and suspicion.by != suspicion.node
    }
    return tuple(
        sorted(node for node in suspected if node in view.by_node and node not in confirmed)
    )


# ---- the decision


EXPIRED_REASON = "its lease expired, or it left"


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipOptions:
    """What a job allows. Times in seconds.

    ``last_call_s``: how long the first epoch waits for more nodes once it has the minimum.
    ``shrink_wait_s``: how long a lost node may take to come back before the world shrinks.
    ``witnesses_min``: suspicions that make a death certain. ``may_grow``: training may be restarted
    now with more nodes. ``epoch_floor``: the greatest epoch seen anywhere else, in stores and
    keepers; new epochs exceed it. ``resumes``: the snapshot that a new epoch names to continue
    from.
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
            raise UsageError(f"invalid membership options. options={self}")


@dataclass(frozen=True, slots=True)
class WaitTimers:
    """Since when there are enough nodes for a first epoch, and since when a node of the epoch is
    lost. None: not so.
    """

    enough_since_s: float | None = None
    lost_since_s: float | None = None


@dataclass(frozen=True, slots=True)
class NewEpoch:
    """Publish ``record`` and delete the members ``remove``, in one transaction."""

    record: EpochRecord
    remove: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class KeepEpoch:
    """The epoch holds."""

    reason: str


@dataclass(frozen=True, slots=True)
class WaitForNodes:
    """No epoch now. Decide again when the view changes, at the latest at ``until_s``."""

    until_s: float
    reason: str


MembershipDecision = NewEpoch | KeepEpoch | WaitForNodes


@dataclass(frozen=True, slots=True)
class _Assessment:
    """A view, assessed: confirmed suspects and why, live members, lost places, and live members
    without a place.
    """

    view: View
    suspects: Mapping[str, str]
    live: Mapping[str, Member]
    lost: tuple[NodePlacement, ...]
    standbys: tuple[Member, ...]

    @property
    def gathers(self) -> bool:
        """Whether no rank has a survivor, so that the next epoch is made of any members."""
        epoch = self.view.epoch
        return epoch is None or len(self.lost) == len(epoch.places)


def update_timers(
    timers: WaitTimers, view: View, options: MembershipOptions, now_s: float
) -> WaitTimers:
    """The timers after ``view``.

    Call it for each view before ``decide``; the first call gets ``WaitTimers()``.
    """
    state = _assess(view, options)
    enough = state.gathers and len(state.live) >= options.nodes_min
    lost = not state.gathers and bool(state.lost)
    return WaitTimers(
        enough_since_s=_since(timers.enough_since_s, now_s) if enough else None,
        lost_since_s=_since(timers.lost_since_s, now_s) if lost else None,
    )


def _since(before_s: float | None, now_s: float) -> float:
    return now_s if before_s is None else before_s


def decide(
    view: View, timers: WaitTimers, options: MembershipOptions, now_s: float
) -> MembershipDecision:
    """What the leader of ``view`` does.

    ``timers`` is what ``update_timers`` returned for the same view.
    """
    if view.leader is None:
        return WaitForNodes(math.inf, "no node leads")
    state = _assess(view, options)
    if state.gathers:
        return _gather(state, timers, options, now_s)
    if state.lost:
        return _recover(state, timers, options, now_s)
    return _grow_or_keep(state, options)


def _assess(view: View, options: MembershipOptions) -> _Assessment:
    suspects = confirmed_suspects(view, options.witnesses_min)
    live = {member.node: member for member in view.members if member.node not in suspects}
    places = view.epoch.places if view.epoch is not None else ()
    placed = {place.node for place in places}
    return _Assessment(
        view,
        suspects,
        live,
        lost=tuple(place for place in places if place.node not in live),
        standbys=tuple(member for member in live.values() if member.node not in placed),
    )


def _gather(
    state: _Assessment, timers: WaitTimers, options: MembershipOptions, now_s: float
) -> MembershipDecision:
    count = len(state.live)
    if count < options.nodes_min:
        return WaitForNodes(math.inf, f"too few nodes. nodes={count} nodes_min={options.nodes_min}")
    if count < options.nodes_max:
        until_s = _since(timers.enough_since_s, now_s) + options.last_call_s
        if now_s < until_s:
            return WaitForNodes(
                until_s, f"last call for more nodes. nodes={count} nodes_max={options.nodes_max}"
            )
    old = state.view.epoch
    old_places = old.places if old is not None else ()
    places = place_all(tuple(state.live.values()), old_places, nodes_max=options.nodes_max)
    reason = "the first epoch" if old is None else f"no node of epoch {old.number} is left"
    return _new_epoch(state, places, options, f"{reason}. nodes={len(places)}")


def _recover(
    state: _Assessment, timers: WaitTimers, options: MembershipOptions, now_s: float
) -> MembershipDecision:
    assert state.view.epoch is not None
    old = state.view.epoch.places
    names = _named(state.lost)
    filled, left = fill_placements(old, state.live, state.standbys)
    limit = options.nodes_max if options.may_grow else min(len(old), options.nodes_max)
    places = _extended(filled, left, limit)
    if len(places) < options.nodes_min:
        return WaitForNodes(
            math.inf,
            f"{names} lost, too few nodes left. nodes={len(places)} nodes_min={options.nodes_min}",
        )
    if len(places) < len(old):
        until_s = _since(timers.lost_since_s, now_s) + options.shrink_wait_s
        if now_s < until_s:
            return WaitForNodes(
                until_s, f"{names} lost, and no standby: it may come back before the world shrinks"
            )
        return _new_epoch(
            state,
            places,
            options,
            f"{names} lost, and no standby: {len(places)} nodes go on without",
        )
    return _new_epoch(
        state, places, options, f"{names} lost: standbys take over. nodes={len(places)}"
    )


def _grow_or_keep(state: _Assessment, options: MembershipOptions) -> MembershipDecision:
    assert state.view.epoch is not None
    epoch = state.view.epoch
    places = _extended(epoch.places, state.standbys, options.nodes_max)
    if len(places) > len(epoch.places):
        if options.may_grow:
            return _new_epoch(
                state, places, options, f"the world grows at a boundary. nodes={len(places)}"
            )
        return KeepEpoch(f"{len(state.standbys)} standbys wait for a boundary")
    if doubted := doubted_members(state.view, options.witnesses_min):
        return KeepEpoch(f"suspected by too few: {doubted[0]} and {len(doubted) - 1} others")
    return KeepEpoch(f"all nodes of epoch {epoch.number} live. standbys={len(state.standbys)}")


def _extended(
    places: Sequence[NodePlacement], standbys: Sequence[Member], nodes_max: int
) -> tuple[NodePlacement, ...]:
    """``places``, followed by as many standbys as ``nodes_max`` allows.

    The ranks of ``places`` stay the same.
    """
    more = sorted_by_domain(standbys)[: max(0, nodes_max - len(places))]
    return (*places, *(NodePlacement(member.node, member.info.slots) for member in more))


def _new_epoch(
    state: _Assessment, places: tuple[NodePlacement, ...], options: MembershipOptions, reason: str
) -> NewEpoch:
    view = state.view
    assert view.leader is not None
    # The floor covers a keyspace whose data were lost: its epochs would begin anew, below those in
    # stores.
    greatest = max(options.epoch_floor, view.epoch.number if view.epoch is not None else 0)
    reasons = {place.node: EXPIRED_REASON for place in state.lost} | dict(state.suspects)
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
    return NewEpoch(record, tuple(sorted(state.suspects)), reason)


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:REASON_CHARS_MAX]


def _named(lost: Sequence[NodePlacement]) -> str:
    more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
    return f"node {lost[0].node}{more}"
