"""A node has one lease: agents live under their keepers', and nobody misses one when keepers come,
leave and come back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kit.agents import Agents, Etcd, seated, wait_for
from kit.membership.memory_keyspace import MemoryKeyspace, MemoryServer
from torch.distributed.elastic.utils.store import barrier

from ckpt.cluster.membership.leases import LeaseState
from ckpt.cluster.membership.member import KeyspaceMembership
from ckpt.cluster.membership.records import NodeInfo
from ckpt.elastic.rendezvous import agent as rendezvous_agent
from ckpt.elastic.rendezvous.agent import (
    VIEW_S,
    AgentLease,
    RendezvousAgent,
    keyspace_of,
    newest_offer,
)
from ckpt.ipc.cluster_spec import nodes_from_environment
from ckpt.keyspace.base import Delete, Keys, KeyValue, Transaction

TTL_S = 8.0
Make = Callable[..., Agents]


class Keepers:
    """What keepers have of the membership, one a node."""

    def __init__(self) -> None:
        self.made: list[KeyspaceMembership] = []
        self._names = iter(range(1000))

    def info(self) -> NodeInfo:
        return NodeInfo(node=f"keeper-{next(self._names)}", host="h", slots=1)

    def come(self, agent: RendezvousAgent) -> KeyspaceMembership:
        """A keeper comes to the node of that agent, as the agent's workers have it."""
        spec = agent._settings.nodes
        assert spec is not None
        keeper = KeyspaceMembership(keyspace_of(spec), spec.job, ttl_s=spec.ttl_s)
        keeper.join(self.info(), agent=agent.name)
        self.made.append(keeper)
        return keeper

    def close(self) -> None:
        for one in self.made:
            one.leave(keep=True)


