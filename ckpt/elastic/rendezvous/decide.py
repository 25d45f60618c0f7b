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

# ---- what agents know of each other

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
    ends_after: int = -1


prepare_decoders(AgentStatus, _Note)


def encode_status(status: AgentStatus) -> bytes:
    """The stored bytes of a status."""
    return msgspec.json.encode(status)


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

    ``lease`` keeps the keys of its store. ``ends_after``: the revision of the keepers' newest
    epoch when agents that ran nothing made it, 0 if there was none, -1 if it is not known. So the
    end of the keepers' job in a newer epoch is the end of what began with this round, and an older
    one is that of an earlier run.
    """

    number: int
    agents: tuple[str, ...]
    lease: int
    ends_after: int = -1


def encode_round_note(lease: int, ends_after: int) -> str:
    """The note in the epoch's record."""
    return msgspec.json.encode(_Note(lease, ends_after)).decode()


def round_of(record: EpochRecord) -> RendezvousRound:
    """The round that an epoch is. Raises IntegrityError if no agent wrote it."""
    try:
        note = msgspec.json.decode(record.note.encode(), type=_Note)
    except msgspec.MsgspecError as error:
        raise IntegrityError(
            f"an epoch that no agent wrote. job={record.job} epoch={record.number}"
        ) from error
    return RendezvousRound(
        record.number,
        tuple(agent_of(place.node) for place in record.places),
        note.lease,
        note.ends_after,
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
        by_agent: dict[str, Member] = {}
        for member in sorted(self.view.members, key=lambda member: member.joined_revision):
            by_agent[agent_of(member.node)] = member
        return by_agent

    def status(self, agent: str) -> AgentStatus | None:
        """The status of a live agent; None if it is gone or has not published one."""
        member = self.live.get(agent)
        return None if member is None else self.statuses.get(member.node)

    @cached_property
    def lost(self) -> tuple[str, ...]:
        """The agents of the round that are gone."""
        return tuple(agent for agent in self._agents if agent not in self.live)

    @cached_property
    def returned(self) -> tuple[str, ...]:
        """The agents of the round that have left it and wait for another one."""
        return tuple(agent for agent in self._agents if self._waits(agent) and self._left(agent))

    @cached_property
    def running(self) -> tuple[str, ...]:
        """The agents of the round that run it, or are about to."""
        alone = [
            agent
            for agent in self._agents
            if (status := self.status(agent)) is not None and status.doing == ALONE
        ]
        stopped = {*self.lost, *self.returned, *alone}
        return tuple(agent for agent in self._agents if agent not in stopped)

    @cached_property
    def newcomers(self) -> tuple[str, ...]:
        """The waiting agents that are not in the round."""
        waiting = (agent for agent in self.live if self._waits(agent))
        return tuple(agent for agent in waiting if agent not in self._agents)

    @property
    def _agents(self) -> tuple[str, ...]:
        return () if self.round is None else self.round.agents

    def _waits(self, agent: str) -> bool:
        status = self.status(agent)
        return status is not None and status.doing == WAITING

    def _left(self, agent: str) -> bool:
        status = self.status(agent)
        return status is not None and self.round is not None and status.round >= self.round.number


# ---- the leader's decision

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
    enough_since_s: float | None, agents: AgentsView, rules: RendezvousRules, now_s: float
) -> float | None:
    """Since when there are enough agents for a round, by the leader's clock. Start with None."""
    enough = not agents.running and len(agents.returned) + len(agents.newcomers) >= rules.agents_min
    return (now_s if enough_since_s is None else enough_since_s) if enough else None


def next_round(
    agents: AgentsView, enough_since_s: float | None, rules: RendezvousRules, now_s: float
) -> PublishRound | HoldRound:
    """The leader's decision.

    ``enough_since_s`` is from ``update_enough_since`` for the same view.
    """
    if agents.closed is not None:
        return HoldRound(math.inf, f"the rendezvous is closed: {agents.closed}")
    if agents.kept_by_keepers:
        return _replace(agents)
    # A round that began before all agents have stopped would make the newcomers wait in its store,
    # where they cannot be told that the round is over.
    if agents.running:
        return HoldRound(math.inf, f"agents of the round still run. agents={len(agents.running)}")
    return _gather(agents, enough_since_s, rules, now_s)


def _replace(agents: AgentsView) -> PublishRound | HoldRound:
    """Give the places of agents that are gone or have returned to waiting agents.

    A returned agent gets its own place.
    """
    waiting = [
        *agents.returned,
        *(
            agent_of(member.node)
            for member in sorted_by_domain([agents.live[agent] for agent in agents.newcomers])
        ),
    ]
    if agents.round is None or not waiting or not (agents.lost or agents.returned):
        return HoldRound(
            math.inf, "keepers hold the job together, and no agent is missing or none waits"
        )
    places = []
    replaced = 0
    for agent, place in zip(agents.round.agents, _named_now(agents), strict=True):
        takes = (
            agent if agent in waiting else waiting[0] if agent in agents.lost and waiting else None
        )
        if takes is not None:
            waiting.remove(takes)
            replaced += 1
            place = NodePlacement(agents.live[takes].node, place.slots)
        places.append(place)
    return PublishRound(
        tuple(places), f"{replaced} agents take the places of others; the rest continues"
    )


