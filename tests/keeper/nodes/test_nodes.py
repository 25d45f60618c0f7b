"""A keeper among those of other nodes: what it makes of epochs, words and broken lines, without any
of them."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from kit.keepers.slot_makers import MadeSlot
from msgspec import structs

from ckpt.cluster.endpoint import Endpoint
from ckpt.cluster.membership.admission import NO_LOG
from ckpt.cluster.membership.leases import LeaseState
from ckpt.cluster.membership.outcomes import LeaseStatus
from ckpt.cluster.membership.records import EpochRecord, NodePlacement
from ckpt.cluster.mesh import messages as said
from ckpt.cluster.mesh.messages import MeshMessage
from ckpt.cluster.node.epochs import NodeEpoch, NodeObserver
from ckpt.cluster.node.leading import EpochNote
from ckpt.cluster.peermem.keys import mirror_key
from ckpt.errors import SupersededError, UnavailableError, UsageError
from ckpt.events import Event
from ckpt.ipc.client import KeeperSpec
from ckpt.ipc.cluster_spec import NodesSpec
from ckpt.ipc.messages import Message, Policy, PrintLine, StartPrepared
from ckpt.keeper.attempts.events import (
    EpochChanged,
    Failure,
    JobEnded,
    Rank0Unreachable,
    RequestEpoch,
)
from ckpt.keeper.attempts.failures import EpochFailures
from ckpt.keeper.job_state import JobState
from ckpt.keeper.mailbox import LocalMailbox
from ckpt.keeper.nodes import nodes as nodes_room
from ckpt.keeper.nodes.join import _decided, check_spec, memory_address, said_by
from ckpt.keeper.nodes.nodes import Nodes
from ckpt.keeper.nodes.progress import REPORTS_PER_S_MAX, report_every_s
from ckpt.keeper.nodes.remote_mailbox import RemoteMailbox
from ckpt.values import MembershipEpoch, SnapshotId

PAIR = SnapshotId(1, 5)
DIED = Failure(1, "died", "rank 1 died of SIGKILL", -9, 1.0)


class FakeNode:
    """What a keeper asks of its node; ``reached``: to whom it has lines."""

    def __init__(self, told: NodeObserver, seen: Callable[[], MembershipEpoch]) -> None:
        self.told, self.seen = told, seen
        self.node_id = "me"
        self.reached = {"root", "other"}
        self.said: list[tuple[str, MeshMessage]] = []
        self.failures: list[said.NodeFailed] = []
        self.ends: list[int] = []
        self.closed = self.departed = False
        self.awaited = ""
        self.lease_status = LeaseStatus(LeaseState.VALID, 77.0, 1, True)

    def send(self, node: str, word: MeshMessage) -> bool:
        self.said.append((node, word))
        return node in self.reached

    def is_connected(self, node: str) -> bool:
        return node in self.reached

    def report_failure(self, failure: said.NodeFailed) -> None:
        self.failures.append(failure)

    def report_ended(self, attempt: int) -> None:
        self.ends.append(attempt)

    def depart(self) -> None:
        self.departed = True

    def close(self) -> None:
        self.closed = True

    def of(self, kind: type[MeshMessage]) -> list[tuple[str, MeshMessage]]:
        return [one for one in self.said if isinstance(one[1], kind)]


class Keeper:
    """One node's part of a keeper, its loop run by hand."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **more: object) -> None:
        self.posted: list[Callable[[], object]] = []
        self.heard: list[EpochChanged | JobEnded | Rank0Unreachable] = []
        spec = KeeperSpec(job="job", store=str(tmp_path / "store"), compression="off")
        self.state = JobState.create(
            spec, incarnation="b", post=self.posted.append, emit=lambda event: None
        )
        self.state.memory.resize(2)
        self.state.launch.policy = Policy(linger_s=5.0)
        where = NodesSpec(where=str(tmp_path / "meet"), job="job", nodes_min=2, nodes_max=2, **more)  # type: ignore[arg-type]
        self.node: FakeNode | None = None
        self.refuses: Exception | None = None

        def join(
            *_: object, observer: NodeObserver, seen: Callable[[], MembershipEpoch], **__: object
        ) -> FakeNode:
            if self.refuses is not None:
                raise self.refuses
            self.node = FakeNode(observer, seen)
            return self.node

        monkeypatch.setattr(nodes_room, "join", join)
        self.nodes = Nodes(self.state, where, on=self.heard.append)

    def close(self) -> None:
        self.nodes.close()
        self.state.uploads.close()
        self.state.memory.close()

    @property
    def fake(self) -> FakeNode:
        assert self.node is not None
        return self.node

    def run(self) -> None:
        """The loop does what was posted."""
        while self.posted:
            self.posted.pop(0)()

    def come(
        self,
        number: int,
        *order: str,
        end: int | None = None,
        era: int = 1,
        why: str = "why",
        completed: int = -1,
        line: str = "",
    ) -> None:
        """An epoch of those nodes, two ranks each."""
        places = tuple(NodePlacement(name, 2) for name in order)
        record = EpochRecord(
            job="job", number=number, places=places, leader=order[0], nodes_min=1, nodes_max=3
        )
        meet = (
            None
            if end is not None or "me" not in order
            else said.MeetingAddress(attempt=number, host="10.0.0.9", port=4000)
        )
        self.fake.told.on_epoch(
            NodeEpoch(
                record,
                EpochNote(why=why, end=end, era=era, completed=completed, line=line),
                {},
                {},
                {},
                meet,
                "me",
            )
        )
        self.run()

    def word(self, node: str, word: MeshMessage) -> None:
        self.fake.told.on_message(node, word)
        self.run()


