"""Supervisors and real keepers of two nodes of one machine: attempts are epochs, on both alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from kit.keepers import served as served_room
from kit.keepers.served import Peer, Served, started, until

from ckpt.cluster.membership.admission import SharedFacts
from ckpt.ipc import messages as words
from ckpt.ipc.client import KeeperSpec
from ckpt.ipc.cluster_spec import NodesSpec
from ckpt.ipc.frames import close_fds
from ckpt.ipc.messages import Policy
from ckpt.keeper import daemon as daemon_module
from ckpt.keeper.nodes import join as join_module
from ckpt.keyspace.base import Keys, Transaction
from ckpt.keyspace.sqlite import SqliteKeyspace

POLICY = Policy(linger_s=20.0, hang_s=0.0)


class Node(Served):
    """A machine: its keeper, and whoever speaks to it."""

    peers: list[Peer]

    def peer(self, **hello: object) -> Peer:
        found = super().peer(**hello)
        self.peers = [*getattr(self, "peers", ()), found]
        return found

    def end(self) -> None:
        for one in getattr(self, "peers", ()):
            one.wire.close()
            close_fds(one.fds)
            one.fds = []
        if self.home is not None:
            self.crash()


Serve = Callable[..., Node]


@pytest.fixture
def serve_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Makes keepers of one job, each with a store of its own so that each is another machine's; so
    they do not say which stores they have."""
    monkeypatch.setattr(join_module, "said_by", lambda *_, **__: SharedFacts())
    monkeypatch.setattr(daemon_module, "TICK_S_MAX", 0.05)
    made: list[Node] = []

    def make(name: str, *, policy: Policy = POLICY, **more: object) -> Node:
        known = {
            "where": str(tmp_path / "meet"),
            "job": "job",
            "nodes_min": 2,
            "nodes_max": 2,
            "ttl_s": 30.0,
        }
        spec = NodesSpec(**{**known, **more})  # type: ignore[arg-type]
        monkeypatch.setattr(served_room, "KeeperSpec", partial(KeeperSpec, nodes=spec))
        made.append(Node(tmp_path / name, policy))
        return made[-1]

    yield make
    for one in made:
        one.end()


def crews(serve_node: Serve, **more: object) -> tuple[list[Peer], list[Peer]]:
    one, other = (
        serve_node(name, **more).supervisors(2, launch=f"launch-{name}") for name in ("a", "b")
    )
    return one, other


def ends(crew: list[Peer], attempt: int) -> None:
    for one in crew:
        one.say(words.Died(attempt=attempt, status=0, at_s=time.monotonic()))


@pytest.mark.slow
def test_death_on_one_node_starts_both_anew_with_the_same_number_and_place(
    serve_node: Serve,
) -> None:
    crew = crews(serve_node)
    first = [started(one) for one in crew]
    assert [one.attempt for one in first] == [1, 1]
    assert first[0].port == first[1].port
    seats = [one.seating for one in first]
    assert sorted(seat.first_rank for seat in seats if seat) == [0, 2]
    assert all(seat and (seat.world_size, seat.nodes) == (4, 2) for seat in seats)

    crew[0][1].say(words.Died(attempt=1, status=-9, at_s=time.monotonic()))
    for peers in crew:
        for peer in peers:
            assert peer.next(words.Kill).attempt == 1
            peer.say(words.Killed(attempt=1))
    lines = [peers[0].next(words.PrintLine).text for peers in crew]
    rank = seats[0].first_rank + 1 if seats[0] else -1
    assert lines == [
        f"attempt 1 failed: rank {rank} died of SIGKILL; the next one starts {when}"
        for when in ("together with the other nodes'", "now")
    ]
    second = [started(one) for one in crew]
    assert [one.attempt for one in second] == [2, 2]
    assert second[0].port == second[1].port
    assert [one.seating for one in second] == seats, "who lives keeps its ranks"


