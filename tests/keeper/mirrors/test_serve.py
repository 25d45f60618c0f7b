"""What a node lends: its slots as they are at that moment, and what it keeps for others."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.keepers.slot_makers import SLOT_BYTES, MadeSlot, descriptors, leading_to

from ckpt.cluster.endpoint import Endpoint
from ckpt.cluster.mesh.messages import InventoryEntry
from ckpt.cluster.peermem.auth import PeerSecret
from ckpt.cluster.peermem.keys import mirror_key, slot_key
from ckpt.cluster.peermem.store import PeerStore
from ckpt.errors import FencedError, NotFoundError, StoreFullError
from ckpt.events import Event
from ckpt.ipc.board import Board
from ckpt.keeper.mirrors import serve as lend
from ckpt.keeper.mirrors.serve import NodeMemoryServer, SlotCatalog
from ckpt.keeper.slots import SlotTable
from ckpt.values import SnapshotId

SECRET = PeerSecret.of(bytes(range(32)))
PAIR = SnapshotId(1, 5)
NEXT = SnapshotId(1, 6)


class Node:
    """Two slots of one rank, lent."""

    def __init__(self) -> None:
        self.board = Board.create(1)
        self.table = SlotTable(self.board, lambda call: call(), dropped=lambda rank, index: None)
        self.made = [MadeSlot(), MadeSlot()]
        for index, made in enumerate(self.made):
            self.table.add(0, index, made.given(), made.size_bytes)
        self.told: list[Event] = []
        self.lending = NodeMemoryServer(
            SECRET, Endpoint(), emit=self.told.append, budget_bytes=1 << 20
        )
        self.lending.slots.show(self.table)
        self.store = PeerStore(Endpoint("127.0.0.1", self.lending.port), SECRET, epoch=lambda: 1)

    def read(self, key: str) -> bytes:
        stat = self.store.stat(key)
        assert stat is not None
        out = bytearray(stat.size_bytes)
        self.store.read_into(key, memoryview(out))
        return bytes(out)

    def close(self) -> None:
        self.store.close()
        self.lending.close()
        self.table.close()
        self.board.close()
        for made in self.made:
            made.close()
        assert self.told == []


@pytest.fixture
def node() -> Iterator[Node]:
    made = Node()
    yield made
    made.close()


def kept_for_others() -> int:
    """How many descriptors of this process lead to memory of a vault."""
    found = 0
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found += "memfd:ckpt-peer" in str(path.readlink())
    return found


def test_slot_is_lent_whole_under_what_it_holds(node: Node) -> None:
    node.made[0].seal(PAIR)
    node.made[1].seal(NEXT)
    keys = [slot_key(PAIR, 0), slot_key(NEXT, 0)]
    assert [stat.key for stat in node.store.list("slots/")] == keys
    assert [node.read(key) for key in keys] == [bytes(made.memory) for made in node.made]


def test_slot_that_is_begun_or_sealed_anew_is_lent_as_what_it_was_no_more(node: Node) -> None:
    node.made[0].seal(PAIR)
    assert node.store.stat(slot_key(PAIR, 0)) is not None
    node.made[0].begin()
    assert node.store.stat(slot_key(PAIR, 0)) is None
    node.made[0].seal(NEXT)
    assert node.store.stat(slot_key(PAIR, 0)) is None
    assert node.read(slot_key(NEXT, 0)) == bytes(node.made[0].memory)


def test_slot_overwritten_while_it_is_read_has_changed(node: Node) -> None:
    node.made[0].seal(PAIR)
    with node.lending.slots.reading(slot_key(PAIR, 0)) as held:
        assert held.unchanged()
        node.made[0].seal(NEXT)
        assert not held.unchanged()


def test_slot_that_is_gone_stays_readable_for_who_reads_it(node: Node) -> None:
    node.made[0].seal(PAIR)
    before = descriptors(node.made)
    with node.lending.slots.reading(slot_key(PAIR, 0)) as held:
        assert node.table.drop(0, 0)
        node.lending.slots.show(node.table)
        assert bytes(held.view) == bytes(node.made[0].memory)
        with pytest.raises(NotFoundError), node.lending.slots.reading(slot_key(PAIR, 0)):
            pass
    del held
    assert descriptors(node.made) < before


def test_damaged_header_is_nothing_that_is_lent(node: Node) -> None:
    node.made[0].seal(PAIR)
    node.made[1].seal(NEXT)
    node.made[0].memory[100] ^= 1
    assert [stat.key for stat in node.store.list("slots/")] == [slot_key(NEXT, 0)]


def test_index_is_looked_into_once_a_generation(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    real = lend.read_summary

    def counted(memory: memoryview) -> object:
        looks.append(len(memory))
        return real(memory)

    monkeypatch.setattr(lend, "read_summary", counted)
    node.made[1].seal(NEXT)
    for step in (1, 2):
        node.made[0].seal(SnapshotId(1, step))
        for _ in range(3):
            assert node.lending.slots.stat(slot_key(SnapshotId(1, step), 0)) is not None
            assert len(node.lending.slots.list()) == 2
    assert looks == [SLOT_BYTES] * 3


@pytest.mark.parametrize("call", ["dup", "mmap"])
def test_system_without_descriptors_lends_later(
    node: Node, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*args: object, **kwargs: object) -> int:
        raise OSError(24, "too many open files")

    node.made[0].seal(PAIR)
    lent = SlotCatalog()
    before = descriptors(node.made)
    with monkeypatch.context() as patched:
        patched.setattr(lend.os if call == "dup" else lend.mmap, call, full)
        lent.show(node.table)
    assert (lent.list(), descriptors(node.made)) == ([], before)
    lent.show(node.table)
    assert [stat.key for stat in lent.list()] == [slot_key(PAIR, 0)]
    lent.show(())
    del lent
    assert descriptors(node.made) == before


def test_what_is_kept_for_others_is_told_unless_it_is_something_else(node: Node) -> None:
    node.made[0].seal(PAIR, rank=1, origin="o")
    whole = bytes(node.made[0].memory)
    damaged = whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]
    node.store.put(mirror_key(PAIR, 1), [whole])
    node.store.put(mirror_key(PAIR, 0), [whole])
    node.store.put(mirror_key(NEXT, 1), [damaged])
    node.store.put("mirrors/what", [b"ever"])
    assert node.lending.mirrored() == [
        InventoryEntry(snapshot=PAIR, origin="o", world_size=2, rank=1, mirror=True)
    ]


def test_only_the_pairs_that_are_named_stay(node: Node) -> None:
    pairs = (SnapshotId(1, 4), PAIR, NEXT, SnapshotId(2, 1))
    for pair in pairs:
        node.store.put(mirror_key(pair, 0), [b"x"])
    assert node.lending.snapshots() == frozenset(pairs)
    node.lending.retain(frozenset({NEXT, SnapshotId(2, 1), SnapshotId(9, 9)}))
    assert [stat.key for stat in node.store.list("mirrors/")] == ["mirrors/1-6/0", "mirrors/2-1/0"]


def test_own_share_is_kept_whole_beside_the_slots(node: Node) -> None:
    node.made[0].seal(PAIR, rank=1, origin="o")
    memory = node.made[0].memory
    node.lending.keep(mirror_key(PAIR, 1), [memory[:100], memory[100:]])
    node.made[0].seal(NEXT, rank=1, origin="o")  # training goes on
    assert [(one.snapshot, one.rank) for one in node.lending.mirrored()] == [(PAIR, 1)]
    with pytest.raises(StoreFullError):
        node.lending.keep(mirror_key(NEXT, 1), [bytes(node.lending.vault.budget_bytes + 1)])
    assert node.lending.snapshots() == {PAIR}


def test_older_epoch_is_refused(node: Node) -> None:
    node.lending.see_epoch(2)
    with pytest.raises(FencedError):
        node.store.put(mirror_key(PAIR, 0), [b"x"])
    assert node.lending.mirrored() == []


def test_end_gives_everything_back() -> None:
    gc.collect()  # what earlier tests left
    before = kept_for_others()
    made = Node()
    made.made[0].seal(PAIR)
    made.store.put(mirror_key(PAIR, 0), [b"x" * (256 << 10)])
    made.read(slot_key(PAIR, 0))
    assert kept_for_others() > before
    keep = [os.dup(one.fd) for one in made.made]
    made.close()
    del made
    try:
        assert [leading_to(fd) for fd in keep] == [1, 1]
        assert kept_for_others() <= before
    finally:
        for fd in keep:
            os.close(fd)
