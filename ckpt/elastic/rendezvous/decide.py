"""The decisions of agents: rounds, restarts, and what stands in for agents that are gone. Pure.

A view, the time and what was noticed go in; a decision with its reason comes out. A round is made
of waiting agents, and only if no agent runs the one before: so running agents are first asked, by
``restart_request``, to stop their workers. If keepers hold the job together, no running agent is
ever asked: lost places go to waiting agents, and the others continue.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import msgspec

from ckpt.cluster.membership.decide import fill_placements, place_all, sorted_by_domain
from ckpt.cluster.membership.records import EpochRecord, Member, NodePlacement, View
from ckpt.errors import IntegrityError
from ckpt.format.canonical import prepare_decoders

# What agents know of each other: who waits, who runs which round, and what a round is. Pure.

WAITING = "waiting"
RUNNING = "running"
ALONE = "alone"


class AgentStatus(msgspec.Struct, frozen=True):
    """What an agent publishes about itself. ``round``: the last one it was in, 0 for none.

    ``doing`` is ``waiting`` at the barrier, ``running`` the workers of that round, or ``alone``:
    running workers without a round, as on a standby whose keeper is warm, and after a return to a
    job that its keepers hold together.
    """

    doing: str
    round: int = 0


class _Note(msgspec.Struct, frozen=True):
    lease: int


prepare_decoders(AgentStatus, _Note)


def encode_status(seat: AgentStatus) -> bytes:
    """The stored bytes of a status."""
    return msgspec.json.encode(seat)


def decode_status(data: bytes) -> AgentStatus | None:
    """The status in ``data``, which is untrusted; None if it is invalid."""
    try:
        return msgspec.json.decode(data, type=AgentStatus)
    except msgspec.MsgspecError:
        return None


def agent_of(node: str) -> str:
    """The agent of a node id.

    An agent that lost its membership joins again under another node id.
    """
    return node.rpartition("-")[0]


@dataclass(frozen=True, slots=True)
class RendezvousRound:
    """A numbered world of agents, in the order of their ranks.

    ``lease`` keeps the keys of its store.
    """

    number: int
    agents: tuple[str, ...]
    lease: int


def encode_round_note(lease: int) -> str:
    """The note in the epoch's record."""
    return msgspec.json.encode(_Note(lease)).decode()


def round_of(record: EpochRecord) -> RendezvousRound:
    """The round that an epoch is. Raises IntegrityError if no agent wrote it."""
    try:
        note = msgspec.json.decode(record.note.encode(), type=_Note)
    except msgspec.MsgspecError as error:
        raise IntegrityError(
            f"an epoch that no agent wrote. job={record.job} epoch={record.number}"
        ) from error
    return RendezvousRound(
        record.number, tuple(agent_of(place.node) for place in record.places), note.lease
    )


@dataclass(frozen=True)
class AgentsView:
    """All agents at one revision.

    ``kept_by_keepers``: keepers hold the job together. ``closed``: why the rendezvous is closed,
    or None.
    """

    view: View
    statuses: Mapping[str, AgentStatus]
    kept_by_keepers: bool = False
    closed: str | None = None

    @cached_property
    def round(self) -> RendezvousRound | None:
        """The newest round."""
        return None if self.view.epoch is None else round_of(self.view.epoch)

    @cached_property
    def live(self) -> Mapping[str, Member]:
        """The members by agent: the newest, if an older membership has not expired yet."""
        found: dict[str, Member] = {}
        for member in sorted(self.view.members, key=lambda one: one.joined_revision):
            found[agent_of(member.node)] = member
        return found

    def status(self, agent: str) -> AgentStatus | None:
        """The status of a live agent; None if it is gone or has not published one."""
        member = self.live.get(agent)
        return None if member is None else self.statuses.get(member.node)

    @cached_property
    def lost(self) -> tuple[str, ...]:
        """The agents of the round that are gone."""
        return tuple(one for one in self._agents if one not in self.live)

    @cached_property
    def returned(self) -> tuple[str, ...]:
        """The agents of the round that have left it and wait for another one."""
        return tuple(one for one in self._agents if self._waits(one) and self._been(one))

    @cached_property
    def running(self) -> tuple[str, ...]:
        """The agents of the round that run it, or are about to."""
        alone = [
            one
            for one in self._agents
            if (seat := self.status(one)) is not None and seat.doing == ALONE
        ]
        return tuple(one for one in self._agents if one not in {*self.lost, *self.returned, *alone})

    @cached_property
    def newcomers(self) -> tuple[str, ...]:
        """The waiting agents that are not in the round."""
        return tuple(one for one in self.live if one not in self._agents and self._waits(one))

    @property
    def _agents(self) -> tuple[str, ...]:
        return () if self.round is None else self.round.agents

    def _waits(self, agent: str) -> bool:
        seat = self.status(agent)
        return seat is not None and seat.doing == WAITING

    def _been(self, agent: str) -> bool:
        seat = self.status(agent)
        return seat is not None and self.round is not None and seat.round >= self.round.number


