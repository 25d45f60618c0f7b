"""Keeping a pair on other nodes, which are real servers on loopback."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
from kit.keepers.slot_makers import MadeSlot

from ckpt.backends.base import Buffer
from ckpt.cluster.endpoint import Endpoint
from ckpt.cluster.mesh.messages import InventoryEntry
from ckpt.cluster.peermem.auth import PeerSecret
from ckpt.cluster.peermem.http import StoredContent
from ckpt.cluster.peermem.keys import mirror_key
from ckpt.cluster.peermem.store import PeerStore
from ckpt.events import Event
from ckpt.ipc.board import Board
from ckpt.keeper.mirrors.plan import complete_snapshots
from ckpt.keeper.mirrors.send import MirrorSender, MirrorTask, compact_header
from ckpt.keeper.mirrors.serve import NodeMemoryServer
from ckpt.keeper.slots import SlotTable
from ckpt.rate_limit import RATE_BYTES_MIN, RateLimit
from ckpt.staging.header import read_slot
from ckpt.values import PAGE_BYTES, SnapshotId

SECRET = PeerSecret.of(bytes(range(32)))
WAIT_S = 60.0
ROOMY = 1 << 20


class SenderBench:
    """A node of two ranks, and others that keep its pairs."""

    def __init__(self) -> None:
        self.board = Board.create(2)
        self.table = SlotTable(self.board, lambda call: call(), dropped=lambda rank, index: None)
        self.made = [MadeSlot(), MadeSlot()]
        for rank, made in enumerate(self.made):
            self.table.add(rank, 0, made.given(), made.size_bytes)
        self.told: list[Event] = []
        self.came: list[tuple[SnapshotId, int, frozenset[str]]] = []
        self.heard = threading.Semaphore(0)
        self.epoch = 1
        self.cap = RateLimit()
        self.nodes: dict[str, NodeMemoryServer] = {}
        self.stores: dict[str, PeerStore] = {}
        self.mirror = MirrorSender(done=self.done, emit=self.told.append)

    def done(self, task: MirrorTask, came: frozenset[str]) -> None:
        self.came.append((task.snapshot, task.epoch, came))
        self.heard.release()

    def node(self, name: str, budget_bytes: int = ROOMY) -> NodeMemoryServer:
        lending = NodeMemoryServer(
            SECRET, Endpoint(), emit=self.told.append, budget_bytes=budget_bytes
        )
        self.nodes[name] = lending
        endpoint = Endpoint("127.0.0.1", lending.port)
        self.stores[name] = PeerStore(endpoint, SECRET, epoch=lambda: self.epoch, cap=self.cap)
        return lending

    def send(self, snapshot: SnapshotId) -> frozenset[str]:
        for rank, made in enumerate(self.made):
            made.seal(snapshot, rank=rank, origin="o")
        sealed = [self.table.hold_snapshot(rank, snapshot) for rank in range(2)]
        assert all(self.board.rank(rank).slot(0).held for rank in range(2)), (
            "not overwritten on its way"
        )
        self.mirror.send(
            MirrorTask(
                snapshot, self.epoch, [one for one in sealed if one is not None], self.stores
            )
        )
        assert self.heard.acquire(timeout=WAIT_S)
        assert not any(self.board.rank(rank).slot(0).held for rank in range(2)), "let go of"
        return self.came[-1][2]

    def close(self) -> None:
        assert self.mirror.close(WAIT_S)
        for store in self.stores.values():
            store.close()
        for lending in self.nodes.values():
            lending.close()
        self.table.close()
        self.board.close()
        for made in self.made:
            made.close()


@pytest.fixture
def world() -> Iterator[SenderBench]:
    made = SenderBench()
    yield made
    made.close()


def held(lending: NodeMemoryServer) -> list[tuple[SnapshotId, int]]:
    return [(one.snapshot, one.rank) for one in lending.mirrored()]


def test_pair_comes_to_each_node_whole_and_under_a_short_header(world: SenderBench) -> None:
    nodes = [world.node(name) for name in ("b", "c")]
    pair = SnapshotId(1, 7)
    assert world.send(pair) == {"b", "c"}
    for node in nodes:
        assert held(node) == [(pair, 0), (pair, 1)]
        for rank, made in enumerate(world.made):
            with node.vault.reading(mirror_key(pair, rank)) as kept:
                found, own = read_slot(kept.view), read_slot(made.memory)
                assert found is not None
                assert own is not None
                assert found[0] == own[0]
                assert len(kept.view) < made.size_bytes
                assert bytes(kept.view[PAGE_BYTES:]) == bytes(
                    made.memory[-len(kept.view) + PAGE_BYTES :]
                )
    assert world.mirror.sent_bytes == 2 * sum(
        stat.size_bytes for stat in nodes[0].vault.list("mirrors/")
    )
    assert world.told == []


def test_full_node_is_told_once_with_what_to_do_and_again_after_it_had_room(
    world: SenderBench,
) -> None:
    small = world.node("b", budget_bytes=32 * PAGE_BYTES)
    world.node("c")
    first = SnapshotId(1, 1)
    assert world.send(first) == {"b", "c"}
    for step in (2, 3):
        assert world.send(SnapshotId(1, step)) == {"c"}
    assert [(event.kind, event.alarm, event.facts["node"]) for event in world.told] == [
        ("mirror-failed", True, "b")
    ]
    assert "raise mirror_bytes" in world.told[0].text
    small.retain(frozenset())
    assert world.send(SnapshotId(1, 4)) == {"b", "c"}
    assert world.send(SnapshotId(1, 5)) == {"c"}
    assert len(world.told) == 2


def test_some_ranks_shares_are_no_pair(world: SenderBench) -> None:
    node = world.node("b", budget_bytes=20 * PAGE_BYTES)
    pair = SnapshotId(1, 1)
    assert world.send(pair) == frozenset()
    assert held(node) == [(pair, 0)]
    assert complete_snapshots({"b": node.mirrored()}) == []
    slot = InventoryEntry(snapshot=pair, origin="o", world_size=2, rank=1)
    assert len(complete_snapshots({"b": node.mirrored(), "a": [slot]})) == 1


def test_node_that_is_gone_keeps_no_others_from_their_mirrors(world: SenderBench) -> None:
    world.node("b").close()
    world.node("c")
    for step in (1, 2):
        assert world.send(SnapshotId(1, step)) == {"c"}
    assert [event.facts["code"] for event in world.told] == ["unavailable"]


def test_older_epoch_puts_nothing_and_alarms_nobody(world: SenderBench) -> None:
    node = world.node("b")
    node.see_epoch(2)
    assert world.send(SnapshotId(1, 1)) == frozenset()
    assert held(node) == []
    world.epoch = 2
    assert world.send(SnapshotId(1, 1)) == {"b"}
    assert [number for _, number, _ in world.came] == [1, 2]
    assert world.told == []


def test_node_that_was_started_anew_between_two_ranks_has_not_the_pair(
    world: SenderBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.node("b")
    store = world.stores["b"]
    real = store.put_whole
    boots = iter(("first", "second"))

    def put(key: str, data: Sequence[Buffer], still_lent: Callable[[], None]) -> StoredContent:
        return replace(real(key, data, still_lent), boot=next(boots))

    monkeypatch.setattr(store, "put_whole", put)
    assert world.send(SnapshotId(1, 1)) == frozenset()
    assert "restarted" in world.told[0].text


def test_end_waits_for_nobody_for_long(world: SenderBench) -> None:
    world.node("b")
    entered, go_on = threading.Event(), threading.Event()

    class Slow:
        def put_whole(self, key: str, data: object, still_lent: object) -> StoredContent:
            entered.set()
            assert go_on.wait(WAIT_S)
            return StoredContent(key=key, size_bytes=0, version=1, boot="b")

    world.stores["b"].close()
    world.stores = {"b": Slow()}  # type: ignore[dict-item]
    sending = threading.Thread(target=lambda: world.send(SnapshotId(1, 1)))
    sending.start()
    assert entered.wait(WAIT_S)
    assert not world.mirror.close(0.01)
    go_on.set()
    sending.join(WAIT_S)
    assert world.came[-1][2] == frozenset(), "no more than what was on its way"
    world.stores = {}


def test_header_is_as_short_as_its_index_and_fits_memory_that_is_not_there(
    world: SenderBench,
) -> None:
    world.made[0].seal(SnapshotId(1, 1))
    found = read_slot(world.made[0].memory)
    assert found is not None
    assert len(compact_header(found[0], PAGE_BYTES)) == PAGE_BYTES
    assert len(compact_header(found[0], 1 << 38)) == PAGE_BYTES


@pytest.mark.slow
def test_all_nodes_together_get_no_more_than_the_cap_lets_through(world: SenderBench) -> None:
    for name in ("a", "b", "c"):
        world.node(name)
    assert world.send(SnapshotId(1, 1)) == {"a", "b", "c"}
    sent_bytes = world.mirror.sent_bytes
    world.epoch = 2  # in which nothing is a base
    world.cap.set(RATE_BYTES_MIN)
    world.cap.take(RATE_BYTES_MIN)  # a second's bytes are owed from here on
    began_s = time.monotonic()
    assert world.send(SnapshotId(1, 2)) == {"a", "b", "c"}
    assert world.mirror.sent_bytes == 2 * sent_bytes
    assert time.monotonic() - began_s >= 0.9
    assert world.told == []