@pytest.fixture
def keeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Keeper]:
    made = Keeper(tmp_path, monkeypatch)
    yield made
    made.close()


@pytest.fixture
def joined(keeper: Keeper) -> Keeper:
    keeper.nodes.request_epoch(RequestEpoch(None, -1), 0)
    return keeper


def test_nodes_that_meet_in_etcd_need_a_secret(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="secret"):
        check_spec(NodesSpec(where="etcd://h:1", job="j", nodes_min=1, nodes_max=2))
    check_spec(NodesSpec(where=str(tmp_path), job="j", nodes_min=1, nodes_max=2))


def test_nodes_on_a_network_need_tls_or_a_word(tmp_path: Path) -> None:
    spec = {"where": str(tmp_path), "job": "j", "nodes_min": 1, "nodes_max": 2, "host": "10.1.2.3"}
    with pytest.raises(UsageError, match="--plaintext"):
        check_spec(NodesSpec(**spec))
    with pytest.raises(UsageError, match="certificate can't be read"):
        check_spec(NodesSpec(**spec, tls_cert="/none", tls_key="/none", tls_ca="/none"))
    check_spec(NodesSpec(**spec, plaintext=True))


@pytest.mark.parametrize("host", ["10.1.2.3", "node7.example", "fd00::7"])
def test_address_of_lent_memory_is_read_as_it_is_written(host: str) -> None:
    read = Endpoint.parse(memory_address(host, 4000), plaintext=True)
    assert (read.host, read.port) == (host, 4000)


def test_one_rate_cap_for_all_nodes_that_keep_mirrors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capped = Keeper(tmp_path, monkeypatch, mirror_rate=float(5 << 20))
    memory = capped.nodes.memory
    caps = {memory._peers._store(f"127.0.0.1:{port}")._cap for port in (1, 2)}
    assert [cap and cap.bytes_per_s for cap in caps] == [float(5 << 20)]
    capped.close()
    with pytest.raises(UsageError, match="rate limit"):
        Keeper(tmp_path, monkeypatch, mirror_rate=5.0)


def test_epoch_that_places_this_node_starts_it_where_its_ranks_are(joined: Keeper) -> None:
    joined.come(3, "root", "me")
    (came,) = joined.heard
    assert came == EpochChanged(3, True, "why", came.at_s)
    seating = joined.nodes.placement
    assert seating is not None
    assert (seating.first_rank, seating.world_size, seating.node, seating.nodes) == (2, 4, 1, 2)
    assert (seating.host, joined.nodes.start_message(3).port) == ("10.0.0.9", 4000)
    assert not joined.nodes.view.has_rank0
    assert isinstance(joined.nodes.view.mailbox("attempt/3", LocalMailbox()), RemoteMailbox)
    joined.come(4, "root", "other")
    assert joined.heard[-1] == EpochChanged(4, False, "why", joined.heard[-1].at_s)
    assert joined.nodes.placement is None


def test_generation_is_that_of_the_newest_epoch(joined: Keeper) -> None:
    assert joined.nodes.generation == 0
    joined.come(3, "root", "me", era=3)
    joined.come(4, "root", "me", era=3)
    assert joined.nodes.generation == 3
    joined.come(5, "other", "me", era=5)
    assert joined.nodes.generation == 5


