"""Nodes of several ranks each, whose trainers die between any two words of theirs: one seed is one
run."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator

import pytest

from ckpt.errors import UsageError
from ckpt.ipc.client import KeeperSpec
from ckpt.keeper.mailbox import LocalMailbox
from ckpt.keeper.nodes.remote_mailbox import LoopChannel
from ckpt.keeper.uploads.uploads import Uploads
from ckpt.log.catalog import load_manifest
from ckpt.values import SnapshotId

WAIT_S = 60.0
COUNTS = (2, 3)
WORLD = sum(COUNTS)
ATTEMPTS = 6
SOAK = os.environ.get("CKPT_SOAK") == "1"
SEEDS = 250 if SOAK else 6


class Node:
    """One keeper's uploads, of ``ranks`` ranks from ``first`` on."""

    def __init__(self, world, first: int, ranks: int) -> None:
        self.world = world
        self.first = first
        self.ranks = ranks
        self.room: LocalMailbox | None = None
        self.uploads = Uploads(
            KeeperSpec(job="job", store=str(world.root), compression="off"),
            ranks=ranks,
            post=world.calls.put,
            on_outcome=lambda *told: None,
            on_fenced_text=world.fences.append,
            emit=world.events.append,
            open_store=lambda: world.store,
            retry_first_s=0.01,
        )
        self.uploads.use_channels(self.channel)

    def channel(self, rank: int) -> LoopChannel:
        room = self.room
        return LoopChannel(
            self.world.calls.put,
            lambda: room if room is self.room else None,
            rank=self.first + rank,
            size=WORLD,
        )

    def sealed_of(self, rank: int, snapshot: SnapshotId):
        return self.world.sealed_of(self.first + rank, snapshot)

    def persist(self, rank: int, snapshot: SnapshotId) -> None:
        self.uploads.persist(rank, self.world.stage(self.first + rank, snapshot), ())


class Job:
    """All nodes, and what happens to them."""

    def __init__(self, world, dice: random.Random) -> None:
        self.world = world
        self.dice = dice
        firsts = [0, *itertools.accumulate(COUNTS)]
        self.nodes = [
            Node(world, first, ranks) for first, ranks in zip(firsts, COUNTS, strict=False)
        ]
        self.step = 0

    def era(self) -> None:
        room = LocalMailbox()
        for node in self.nodes:
            node.room = room
            node.uploads.new_generation(root=node.first == 0)

    def begin(self) -> int:
        for node in self.nodes:
            node.uploads.hold_submissions()
        number: int = self.world.opened(self.nodes[0].uploads, None)
        handed = max((node.uploads.submitted for node in self.nodes), key=lambda one: one[0])[1]
        for node in self.nodes:
            node.uploads.epoch_opened(handed, node.sealed_of)
        return number

    def train(self, epoch: int) -> None:
        """Some snapshots; the last one may meet the trainers' death."""
        for _ in range(self.dice.randint(0, 3)):
            if self.in_flight >= 2:
                self.settled()
            self.step += 1
            dies = self.dice.random() < 0.4
            for node in self.nodes:
                for rank in range(node.ranks):
                    self._hand_in(node, rank, SnapshotId(epoch, self.step), dies)
            if dies:
                return
            if self.dice.random() < 0.6:
                self.settled()

    def _hand_in(self, node: Node, rank: int, snapshot: SnapshotId, dies: bool) -> None:
        if dies and self.dice.random() < 0.4:
            if self.dice.random() < 0.5:  # staged, and not handed in
                self.world.stage(node.first + rank, snapshot).free()
        elif self.dice.random() < 0.1:
            node.uploads.refuse(rank, snapshot, UsageError("no share of this one"))
        else:
            node.persist(rank, snapshot)

    @property
    def in_flight(self) -> int:
        return max(node.uploads.in_flight for node in self.nodes)

    def end(self) -> None:
        for node in self.nodes:
            node.uploads.attempt_ended(node.sealed_of)

    def settled(self) -> None:
        self.world.until(lambda: all(node.uploads.idle for node in self.nodes))
        assert self.world.pinned() == 0, "no slot is held by what is over"


@pytest.fixture(params=range(SEEDS), ids=lambda seed: f"seed{seed}")
def job(request: pytest.FixtureRequest, make_world) -> Iterator[Job]:
    """A job of a seed."""
    made = Job(make_world(WORLD), random.Random(request.param))
    made.era()
    yield made
    for node in made.nodes:
        node.uploads.close(WAIT_S)


@pytest.mark.slow
def test_whatever_trainers_left_undone_settles_and_the_next_snapshot_is_durable(job: Job) -> None:
    for _ in range(ATTEMPTS):
        job.train(job.begin())
        job.end()
        if job.dice.random() < 0.3:
            job.era()
            job.settled()
    epoch = job.begin()
    job.settled()
    newest = SnapshotId(epoch, job.step + 1)
    for node in job.nodes:
        for rank in range(node.ranks):
            node.persist(rank, newest)
    job.settled()
    assert job.world.readable(newest)
    manifest = load_manifest(job.world.store, job.world.state(), newest)
    assert [part.ranks for part in manifest.parts] == list(COUNTS), "one part a node"