def _gather(
    agents: AgentsView, enough_since_s: float | None, rules: RendezvousRules, now_s: float
) -> PublishRound | HoldRound:
    candidates = [agents.live[agent] for agent in (*agents.returned, *agents.newcomers)]
    before = _named_now(agents)
    count = min(len(candidates), rules.agents_max)
    if count < rules.agents_min:
        return HoldRound(math.inf, f"too few agents. waiting={count} nodes_min={rules.agents_min}")
    wanted = min(len(before), rules.agents_max) if agents.returned else rules.agents_max
    if count < wanted:
        wait_s = rules.shrink_wait_s if agents.returned else rules.last_call_s
        until_s = (now_s if enough_since_s is None else enough_since_s) + wait_s
        if now_s < until_s:
            return HoldRound(until_s, f"waits for more agents. waiting={count} wanted={wanted}")
    if not agents.returned:
        return PublishRound(
            place_all(candidates, (), nodes_max=rules.agents_max), f"{count} agents begin"
        )
    # Survivors keep their ranks, newcomers take lost ones; what is left over extends the round.
    returned = (agents.live[agent] for agent in agents.returned)
    newcomers = [agents.live[agent] for agent in agents.newcomers]
    kept = {member.node: member for member in returned}
    filled, unplaced = fill_placements(before, kept, newcomers)
    more = sorted_by_domain(unplaced)[: max(0, rules.agents_max - len(filled))]
    places = (*filled, *(NodePlacement(member.node, member.info.slots) for member in more))[
        : rules.agents_max
    ]
    return PublishRound(
        places, f"{len(places)} agents continue, {len(agents.returned)} of them from the last round"
    )


def _named_now(agents: AgentsView) -> tuple[NodePlacement, ...]:
    """The round's places under the current node ids of its agents."""
    if agents.view.epoch is None or agents.round is None:
        return ()
    placed = zip(agents.round.agents, agents.view.epoch.places, strict=True)
    return tuple(
        NodePlacement(agents.live[agent].node, old.slots) if agent in agents.live else old
        for agent, old in placed
    )


# ---- one agent's decision


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
    agents: AgentsView, agent: str, last: int, rules: RendezvousRules
) -> PlacedInRound | RunUnranked | StandBy | RoundPending | RendezvousShut:
    """What the agent ``me`` does, which waits for a round after number ``last`` (0: any)."""
    if agents.closed is not None:
        return RendezvousShut(agents.closed)
    newest = agents.round
    placed = newest is not None and agent in newest.agents and newest.number > last
    if agents.kept_by_keepers:
        if placed or (rules.warm and newest is not None):
            return RunUnranked("the job's keepers hold it together, and no other agent restarts")
        return StandBy()
    if placed and newest is not None:
        return PlacedInRound(newest)
    if newest is None or not agents.running or agent in newest.agents:
        return RoundPending(
            f"waiting={len(agents.newcomers) + len(agents.returned)} nodes_min={rules.agents_min}"
        )
    if agents.lost or agents.returned or (rules.grow and len(newest.agents) < rules.agents_max):
        return RoundPending("the round that runs is about to end")
    return RunUnranked("the round is complete without this agent") if rules.warm else StandBy()


def restart_request(
    agents: AgentsView,
    own_round: RendezvousRound | None,
    rules: RendezvousRules,
    lost_for_s: float = math.inf,
) -> tuple[int, str]:
    """How many agents wait for one that runs ``mine`` (None: none) to stop its workers, and why.

    0 if keepers hold the job together, if the rendezvous is closed, and while the round is
    complete and alive. ``lost_for_s``: how long an agent has been missing; one that only lost its
    lease may join again meanwhile.
    """
    newest = agents.round
    if own_round is None or newest is None or agents.closed is not None or agents.kept_by_keepers:
        return 0, "no agent waits"
    if newest.number != own_round.number:
        return 1, f"the others are in another round. round={newest.number}"
    if agents.returned:
        count = len(agents.returned) + len(agents.newcomers)
        return count, f"{agents.returned[0]} left the round and waits for the next one"
    if agents.lost and lost_for_s < REJOIN_S:
        return 0, f"{agents.lost[0]} may join again"
    if (
        agents.lost
        and len(newest.agents) - len(agents.lost) + len(agents.newcomers) >= rules.agents_min
    ):
        return max(1, len(agents.newcomers)), f"{agents.lost[0]} is gone"
    if rules.grow and agents.newcomers and len(newest.agents) < rules.agents_max:
        return len(agents.newcomers), "the job may grow"
    if agents.lost:
        return 0, "too few agents are left for another round"
    return 0, "the round is complete"


def round_problem(agents: AgentsView, own_round: RendezvousRound) -> str:
    """Why a round that is about to begin cannot: an agent of it is gone or has left it.

    Empty if it can.
    """
    if agents.closed is not None:
        return f"the rendezvous was closed: {agents.closed}"
    newest = agents.round
    if newest is None or newest.number != own_round.number:
        return "another round began"
    if agents.lost:
        return f"{agents.lost[0]} is gone"
    return f"{agents.returned[0]} left it" if agents.returned else ""


def count_present(agents: AgentsView, own_round: RendezvousRound) -> int:
    """How many agents of a round run it, or are about to."""
    count = 0
    for agent in own_round.agents:
        status = agents.status(agent)
        if status is not None:
            running = status.doing == RUNNING and status.round == own_round.number
            count += running or (status.doing == WAITING and status.round < own_round.number)
    return count


# ---- values in a round's store that stand in for agents that are gone
#
# torch's agent reads its store at two moments, and cannot be told there that a round is over. When
# it hands out ranks it would wait 5 minutes for a dead agent's value: it gets ranks of a world that
# never connects, and is asked back to the rendezvous before its workers have imported torch. When
# its workers have ended well it would wait minutes for dead agents: it waits for live ones only.

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
    local_ranks = int(json.loads(role_info)["local_world_size"])
    world = agents * local_ranks
    return json.dumps([world, world, world, world]).encode()