def test_node_of_rank_0_has_the_room_and_answers_others(joined: Keeper) -> None:
    joined.come(3, "me", "other")
    room = LocalMailbox()
    assert joined.nodes.begin(3, room) is room
    joined.word("other", said.MeshPost(room="attempt/3", key="k", value=b"v"))
    joined.word("other", said.MeshPeek(call=8, room="attempt/3", key="k"))
    assert ("other", said.MeshReply(call=8, value=b"v")) in joined.fake.said


def test_what_mirrors_complete_can_be_submitted_if_it_is_of_this_world(joined: Keeper) -> None:
    joined.come(3, "me", "other")
    slot, larger = MadeSlot(), SnapshotId(1, 9)
    for pair, ranks in ((PAIR, 4), (larger, 6)):
        for rank in range(ranks):
            slot.seal(pair, rank=rank, ranks=ranks, origin="ours")
            joined.nodes.memory._server.keep(mirror_key(pair, rank), [slot.memory])
    slot.close()
    answers: list[object] = []
    joined.nodes.gather(answers.append)
    assert answers == [{larger: "ours", PAIR: "ours"}]
    assert joined.nodes.uploads._elsewhere.held_by_all(()) == {PAIR: "ours"}
    joined.nodes.begin(3, LocalMailbox())
    assert joined.nodes.uploads._elsewhere.held_by_all(()) == {}, "it is asked for anew"


def test_failure_is_told_of_a_rank_of_the_whole_job(joined: Keeper) -> None:
    joined.come(3, "root", "me")
    joined.nodes.request_epoch(RequestEpoch(DIED, 7), 3)
    (told,) = joined.fake.failures
    assert (told.attempt, told.rank, told.kind, told.status, told.completed) == (
        3,
        3,
        "died",
        -9,
        7,
    )
    assert joined.fake.seen() == MembershipEpoch("", 3)


def test_leader_is_told_all_that_one_nodes_keeper_would_decide_by(joined: Keeper) -> None:
    joined.come(3, "root", "me")
    outage = replace(DIED, kind="error", fingerprint="f", step=7, passing=True)
    joined.nodes.request_epoch(RequestEpoch(outage, 7, calls=2, moved=True), 3)
    (told,) = joined.fake.failures
    known = EpochFailures({}, {}, frozenset())
    before = EpochNote(fingerprint="f", step=7, same=1, stuck=4, completed=90, calls=1)
    decided = _decided(before, {"me": told}, known, {"me": 50.0}, 60.0, Policy())
    assert decided.note is not None and decided.note.end is None
    assert (decided.note.calls, decided.note.completed, decided.note.stuck) == (2, 7, 0)
    assert decided.note.same == 1, "an outage counts only after a pause"
    assert len(decided.note.restarts) == 1
    again = _decided(decided.note, {"me": told}, known, {"me": 50.0}, 60.0, Policy())
    assert again.note is not None and again.note.calls == 2 and len(again.note.restarts) == 2


def test_node_that_can_not_join_ends_the_launch_and_says_why(keeper: Keeper) -> None:
    keeper.refuses = UnavailableError("no such file")
    keeper.nodes.request_epoch(RequestEpoch(None, -1), 0)
    keeper.run()
    (ended,) = keeper.heard
    assert isinstance(ended, JobEnded)
    assert ended.status == 1
    assert "no such file" in ended.text


def test_refused_node_ends_its_launch_with_the_status_of_wrong_options(joined: Keeper) -> None:
    joined.fake.told.on_refused("a=(/x) b=(/y)")
    joined.run()
    (ended,) = joined.heard
    assert isinstance(ended, JobEnded)
    assert (ended.status, "a=(/x) b=(/y)" in ended.text) == (2, True)


def test_options_that_say_what_is_written_are_said_to_the_other_nodes() -> None:
    nodes = NodesSpec(where="/meet", job="j", nodes_min=2, nodes_max=4)
    job = KeeperSpec(job="run", store="/a/run", others=("/b/run",))
    plain = said_by(job, nodes, None)
    assert (plain.options, plain.log_id) == ("nodes=2:4 stores=2", NO_LOG)
    more = structs.replace(job, job="mine", write_quorum=2, encryption_key="env:KEY")
    assert said_by(more, nodes, "").options == (
        "nodes=2:4 stores=2 write_quorum=2 encrypted=yes job=mine"
    )
    said = said_by(job, nodes, None, capture_rule="every=5 memory_every=0")
    assert said.capture_rule == "every=5 memory_every=0"
    assert said.options == "nodes=2:4 stores=2", "releases that say no rule compare these whole"


