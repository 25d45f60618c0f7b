"""Snapshots of several nodes: two keepers' uploads in one process, joined by the room of their
era."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from ckpt.errors import UnavailableError, UsageError
from ckpt.ipc.client import KeeperSpec
from ckpt.keeper.mailbox import LocalMailbox
from ckpt.keeper.nodes.remote_mailbox import LoopChannel
from ckpt.keeper.uploads.submissions import SubmissionEntry
from ckpt.keeper.uploads.uploads import Uploads, WrittenLog
from ckpt.values import SnapshotId

WAIT_S = 60.0


class Node:
    """One keeper's uploads, with one rank of the world."""

    def __init__(self, world, rank: int) -> None:
        self.world = world
        self.rank = rank
        self.room: LocalMailbox | None = None
        self.told: list = []
        self.down = 0
        self.uploads = Uploads(
            KeeperSpec(job="job", store=str(world.root), compression="off"),
            ranks=1,
            post=world.calls.put,
            on_outcome=lambda *told: self.told.append(told),
            on_fenced_text=world.fences.append,
            emit=world.events.append,
            open_store=self.open,
            retry_first_s=0.01,
        )
        self.uploads.use_channels(self.channel)

    def open(self):
        """The store, after it failed for a while."""
        if self.down:
            self.down -= 1
            raise UnavailableError("the store is down")
        return self.world.store

    def channel(self, rank: int) -> LoopChannel:
        room = self.room
        return LoopChannel(
            self.world.calls.put,
            lambda: room if room is self.room else None,
            rank=self.rank + rank,
            size=2,
        )

    def stage(self, snapshot: SnapshotId):
        return self.world.stage(self.rank, snapshot)

    def sealed_of(self, rank: int, snapshot: SnapshotId):
        return self.world.sealed_of(self.rank + rank, snapshot)

    def hand_in(self, snapshot: SnapshotId, tags: tuple[str, ...] = ()) -> None:
        self.uploads.persist(0, self.stage(snapshot), tags)

    def opened(self, handed: Sequence[SubmissionEntry] = ()) -> None:
        self.uploads.epoch_opened(handed, self.sealed_of)

    def durable(self) -> list[SnapshotId]:
        return [told[1] for told in self.told if told[2] is not None]


class Pair:
    """The node of rank 0 and another."""

    def __init__(self, world) -> None:
        self.world = world
        self.nodes = (Node(world, 0), Node(world, 1))
        self.root, self.other = self.nodes

    def era(self, *, root: int = 0) -> None:
        room = LocalMailbox()
        for node in self.nodes:
            node.room = room
            node.uploads.new_generation(root=node.rank == root)

    def begin(self) -> None:
        for node in self.nodes:
            node.uploads.hold_submissions()

    def open(self, resume: SnapshotId | None = None, *, tell: bool = True) -> int:
        number = self.world.opened(self.root.uploads, resume)
        if tell:
            handed = max((node.uploads.submitted for node in self.nodes), key=lambda one: one[0])[1]
            for node in self.nodes:
                node.opened(handed)
        return number

    def end(self) -> None:
        for node in self.nodes:
            node.uploads.attempt_ended(node.sealed_of)

    def settled(self) -> None:
        self.world.until(lambda: all(node.uploads.idle for node in self.nodes))
        assert self.world.pinned() == 0

    def both_durable(self, *snapshots: SnapshotId) -> None:
        self.world.until(
            lambda: all(node.durable()[-len(snapshots) :] == [*snapshots] for node in self.nodes)
        )
        assert all(self.world.readable(one) for one in snapshots)
        self.settled()


@pytest.fixture
def pair(make_world):
    made = Pair(make_world(2))
    made.era()
    yield made
    for node in made.nodes:
        node.uploads.close(WAIT_S)


