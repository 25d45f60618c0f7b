"""Which of the pairs that all nodes hold are kept on others, and whose mirrors stay."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from slot_makers import HEADER_BYTES, SLOT_BYTES, MadeSlot

from ckpt.fleet.note import Note
from ckpt.fleet.ways import Epoch
from ckpt.fleet.words import Word as Said
from ckpt.keeper.job import Job
from ckpt.keeper.lend import Lending
from ckpt.keeper.mirror_rounds import Round, Word, next_round, retained
from ckpt.keeper.nodes_memory import NodesMemory
from ckpt.keeper.room import OwnRoom, Room
from ckpt.link.client import KeeperSpec
from ckpt.link.lent_keys import mirror_key
from ckpt.link.nodes_spec import NodesSpec
from ckpt.membership.values import EpochRecord, Place
from ckpt.observe.events import Event
from ckpt.peer.auth import Secret
from ckpt.peer.endpoint import Endpoint
from ckpt.values import PAGE_BYTES, SnapshotId

SECRET = bytes(range(32))
WAIT_S = 20.0
OLD, NEW = SnapshotId(1, 5), SnapshotId(1, 6)


class Alone:
    """What this node knows of the others; nobody can be spoken to."""

    me = "me"
    epoch: Epoch | None = None
    root = True

    @property
    def others(self) -> tuple[str, ...]:
        assert self.epoch is not None
        return tuple(node for node in self.epoch.record.ranks if node != self.me)

    def room(self, name: str, own: OwnRoom) -> Room:
        return own

    def say(self, node: str, word: Said) -> bool:
        return False

    def say_to_all(self, word: Said) -> None:
        return


class World:
    """This node, of one rank, and a peer that keeps its pairs."""

    def __init__(self, folder: Path) -> None:
        self.told: list[Event] = []
        self.posted: list[Callable[[], object]] = []
        self.heard = threading.Semaphore(0)
        spec = KeeperSpec(job="job", store=str(folder / "store"), compression="off")
        self.job = Job(spec, boot="b", post=self._post, tell=self.told.append)
        self.job._make_room(1)
        self.slot = MadeSlot()
        assert self.job.slots is not None
        self.job.slots.add(0, 0, self.slot.given(), self.slot.size_bytes)
        self.among = Alone()
        where = NodesSpec(where=str(folder / "meet"), job="job", nodes_min=1, nodes_max=3, mirror_bytes=1 << 20)
        self.memory = NodesMemory(self.job, self.among, where, SECRET, host="127.0.0.1", tell=lambda event: None)
        self.peer = Lending(Secret.of(SECRET), Endpoint(), tell=lambda event: None, budget_bytes=1 << 20)

    def _post(self, call: Callable[[], object]) -> None:
        self.posted.append(call)
        self.heard.release()

    def come(self, number: int, *nodes: str, standbys: dict[str, int] | None = None) -> None:
        """An epoch of these nodes, one rank each; ``standbys``: their ports."""
        record = EpochRecord(
            job="job", number=number, places=tuple(Place(node, 1) for node in nodes), leader="me", nodes_min=1, nodes_max=3
        )  # fmt: skip
        peers = {node: f"127.0.0.1:{self.peer.port}" for node in nodes if node != "me"}
        peers |= {node: f"127.0.0.1:{port}" for node, port in (standbys or {}).items()}
        self.among.epoch = Epoch(record, Note(era=number), {}, peers, {}, None, "me")
        self.memory.see(self.among.epoch)

    def named(self, pair: SnapshotId, kept: SnapshotId | None = None) -> None:
        """A pair is named, and what comes of it is heard."""
        self.memory.go_round(Round(pair, kept))
        self.memory.tick(0.0, placed=True)
        while pair not in (self.memory.word.mirrored, self.memory.word.missed):
            assert self.heard.acquire(timeout=WAIT_S)
            self.posted.pop(0)()

    def close(self) -> None:
        self.memory.close()
        self.peer.close()
        self.slot.close()
        self.job.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


def kept(lending: Lending) -> list[tuple[SnapshotId, int]]:
    return [(one.snapshot, one.rank) for one in lending.mirrored()]


def test_pair_that_is_named_is_kept_here_and_on_the_peer(world: World) -> None:
    world.come(1, "me", "peer")
    world.slot.seal(OLD, rank=0, ranks=2)
    world.named(OLD)
    assert world.memory.word.mirrored == OLD
    assert kept(world.peer) == [(OLD, 0)]
    assert kept(world.memory._lending) == [(OLD, 0)]


@pytest.mark.parametrize(("rank", "ranks"), [(0, 3), (1, 2)])
def test_pair_of_a_world_that_has_shrunk_is_not_kept_instead_of_what_a_lost_node_left(
    world: World, rank: int, ranks: int
) -> None:
    world.come(1, "me", "lost", "peer")
    share = MadeSlot()
    share.seal(OLD, rank=1, ranks=3)
    world.memory._lending.keep(mirror_key(OLD, 1), [share.memory])
    share.close()
    world.come(2, "me", "peer")
    world.slot.seal(NEW, rank=rank, ranks=ranks)
    world.named(NEW)
    assert world.memory.word.missed == NEW
    assert kept(world.peer) == []
    assert kept(world.memory._lending) == [(OLD, 1)]


def test_standby_keeps_it_too_and_nobody_waits_for_one_that_has_no_room(world: World) -> None:
    standby = Lending(Secret.of(SECRET), Endpoint(), tell=lambda event: None, budget_bytes=1 << 20)
    full = Lending(Secret.of(SECRET), Endpoint(), tell=lambda event: None, budget_bytes=1)
    try:
        world.come(1, "me", "peer", standbys={"s": standby.port})
        world.slot.seal(OLD, rank=0, ranks=2)
        world.named(OLD)
        assert world.memory.word.mirrored == OLD
        assert kept(standby) == kept(world.peer) == [(OLD, 0)]
        world.come(2, "me", "peer", standbys={"s": full.port})
        world.slot.seal(NEW, rank=0, ranks=2)
        world.named(NEW)
        assert world.memory.word.mirrored == NEW, "what has to have it has it"
        assert (kept(full), kept(world.peer)) == ([], [(OLD, 0), (NEW, 0)])
    finally:
        standby.close()
        full.close()


def test_only_node_with_ranks_keeps_its_state_at_a_standby(world: World) -> None:
    standby = Lending(Secret.of(SECRET), Endpoint(), tell=lambda event: None, budget_bytes=1 << 20)
    try:
        world.come(1, "me", standbys={"s": standby.port})
        world.slot.seal(OLD, rank=0, ranks=1)
        world.named(OLD)
        assert world.memory.word.mirrored == OLD and kept(standby) == [(OLD, 0)]
    finally:
        standby.close()


def test_standby_knows_the_newest_pair_of_which_it_has_all_that_it_is_to_keep(world: World) -> None:
    world.come(1, "a", "b")
    world.among.epoch = replace(world.among.epoch, peers={"me": "127.0.0.1:1", "a": "h:1", "b": "h:2"}, me="me")
    share = MadeSlot()
    for pair, ranks in ((OLD, (0, 1)), (NEW, (1,))):
        for rank in ranks:
            share.seal(pair, rank=rank, ranks=2)
            world.memory._lending.keep(mirror_key(pair, rank), [share.memory])
    share.close()
    pair, sizes = world.memory.copied(world.among.epoch)
    assert pair == OLD and sizes.keys() == {0, 1} and min(sizes.values()) > 0


def test_what_did_not_change_since_the_pair_before_is_not_sent_again(world: World) -> None:
    """Each pair's base is still there when it is put, though what is over goes as soon as all have a newer one."""
    world.come(1, "me", "peer")
    before, now, sent_bytes = frozenset[SnapshotId](), Round(), []
    for step in range(5, 10):
        pair = SnapshotId(1, step)
        now = next_round(now, [Word(mirrored=now.named)], pair)
        world.peer.retain(retained(now, before))
        world.slot.seal(pair, rank=0, ranks=2)
        so_far = world.memory.sent_bytes
        world.named(pair, now.kept)
        assert world.memory.word.mirrored == pair
        sent_bytes.append(world.memory.sent_bytes - so_far)
    assert sent_bytes == [SLOT_BYTES - HEADER_BYTES + PAGE_BYTES] + [2 * PAGE_BYTES] * 4, "a header and one page"
    assert world.peer.pairs() == {SnapshotId(1, 8), SnapshotId(1, 9)}
    assert world.peer.refused == {}


def test_how_long_nothing_newer_was_on_others_is_told_once(world: World) -> None:
    world.come(1, "me", "peer")
    world.memory.go_round(Round(OLD, None))
    world.memory.go_round(Round(NEW, OLD))
    world.memory.go_round(Round(NEW, NEW))
    assert [event.kind for event in world.told].count("protected") == 1
    world.come(2, "me", "peer")
    world.memory.go_round(Round(NEW, None))
    assert [event.kind for event in world.told].count("protected") == 1, "in this epoch nothing is yet"
    world.memory.go_round(Round(NEW, NEW))
    assert [event.kind for event in world.told].count("protected") == 2