def told_lines(joined: Keeper, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What supervisors are told to print."""
    lines: list[str] = []

    def broadcast(role: str, message: Message, *, rank: int = -1) -> None:
        if isinstance(message, PrintLine):
            lines.append(message.text)

    monkeypatch.setattr(joined.state.clients, "broadcast", broadcast)
    return lines


def test_program_is_told_of_refused_lines_and_not_without_end(
    joined: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = told_lines(joined, monkeypatch)
    for n in range(nodes_room.TOLD_MAX + 5):
        joined.nodes._emit(Event("line-refused", f"another secret at port {n}"))
    joined.nodes._emit(Event("protected", "not for the program"))
    joined.run()
    assert lines[0] == "another secret at port 0"
    assert len(lines) == nodes_room.TOLD_MAX


def test_wait_for_nodes_is_told_and_ends_in_time(
    joined: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = told_lines(joined, monkeypatch)
    joined.fake.awaited = "more nodes: 1 of 2 are here"
    for now_s in (100.0, 105.0, 110.0, 120.0, 170.0):
        joined.nodes.tick(now_s)
    assert [line.partition(" for more")[0] for line in lines] == [
        "waiting for 10 s",
        "waiting for 70 s",
    ]
    joined.nodes.tick(100.0 + 900.0)
    (ended,) = joined.heard
    assert isinstance(ended, JobEnded)
    assert (ended.status, "1 of 2 are here" in ended.text) == (11, True)


def test_node_that_found_the_others_waits_no_more(joined: Keeper) -> None:
    joined.fake.awaited = "more nodes"
    joined.nodes.tick(100.0)
    joined.fake.awaited = ""
    joined.nodes.tick(500.0)
    joined.fake.awaited = "a node in the place of b"
    joined.nodes.tick(900.0)
    joined.nodes.tick(1100.0)
    assert not joined.heard


def test_other_store_ends_the_job_before_it_has_begun_and_this_node_alone_after(
    joined: Keeper,
) -> None:
    joined.come(3, "root", "me")
    joined.nodes._other_store("theirs=x ours=y")
    (told,) = joined.fake.failures
    assert (told.attempt, told.final, told.status, "theirs=x" in told.text) == (3, True, 2, True)
    joined.come(4, "root", "me", completed=7)
    joined.nodes._other_store("theirs=x ours=y")
    assert len(joined.fake.failures) == 1
    assert isinstance(joined.heard[-1], JobEnded) and joined.heard[-1].status == 2


def test_end_of_the_job_is_passed_on_and_frees_the_keeper(joined: Keeper) -> None:
    joined.come(3, "root", "me")
    assert not joined.nodes.busy
    joined.nodes.report_ended(3)
    assert joined.fake.ends == [3]
    assert joined.nodes.busy
    joined.come(4, "root", "me", end=0)
    assert joined.heard[-1] == JobEnded(0, "why", joined.heard[-1].at_s)
    assert not joined.nodes.busy
    joined.nodes.leave()
    assert not joined.fake.closed, "lines stay for what is on its way to a store"
    joined.nodes.close()
    assert joined.fake.closed


def test_node_that_is_out_has_no_ranks_until_the_next_epoch_of_its_own(joined: Keeper) -> None:
    joined.come(3, "root", "me")
    joined.fake.told.on_membership_lost("its lease expired")
    joined.run()
    assert joined.heard[-1] == EpochChanged(4, False, "its lease expired", joined.heard[-1].at_s)
    assert joined.nodes.placement is None
    assert not joined.nodes.view.placed
    joined.come(4, "root", "me")
    assert joined.nodes.view.placed


def test_launch_that_has_left_hears_nothing_more(joined: Keeper) -> None:
    told = joined.fake.told
    joined.come(3, "root", "me")
    before = list(joined.heard)
    joined.fake.told.on_membership_lost("late")
    joined.nodes.close()
    joined.run()
    told.on_disconnected("root", "late")
    joined.run()
    assert joined.heard == before


def test_broken_line_to_the_node_of_rank_0_cuts_the_attempt(joined: Keeper) -> None:
    joined.come(3, "root", "other", "me")
    joined.fake.told.on_disconnected("other", "reset")
    joined.run()
    assert len(joined.heard) == 1
    joined.fake.told.on_disconnected("root", "reset")
    joined.run()
    assert isinstance(joined.heard[-1], Rank0Unreachable)
    assert joined.heard[-1].attempt == 3


def test_node_that_is_asked_to_go_leaves_and_stays_connected_for_what_is_in_flight(
    joined: Keeper,
) -> None:
    joined.come(3, "root", "me")
    joined.nodes.leave()
    assert joined.fake.departed and not joined.fake.closed
    assert joined.nodes.view.send("root", said.NodeEnded(attempt=3)), "its shares go this way"
    joined.nodes.close()
    assert joined.fake.closed


def test_writer_that_replaced_this_one_within_the_job_cuts_the_attempt_only(joined: Keeper) -> None:
    joined.come(3, "me", "other")
    joined.state.uploads.on_superseded("a later membership epoch opened one")
    joined.run()
    cut = joined.heard[-1]
    assert isinstance(cut, Rank0Unreachable)
    assert (cut.attempt, joined.state.uploads.fenced) == (3, "")


def test_epochs_of_the_log_are_opened_in_the_name_of_the_membership_epoch(joined: Keeper) -> None:
    joined.come(3, "me", "other", line="first")
    assert joined.nodes.view.membership == MembershipEpoch("first", 3)
    joined.nodes.begin(3, LocalMailbox())
    term = joined.state.uploads.need()._epochs.term
    assert term.membership == MembershipEpoch("first", 3)
    with pytest.raises(UnavailableError, match="may not act"):
        term.require()  # the lease of this fake node ended long ago
    board = joined.state.memory.board
    assert board is not None
    board.extend_act_until(time.clock_gettime_ns(time.CLOCK_BOOTTIME) + 60 * 10**9)
    term.require()
    joined.fake.told.on_membership_lost("its lease expired")
    joined.run()
    with pytest.raises(SupersededError):
        term.require()
    assert joined.fake.seen() == MembershipEpoch("first", 3)


def test_line_that_broke_before_the_attempt_began_cuts_it_as_well(joined: Keeper) -> None:
    joined.come(3, "root", "me")
    joined.fake.reached = set()
    joined.nodes.begin(3, LocalMailbox())
    assert len(joined.heard) == 1, "the roster does not know yet that it runs"
    joined.run()
    assert isinstance(joined.heard[-1], Rank0Unreachable)


def test_decisions_of_rank_0_are_passed_on_and_those_of_this_attempt_taken(joined: Keeper) -> None:
    board = joined.state.memory.board
    assert board is not None
    joined.come(3, "me", "other")
    board.begin_attempt(3)
    joined.nodes.decided(6, 1)
    assert joined.fake.of(said.MeshDecided) == [
        ("other", said.MeshDecided(attempt=3, boundary=6, flags=1))
    ]
    joined.come(4, "root", "me")
    board.begin_attempt(4)
    joined.word("root", said.MeshDecided(attempt=3, boundary=8, flags=1))
    assert board.decision(8) is None
    joined.word("root", said.MeshDecided(attempt=4, boundary=8, flags=1))
    assert board.decision(8) == 1


def test_what_the_others_hold_comes_onto_the_board(joined: Keeper) -> None:
    board = joined.state.memory.board
    assert board is not None
    joined.come(3, "me", "other", "third")
    board.begin_attempt(3)
    assert board.has_remote_ranks
    mine = said.NodeProgress(attempt=3, sealed=(PAIR,), completed=5)
    clock_s = itertools.count(100.0)

    def shown_after(node: str, word: said.NodeProgress) -> frozenset[SnapshotId]:
        joined.word(node, word)
        joined.nodes.tick(next(clock_s))
        return board.remote_ranks.sealed_snapshots()

    assert shown_after("other", mine) == frozenset(), "the third has said nothing yet"
    assert shown_after("third", replace_attempt(mine, 2)) == frozenset()
    assert shown_after("third", mine) == {PAIR}
    assert board.remote_ranks.completed == 5


def rank0_load(joined: Keeper, nodes: int, *, seconds: float, step_s: float = 0.1) -> float:
    """The share of a core that rank 0's keeper spends on the progress and the roll of so many
    nodes that take a step each ``step_s``, words aside; checks how many words there are."""
    board = joined.state.memory.board
    assert board is not None
    names = [f"n{number}" for number in range(1, nodes)]
    joined.come(3, "me", *names)
    board.begin_attempt(3)
    dice = random.Random(nodes)
    every_s = report_every_s(nodes)
    due = sorted((dice.uniform(0, max(step_s, every_s)), name) for name in names)
    joined.fake.said.clear()
    heard, began_s = 0, time.process_time()
    answer = said.LivenessAnswer(attempt=3, number=1)
    while due[0][0] < seconds:
        now_s, name = due.pop(0)
        step = 10 + int(now_s / step_s)
        sealed = tuple(SnapshotId(1, step - back) for back in (1, 2, 3))
        word = said.NodeProgress(attempt=3, sealed=sealed, completed=step)
        due.append((now_s + max(step_s, every_s), name))
        for told in (word, structs.replace(answer, number=joined.nodes._liveness._round.number)):
            joined.nodes._receive(name, told)
            joined.nodes.tick(100.0 + now_s)  # as if the loop turned for each
        heard += 1
    share = (time.process_time() - began_s) / seconds
    assert board.remote_ranks.completed is not None
    told = len(joined.fake.of(said.NodeProgress))
    assert heard <= REPORTS_PER_S_MAX * seconds * 1.1
    assert told <= 2 * heard + nodes
    return share


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1000, 5000])
def test_progress_of_many_nodes_takes_little_of_a_core(joined: Keeper, nodes: int) -> None:
    # A quarter of a core is far from what it takes alone (0.02), on whatever machine, and farther
    # from what one look at all nodes for each report took (2.5 at 1,000 nodes).
    assert rank0_load(joined, nodes, seconds=2 * report_every_s(nodes)) <= 0.25


def test_how_far_this_node_is_goes_to_rank_0_and_its_lease_onto_the_board(joined: Keeper) -> None:
    board = joined.state.memory.board
    assert board is not None
    joined.come(3, "root", "me")
    board.begin_attempt(3)
    joined.nodes.tick(100.0)
    assert board.act_until_ns == 77_000_000_000
    ((to, word),) = joined.fake.of(said.NodeProgress)
    assert (to, word) == ("root", said.NodeProgress(attempt=3, sealed=(), completed=-1))
    joined.nodes.tick(100.5)
    assert len(joined.fake.of(said.NodeProgress)) == 1, "nothing has changed"
    joined.nodes.tick(101.5)
    assert len(joined.fake.of(said.NodeProgress)) == 2


def test_supervisors_of_a_standby_hear_once_an_epoch_that_trainers_may_run_ahead(
    joined: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[str, Message]] = []
    monkeypatch.setattr(
        joined.state.clients, "broadcast", lambda role, word, **_: heard.append((role, word))
    )
    joined.come(3, "root", "me")
    assert heard == []
    joined.come(4, "root", "other")
    assert heard == [("supervisor", StartPrepared())]
    assert joined.nodes.view.epoch is not None
    joined.fake.told.on_standbys(joined.nodes.view.epoch)  # another standby came
    joined.run()
    assert len(heard) == 1
    joined.come(5, "root", "other")
    assert len(heard) == 2
    joined.come(6, "root", "other", end=0)
    assert len(heard) == 2


def test_lease_prolonged_while_the_loop_stands_still_is_on_the_board(joined: Keeper) -> None:
    board = joined.state.memory.board
    assert board is not None
    joined.fake.told.on_act_until(80.0)
    assert board.act_until_ns == 80_000_000_000
    joined.nodes.tick(100.0)  # what it read before is older
    assert board.act_until_ns == 80_000_000_000
    joined.close()
    joined.fake.told.on_act_until(90.0)  # the thread ends a little later


def test_node_of_rank_0_tells_each_what_the_rest_have_in_common(joined: Keeper) -> None:
    board = joined.state.memory.board
    assert board is not None
    joined.come(3, "me", "other", "third")
    board.begin_attempt(3)
    joined.word("other", said.NodeProgress(attempt=3, sealed=(PAIR,), completed=5))
    joined.word("third", said.NodeProgress(attempt=3, sealed=(PAIR,), completed=4))
    joined.fake.said.clear()
    joined.nodes.tick(100.0)
    told = dict(joined.fake.of(said.NodeProgress))
    assert set(told) == {"other", "third"}
    assert all(
        word == said.NodeProgress(attempt=3, sealed=(), completed=-1) for word in told.values()
    )


def replace_attempt(word: said.NodeProgress, attempt: int) -> said.NodeProgress:
    return said.NodeProgress(attempt=attempt, sealed=word.sealed, completed=word.completed)