def test_both_nodes_hand_in_and_hear_of_the_same_snapshot(pair) -> None:
    pair.begin()
    epoch = pair.open()
    for step in (1, 2):
        for node in pair.nodes:
            node.hand_in(SnapshotId(epoch, step), ("best",))
    pair.both_durable(SnapshotId(epoch, 1), SnapshotId(epoch, 2))
    assert [node.uploads.submitted[0] for node in pair.nodes] == [2, 2]


def test_what_comes_before_the_epoch_is_known_to_be_open_waits_for_it(pair) -> None:
    pair.begin()
    epoch = pair.open(tell=False)
    for node in pair.nodes:
        node.hand_in(SnapshotId(epoch, 1))
    assert pair.other.uploads.submitted[0] == 0
    assert pair.world.pinned() == 2
    pair.other.down = 2
    for node in pair.nodes:
        node.opened()
    pair.both_durable(SnapshotId(epoch, 1))
    assert len(pair.world.alarms("follow-waits")) == 1


@pytest.mark.parametrize("staged", [True, False])
def test_uneven_hand_ins_of_an_attempt_are_evened_out_when_the_next_opens(
    pair, staged: bool
) -> None:
    pair.begin()
    epoch = pair.open()
    one, two = SnapshotId(epoch, 1), SnapshotId(epoch, 2)
    for node in pair.nodes:
        node.hand_in(one)
    pair.both_durable(one)
    pair.root.hand_in(two, ("end",))
    if staged:
        pair.other.stage(two).free()
    pair.end()
    pair.begin()
    epoch = pair.open(two if staged else one)
    if staged:
        pair.both_durable(two)
    three = SnapshotId(epoch, 3)
    for node in pair.nodes:
        node.hand_in(three)
    pair.both_durable(three)
    assert [node.uploads.submitted[0] for node in pair.nodes] == [3, 3]
    assert (pair.world.state().find(two) is not None) is staged


def test_what_an_attempt_held_back_until_its_end_is_neither_lost_count_of_nor_handed_in_twice(
    pair,
) -> None:
    pair.begin()
    epoch = pair.open()
    pair.end()
    pair.begin()
    pair.root.opened()
    one = SnapshotId(epoch, 1)
    for node in pair.nodes:  # the other never hears that the epoch is open
        node.hand_in(one)
    assert pair.other.uploads.submitted[0] == 0
    pair.end()
    pair.begin()
    epoch = pair.open(one)
    pair.both_durable(one)
    for node in pair.nodes:
        node.hand_in(SnapshotId(epoch, 2))
    pair.both_durable(one, SnapshotId(epoch, 2))
    assert [node.uploads.submitted[0] for node in pair.nodes] == [2, 2]


def test_word_of_an_earlier_attempt_that_comes_late_opens_nothing(pair) -> None:
    pair.begin()
    epoch = pair.open(tell=False)
    pair.other.opened()  # its store is opened in a thread
    pair.other.uploads.attempt_ended(pair.other.sealed_of)
    pair.begin()
    pair.root.opened()
    pair.other.hand_in(SnapshotId(epoch, 1))
    pair.world.until(lambda: pair.other.uploads.idle)
    assert pair.other.uploads.submitted[0] == 0, "held back still"
    pair.other.opened()
    pair.root.hand_in(SnapshotId(epoch, 1))
    pair.both_durable(SnapshotId(epoch, 1))


def test_other_era_fails_what_is_in_flight_and_lets_go_of_what_waits(pair) -> None:
    pair.begin()
    epoch = pair.open()
    pair.root.hand_in(SnapshotId(epoch, 1))  # the other node is gone
    pair.other.uploads.hold_submissions()
    pair.other.hand_in(SnapshotId(epoch, 1))
    pair.era()
    pair.settled()
    assert pair.root.durable() == pair.other.durable() == []
    pair.end()
    pair.begin()
    epoch = pair.open()
    for node in pair.nodes:
        node.hand_in(SnapshotId(epoch, 2))
    pair.both_durable(SnapshotId(epoch, 2))
    assert [node.uploads.submitted for node in pair.nodes] == [
        (1, ((0, SnapshotId(epoch, 2), ()),))
    ] * 2


