"""Shares of which only what changed is sent, to nodes that are real servers on loopback."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
from kit.keepers.slot_makers import HEADER_BYTES, MadeSlot

from ckpt.backends.base import Buffer
from ckpt.cluster.endpoint import Endpoint
from ckpt.cluster.peermem.auth import PeerSecret
from ckpt.cluster.peermem.http import RANGE_BYTES, StoredContent
from ckpt.cluster.peermem.keys import mirror_key
from ckpt.cluster.peermem.store import PeerStore
from ckpt.events import Event
from ckpt.ipc.board import Board
from ckpt.keeper.mirrors import send as mirror_bases
from ckpt.keeper.mirrors.plan import MirrorReport, MirrorRound, next_round, retained_mirrors
from ckpt.keeper.mirrors.send import MirrorSender, MirrorTask
from ckpt.keeper.mirrors.serve import NodeMemoryServer
from ckpt.keeper.slots import SlotTable
from ckpt.staging.header import read_slot
from ckpt.values import CHUNK_BYTES, PAGE_BYTES, SnapshotId

SECRET = PeerSecret.of(bytes(range(32)))
WAIT_S = 60.0
DATA_BYTES = 4 * CHUNK_BYTES
FROZEN = bytes(3 * CHUNK_BYTES)
ROOMY = 1 << 30


def pair(step: int) -> SnapshotId:
    return SnapshotId(1, step)


class DeltaSender:
    """A node of one rank, whose slot holds a leaf of three chunks and a small one, and a node that
    keeps its pairs."""

    def __init__(self) -> None:
        self.board = Board.create(1)
        self.table = SlotTable(self.board, lambda call: call(), dropped=lambda rank, index: None)
        self.slot = MadeSlot(HEADER_BYTES + DATA_BYTES)
        self.table.add(0, 0, self.slot.given(), self.slot.size_bytes)
        self.told: list[Event] = []
        self.came: list[frozenset[str]] = []
        self.heard = threading.Semaphore(0)
        self.epoch = 1
        self.lending = NodeMemoryServer(
            SECRET, Endpoint(), emit=self.told.append, budget_bytes=ROOMY
        )
        self.store = PeerStore(
            Endpoint("127.0.0.1", self.lending.port), SECRET, epoch=lambda: self.epoch
        )
        self.mirror = MirrorSender(done=self.done, emit=self.told.append)

    def done(self, task: MirrorTask, came: frozenset[str]) -> None:
        self.came.append(came)
        self.heard.release()

    def send(self, step: int, *bodies: bytes) -> int:
        """Seal a pair and have it kept; returns how many bytes the other node received for it."""
        self.slot.seal_leaves(pair(step), bodies, ranks=1)
        sealed = self.table.hold_snapshot(0, pair(step))
        assert sealed is not None
        before = self.lending._server.stats()
        self.mirror.send(MirrorTask(pair(step), self.epoch, [sealed], {"b": self.store}))
        assert self.heard.acquire(timeout=WAIT_S)
        puts = before.served.get("PUT", 0) + len(self.came[-1])
        deadline_s = time.monotonic() + WAIT_S
        while (after := self.lending._server.stats()).served.get(
            "PUT", 0
        ) != puts:  # counted once they are answered
            assert time.monotonic() < deadline_s, "other puts than came"
            time.sleep(0.001)
        return after.received_bytes - before.received_bytes

    def has(self, step: int) -> bool:
        """Whether the other node holds exactly what the slot does."""
        with self.lending.vault.reading(mirror_key(pair(step), 0)) as kept:
            found, own = read_slot(kept.view), read_slot(self.slot.memory)
            assert found is not None
            assert own is not None
            same_bytes = kept.view[PAGE_BYTES:] == self.slot.memory[HEADER_BYTES:]
            return self.came[-1] == {"b"} and found[0] == own[0] and same_bytes

    def restart(self) -> None:
        """The other node's keeper dies, and another one lends at the same address."""
        port = self.lending.port
        self.lending.close()
        self.lending = NodeMemoryServer(
            SECRET, Endpoint("127.0.0.1", port), emit=self.told.append, budget_bytes=ROOMY
        )

    def close(self) -> None:
        assert self.mirror.close(WAIT_S)
        self.store.close()
        self.lending.close()
        self.table.close()
        self.board.close()
        self.slot.close()


@pytest.fixture
def world() -> Iterator[DeltaSender]:
    made = DeltaSender()
    yield made
    made.close()


def small(step: int) -> bytes:
    return bytes([step]) * 1000


def with_chunk(number: int, step: int) -> bytes:
    """The large leaf with one chunk that changed."""
    body = bytearray(FROZEN)
    body[number * CHUNK_BYTES + 5] = step
    return bytes(body)


WHOLE_BYTES = PAGE_BYTES + DATA_BYTES
SMALL_SENT = PAGE_BYTES + 1000 + 2 * RANGE_BYTES


@pytest.mark.slow
def test_only_chunks_that_changed_travel(world: DeltaSender) -> None:
    assert world.send(1, FROZEN, small(1)) == WHOLE_BYTES
    assert world.send(2, FROZEN, small(2)) == SMALL_SENT
    assert world.has(2)
    assert world.send(3, with_chunk(1, 3), small(2)) == PAGE_BYTES + CHUNK_BYTES + 2 * RANGE_BYTES
    assert world.has(3)
    assert world.mirror.sent_bytes == WHOLE_BYTES + (PAGE_BYTES + 1000) + (PAGE_BYTES + CHUNK_BYTES)
    assert world.lending.refused == {}
    assert world.told == []