class Watcher:
    """Reads the agents' membership over and over, and notes where one of some agents is missing."""

    def __init__(self, agents: list[RendezvousAgent]) -> None:
        self._member = KeyspaceMembership(
            keyspace_of(agents[0]._settings.agents_spec), agents[0]._settings.agents_spec.job
        )
        self._agents = agents
        self._ended = threading.Event()
        self.missing: list[str] = []
        self.views = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(0.005):
            there = {node.rpartition("-")[0] for node in self._member.view().by_node}
            self.missing += [one.name for one in self._agents if one.name not in there]
            self.views += 1

    def end(self) -> list[str]:
        self._ended.set()
        self._thread.join()
        self._member.leave()
        assert self.views > 0
        return self.missing


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Etcd]:
    """An etcd with nobody else's leases."""
    monkeypatch.setenv("CKPT_NODES", "")
    server = Etcd(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def job(alone: Etcd, etcd: Etcd) -> Iterator[Agents]:
    """Two agents at most, over that etcd; ``etcd`` is only asked whether there is one to be had."""
    made = Agents(
        alone.endpoint, "one lease", 1, 2, {"ttl": str(TTL_S), "last_call_timeout": "0.5"}
    )
    yield made
    made.close()


@pytest.fixture
def keepers(job: Agents) -> Iterator[Keepers]:
    made = Keepers()
    yield made
    made.close()


def running(job: Agents, count: int) -> list[RendezvousAgent]:
    """That many agents, which run a round; in the order of their ranks."""
    waiting = seated(job.come(count))
    assert {one.info.world_size for one in waiting} == {count}
    return [one.handler._agent for one in waiting]


def lease_of(agent: RendezvousAgent) -> int:
    """The lease of the agent's own key, as the service has it; 0: none."""
    key = Keys(f"nodes/{agent._node}", values=False)
    (found,) = agent.keyspace.transact(Transaction(reads=(key,))).found
    return found[0].lease_id if agent._node and found else 0


def lives_with(agent: RendezvousAgent, keeper: KeyspaceMembership) -> bool:
    return agent._member.borrowed_lease_id == keeper._member()[0].lease_id == lease_of(agent)


def shared(agents: list[RendezvousAgent], keepers: list[KeyspaceMembership]) -> None:
    wait_for(
        lambda: all(lives_with(*one) for one in zip(agents, keepers, strict=True)),
        "the agents live with their keepers",
    )


@pytest.mark.slow
def test_each_node_has_one_lease_which_its_keeper_alone_keeps_alive(
    job: Agents, keepers: Keepers, alone: Etcd
) -> None:
    agents = running(job, 2)
    assert len(alone.leases()) == 2
    keeps = [keepers.come(one) for one in agents]
    watcher = Watcher(agents)
    shared(agents, keeps)
    wait_for(lambda: len(alone.leases()) == 2, "the agents' own leases are given back")
    assert watcher.end() == []
    seats = agents[0].keyspace.transact(Transaction(reads=(Keys("a", "z"),))).found[0]
    assert {one.lease_id for one in seats if not one.key.startswith(("rounds/", "epoch"))} == set(
        alone.leases()
    )
    assert [one.num_nodes_waiting() for one in job.made] == [0, 0]
    keeps[0].keepalive.retire()  # as if it hung
    node = agents[0]._node
    wait_for(lambda: agents[0]._node not in ("", node), "the agent whose keeper hangs joins anew")
    assert agents[0]._member.borrowed_lease_id == 0
    assert agents[0]._member.lease_status().state is LeaseState.VALID
    assert lives_with(agents[1], keeps[1])
    wait_for(
        lambda: all(one.name in agents[1].latest_view().live for one in agents),
        "the other one sees it",
    )
    assert [one.num_nodes_waiting() for one in job.made] == [0, 0]


@pytest.mark.slow
def test_nobody_misses_an_agent_whose_keeper_leaves(
    job: Agents, keepers: Keepers, alone: Etcd
) -> None:
    agents = running(job, 2)
    keeps = [keepers.come(one) for one in agents]
    shared(agents, keeps)
    nodes = [one._node for one in agents]
    watcher = Watcher(agents)
    for one in keeps:
        one.leave()
    wait_for(
        lambda: all(one._member.borrowed_lease_id == 0 for one in agents),
        "each has a lease of its own",
    )
    wait_for(lambda: len(alone.leases()) == 2, "the keepers' leases have run out")
    assert watcher.end() == []
    assert [one._node for one in agents] == nodes
    assert [one._member.lease_status().state for one in agents] == [
        LeaseState.VALID,
        LeaseState.VALID,
    ]


@pytest.mark.slow
def test_an_agent_whose_keepers_lease_is_revoked_joins_anew_and_keeps_its_place(
    job: Agents, keepers: Keepers
) -> None:
    agents = running(job, 2)
    keeps = [keepers.come(one) for one in agents]
    shared(agents, keeps)
    before = agents[0]._node
    keeps[0]._keyspace.revoke(keeps[0]._member()[0].lease_id)
    wait_for(lambda: agents[0]._node not in ("", before), "it joined anew")
    wait_for(lambda: agents[0].name in agents[1].latest_view().live, "the other one sees it")
    assert [one.num_nodes_waiting() for one in job.made] == [0, 0]
    assert lives_with(agents[1], keeps[1])
    wait_for(lambda: keeps[0].lease_status().state is LeaseState.LOST, "its keeper knows it too")
    keeps[0].join(keepers.info(), agent=agents[0].name)
    shared(agents, keeps)


@pytest.mark.slow
def test_an_agent_moves_on_with_a_keeper_that_joined_anew(
    job: Agents, keepers: Keepers, alone: Etcd
) -> None:
    (agent,) = running(job, 1)
    keeper = keepers.come(agent)
    shared([agent], [keeper])
    node, first = agent._node, keeper._member()[0].lease_id
    watcher = Watcher([agent])
    keeper.keepalive.mark_lost("as if it was taken out")
    keeper.join(keepers.info(), agent=agent.name)
    assert keeper._member()[0].lease_id != first
    shared([agent], [keeper])
    wait_for(lambda: alone.leases() == [keeper._member()[0].lease_id], "one lease is left")
    assert watcher.end() == []
    assert agent._node == node


@pytest.mark.slow
def test_an_agent_moves_from_a_keeper_that_died_to_the_next_one(
    job: Agents, keepers: Keepers
) -> None:
    (agent,) = running(job, 1)
    first = keepers.come(agent)
    shared([agent], [first])
    node = agent._node
    first.leave(keep=True)  # dead: nothing is taken back
    watcher = Watcher([agent])
    second = keepers.come(agent)
    shared([agent], [second])
    assert watcher.end() == []
    assert agent._node == node


@pytest.mark.slow
def test_an_agent_goes_from_a_keeper_that_others_took_out_before_that_lease_ends(
    job: Agents, keepers: Keepers
) -> None:
    agents = running(job, 2)
    keeps = [keepers.come(one) for one in agents]
    shared(agents, keeps)
    node, watcher = agents[0]._node, Watcher(agents)
    out = keeps[0]._member()[0]
    keeps[0].leave(keep=True)
    keeps[1]._keyspace.transact(Transaction(then=(Delete(f"nodes/{out.node}"),)))
    wait_for(lambda: agents[0]._member.borrowed_lease_id == 0, "it has a lease of its own")
    assert watcher.end() == []
    assert agents[0]._node == node


@pytest.mark.slow
def test_an_agent_that_leaves_takes_its_keys_from_its_keepers_lease(
    job: Agents, keepers: Keepers
) -> None:
    agents = running(job, 2)
    keeps = [keepers.come(one) for one in agents]
    shared(agents, keeps)
    nodes = [one._node for one in agents]
    for one in agents:
        one.leave()
    reader = keyspace_of(job.made[0]._settings.agents_spec)
    (left,) = reader.transact(Transaction(reads=(Keys("a", "z"),))).found
    reader.close()
    assert not [
        one.key for one in left if any(node in one.key for node in nodes) or one.key == "leader"
    ]
    for keeper in keeps:
        assert keeper._keyspace.renew(keeper._member()[0].lease_id) > 0
        assert keeper.lease_status().state is LeaseState.VALID
        assert keeper._member()[0].node in keeper.view().by_node


@pytest.mark.slow
def test_agents_meet_in_the_barrier_at_the_end_though_their_keepers_have_left(
    job: Agents, keepers: Keepers
) -> None:
    waiting = seated(job.come(2))
    stores = [one.info.store for one in waiting]
    agents = [one.handler._agent for one in waiting]
    keeps = [keepers.come(one) for one in agents]
    shared(agents, keeps)
    for one in keeps:
        one.leave()
    barrier_s = 60
    first = threading.Thread(
        target=barrier, args=(stores[0], 2, "torchelastic/agent/terminal_state", barrier_s)
    )
    first.start()
    wait_for(
        lambda: all(one._member.borrowed_lease_id == 0 for one in agents),
        "each has a lease of its own",
    )
    assert first.is_alive()  # the other one has not come
    barrier(stores[1], 2, "torchelastic/agent/terminal_state", barrier_s)
    first.join(barrier_s)
    assert not first.is_alive()
    assert [one.handler.shutdown() for one in waiting] == [True, True]


def test_an_agent_moves_only_while_workers_run_and_back_whenever_its_keeper_leaves() -> None:
    server = MemoryServer()
    agent = KeyspaceMembership(MemoryKeyspace(server), "j", ttl_s=60.0, threads=False)
    keeper = KeyspaceMembership(MemoryKeyspace(server), "j", ttl_s=60.0, threads=False)
    lease = AgentLease(MemoryKeyspace(server), agent, "a-1")
    agent.join(NodeInfo(node="a-1-1", host="h", slots=1))
    lease.look(runs=True)
    assert not lease.shared
    first = keeper.join(NodeInfo(node="k-1", host="h", slots=1), agent="a-1").lease_id
    lease.look(runs=False)
    assert not lease.shared
    lease.look(runs=True)
    assert agent.borrowed_lease_id == first
    lease.look(runs=False)
    assert agent.borrowed_lease_id == first
    keeper.keepalive.mark_lost("as if it was taken out")
    second = keeper.join(NodeInfo(node="k-2", host="h", slots=1), agent="a-1").lease_id
    lease.look(runs=False)
    assert agent.borrowed_lease_id == second
    keeper.leave()
    lease.look(runs=False)
    assert not lease.shared
    assert agent.lease_status().state is LeaseState.VALID


@pytest.mark.slow
def test_who_follows_in_a_job_that_keepers_hold_reads_all_seldom_and_hears_of_each_change(
    job: Agents, keepers: Keepers, monkeypatch: pytest.MonkeyPatch
) -> None:
    agents = running(job, 2)
    shared(agents, [keepers.come(one) for one in agents])
    wait_for(
        lambda: all(one.latest_view().view.leader is not None for one in agents), "somebody leads"
    )
    leads = agents[0].latest_view().view.leader.node
    (follower,) = (one for one in agents if one._node != leads)
    (other,) = (one for one in agents if one is not follower)
    whole: list[float] = []
    read, looks = follower._read, follower._lease.look
    asked: list[float] = []
    monkeypatch.setattr(follower, "_read", lambda: (whole.append(time.monotonic()), read())[1])
    monkeypatch.setattr(
        follower._lease,
        "look",
        lambda *, runs: (asked.append(time.monotonic()), looks(runs=runs))[1],
    )
    wait_for(lambda: len(asked) > 8, "it looks over and over whose lease it lives under")
    assert asked[-1] - asked[0] > 2 * TTL_S
    assert len(whole) <= 1 + (asked[-1] - asked[0]) / VIEW_S
    assert follower._follows(follower.latest_view())
    assert not other._follows(other.latest_view())
    monkeypatch.setattr(rendezvous_agent, "VIEW_S", 1000.0)
    wait_for(
        lambda: follower._view_until_s > time.monotonic() + 100,
        "it has read all once more, and will not for long",
    )
    other.leave()
    wait_for(
        lambda: follower.latest_view().lost == (other.name,),
        "it hears at once that the other one left",
    )
    wait_for(
        lambda: (
            (leader := follower.latest_view().view.leader) is not None
            and leader.node == follower._node
        ),
        "it leads",
    )
    assert not follower._follows(follower.latest_view())


@pytest.mark.slow
def test_keepers_are_told_who_launched_them_where_they_can_share_a_lease(
    job: Agents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (agent,) = running(job, 1)
    spec = nodes_from_environment()
    assert spec is not None and spec.agent == agent.name
    monkeypatch.setenv("CKPT_NODES", "")
    other = Agents(
        str(tmp_path / "members"), "in files", 1, 2, {"ttl": "1", "last_call_timeout": "0"}
    )
    try:
        running(other, 1)
        spec = nodes_from_environment()
        assert spec is not None and spec.agent == ""  # two files are two services
    finally:
        other.close()


def test_the_newest_keeper_counts_while_it_is_a_member() -> None:
    old, new = (KeyValue(f"said/agent.a/k{at}", b"", at, at, at) for at in (1, 2))
    members = tuple(KeyValue(f"nodes/k{at}", b"", at, at, at) for at in (1, 2))
    assert newest_offer((old, new), members) == new
    assert newest_offer((new, old), members) == new
    assert newest_offer((old, new), members[:1]) is None
    assert newest_offer((), members) is None
