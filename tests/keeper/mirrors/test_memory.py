"""Which of the pairs that all nodes hold are kept on others, and whose mirrors stay."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from kit.keepers.slot_makers import HEADER_BYTES, SLOT_BYTES, MadeSlot
from msgspec import structs

from ckpt.backends.memory import MemoryBackend
from ckpt.cluster.endpoint import Endpoint
from ckpt.cluster.membership.records import EpochRecord, NodePlacement
from ckpt.cluster.mesh.messages import (
    AskNodeInventory,
    InventoryEntry,
    MeshMessage,
    MeshSources,
    NodeInventory,
)
from ckpt.cluster.node.epochs import NodeEpoch
from ckpt.cluster.node.leading import EpochNote
from ckpt.cluster.peermem.auth import PeerSecret
from ckpt.cluster.peermem.keys import mirror_key
from ckpt.errors import UnavailableError
from ckpt.events import Event
from ckpt.ipc.client import KeeperSpec
from ckpt.ipc.cluster_spec import NodesSpec
from ckpt.keeper.job_state import JobState
from ckpt.keeper.mirrors.memory import ClusterMemory, HoldShare, read_share
from ckpt.keeper.mirrors.plan import (
    InventoryQuery,
    MirrorReport,
    MirrorRound,
    next_round,
    retained_mirrors,
)
from ckpt.keeper.mirrors.serve import NodeMemoryServer
from ckpt.keeper.nodes.epoch_view import EpochView
from ckpt.staging.header import SlotSummary
from ckpt.values import PAGE_BYTES, SnapshotId

SECRET = bytes(range(32))
WAIT_S = 60.0
OLD, NEW = SnapshotId(1, 5), SnapshotId(1, 6)


class Alone(EpochView):
    """This node among others, none of which can be reached."""

    def send(self, node: str, message: MeshMessage) -> bool:
        return False


class MirrorNodes:
    """This node, of one rank, and a peer that keeps its pairs."""

    def __init__(self, folder: Path) -> None:
        self.told: list[Event] = []
        self.posted: list[Callable[[], object]] = []
        self.heard = threading.Semaphore(0)
        spec = KeeperSpec(job="job", store=str(folder / "store"), compression="off")
        self.state = JobState.create(spec, incarnation="b", post=self._post, emit=self.told.append)
        self.state.memory.resize(1)
        self.slot = MadeSlot()
        assert self.state.memory.slots is not None
        self.state.memory.slots.add(0, 0, self.slot.given(), self.slot.size_bytes)
        self.among = Alone()
        where = NodesSpec(
            where=str(folder / "meet"), job="job", nodes_min=1, nodes_max=3, mirror_bytes=1 << 20
        )
        self.memory = ClusterMemory(
            self.state, self.among, where, SECRET, host="127.0.0.1", emit=lambda event: None
        )
        self.peer = NodeMemoryServer(
            PeerSecret.of(SECRET), Endpoint(), emit=lambda event: None, budget_bytes=1 << 20
        )

    def _post(self, call: Callable[[], object]) -> None:
        self.posted.append(call)
        self.heard.release()

    def come(self, number: int, *nodes: str, standbys: dict[str, int] | None = None) -> None:
        """An epoch of these nodes, one rank each; ``standbys``: their ports."""
        record = EpochRecord(
            job="job",
            number=number,
            places=tuple(NodePlacement(node, 1) for node in nodes),
            leader="me",
            nodes_min=1,
            nodes_max=3,
        )
        peers = {node: f"127.0.0.1:{self.peer.port}" for node in nodes if node != "me"}
        peers |= {node: f"127.0.0.1:{port}" for node, port in (standbys or {}).items()}
        self.among.epoch = NodeEpoch(record, EpochNote(era=number), {}, peers, {}, None, "me")
        self.memory.see_epoch(self.among.epoch)

    def named(self, pair: SnapshotId, kept: SnapshotId | None = None) -> None:
        """A pair is named, and what comes of it is heard."""
        self.memory.set_round(MirrorRound(pair, kept))
        self.memory.tick(0.0, placed=True)
        while pair not in (self.memory.mirror_report.mirrored, self.memory.mirror_report.missed):
            assert self.heard.acquire(timeout=WAIT_S)
            self.posted.pop(0)()

    def close(self) -> None:
        self.memory.close()
        self.peer.close()
        self.slot.close()
        self.state.memory.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[MirrorNodes]:
    made = MirrorNodes(tmp_path)
    yield made
    made.close()


def kept(lending: NodeMemoryServer) -> list[tuple[SnapshotId, int]]:
    return [(one.snapshot, one.rank) for one in lending.mirrored()]


def test_pair_that_is_named_is_kept_here_and_on_the_peer(world: MirrorNodes) -> None:
    world.come(1, "me", "peer")
    world.slot.seal(OLD, rank=0, ranks=2)
    world.named(OLD)
    assert world.memory.mirror_report.mirrored == OLD
    assert kept(world.peer) == [(OLD, 0)]
    assert kept(world.memory._server) == [(OLD, 0)]


@pytest.mark.parametrize(("rank", "ranks"), [(0, 3), (1, 2)])
def test_pair_of_a_world_that_has_shrunk_is_not_kept_instead_of_what_a_lost_node_left(
    world: MirrorNodes, rank: int, ranks: int
) -> None:
    world.come(1, "me", "lost", "peer")
    share = MadeSlot()
    share.seal(OLD, rank=1, ranks=3)
    world.memory._server.keep(mirror_key(OLD, 1), [share.memory])
    share.close()
    world.come(2, "me", "peer")
    world.slot.seal(NEW, rank=rank, ranks=ranks)
    world.named(NEW)
    assert world.memory.mirror_report.missed == NEW
    assert kept(world.peer) == []
    assert kept(world.memory._server) == [(OLD, 1)]


def test_standby_keeps_it_too_and_nobody_waits_for_one_that_has_no_room(world: MirrorNodes) -> None:
    standby = NodeMemoryServer(
        PeerSecret.of(SECRET), Endpoint(), emit=lambda event: None, budget_bytes=1 << 20
    )
    full = NodeMemoryServer(
        PeerSecret.of(SECRET), Endpoint(), emit=lambda event: None, budget_bytes=1
    )
    try:
        world.come(1, "me", "peer", standbys={"s": standby.port})
        world.slot.seal(OLD, rank=0, ranks=2)
        world.named(OLD)
        assert world.memory.mirror_report.mirrored == OLD
        assert kept(standby) == kept(world.peer) == [(OLD, 0)]
        world.come(2, "me", "peer", standbys={"s": full.port})
        world.slot.seal(NEW, rank=0, ranks=2)
        world.named(NEW)
        assert world.memory.mirror_report.mirrored == NEW, "what has to have it has it"
        assert (kept(full), kept(world.peer)) == ([], [(OLD, 0), (NEW, 0)])
    finally:
        standby.close()
        full.close()


def test_only_node_with_ranks_keeps_its_state_at_a_standby(world: MirrorNodes) -> None:
    standby = NodeMemoryServer(
        PeerSecret.of(SECRET), Endpoint(), emit=lambda event: None, budget_bytes=1 << 20
    )
    try:
        world.come(1, "me", standbys={"s": standby.port})
        world.slot.seal(OLD, rank=0, ranks=1)
        world.named(OLD)
        assert world.memory.mirror_report.mirrored == OLD and kept(standby) == [(OLD, 0)]
    finally:
        standby.close()


def test_standby_knows_the_newest_pair_of_which_it_has_all_that_it_is_to_keep(
    world: MirrorNodes,
) -> None:
    world.come(1, "a", "b")
    world.among.epoch = replace(
        world.among.epoch, peers={"me": "127.0.0.1:1", "a": "h:1", "b": "h:2"}, me="me"
    )
    share = MadeSlot()
    for pair, ranks in ((OLD, (0, 1)), (NEW, (1,))):
        for rank in ranks:
            share.seal(pair, rank=rank, ranks=2)
            world.memory._server.keep(mirror_key(pair, rank), [share.memory])
    share.close()
    pair, sizes = world.memory.copied(world.among.epoch)
    assert pair == OLD and sizes.keys() == {0, 1} and min(sizes.values()) > 0


def test_what_did_not_change_since_the_pair_before_is_not_sent_again(world: MirrorNodes) -> None:
    """Each pair's base is still there when it is put, though what is over goes as soon as all have
    a newer one."""
    world.come(1, "me", "peer")
    before, now, sent_bytes = frozenset[SnapshotId](), MirrorRound(), []
    for step in range(5, 10):
        pair = SnapshotId(1, step)
        now = next_round(now, [MirrorReport(mirrored=now.named)], pair)
        world.peer.retain(retained_mirrors(now, before))
        world.slot.seal(pair, rank=0, ranks=2)
        so_far = world.memory.sent_bytes
        world.named(pair, now.kept)
        assert world.memory.mirror_report.mirrored == pair
        sent_bytes.append(world.memory.sent_bytes - so_far)
    assert sent_bytes == [SLOT_BYTES - HEADER_BYTES + PAGE_BYTES] + [2 * PAGE_BYTES] * 4, (
        "a header and one page"
    )
    assert world.peer.snapshots() == {SnapshotId(1, 8), SnapshotId(1, 9)}
    assert world.peer.refused == {}


def test_how_long_nothing_newer_was_on_others_is_told_once(world: MirrorNodes) -> None:
    world.come(1, "me", "peer")
    world.memory.set_round(MirrorRound(OLD, None))
    world.memory.set_round(MirrorRound(NEW, OLD))
    world.memory.set_round(MirrorRound(NEW, NEW))
    assert [event.kind for event in world.told].count("protected") == 1
    world.come(2, "me", "peer")
    world.memory.set_round(MirrorRound(NEW, None))
    assert [event.kind for event in world.told].count("protected") == 1, (
        "in this epoch nothing is yet"
    )
    world.memory.set_round(MirrorRound(NEW, NEW))
    assert [event.kind for event in world.told].count("protected") == 2


def test_where_each_share_is_follows_from_the_spans_of_the_plan(world: MirrorNodes) -> None:
    world.come(1, "me", "peer", "third")
    epoch = world.among.epoch
    assert epoch is not None
    addresses = {"me": "127.0.0.1:1", "peer": "127.0.0.1:2", "third": "127.0.0.1:3"}
    world.among.epoch = replace(epoch, peers=addresses)
    world.slot.seal(OLD, rank=3, ranks=6)
    spans = ((1, (0,)), (3, (1, 2)), (2, (0, 2, 3)))
    word = MeshSources(attempt=1, nodes=("peer", "third", "me", "gone"), pairs=((OLD, 6, spans),))
    world.memory.receive("peer", structs.replace(word, attempt=7))
    assert world.memory.sources(OLD) == (), "a plan of another attempt says nothing"
    world.memory.receive("peer", word)
    peer, both, near = (
        ("127.0.0.1:2",),
        ("127.0.0.1:1", "127.0.0.1:3"),
        ("127.0.0.1:1", "127.0.0.1:2"),
    )
    found = world.memory.sources(OLD)
    assert [one.slots for one in found] == [peer, both, both, both, near, near], (
        "here first; who is gone lends nothing"
    )
    assert [one.mirrors for one in found] == [one.slots for one in found]
    assert [one.local for one in found] == [-1, -1, -1, 0, -1, -1]
    assert world.memory.sources(NEW) == ()


def test_ranks_of_a_node_are_told_of_as_one(world: MirrorNodes) -> None:
    said: list[tuple[str, MeshMessage]] = []
    world.come(1, "me", "peer")
    world.among.send = lambda node, word: said.append((node, word)) is None  # type: ignore[method-assign]
    world.slot.seal(OLD, rank=0, ranks=2)
    world.named(OLD)
    world.memory.receive("peer", AskNodeInventory(call=5))
    ((node, word),) = said
    assert isinstance(word, NodeInventory) and (node, word.call) == ("peer", 5)
    assert {(one.snapshot, one.rank, one.ranks, one.mirror) for one in word.holdings} == {
        (OLD, 0, 1, False),
        (OLD, 0, 1, True),
    }


def test_plan_is_told_to_all_once_all_have_said_what_they_hold(world: MirrorNodes) -> None:
    told: list[MeshMessage] = []
    asked: list[MeshMessage] = []
    answers: list[dict[SnapshotId, str]] = []
    world.come(1, "me", "peer")
    epoch = world.among.epoch
    assert epoch is not None
    world.among.epoch = replace(epoch, addresses={"me": "x", "peer": "y"})
    world.memory._query = InventoryQuery(lambda node, word: asked.append(word) is None)
    world.among.send_to_others = told.append  # type: ignore[method-assign]
    world.slot.seal(OLD, rank=0, ranks=3)
    world.memory.gather(answers.append)
    assert not answers
    (question,) = asked
    assert isinstance(question, AskNodeInventory)
    origin = world.memory._inventory()[0].origin
    theirs = InventoryEntry(snapshot=OLD, origin=origin, world_size=3, rank=1, ranks=2)
    world.memory.receive("peer", NodeInventory(call=question.call, holdings=(theirs,)))
    assert answers == [{OLD: origin}]
    (plan,) = told
    assert plan == MeshSources(
        attempt=1, nodes=("me", "peer"), pairs=((OLD, 3, ((1, (0,)), (2, (1,)))),)
    )
    assert [one.local for one in world.memory.sources(OLD)] == [0, -1, -1]


def test_share_of_a_lost_node_is_fetched_from_the_memory_of_the_one_that_mirrors_it(
    world: MirrorNodes,
) -> None:
    world.come(2, "me", "peer")
    world.slot.seal(OLD, rank=0, ranks=2)
    world.peer.keep(mirror_key(OLD, 0), [world.slot.memory])
    world.slot.begin()
    spans = ((1, (0,)), (1, (0,)))
    world.memory.receive("peer", MeshSources(attempt=2, nodes=("peer",), pairs=((OLD, 2, spans),)))
    assert (world.memory.world_size(OLD), world.memory.world_size(NEW)) == (2, 0)
    wanted = [SlotSummary(pair, 0, 2) for pair in (OLD, NEW)]
    answers: list[Mapping[SlotSummary, HoldShare]] = []
    world.memory.fetch(wanted, answers.append)
    while not answers:
        assert world.heard.acquire(timeout=WAIT_S)
        world.posted.pop(0)()
    assert list(answers[0]) == wanted[:1]
    assert [event.kind for event in world.told] == ["memory-lost"]
    for _ in range(2):  # an upload may be repeated
        share = answers[0][wanted[0]]()
        assert share.index.snapshot == OLD and share.index.rank == 0
        assert share.data[:PAGE_BYTES] == bytes([OLD.step]) * PAGE_BYTES
        share.free()


@pytest.mark.parametrize("why", ["damaged", "of another epoch of that number", "cut off"])
def test_share_is_read_from_the_next_node_if_one_has_another_or_a_damaged_one(why: str) -> None:
    slot = MadeSlot()
    slot.seal(OLD, rank=1, ranks=2, origin="ours")
    good, bad = MemoryBackend("good"), MemoryBackend("bad")
    good.put(mirror_key(OLD, 1), [slot.memory])
    if why == "damaged":
        slot.memory[HEADER_BYTES] ^= 1
    elif why != "cut off":
        slot.seal(OLD, rank=1, ranks=2, origin="theirs")
    bad.put(mirror_key(OLD, 1), [slot.memory[: PAGE_BYTES if why == "cut off" else None]])
    slot.close()
    wanted = SlotSummary(OLD, 1, 2, "ours")
    share = read_share(wanted, [bad, good], left_bytes=None)()
    assert share.index.origin == "ours"
    assert share.data[:PAGE_BYTES] == bytes([OLD.step]) * PAGE_BYTES
    with pytest.raises(UnavailableError, match="no node has this share"):
        read_share(wanted, [bad], left_bytes=None)
    with pytest.raises(UnavailableError, match="no memory here"):
        read_share(wanted, [good], left_bytes=SLOT_BYTES - 1)
