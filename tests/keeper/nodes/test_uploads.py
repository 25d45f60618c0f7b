"""Keepers of two nodes that lost each other's words: what was handed in to one that died, and what
memory alone holds when no attempt follows, becomes durable."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from kit.keepers.slot_makers import HEADER_BYTES, MadeSlot

from ckpt.backends.base import Backend
from ckpt.backends.file.store import FileBackend
from ckpt.backends.memory import MemoryBackend
from ckpt.cluster.membership.records import EpochRecord, NodePlacement
from ckpt.cluster.mesh import messages as said
from ckpt.cluster.node.epochs import NodeEpoch
from ckpt.cluster.node.leading import EpochNote
from ckpt.cluster.peermem.keys import mirror_key
from ckpt.errors import CkptError, UnavailableError
from ckpt.events import Event
from ckpt.ipc.client import KeeperSpec
from ckpt.ipc.messages import RemoteError
from ckpt.keeper.cluster_view import SingleNode
from ckpt.keeper.job_state import JobState
from ckpt.keeper.mirrors.memory import read_share
from ckpt.keeper.mirrors.send import compact_header
from ckpt.keeper.nodes import uploads as of_nodes
from ckpt.keeper.nodes.epoch_view import EpochView
from ckpt.keeper.nodes.uploads import ClusterUploads
from ckpt.keeper.uploads.store_log import open_job_of
from ckpt.keeper.uploads.uploads import Uploads
from ckpt.log.journal import Journal
from ckpt.log.state import LogState
from ckpt.staging.header import SlotSummary, read_slot
from ckpt.values import SnapshotId

WAIT_S = 60.0
NODES = ("a", "b")


class Keeper:
    """One node's keeper, of one rank. ``slots`` outlive it."""

    def __init__(self, world: World, name: str, slots: list[MadeSlot]) -> None:
        self.world, self.name, self.slots = world, name, slots
        self.events: list[Event] = []
        self.failed: list[tuple[SnapshotId, RemoteError]] = []
        spec = KeeperSpec(job="job", store=str(world.root), compression="off")
        self.state = JobState.create(
            spec, incarnation=name, post=self._post, emit=self.events.append
        )
        self.state.memory.resize(1)
        self.view = EpochView()
        self.view.node = self  # type: ignore[assignment]  # of a node it asks for ``send`` alone
        self.uploads = ClusterUploads(
            self.state, self.view, on_other_store=pytest.fail, fetch=self._fetch
        )
        cluster = SingleNode(self.state.memory)
        cluster.uploads = self.uploads
        self.state.launch.enter_cluster(lambda: cluster)
        self.down = 0
        self.node_id, self.lives = name, True
        self.state.uploads.current = Uploads(
            spec,
            ranks=1,
            post=self._post,
            on_outcome=self._outcome,
            on_fenced_text=pytest.fail,
            emit=self.events.append,
            open_store=lambda: self._open(spec),
            retry_first_s=0.01,
        )
        for number, slot in enumerate(slots):
            assert self.table is not None
            self.table.add(0, number, slot.given(), slot.size_bytes)
        self.table.sync_board()

    @property
    def table(self):
        table = self.state.memory.slots
        assert table is not None
        return table

    @property
    def rank(self) -> int:
        return NODES.index(self.name)

    def send(self, node: str, message: said.MeshMessage) -> bool:
        """To the keeper that serves under that name when the message arrives."""
        self.world.calls.put(lambda: self.world.keepers[node].take(self.name, message))
        return True

    def take(self, node: str, message: said.MeshMessage) -> None:
        match message:
            case said.NodeSubmissions() | said.MeshEpochOpened():
                self.uploads.receive(node, message)
            case _:
                self.view.mailboxes.receive(node, message)  # type: ignore[arg-type]

    def come(self, number: int, *, era: int) -> None:
        places = tuple(NodePlacement(name, 1) for name in NODES)
        record = EpochRecord(
            job="job", number=number, places=places, leader="a", nodes_min=2, nodes_max=2
        )
        meeting = said.MeetingAddress(attempt=number, host="h", port=1)
        epoch = NodeEpoch(record, EpochNote(era=era), {}, {}, {}, meeting, self.name)
        before, self.view.epoch = self.view.epoch, epoch
        self.view.mailboxes.new_epoch(number, generation=era)
        self.uploads.see_epoch(epoch, before, placed=True)
        board = self.state.memory.board
        assert board is not None
        board.begin_attempt(number)
        self.uploads.begin(number)

    def stage(self, slot: int, pair: SnapshotId, origin: str, tags: tuple[str, ...] | None) -> None:
        """Seal a slot; ``tags``: and mark it as handed in, which no keeper hears."""
        self.slots[slot].seal(pair, rank=self.rank, ranks=2, origin=origin)
        if tags is not None:
            self.slots[slot].header.hand_in(tags)

    def hand_in(self, slot: int, pair: SnapshotId, tags: tuple[str, ...] = ()) -> None:
        """A trainer's submission of what it staged."""
        sealed = self.table.hold_snapshot(0, pair)
        assert sealed is not None
        self.state.uploads.need().persist(0, sealed, tags)

    def end(self) -> None:
        """Its trainers are gone, and none follows."""
        self.state.uploads.attempt_ended()
        self.state.uploads.flush_newest()

    def alarms(self, kind: str) -> list[str]:
        return [event.text for event in self.events if event.kind == kind and event.alarm]

    def close(self) -> None:
        self.lives = False
        self.state.uploads.close()
        self.state.memory.close()

    def _post(self, call: Callable[[], object]) -> None:
        self.world.calls.put(lambda: call() if self.lives else None)

    def _outcome(
        self, rank: int, pair: SnapshotId, info: object, error: RemoteError | None
    ) -> None:
        if error is not None:
            self.failed.append((pair, error))

    def _fetch(
        self, wanted: Sequence[SlotSummary], then: Callable[[of_nodes.FetchedShares], object]
    ) -> None:
        """From the memory of the node that keeps mirrors."""
        got = {}
        for share in wanted:
            with suppress(CkptError):
                got[share] = read_share(share, [self.world.mirrors], left_bytes=None)
        self._post(lambda: then(got))

    def _open(self, spec: KeeperSpec) -> Backend:
        if self.down:
            self.down -= 1
            raise UnavailableError("the store is down")
        return open_job_of(spec, self.events.append)