REJOIN_S = 1.0
"""How long an agent may take to join again before its round counts as broken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RendezvousRules:
    """What a job allows.

    ``last_call_s``: how long a first round waits for more agents than the minimum.
    ``shrink_wait_s``: how long a later round waits for as many agents as before. ``warm``: agents
    that no round needs start their workers all the same. ``grow``: a job with fewer agents than
    its maximum restarts when one more arrives.
    """

    agents_min: int
    agents_max: int
    last_call_s: float = 30.0
    shrink_wait_s: float = 5.0
    warm: bool = False
    grow: bool = False


@dataclass(frozen=True, slots=True)
class PublishRound:
    """Make this the next round."""

    places: tuple[NodePlacement, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class HoldRound:
    """Not now: look again after a change, at the latest at ``until_s``."""

    until_s: float
    reason: str


def update_enough_since(
    enough_since_s: float | None, look: AgentsView, rules: RendezvousRules, now_s: float
) -> float | None:
    """Since when there are enough agents for a round, by the leader's clock. Start with None."""
    enough = not look.running and len(look.returned) + len(look.newcomers) >= rules.agents_min
    return (now_s if enough_since_s is None else enough_since_s) if enough else None


def next_round(
    look: AgentsView, enough_since_s: float | None, rules: RendezvousRules, now_s: float
) -> PublishRound | HoldRound:
    """The leader's decision.

    ``enough_since_s`` is from ``update_enough_since`` for the same view.
    """
    if look.closed is not None:
        return HoldRound(math.inf, f"the rendezvous is closed: {look.closed}")
    if look.kept_by_keepers:
        return _replace(look)
    if look.running:
        return HoldRound(math.inf, f"agents of the round still run. agents={len(look.running)}")
    return _gather(look, enough_since_s, rules, now_s)


def _replace(look: AgentsView) -> PublishRound | HoldRound:
    """Give the places of agents that are gone or have returned to waiting agents.

    A returned agent gets its own place.
    """
    waiting = [
        *look.returned,
        *(
            agent_of(one.node)
            for one in sorted_by_domain([look.live[fresh] for fresh in look.newcomers])
        ),
    ]
    if look.round is None or not waiting or not (look.lost or look.returned):
        return HoldRound(
            math.inf, "keepers hold the job together, and nobody is missing or nobody waits"
        )
    places = []
    replaced = 0
    for agent, place in zip(look.round.agents, _named_now(look), strict=True):
        takes = (
            agent if agent in waiting else waiting[0] if agent in look.lost and waiting else None
        )
        if takes is not None:
            waiting.remove(takes)
            replaced += 1
            place = NodePlacement(look.live[takes].node, place.slots)
        places.append(place)
    return PublishRound(
        tuple(places), f"{replaced} agents come in the place of others, and disturb nobody"
    )


def _gather(
    look: AgentsView, enough_since_s: float | None, rules: RendezvousRules, now_s: float
) -> PublishRound | HoldRound:
    candidates = [look.live[one] for one in (*look.returned, *look.newcomers)]
    before = _named_now(look)
    count = min(len(candidates), rules.agents_max)
    if count < rules.agents_min:
        return HoldRound(math.inf, f"too few agents. waiting={count} nodes_min={rules.agents_min}")
    wanted = min(len(before), rules.agents_max) if look.returned else rules.agents_max
    if count < wanted:
        patience_s = rules.shrink_wait_s if look.returned else rules.last_call_s
        until_s = (now_s if enough_since_s is None else enough_since_s) + patience_s
        if now_s < until_s:
            return HoldRound(until_s, f"waits for more agents. waiting={count} wanted={wanted}")
    if not look.returned:
        return PublishRound(
            place_all(candidates, (), nodes_max=rules.agents_max), f"{count} agents begin"
        )
    stays = {look.live[one].node: look.live[one] for one in look.returned}
    filled, left = fill_placements(before, stays, [look.live[one] for one in look.newcomers])
    more = sorted_by_domain(left)[: max(0, rules.agents_max - len(filled))]
    places = (*filled, *(NodePlacement(member.node, member.info.slots) for member in more))[
        : rules.agents_max
    ]
    return PublishRound(
        places, f"{len(places)} agents go on, {len(look.returned)} of them from the round before"
    )


def _named_now(look: AgentsView) -> tuple[NodePlacement, ...]:
    """The round's places under the current node ids of its agents."""
    if look.view.epoch is None or look.round is None:
        return ()
    pairs = zip(look.round.agents, look.view.epoch.places, strict=True)
    return tuple(
        NodePlacement(look.live[agent].node, old.slots) if agent in look.live else old
        for agent, old in pairs
    )


@dataclass(frozen=True, slots=True)
class PlacedInRound:
    """The agent has a place in this round."""

    round: RendezvousRound


@dataclass(frozen=True, slots=True)
class RunUnranked:
    """The agent starts its workers without a round: the job's keepers give them ranks."""

    reason: str


@dataclass(frozen=True, slots=True)
class StandBy:
    """A round runs without this agent: it waits without a time limit."""


@dataclass(frozen=True, slots=True)
class RoundPending:
    """A round is expected: the agent waits for it until its time limit."""

    reason: str