def test_turn_that_one_rank_lacks_ends_with_its_era(make_world) -> None:
    world = make_world(2)
    uploads = world.uploads()
    uploads.new_generation(root=True)
    world.opened(uploads, None)
    uploads.persist(0, world.stage(0, SnapshotId(1, 1)), ())
    uploads.new_generation(root=True)
    world.until(lambda: uploads.idle)
    assert (uploads.in_flight, world.pinned(), uploads.submitted) == (0, 0, (0, ()))
    epoch = world.opened(uploads, None)
    assert all(world.infos(world.save(uploads, SnapshotId(epoch, 1))))
    uploads.close(WAIT_S)


def test_rank_zero_goes_to_the_other_node_and_comes_back(pair) -> None:
    pair.begin()
    first = pair.open()
    for turn in (1, 0):
        for node in pair.nodes:
            node.rank = 1 - node.rank
        pair.root, pair.other = pair.other, pair.root
        pair.era(root=0)
        pair.end()
        pair.begin()
        epoch = pair.open()
        assert epoch > first
        first = epoch
        for node in pair.nodes:
            node.hand_in(SnapshotId(epoch, turn))
        pair.both_durable(SnapshotId(epoch, turn))
    assert pair.world.fences == []


def test_opening_that_waits_for_the_store_ends_with_its_era(pair) -> None:
    world = pair.world
    pair.begin()
    pair.open()
    staged = SnapshotId(1, 1)
    pair.era()
    choices = pair.root.uploads.choices([staged], {staged: world.origins[1]})
    world.result(choices)
    world.store.down = True
    opening = pair.root.uploads.open_epoch(staged)
    world.until(lambda: world.alarms("open-waits"))
    pair.era(root=1)
    world.until(lambda: pair.root.uploads.idle)
    world.store.down = False
    assert not opening.done() or opening.exception() is not None
    assert world.state().epoch == 1


def test_node_that_sees_another_store_submits_nothing_and_names_both(pair) -> None:
    pair.begin()
    epoch = pair.open(tell=False)
    said: list[str] = []
    pair.root.opened()
    elsewhere = WrittenLog("0" * 32, "/mnt/elsewhere", said.append)
    pair.other.uploads.epoch_opened((), pair.other.sealed_of, elsewhere)
    for node in pair.nodes:
        node.hand_in(SnapshotId(epoch, 1))
    pair.world.until(lambda: said)
    assert "/mnt/elsewhere" in said[0] and str(pair.world.root) in said[0]
    assert pair.other.uploads.submitted[0] == 0
    assert not pair.root.durable()


def test_node_that_sees_the_store_of_rank_0_submits_as_soon_as_it_is_known(pair) -> None:
    pair.begin()
    epoch = pair.open(tell=False)
    pair.root.opened()
    said: list[str] = []
    pair.other.down = 2
    written = WrittenLog(pair.root.uploads.log_id, "here", said.append)
    pair.other.uploads.epoch_opened((), pair.other.sealed_of, written)
    for node in pair.nodes:
        node.hand_in(SnapshotId(epoch, 1))
    pair.both_durable(SnapshotId(epoch, 1))
    assert not said and len(pair.world.alarms("store-waits")) == 1


def test_memory_of_one_log_is_never_answered_by_a_start_in_another(pair) -> None:
    pair.begin()
    pair.open()
    pair.other.uploads.expect_log("0" * 32)
    choices = pair.other.uploads.choices([SnapshotId(1, 5)])
    pair.world.until(choices.done)
    with pytest.raises(UsageError, match="another log"):
        choices.result()
    pair.other.uploads.expect_log(pair.root.uploads.log_id)
    choices = pair.other.uploads.choices([])
    pair.world.until(choices.done)
    assert choices.result() == ()