class World:
    """Both keepers, joined by one loop that the test turns."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self.slots = {name: [MadeSlot() for _ in range(3)] for name in NODES}
        self.keepers = {name: Keeper(self, name, self.slots[name]) for name in NODES}
        self.origin = ""
        self.mirrors = MemoryBackend()
        """What a neighbour keeps for others."""

    @property
    def both(self) -> tuple[Keeper, ...]:
        return tuple(self.keepers.values())

    def lose_keeper(self, name: str) -> None:
        """Its keeper is killed; the next one gets the slots."""
        self.keepers[name].close()
        self.keepers[name] = Keeper(self, name, self.slots[name])

    def lose_node(self, name: str) -> None:
        """Its machine is lost; a standby takes its place."""
        self.keepers[name].close()
        for slot in self.slots[name]:
            slot.close()
        self.slots[name] = [MadeSlot() for _ in range(3)]
        self.keepers[name] = Keeper(self, name, self.slots[name])

    def mirror(self, name: str, slot: int) -> bytearray:
        """A neighbour keeps what a slot of that node holds; a copy of it."""
        memory = self.slots[name][slot].memory
        sealed = read_slot(memory)
        assert sealed is not None
        index, data = sealed[0], memory[HEADER_BYTES:]
        share = bytearray(compact_header(index, data.nbytes) + data)
        self.mirrors.put(mirror_key(index.snapshot, index.rank), [share])
        return share

    def attempt(
        self,
        number: int,
        *,
        era: int,
        resume: SnapshotId | None,
        memory: Mapping[SnapshotId, str] | None = None,
    ) -> int:
        """An attempt begins on both nodes and opens its epoch of the log. ``memory``: what is
        complete in slots and mirrors; None: what is in slots."""
        for keeper in self.both:
            keeper.come(number, era=era)
        root = self.keepers["a"]
        uploads = root.state.uploads.need()
        held = root.uploads.staged() if memory is None else memory
        root.uploads.gathered(memory or {})
        self.until(uploads.choices(tuple(held), held).done)
        opened = uploads.open_epoch(resume)
        self.until(opened.done)
        root.uploads.open(resume)
        self.origin = uploads.origin_of(opened.result())
        return opened.result()

    def stage(self, slot: int, pair: SnapshotId, tags: tuple[str, ...] | None = None) -> None:
        for keeper in self.both:
            keeper.stage(slot, pair, self.origin, tags)

    def until(self, there: Callable[[], object]) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while not there():
            assert time.monotonic() < deadline_s, [keeper.events for keeper in self.both]
            with suppress(queue.Empty):
                self.calls.get(timeout=0.01)()
            for keeper in self.both:
                keeper.uploads.tick(time.monotonic())

    def settle(self) -> None:
        """Turn the loop until no keeper has anything left to do."""
        self.until(
            lambda: (
                self.calls.empty()
                and all(one.state.uploads.idle and not one.uploads.settling for one in self.both)
            )
        )

    def log(self) -> LogState:
        return Journal.open(FileBackend(self.root)).refresh()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path / "store")
    yield made
    for keeper in made.both:
        keeper.close()
    for slots in made.slots.values():
        for slot in slots:
            slot.close()


@pytest.mark.parametrize("name", NODES)
def test_what_was_handed_in_outlives_a_keeper_of_either_node(world: World, name: str) -> None:
    epoch = world.attempt(1, era=1, resume=None)
    tagged, newest = SnapshotId(epoch, 3), SnapshotId(epoch, 5)
    world.stage(0, tagged, ("best",))
    world.stage(1, newest)
    world.lose_keeper(name)
    world.attempt(2, era=2, resume=newest)
    world.settle()
    assert [one.snapshot for one in world.log().snapshots] == [tagged]
    assert dict(world.log().tags) == {"best": tagged}
    world.attempt(3, era=3, resume=newest)  # its marks are there still
    world.settle()
    assert [one.snapshot for one in world.log().snapshots] == [tagged]
    assert not [one.alarms("save-failed") for one in world.both if one.alarms("save-failed")]


def test_what_an_era_had_in_flight_is_submitted_again_in_the_next(world: World) -> None:
    epoch = world.attempt(1, era=1, resume=None)
    pair = SnapshotId(epoch, 3)
    world.stage(0, pair, ("best",))
    world.until(world.calls.empty)
    world.keepers["a"].hand_in(0, pair, ("best",))
    world.lose_keeper("b")
    world.attempt(2, era=2, resume=pair)
    world.settle()
    assert dict(world.log().tags) == {"best": pair}


def test_what_not_all_nodes_hold_any_more_is_told_as_lost_once(world: World) -> None:
    epoch = world.attempt(1, era=1, resume=None)
    pair = SnapshotId(epoch, 3)
    world.stage(0, pair, ("best",))
    world.slots["b"][0].begin()
    for era in (2, 3):
        world.attempt(era, era=era, resume=None)
        world.settle()
    (told,) = world.keepers["a"].alarms("save-failed")
    assert "not all nodes have their shares" in told


@pytest.mark.parametrize("name", NODES)
def test_what_was_handed_in_outlives_a_node_whose_share_a_neighbour_mirrors(
    world: World, name: str
) -> None:
    epoch = world.attempt(1, era=1, resume=None)
    tagged, newest = SnapshotId(epoch, 3), SnapshotId(epoch, 5)
    world.stage(0, tagged, ("best",))
    world.stage(1, newest)
    for slot in (0, 1):
        world.mirror(name, slot)
    memory = dict.fromkeys((tagged, newest), world.origin)
    world.lose_node(name)
    world.attempt(2, era=2, resume=newest, memory=memory)
    world.settle()
    assert dict(world.log().tags) == {"best": tagged}
    assert not [one.failed for one in world.both if one.failed]
    assert not [one.alarms("save-failed") for one in world.both if one.alarms("save-failed")]


def test_mirror_that_is_damaged_is_not_submitted_and_the_save_is_told_as_failed(
    world: World,
) -> None:
    epoch = world.attempt(1, era=1, resume=None)
    pair = SnapshotId(epoch, 3)
    world.stage(0, pair, ("best",))
    share = world.mirror("b", 0)
    share[-world.slots["b"][0].size_bytes + HEADER_BYTES] ^= 1  # the first byte of the data
    world.mirrors.put(mirror_key(pair, 1), [share])
    world.lose_node("b")
    world.attempt(2, era=2, resume=pair, memory={pair: world.origin})
    world.settle()
    assert world.log().newest() is None
    ((failed, error),) = world.keepers["a"].failed
    assert failed == pair and "no node has it any more" in error.text
    assert all(one.alarms("save-failed") for one in world.both)


def test_node_that_holds_the_share_of_another_rank_submits_its_own_from_a_mirror(
    world: World,
) -> None:
    epoch = world.attempt(1, era=1, resume=None)
    pair = SnapshotId(epoch, 3)
    world.stage(0, pair, ("best",))
    world.mirror("b", 0)
    world.lose_node("b")
    world.slots["b"][0].seal(pair, rank=0, ranks=2, origin=world.origin)
    world.attempt(2, era=2, resume=pair, memory={pair: world.origin})
    world.settle()
    assert dict(world.log().tags) == {"best": pair}


@pytest.mark.parametrize("name", NODES)
def test_nodes_settle_what_a_neighbour_mirrors_when_no_attempt_follows(
    world: World, name: str
) -> None:
    epoch = world.attempt(1, era=1, resume=None)
    pair = SnapshotId(epoch, 7)
    world.stage(0, pair, ("end",))
    world.mirror(name, 0)
    world.lose_node(name)
    for keeper in world.both:
        keeper.come(2, era=2)
    world.keepers["a"].uploads.gathered({pair: world.origin})
    for keeper in world.both:
        keeper.end()
    world.settle()
    assert dict(world.log().tags) == {"end": pair}


def test_nodes_settle_what_memory_alone_holds_when_no_attempt_follows(world: World) -> None:
    epoch = world.attempt(1, era=1, resume=None)
    pair = SnapshotId(epoch, 7)
    world.until(world.calls.empty)
    world.stage(0, pair)
    world.keepers["b"].stage(1, SnapshotId(epoch, 8), world.origin, None)  # the other did not
    for keeper in world.both:
        assert keeper.state.uploads.newest_staged is not None
        keeper.end()
    world.settle()
    assert world.log().newest() == pair
    assert all(keeper.state.uploads.newest_durable == pair for keeper in world.both)


def test_what_one_node_had_submitted_and_the_other_had_not_settles(world: World) -> None:
    epoch = world.attempt(1, era=1, resume=None)
    pair = SnapshotId(epoch, 7)
    world.until(world.calls.empty)
    world.stage(0, pair, ("end",))
    world.keepers["b"].hand_in(0, pair, ("end",))
    for keeper in world.both:
        keeper.end()
    world.settle()
    assert dict(world.log().tags) == {"end": pair}


def test_nodes_settle_also_where_their_generation_has_opened_no_epoch(world: World) -> None:
    epoch = world.attempt(1, era=1, resume=None)
    pair = SnapshotId(epoch, 7)
    world.until(world.calls.empty)
    world.stage(0, pair)
    for keeper in world.both:
        keeper.come(2, era=2)
    world.keepers["a"].down = world.keepers["b"].down = 2
    for keeper in world.both:
        keeper.end()
    world.settle()
    assert world.log().newest() == pair


def test_node_whose_others_never_end_gives_up_and_says_so(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_nodes, "SETTLE_WAIT_S", 0.0)
    epoch = world.attempt(1, era=1, resume=None)
    pair = SnapshotId(epoch, 7)
    world.until(world.calls.empty)
    world.stage(0, pair)
    world.keepers["b"].end()
    world.settle()
    (told,) = world.keepers["b"].alarms("settle-failed")
    assert f"{pair} stays in memory only" in told
    assert world.log().newest() is None


def test_what_a_node_said_before_another_attempt_does_not_settle_for_it(world: World) -> None:
    epoch = world.attempt(1, era=1, resume=None)
    world.until(world.calls.empty)
    world.stage(0, SnapshotId(epoch, 3))
    world.keepers["b"].end()  # its program was killed as a whole, and comes back
    world.until(world.calls.empty)
    epoch = world.attempt(2, era=1, resume=None)
    world.until(world.calls.empty)
    pair = SnapshotId(epoch, 7)
    world.stage(1, pair)
    world.keepers["a"].end()
    world.until(world.calls.empty)
    assert world.keepers["a"].uploads.settling  # the other has not ended yet
    world.keepers["b"].end()
    world.settle()
    assert world.log().newest() == pair
