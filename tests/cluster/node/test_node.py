"""Nodes of one job in one process, over a keyspace in memory and real lines: epochs, failures,
losses, the end."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest
from kit.membership.memory_keyspace import MemoryKeyspace, MemoryServer

from ckpt.cluster.membership import admission
from ckpt.cluster.membership.decide import MembershipOptions
from ckpt.cluster.membership.leases import LeaseState
from ckpt.cluster.membership.member import KeyspaceMembership
from ckpt.cluster.membership.records import NodeInfo, StateInventory, View
from ckpt.cluster.mesh.connections import Mesh
from ckpt.cluster.mesh.messages import MeetingAddress, MeshDecided, MeshMessage, NodeFailed
from ckpt.cluster.node.epochs import NodeDeps, NodeEpoch, NodeObserver
from ckpt.cluster.node.leading import ALL_ENDED, FLOOR_CAPABILITY, PEER_CAPABILITY
from ckpt.cluster.node.node import Node
from ckpt.errors import UnavailableError
from ckpt.events import Event
from ckpt.ipc.messages import Policy
from ckpt.keeper.attempts.failures import ECHO_S, EpochFailures
from ckpt.keeper.nodes.join import _decided
from ckpt.threads import start_thread

WAIT_S = 60.0
LOOK_S = 0.02
TTL_S = 5.0
SECRET = bytes(32)


@dataclass
class One:
    """A node, its keeper's part in the membership, and all that it told."""

    name: str
    node: Node = field(init=False)
    member: KeyspaceMembership = field(init=False)
    lines: list[Mesh] = field(default_factory=list)
    epochs: list[NodeEpoch] = field(default_factory=list)
    seen: list[NodeEpoch] = field(default_factory=list)
    outs: list[str] = field(default_factory=list)
    words: list[tuple[str, MeshMessage]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    dead: bool = False

    @property
    def id(self) -> str:
        return self.node.node_id

    def fail(self, attempt: int, kind: str = "died", **more: object) -> None:
        known = {
            "rank": 0,
            "kind": kind,
            "text": f"{self.name} {kind}",
            "status": -9,
            "completed": 1,
        }
        self.node.report_failure(NodeFailed(attempt=attempt, **{**known, **more}))  # type: ignore[arg-type]

    def kill(self) -> None:
        """Its process is gone: nobody listens, nothing is said, its lease runs out by itself."""
        self.dead = True
        self.member.keepalive._stopping.set()
        self.member._keyspace.close()
        with self.node._changed:
            self.node._stopped = True
            self.node._touch()
        self.lines[-1].close()


def blinded(view: Callable[[], View], *, times: int) -> Callable[[], View]:
    """The same, but for the first times."""
    left = iter(range(times))

    def view_or_not() -> View:
        if next(left, None) is not None:
            raise UnavailableError("the service changes its leader")
        return view()

    return view_or_not


class NodesOfOneJob:
    """One service and the nodes of one job."""

    def __init__(self) -> None:
        self.server = MemoryServer()
        self.made: list[One] = []
        self.ids = itertools.count()
        self.changed = threading.Condition()
        self.policy = Policy()

    def node(
        self,
        name: str,
        *,
        least: int = 2,
        most: int = 2,
        grow_wait_s: float = 0.0,
        agent: str = "",
        **more: object,
    ) -> One:
        """A node that joins; its id begins with its name."""
        one = One(name)
        attempt = more.pop("attempt", 0)
        ttl_s = float(more.pop("ttl_s", TTL_S))  # type: ignore[arg-type]
        ends_after = int(more.pop("ends_after", -1))  # type: ignore[call-overload]
        blind = int(more.pop("blind", 0))  # type: ignore[call-overload]

        def note(kept: list, said: object) -> None:  # type: ignore[type-arg]
            with self.changed:
                kept.append(said)
                self.changed.notify_all()

        def lines(node: str, heard: object) -> Mesh:
            made = Mesh(
                SECRET,
                job="job",
                node=node,
                listen="127.0.0.1:0",
                observer=heard,  # type: ignore[arg-type]
                emit=lambda event: note(one.events, event),
            )
            one.lines.append(made)
            return made

        def info() -> NodeInfo:
            known = max(attempt, *(epoch.number for epoch in one.epochs), 0)  # type: ignore[call-overload]
            capabilities = (f"{PEER_CAPABILITY}127.0.0.1:1", f"{FLOOR_CAPABILITY}{known}")
            return NodeInfo(
                node=f"{name}-{next(self.ids)}",
                host=name,
                slots=1,
                address="127.0.0.1",
                capabilities=capabilities,
            )

        witnesses = 2 if most > 2 else 1
        one.member = KeyspaceMembership(
            MemoryKeyspace(self.server), "job", ttl_s=ttl_s, witnesses_min=witnesses
        )
        one.member.view = blinded(one.member.view, times=blind)  # type: ignore[method-assign]
        options = replace(
            MembershipOptions(
                nodes_min=least, nodes_max=most, last_call_s=0.3, witnesses_min=witnesses
            ),
            **more,
        )  # type: ignore[arg-type]
        one.node = Node(
            one.member,
            info,
            options,
            decide_failures=lambda note, failures, lost, ended, heard_s, now_s: _decided(
                note, failures, EpochFailures({}, lost, ended), heard_s, now_s, self.policy
            ),
            observer=NodeObserver(
                on_epoch=lambda epoch: note(one.epochs, epoch),
                on_standbys=lambda epoch: note(one.seen, epoch),
                on_membership_lost=lambda why: note(one.outs, why),
                on_message=lambda node, word: note(one.words, (node, word)),
                on_connected=lambda node: None,
                on_disconnected=lambda node, why: None,
            ),
            emit=lambda event: note(one.events, event),
            deps=NodeDeps(
                lines,
                lambda: ("127.0.0.1", 1000 + next(self.ids)),
                agent,
                ttl_s,
                ends_after,
            ),
            grow_wait_s=grow_wait_s,
        )
        self.made.append(one)
        return one

    def until(self, there: Callable[[], object], what: str) -> None:
        deadline_s = time.monotonic() + WAIT_S
        with self.changed:
            while not there():
                assert time.monotonic() < deadline_s, f"not in time: {what}"
                self.changed.wait(LOOK_S)  # what is looked at may change without a word

    def epoch(self, *nodes: One, beyond: int = 0) -> NodeEpoch:
        """The next epoch of all these nodes, which is the same."""
        for one in nodes:
            self.until(
                lambda one=one: one.epochs and one.epochs[-1].number > beyond,
                f"an epoch at {one.name}",
            )
        self.until(
            lambda: len({one.epochs[-1].number for one in nodes}) == 1, "the same epoch everywhere"
        )
        return nodes[0].epochs[-1]


@pytest.fixture
def world() -> Iterator[NodesOfOneJob]:
    made = NodesOfOneJob()
    yield made
    for closing in [
        start_thread(one.node.close, name="test-close") for one in made.made
    ]:  # each waits for its threads
        closing.result()


@pytest.mark.slow
def test_nodes_that_come_have_one_epoch_and_know_where_to_meet(world: NodesOfOneJob) -> None:
    nodes = [world.node("a"), world.node("b")]
    first = world.epoch(*nodes)
    assert first.number == 1
    assert set(first.record.ranks) == {one.id for one in nodes}
    assert {one.epochs[-1].meeting for one in nodes} == {first.meeting}
    assert first.meeting is not None
    assert first.note.era == 1
    assert first.peers.keys() == first.addresses.keys() == {one.id for one in nodes}
    assert [one.epochs[-1].me for one in nodes] == [one.id for one in nodes]


@pytest.mark.slow
def test_standby_that_comes_later_is_told_to_all_and_hears_of_the_epoch_that_is(
    world: NodesOfOneJob,
) -> None:
    nodes = [world.node("a"), world.node("b")]
    first = world.epoch(*nodes)
    late = world.node("c")
    for one in (*nodes, late):
        world.until(
            lambda one=one: one.seen and late.id in one.seen[-1].peers, f"the standby at {one.name}"
        )
        assert one.seen[-1].record == first.record and one.seen[-1].standbys == (late.id,)
        assert one.seen[-1].me == one.id
    assert (late.epochs, late.seen[-1].meeting) == ([], None), "nothing begins at it"
    assert all(one.epochs == [first] or one.epochs[0].record == first.record for one in nodes), (
        "nor at the others"
    )
    late.kill()
    for one in nodes:
        world.until(lambda one=one: not one.seen[-1].standbys, f"its end at {one.name}")
        assert one.seen[-1].peers == first.peers, "who has ranks stays"


@pytest.mark.slow
def test_standby_says_what_it_holds_and_is_chosen_for_it(world: NodesOfOneJob) -> None:
    nodes = [world.node("a"), world.node("b")]
    first = world.epoch(*nodes)
    spares = [world.node("c"), world.node("d")]
    for one in nodes:
        world.until(lambda one=one: one.seen and len(one.seen[-1].standbys) == 2, "two standbys")
    lost = nodes[1]
    rank = first.record.ranks[lost.id].start
    spares[1].node.put_inventory(StateInventory(2, {rank: 1 << 20}))
    world.until(
        lambda: any(m.inventory for m in nodes[0].member.view().members if m.node == spares[1].id),
        "what it holds",
    )
    lost.kill()
    second = world.epoch(nodes[0], spares[1], beyond=first.number)
    assert second.record.ranks[spares[1].id].start == rank


@pytest.mark.slow
def test_words_reach_another_nodes_keeper(world: NodesOfOneJob) -> None:
    one, other = world.node("a"), world.node("b")
    world.epoch(one, other)
    assert one.node.is_connected(other.id)
    assert one.node.send(other.id, MeshDecided(attempt=1, boundary=4, flags=1))
    world.until(lambda: other.words, "the word")
    assert other.words == [(one.id, MeshDecided(attempt=1, boundary=4, flags=1))]


@pytest.mark.slow
def test_failure_is_followed_by_an_epoch_of_the_same_places_that_says_why(
    world: NodesOfOneJob,
) -> None:
    nodes = [world.node("a"), world.node("b")]
    first = world.epoch(*nodes)
    nodes[1].fail(1, completed=7)
    second = world.epoch(*nodes, beyond=1)
    assert (second.number, second.record.places) == (2, first.record.places)
    assert (second.note.why, second.note.completed, second.note.era) == ("b died", 7, 1)
    assert second.meeting is not None
    assert second.meeting != first.meeting


@pytest.mark.slow
def test_exception_waits_for_what_explains_it(world: NodesOfOneJob) -> None:
    nodes = [world.node("a"), world.node("b")]
    world.epoch(*nodes)
    began_s = time.monotonic()
    nodes[0].fail(1, "error", fingerprint="f", step=3, status=1)
    second = world.epoch(*nodes, beyond=1)
    assert time.monotonic() - began_s >= ECHO_S
    assert (second.note.fingerprint, second.note.same) == ("f", 1)
    nodes[0].fail(2, "error", fingerprint="f", step=3, status=1)
    nodes[1].fail(2, completed=9)  # of which the exception was an echo
    third = world.epoch(*nodes, beyond=2)
    assert (third.note.why, third.note.completed) == ("b died", 9)
    nodes[0].fail(1, "died")  # of an epoch that is over
    nodes[0].fail(3, "hang", completed=10)
    assert world.epoch(*nodes, beyond=3).note.why == "a hang"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_lost_node_is_replaced_by_a_standby_before_its_lease_runs_out(
    world: NodesOfOneJob, name: str
) -> None:
    nodes = [
        world.node(name, least=2, most=3, ttl_s=30.0, last_call_s=0.0) for name in ("a", "b", "c")
    ]
    world.until(
        lambda: all(one.epochs and len(one.epochs[-1].record.places) == 3 for one in nodes),
        "three nodes",
    )
    first = world.epoch(*nodes)
    spare = world.node("d", least=2, most=3, ttl_s=30.0)
    world.until(lambda: any(event.kind == "joined" for event in spare.events), "that it joined")
    lost = next(one for one in nodes if one.name == name)
    left = [one for one in nodes if one is not lost]
    lost.kill()
    second = world.epoch(*left, spare, beyond=first.number)
    assert lost.id not in second.record.ranks
    assert spare.id in second.record.ranks
    assert second.record.world_size == 3
    assert second.note.era == second.number
    assert second.note.stuck == 0, "nobody could tell how far they were"


@pytest.mark.slow
def test_stranger_that_comes_again_and_again_does_not_hold_up_the_replacement_of_a_lost_node(
    world: NodesOfOneJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "PROOF_S", 1.0)
    nodes = [world.node("a"), world.node("b")]
    first = world.epoch(*nodes)
    leader = next(one for one in nodes if one.id == first.record.leader)
    (lost,) = [one for one in nodes if one is not leader]
    spare = world.node("c")
    world.until(lambda: spare.id and leader.node.is_connected(spare.id), "a standby")
    over, came = threading.Event(), itertools.count()

    def come_and_go() -> None:
        """Nobody can prove it, and it is always too new to be passed over."""
        while not over.is_set():
            stranger = KeyspaceMembership(
                MemoryKeyspace(world.server), "job", ttl_s=TTL_S, witnesses_min=1
            )
            stranger.join(NodeInfo(node=f"s-{next(came)}", host="s", slots=1))
            over.wait(0.3)
            stranger.leave()

    comes = start_thread(come_and_go, name="test-stranger")
    try:
        world.until(lambda: any(m.node[0] == "s" for m in leader.member.view().members), "it")
        lost.kill()
        second = world.epoch(leader, spare, beyond=first.number)
        assert set(second.record.ranks) == {leader.id, spare.id}
    finally:
        over.set()
        comes.result()
    assert next(came) > 2, "it came under more than one name"


def test_leader_that_is_lost_is_followed_by_another(world: NodesOfOneJob) -> None:
    nodes = [world.node("a", least=1), world.node("b", least=1)]
    world.until(
        lambda: all(one.epochs and len(one.epochs[-1].record.places) == 2 for one in nodes), "both"
    )
    first = world.epoch(*nodes)
    leader = next(one for one in nodes if one.id == first.record.leader)
    (other,) = [one for one in nodes if one is not leader]
    leader.kill()
    second = world.epoch(other, beyond=first.number)
    assert list(second.record.ranks) == [other.id]
    assert second.record.leader == other.id
    other.fail(second.number, completed=99)
    assert world.epoch(other, beyond=second.number).note.completed == 99


@pytest.mark.slow
def test_job_ends_everywhere_once_all_have_ended_and_a_new_launch_begins_after_it(
    world: NodesOfOneJob,
) -> None:
    nodes = [world.node("a"), world.node("b")]
    world.epoch(*nodes)
    nodes[0].node.report_ended(1)
    nodes[1].node.report_ended(1)
    end = world.epoch(*nodes, beyond=1)
    assert (end.number, end.note.end, end.note.why) == (2, 0, ALL_ENDED)
    anew = [world.node("a"), world.node("b")]
    first = world.epoch(*anew)
    assert (first.number, first.note.end) == (3, None)
    assert [one.number for one in anew[0].epochs] == [3], "the end of the last launch is not theirs"
    assert [one.number for one in nodes[0].epochs] == [1, 2]
    assert not nodes[0].outs


@pytest.mark.slow
def test_node_that_joins_after_the_end_of_its_own_run_hears_of_it(world: NodesOfOneJob) -> None:
    nodes = [world.node("a"), world.node("b")]
    world.epoch(*nodes)
    for one in nodes:
        one.node.report_ended(1)
    end = world.epoch(*nodes, beyond=1)
    published = world.made[0].node._view.epoch_revision  # type: ignore[union-attr]
    world.until(
        lambda: all(one.node._over for one in nodes), "that all have left the empty membership"
    )
    late = world.node("c", ends_after=published - 1)
    assert world.epoch(late).note.end == end.note.end == 0
    next_run = world.node("d", ends_after=published)
    world.until(
        lambda: any(event.kind == "leads" for event in next_run.events), "that it leads a new run"
    )
    assert next_run.node.awaited == "more nodes: 1 of 2 are here"
    assert not next_run.epochs
    next_run.node.close()  # with it there would be two, enough for an epoch
    unclear = world.node("e")  # no agent says when its run began
    world.until(lambda: "ended before this node came" in unclear.node.awaited, "that it says so")
    assert f"({ALL_ENDED})" in unclear.node.awaited


@pytest.mark.slow
def test_final_failure_ends_the_job_and_its_record_does_not_burden_the_next_launch(
    world: NodesOfOneJob,
) -> None:
    world.policy = Policy(stuck_max=2)
    nodes = [world.node("a"), world.node("b")]
    world.epoch(*nodes)
    nodes[0].fail(1, completed=-1)
    assert world.epoch(*nodes, beyond=1).note.stuck == 1
    nodes[1].fail(2, completed=-1)
    end = world.epoch(*nodes, beyond=2)
    assert end.note.end == 128 + 9
    assert "without one new step" in end.note.why
    anew = [world.node("a"), world.node("b")]
    assert world.epoch(*anew).note.stuck == 0
    anew[0].fail(4, completed=-1)
    assert world.epoch(*anew, beyond=4).note.end is None


def test_failure_that_is_final_counts_though_the_next_epoch_came_first(
    world: NodesOfOneJob,
) -> None:
    early = world.node("a")
    early.fail(0, "preempted", final=True, status=0)  # before it has joined, and before any epoch
    other = world.node("b")
    end = world.epoch(early, other, beyond=1)
    assert (end.number, end.note.end, end.note.why) == (2, 1, "a preempted")


def test_second_word_of_an_attempt_that_is_final_counts(world: NodesOfOneJob) -> None:
    nodes = [world.node("a"), world.node("b")]
    world.epoch(*nodes)
    nodes[1].fail(1, "error", status=1)
    nodes[1].fail(1, "preempted", final=True, status=0)
    assert world.epoch(*nodes, beyond=1).note.why == "b preempted"


@pytest.mark.slow
def test_node_that_joined_and_could_not_look_then_is_a_node_all_the_same(
    world: NodesOfOneJob,
) -> None:
    nodes = [world.node("a"), world.node("b", blind=5)]
    assert world.epoch(*nodes).number == 1
    assert [len(one.lines) for one in nodes] == [1, 1], "others reach it where it said that it is"


@pytest.mark.slow
def test_node_that_could_not_look_until_its_lease_was_over_joins_anew(world: NodesOfOneJob) -> None:
    one = world.node("a", blind=10**9)
    world.until(lambda: one.member.lease_status().state is LeaseState.VALID, "a first membership")
    one.member.keepalive.mark_lost("nobody prolonged it")
    world.until(lambda: len(one.lines) == 2, "another membership")
    one.member.view = KeyspaceMembership.view.__get__(one.member)  # type: ignore[method-assign]
    other = world.node("b")
    world.until(
        lambda: (
            one.epochs
            and other.epochs
            and one.epochs[-1].record.ranks == other.epochs[-1].record.ranks
        ),
        "one",
    )
    assert set(one.epochs[-1].record.ranks) == {one.id, other.id}


@pytest.mark.slow
def test_node_that_came_back_and_could_not_look_then_is_a_node_again(world: NodesOfOneJob) -> None:
    one = world.node("a", least=1, last_call_s=0.0)
    world.epoch(one)
    first, join, view = one.id, one.member.join, one.member.view

    def join_blindly(*args: object, **named: object) -> object:
        ticket = join(*args, **named)  # type: ignore[arg-type]
        one.member.view = blinded(view, times=3)  # type: ignore[method-assign]
        return ticket

    one.member.join = join_blindly  # type: ignore[method-assign,assignment]
    one.member.keepalive.mark_lost("nobody prolonged it")
    world.until(
        lambda: one.id != first and one.id in one.epochs[-1].record.ranks,
        "an epoch under its new name",
    )
    assert len(one.lines) == 2


@pytest.mark.slow
def test_world_grows_when_the_epoch_has_lasted_long_enough(world: NodesOfOneJob) -> None:
    began_s = time.monotonic()
    first = world.node("a", least=1, grow_wait_s=1.0, last_call_s=0.0)
    world.epoch(first)
    second = world.node("b", least=1, grow_wait_s=1.0)
    world.until(lambda: len(first.epochs) == 2 and second.epochs, "growth")
    assert set(first.epochs[-1].record.ranks) == {first.id, second.id}
    assert time.monotonic() - began_s > 0.5


@pytest.mark.slow
def test_node_that_has_ended_may_leave_and_the_others_go_on_to_their_end(
    world: NodesOfOneJob,
) -> None:
    nodes = [world.node("a", least=1), world.node("b", least=1)]
    world.until(
        lambda: all(one.epochs and len(one.epochs[-1].record.places) == 2 for one in nodes), "both"
    )
    number = world.epoch(*nodes).number
    nodes[0].node.report_ended(number)
    other = nodes[1].node
    world.until(lambda: nodes[0].id in other._reports._ended, "its word")
    nodes[0].node.close()
    world.until(
        lambda: (
            other._view is not None
            and other._view.leader is not None
            and other._view.leader.node == other.node_id
        ),
        "the other leads",
    )
    other.report_ended(number)
    end = world.epoch(nodes[1], beyond=number)
    assert (end.number, end.note.end) == (number + 1, 0)


@pytest.mark.slow
def test_failure_after_another_nodes_end_ends_the_job_though_it_is_gone(
    world: NodesOfOneJob,
) -> None:
    nodes = [world.node("a", least=1), world.node("b", least=1)]
    world.until(
        lambda: all(one.epochs and len(one.epochs[-1].record.places) == 2 for one in nodes), "both"
    )
    number = world.epoch(*nodes).number
    nodes[0].node.report_ended(number)
    world.until(lambda: nodes[0].id in nodes[1].node._reports._ended, "its word")
    nodes[0].node.close()
    nodes[1].fail(number)
    end = world.epoch(nodes[1], beyond=number)
    assert end.note.end == 128 + 9
    assert "had ended" in end.note.why


@pytest.mark.slow
def test_node_that_was_taken_out_is_told_and_joins_anew(world: NodesOfOneJob) -> None:
    nodes = [world.node("a"), world.node("b")]
    world.epoch(*nodes)
    before = nodes[1].id
    world.server.revoke(nodes[1].member._member()[0].lease_id)
    world.until(lambda: nodes[1].outs, "that it is out")
    second = world.epoch(*nodes, beyond=1)
    assert nodes[1].id != before
    assert second.number == 2
    assert set(second.record.ranks) == {one.id for one in nodes}
    assert second.meeting is not None
    assert len(nodes[1].outs) == 1
    nodes[1].fail(2, completed=50)
    assert world.epoch(*nodes, beyond=2).note.completed == 50


@pytest.mark.slow
def test_nodes_find_out_that_the_membership_came_back_from_a_backup(world: NodesOfOneJob) -> None:
    nodes = [world.node("a"), world.node("b")]
    world.epoch(*nodes)
    backup = world.server.backup()
    for number in (1, 2):
        nodes[0].fail(number, completed=10 * number)
        world.epoch(*nodes, beyond=number)
    before = {one.id for one in nodes}
    world.server.restore(backup)
    for one in nodes:
        world.until(lambda one=one: one.outs, f"that {one.name} notices")
        assert "earlier revision" in one.outs[0]
        assert [out for out in one.outs[1:] if "earlier revision" in out] == [], "it noticed once"
    again = world.epoch(*nodes, beyond=3)
    assert set(again.record.ranks) == {one.id for one in nodes}
    assert not before & set(again.record.ranks)
    nodes[1].fail(again.number, completed=50)
    assert world.epoch(*nodes, beyond=again.number).note.completed == 50


@pytest.mark.slow
def test_node_whose_ranks_ended_and_that_is_placed_again_ends_the_job_with_a_word(
    world: NodesOfOneJob,
) -> None:
    nodes = [world.node("a"), world.node("b")]
    first = world.epoch(*nodes)
    leader, other = nodes if first.record.leader == nodes[0].id else nodes[::-1]
    leader.fail(1)
    second = world.epoch(*nodes, beyond=1)
    assert second.note.end is None
    other.node.report_ended(1)  # as if the leader had heard it too late
    end = world.epoch(*nodes, beyond=2)
    assert end.note.end == 1
    assert other.id in end.note.why and "ended before" in end.note.why


@pytest.mark.slow
def test_node_that_was_out_when_the_job_ended_learns_of_the_end(world: NodesOfOneJob) -> None:
    nodes = [world.node("a"), world.node("b")]
    world.epoch(*nodes)
    server = world.server
    leader, other = nodes if nodes[0].epochs[-1].record.leader == nodes[0].id else nodes[::-1]
    lease_id = other.member._member()[0].lease_id
    leader.fail(1, final=True)
    with server.lock:
        server.revoke(lease_id)
    end = world.epoch(*nodes, beyond=1)
    assert end.note.end == 128 + 9


@pytest.mark.slow
def test_epochs_exceed_what_any_keeper_knows_of(world: NodesOfOneJob) -> None:
    nodes = [world.node("a"), world.node("b", attempt=12)]
    assert world.epoch(*nodes).number == 13
    nodes[0].fail(13)
    assert world.epoch(*nodes, beyond=13).number == 14


@pytest.mark.slow
def test_meeting_place_that_comes_before_its_epoch_is_kept(world: NodesOfOneJob) -> None:
    one = world.node("b")
    world.until(lambda: any(event.kind == "joined" for event in one.events), "that it joined")
    one.node._on_message("x", MeetingAddress(attempt=1, host="h", port=7))
    other = world.node("c")
    first = world.epoch(one, other)
    assert first.number == 1
    if first.record.rank0_node != one.id:
        assert one.epochs[-1].meeting == MeetingAddress(attempt=1, host="h", port=7)


@pytest.mark.slow
def test_node_says_under_each_lease_that_it_has_which_agent_may_live_there_and_leaves_that_to_run_out(
    world: NodesOfOneJob,
) -> None:
    nodes = [world.node("a"), world.node("b", agent="agent-b")]
    world.epoch(*nodes)

    def said() -> dict[str, int]:
        with world.server.lock:
            return {
                key: one.lease_id
                for key, one in world.server.keys.items()
                if key.startswith("said/agent.")
            }

    first = nodes[1].member._member()[0].lease_id
    assert said() == {f"said/agent.agent-b/{nodes[1].id}": first}
    world.server.revoke(first)
    world.until(lambda: nodes[1].outs, "that it is out")
    world.epoch(*nodes, beyond=1)
    second = nodes[1].member._member()[0].lease_id
    assert said() == {f"said/agent.agent-b/{nodes[1].id}": second}
    own = nodes[0].member._member()[0].lease_id
    for one in nodes:
        one.node.close()
    assert said() == {}
    assert not [key for key in world.server.keys if key.startswith(("nodes/", "leader"))]
    assert second in world.server.leases
    assert own not in world.server.leases


def test_node_that_closes_while_it_joins_leaves_nothing_behind(world: NodesOfOneJob) -> None:
    one = world.node("a")
    one.node.close()
    assert not any(key.startswith("nodes/") for key in world.server.keys)
    assert not any(thread.is_alive() for thread in one.node._threads)


@pytest.mark.slow
def test_suspicion_is_taken_back_when_the_node_is_reached_again(world: NodesOfOneJob) -> None:
    nodes = [world.node(name, least=2, most=3, last_call_s=0.0) for name in ("a", "b", "c")]
    world.until(
        lambda: all(one.epochs and len(one.epochs[-1].record.places) == 3 for one in nodes),
        "three nodes",
    )
    number = world.epoch(*nodes).number
    nodes[0].node._on_disconnected(nodes[1].id, "refused: as if")
    key = f"suspects/{nodes[1].id}/{nodes[0].id}"
    world.until(lambda: key in world.server.keys, "the suspicion")
    nodes[0].node._on_connected(nodes[1].id)
    world.until(lambda: key not in world.server.keys, "that it is taken back")
    assert nodes[0].epochs[-1].number == number, "one witness is none"