@pytest.mark.slow
def test_base_is_there_in_every_round_whichever_are_missed(world: DeltaSender) -> None:
    """As node of rank 0: pairs alternate, some are missed by another node, and what is over goes
    each time."""
    now, received = MirrorRound(), []
    for step in range(1, 9):
        now = next_round(now, [MirrorReport(mirrored=now.named, missed=None)], pair(step))
        assert now.named == pair(step)
        world.lending.retain(retained_mirrors(now, frozenset()))
        received.append(world.send(step, FROZEN, small(step)))
        assert world.has(step)
        assert len(world.lending.snapshots()) <= 2
    assert received == [WHOLE_BYTES] + [SMALL_SENT] * 7
    for step in (
        9,
        10,
    ):  # this node had the last one, another one had not: it goes, and what was kept stays
        now = next_round(
            now, [MirrorReport(mirrored=now.kept), MirrorReport(missed=now.named)], pair(step)
        )
        world.lending.retain(retained_mirrors(now, frozenset()))
        assert world.lending.snapshots() == {pair(7)}
        assert world.send(step, FROZEN, small(step)) == SMALL_SENT
        assert world.has(step)
    assert world.lending.refused == {"base": 2}, "each found that the newest had gone"
    assert world.told == []


@pytest.mark.slow
def test_refused_base_is_followed_by_the_whole_share_in_the_same_round(world: DeltaSender) -> None:
    for step in (1, 2):
        world.send(step, FROZEN, small(step))
    world.lending.retain(frozenset())
    assert world.send(3, FROZEN, small(3)) == WHOLE_BYTES
    assert world.has(3)
    assert world.lending.refused == {"base": 2}
    assert world.send(4, FROZEN, small(4)) == SMALL_SENT
    assert world.told == []


def test_base_that_was_put_anew_by_somebody_else_is_no_base(world: DeltaSender) -> None:
    world.send(1, FROZEN, small(1))
    with world.lending.vault.reading(mirror_key(pair(1), 0)) as held:
        world.lending.keep(mirror_key(pair(1), 0), [bytes([9]) * len(held.view)])
    assert world.send(2, FROZEN, small(2)) == WHOLE_BYTES
    assert world.has(2)


@pytest.mark.slow
def test_node_that_was_started_anew_gets_all_and_then_what_changed(world: DeltaSender) -> None:
    world.send(1, FROZEN, small(1))
    world.restart()
    with world.lending.vault.incoming(
        mirror_key(pair(1), 0), WHOLE_BYTES
    ) as room:  # the same version as before
        room.view[:] = bytes([9]) * WHOLE_BYTES
        assert room.publish() == 1
    assert world.send(2, FROZEN, small(2)) == WHOLE_BYTES
    assert world.has(2)
    assert world.send(3, FROZEN, small(3)) == SMALL_SENT
    assert world.has(3)
    assert world.told == []


def test_another_epoch_begins_with_all(world: DeltaSender) -> None:
    world.send(1, FROZEN, small(1))
    world.epoch = 2
    assert world.send(2, FROZEN, small(2)) == WHOLE_BYTES
    assert world.send(3, FROZEN, small(3)) == SMALL_SENT


def test_failed_put_leaves_no_base(world: DeltaSender) -> None:
    world.send(1, FROZEN, small(1))
    world.lending.see_epoch(2)
    assert world.send(2, FROZEN, small(2)) == 0
    assert world.came[-1] == frozenset()
    world.lending._server._context.fence._epoch = 1  # as if it had never been seen
    assert world.send(3, FROZEN, small(3)) == WHOLE_BYTES


def test_share_of_which_most_changed_goes_whole(world: DeltaSender) -> None:
    world.send(1, FROZEN, small(1))
    assert world.send(2, b"\x02" * len(FROZEN), small(2)) == WHOLE_BYTES
    assert world.has(2)


def test_leaf_of_another_length_costs_what_lies_elsewhere_now(world: DeltaSender) -> None:
    world.send(1, FROZEN, small(1))
    assert world.send(2, FROZEN, small(2) + b"longer") == SMALL_SENT + 6
    assert world.has(2)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2])
def test_slot_that_is_overwritten_while_it_is_sent_is_kept_nowhere_and_no_base(
    world: DeltaSender, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Whole, or what changed."""
    for before in range(1, step):
        world.send(before, FROZEN, small(before))
    name = "put_whole" if step == 1 else "put_changed"
    real = getattr(world.store, name)

    def put(
        key: str,
        data: Sequence[Buffer],
        check_unchanged: Callable[[], None] | None = None,
        **facts: object,
    ) -> StoredContent:
        def begun() -> None:
            world.slot.begin()
            assert check_unchanged is not None
            check_unchanged()

        made: StoredContent = real(key, data, check_unchanged=begun, **facts)
        return made

    with monkeypatch.context() as patched:
        patched.setattr(world.store, name, put)
        assert world.send(step, FROZEN, small(step)) == 0
    assert world.came[-1] == frozenset()
    assert world.lending.snapshots() == ({pair(1)} if step == 2 else set())
    assert [event.facts["code"] for event in world.told] == ["taken-back"]
    assert world.send(3, FROZEN, small(3)) == WHOLE_BYTES
    assert world.has(3)


@pytest.mark.slow
def test_now_and_then_a_share_goes_whole(
    world: DeltaSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_bases, "BEHIND_MAX", 2)
    received = [world.send(step, FROZEN, small(step)) for step in range(1, 8)]
    assert received == [WHOLE_BYTES, SMALL_SENT, SMALL_SENT] * 2 + [WHOLE_BYTES]