@pytest.mark.slow
def test_nodes_that_ended_wait_for_each_other_and_then_all_go(serve_node: Serve) -> None:
    nodes = [serve_node(name) for name in ("a", "b")]
    crew = [node.supervisors(2, launch=f"launch-{n}") for n, node in enumerate(nodes)]
    for one in crew:
        started(one)
    ends(crew[0], 1)
    for peer in crew[0]:
        assert peer.next(words.Leave).status == 0
        peer.leave()
    assert not nodes[0].ends(0.5), "the other may yet need it"
    ends(crew[1], 1)
    for peer in crew[1]:
        assert peer.next(words.Leave).status == 0
        peer.leave()
    assert all(node.ends() for node in nodes)
    assert not nodes[0].told("out")


def test_failure_that_is_final_on_one_node_ends_the_job_on_both(serve_node: Serve) -> None:
    crew = crews(serve_node)
    for one in crew:
        started(one)
    crew[1][0].say(
        words.Died(attempt=1, status=-2, at_s=time.monotonic())
    )  # somebody wants the end
    for peers in reversed(crew):  # the others hear of it once nothing of it lives
        for peer in peers:
            peer.next(words.Kill)
            peer.say(words.Killed(attempt=1))
    for peers in crew:
        for peer in peers:
            leave = peer.next(words.Leave)
            assert leave.status == 130
            assert "SIGINT" in leave.text
            peer.leave()


@pytest.mark.slow
def test_new_launch_of_the_same_keepers_begins_after_the_last_ones_end(serve_node: Serve) -> None:
    nodes = [serve_node(name, policy=Policy(linger_s=20.0, hang_s=0.0)) for name in ("a", "b")]
    wires = [node.wire() for node in nodes]  # keep them for the second launch
    for number, attempt in ((1, 1), (2, 3)):
        crew = [node.supervisors(2, launch=f"launch-{number}-{n}") for n, node in enumerate(nodes)]
        assert [started(one).attempt for one in crew] == [attempt, attempt]
        for one in crew:
            ends(one, attempt)
        for peers in crew:
            for peer in peers:
                assert peer.next(words.Leave).status == 0
                peer.leave()
        for node in nodes:
            launch = node.daemon._job.state.launch
            until(lambda launch=launch: not launch.cluster.busy)
    for wire in wires:
        wire.close()


def test_each_launch_of_a_keeper_says_which_agent_launched_it(
    serve_node: Serve, tmp_path: Path
) -> None:
    node = serve_node("a", nodes_min=1, nodes_max=1)
    wire = node.wire()  # keep it for the second launch
    keyspace = SqliteKeyspace(tmp_path / "meet")

    def named() -> list[str]:
        (found,) = keyspace.transact(Transaction(reads=(Keys("said/agent.", "said/agent/"),))).found
        return [one.key.split("/")[1] for one in found]

    for number in (1, 2):
        (peer,) = node.supervisors(1, launch=f"launch-{number}", agent=f"agent-{number}")
        attempt = started([peer]).attempt
        assert named() == [f"agent.agent-{number}"]
        ends([peer], attempt)
        assert peer.next(words.Leave).status == 0
        peer.leave()
        until(lambda: named() == [])
    wire.close()
    keyspace.close()


@pytest.mark.slow
def test_node_that_is_asked_to_go_before_its_first_epoch_leaves_and_the_others_begin_without_it(
    serve_node: Serve,
) -> None:
    first = serve_node("a").supervisors(1, launch="a")
    first[0].say(words.Preempt(grace_s=30.0))
    assert first[0].next(words.Leave).status == 143
    second = serve_node("b").supervisors(1, launch="b")
    serve_node("c").supervisors(1, launch="c")
    assert second[0].next(words.Start).attempt >= 1
    assert not second[0].so_far(words.Leave)


def test_keeper_that_can_not_meet_the_others_has_its_supervisors_leave(
    serve_node: Serve, tmp_path: Path
) -> None:
    (tmp_path / "meet").mkdir()  # where a file should be
    crew = serve_node("a").supervisors(1, launch="a")
    leave = crew[0].next(words.Leave)
    assert leave.status == 1
    assert "can't meet" in leave.text
