"""Memory for the first mirrors is there before they come, and no more of it than may be."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from slot_makers import HEADER_BYTES, MadeSlot

from ckpt.keeper import mirror_room
from ckpt.keeper.mirror_room import MirrorRoom
from ckpt.keeper.slots import SlotTable
from ckpt.link.board import Board
from ckpt.peer.vault import Vault
from ckpt.values import SnapshotId

WAIT_S = 20.0
DATA_BYTES = 20 << 20
SHARE_BYTES = DATA_BYTES + (4 << 10)
"""A mirror of one: its data under a short header."""

PAIR = SnapshotId(1, 5)


class Node:
    """The slots of two ranks, three each, and the room for what comes from others."""

    def __init__(self, vault: Vault, *, copies: int = 2, size_bytes: int = HEADER_BYTES + DATA_BYTES) -> None:
        self.vault = vault
        self.board = Board.create(2)
        self.table = SlotTable(self.board, lambda call: call(), dropped=lambda rank, index: None)
        self.made = {(rank, index): MadeSlot(size_bytes) for rank in range(2) for index in range(3)}
        for (rank, index), made in self.made.items():
            self.table.add(rank, index, made.given(), made.size_bytes)
        self.room = MirrorRoom(vault, copies=copies)

    def stage(self) -> None:
        for (rank, _), made in self.made.items():
            made.seal(PAIR, rank=rank)

    def expect(self) -> None:
        self.room.expect(self.table)

    def done(self) -> None:
        thread = self.room._thread
        assert thread is not None
        thread.join(WAIT_S)
        assert not thread.is_alive()

    def close(self) -> None:
        self.room.close()
        self.table.close()
        self.board.close()
        for made in self.made.values():
            made.close()


@pytest.fixture
def ending() -> Iterator[list[Node]]:
    nodes: list[Node] = []
    yield nodes
    for node in nodes:
        node.close()


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_room, "PAUSE_S", 0.0)


def test_as_many_shares_find_memory_as_are_kept_at_a_time(ending: list[Node]) -> None:
    ending.append(node := Node(Vault(4 << 30)))
    node.stage()
    node.expect()
    node.done()
    stats = node.vault.stats()
    # Two ranks' own shares and two of others, of a pair and the next one.
    assert stats.spare_bytes == pytest.approx(8 * DATA_BYTES, rel=0.1)
    for number in range(8):
        with node.vault.incoming(f"mirrors/{number}", SHARE_BYTES) as room:
            room.publish()
    after = node.vault.stats()
    assert (after.spare_bytes, after.held_bytes) == (0, stats.held_bytes), "each lies in what was ready"


def test_it_is_ready_before_the_first_staging_and_staging_changes_nothing(
    ending: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_room, "HEADER_BYTES_DEFAULT", HEADER_BYTES)
    ending.append(node := Node(Vault(4 << 30)))
    node.expect()
    node.done()
    ready = node.room._thread
    assert node.vault.stats().spare_bytes > 8 * DATA_BYTES
    node.stage()
    node.expect()
    assert node.room._thread is ready


def test_small_shares_are_not_worth_it(ending: list[Node]) -> None:
    ending.append(node := Node(Vault(4 << 30), size_bytes=HEADER_BYTES + (4 << 20)))
    node.stage()
    node.expect()
    assert node.room._thread is None


def test_end_waits_for_no_more_than_a_megabyte(ending: list[Node], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_room, "PAUSE_S", 1000.0)
    ending.append(node := Node(Vault(4 << 30)))
    node.stage()
    node.expect()
    began_s = time.monotonic()
    node.room.close()
    assert time.monotonic() - began_s < WAIT_S
    assert node.vault.stats().coming_bytes == 0, "given back"
    assert "ckpt-mirror-room" not in [thread.name for thread in threading.enumerate()]