@dataclass(frozen=True, slots=True)
class RendezvousShut:
    """No round will begin any more."""

    reason: str


def decide_for_agent(
    look: AgentsView, me: str, last: int, rules: RendezvousRules
) -> PlacedInRound | RunUnranked | StandBy | RoundPending | RendezvousShut:
    """What the agent ``me`` does, which waits for a round after number ``last`` (0: any)."""
    if look.closed is not None:
        return RendezvousShut(look.closed)
    newest = look.round
    placed = newest is not None and me in newest.agents and newest.number > last
    if look.kept_by_keepers:
        if placed or (rules.warm and newest is not None):
            return RunUnranked("the job's keepers hold it together, and nobody else is disturbed")
        return StandBy()
    if placed and newest is not None:
        return PlacedInRound(newest)
    if newest is None or not look.running or me in newest.agents:
        return RoundPending(
            f"waiting={len(look.newcomers) + len(look.returned)} nodes_min={rules.agents_min}"
        )
    if look.lost or look.returned or (rules.grow and len(newest.agents) < rules.agents_max):
        return RoundPending("the round that runs is about to end")
    return RunUnranked("the round is complete without this agent") if rules.warm else StandBy()


def restart_request(
    look: AgentsView,
    mine: RendezvousRound | None,
    rules: RendezvousRules,
    lost_for_s: float = math.inf,
) -> tuple[int, str]:
    """How many agents wait for one that runs ``mine`` (None: none) to stop its workers, and why.

    0 if keepers hold the job together, if the rendezvous is closed, and while the round is
    complete and alive. ``lost_for_s``: how long an agent has been missing; one that only lost its
    lease may join again meanwhile.
    """
    newest = look.round
    if mine is None or newest is None or look.closed is not None or look.kept_by_keepers:
        return 0, "nobody is to be waited for"
    if newest.number != mine.number:
        return 1, f"the others are in another round. round={newest.number}"
    if look.returned:
        return len(look.returned) + len(
            look.newcomers
        ), f"{look.returned[0]} left the round and waits for the next one"
    if look.lost and lost_for_s < REJOIN_S:
        return 0, f"{look.lost[0]} may join anew"
    if look.lost and len(newest.agents) - len(look.lost) + len(look.newcomers) >= rules.agents_min:
        return max(1, len(look.newcomers)), f"{look.lost[0]} is gone"
    if rules.grow and look.newcomers and len(newest.agents) < rules.agents_max:
        return len(look.newcomers), "the job may grow"
    return (
        0,
        "the round is complete" if not look.lost else "too few agents are left for another round",
    )


def round_problem(look: AgentsView, mine: RendezvousRound) -> str:
    """Why a round that is about to begin cannot: an agent of it is gone or has left it.

    Empty if it can.
    """
    if look.closed is not None:
        return f"the rendezvous was closed: {look.closed}"
    newest = look.round
    if newest is None or newest.number != mine.number:
        return "another round came"
    if look.lost:
        return f"{look.lost[0]} is gone"
    return f"{look.returned[0]} left it" if look.returned else ""


def count_present(look: AgentsView, mine: RendezvousRound) -> int:
    """How many agents of a round run it, or are about to."""
    count = 0
    for agent in mine.agents:
        seat = look.status(agent)
        if seat is not None:
            running = seat.doing == RUNNING and seat.round == mine.number
            count += running or (seat.doing == WAITING and seat.round < mine.number)
    return count


# What a round's store says in the place of agents that are gone, so that nobody waits for them.
# Pure.
#
# torch's agent asks its store at two moments, and can't be told there that a round is over. When
# it hands out ranks it would wait for what a dead agent never says: it gets ranks of a world that
# can't come together, and is asked back to the rendezvous before its workers have imported
# anything. When its workers have ended well it would wait minutes for agents that are no more: it
# waits for those that live.

ROLE_INFO = "torchelastic/role_info/"
ASSIGNED = "torchelastic/assigned_ranks/"
EXIT_COUNT = "torchelastic/agent/terminal_state/num_members"
EXIT_DONE = "torchelastic/agent/terminal_state/last_member"

NOWHERE = 10**6
"""Ranks of a world of at least this size never all connect."""


def is_agent_key(key: str) -> bool:
    """Whether agents wait for ``key`` while they hand out ranks."""
    return key.startswith((ROLE_INFO, ASSIGNED))


def stand_in_value(key: str) -> bytes:
    """The value of an agent that is gone, for a key of ``is_agent_key``."""
    number = int(key.rpartition("/")[2])
    if key.startswith(ROLE_INFO):
        return json.dumps({"role": "gone", "rank": number, "local_world_size": NOWHERE}).encode()
    first = (number + 1) * NOWHERE
    return json.dumps([first, NOWHERE**2, first, NOWHERE**2]).encode()


def ranks_outside_world(role_info: bytes, agents: int) -> bytes:
    """The ranks of workers without a place: beyond the end of a world of ``agents`` nodes."""
    here = int(json.loads(role_info)["local_world_size"])
    world = agents * here
    return json.dumps([world, world, world, world]).encode()
