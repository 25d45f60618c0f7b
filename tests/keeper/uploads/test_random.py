"""Attempts that die at any moment over a store that comes and goes: what is told is true, nothing
is stuck. One seed a run."""

from __future__ import annotations

import random

import pytest

from ckpt.errors import UnavailableError
from ckpt.values import SnapshotId

ACTIONS = 25


class Run:
    """One job, driven by a seed."""

    def __init__(self, world, seed: int) -> None:
        self.world = world
        self.random = random.Random(seed)
        self.uploads = world.uploads()
        self.epochs: list[tuple[int, SnapshotId | None]] = []
        self.step = 0
        self.handed_in: set[SnapshotId] = set()
        self.begin(None)

    def begin(self, resume: SnapshotId | None) -> None:
        """The next attempt."""
        number = self.world.result(self.uploads.open_epoch(resume))
        assert number == len(self.epochs) + 1
        self.epochs.append((number, resume))
        self.step = resume.step if resume is not None else 0
        for slot in (
            slot for pool in self.world.pools for slot in pool.slots
        ):  # what is off the line now, as a keeper does
            if (
                slot.snapshot is not None
                and not slot.pinned
                and (resume is None or slot.snapshot > resume)
            ):
                slot.invalidate()

    def complete(self) -> list[SnapshotId]:
        """The pairs that all ranks' slots hold."""
        held = [
            {slot.snapshot for slot in pool.slots if slot.snapshot is not None}
            for pool in self.world.pools
        ]
        return sorted(set.intersection(*held), reverse=True)

    def save(self, ranks: list[int]) -> None:
        """One more step; only some ranks get as far as handing it in, and some of the others as
        staging it."""
        free = [[slot for slot in pool.slots if not slot.pinned] for pool in self.world.pools]
        if any(
            len(pool.slots) == pool.count and len(slots) < 2
            for pool, slots in zip(self.world.pools, free, strict=True)
        ):
            return  # skipped, as a job does whose slots are all held
        self.step += 1
        pair = SnapshotId(self.epochs[-1][0], self.step)
        for rank in range(self.world.ranks):
            if rank in ranks:
                self.handed_in.add(pair)
                self.uploads.persist(rank, self.world.stage(rank, pair), ())
            elif self.random.random() < 0.5:
                self.world.stage_only(rank, pair)

    def die(self) -> None:
        """The attempt dies while it saves, and the next goes on from one of the choices, mostly the
        first."""
        self.save(
            self.random.sample(range(self.world.ranks), self.random.randrange(self.world.ranks))
        )
        self.uploads.attempt_ended(self.world.sealed_of)
        try:
            choices = self.world.result(self.uploads.choices(self.complete()))
        except UnavailableError:  # nothing staged is on the line
            self.world.until(self.calm)
            choices = self.world.result(self.uploads.choices(self.complete()))
        if self.world.store.down:
            choices = tuple(choice for choice in choices if choice.tier == "staged")
        assert list(choices) == sorted(
            choices, key=lambda one: (one.snapshot, one.tier == "staged"), reverse=True
        )
        at = 0 if self.random.random() < 0.7 or not choices else self.random.randrange(len(choices))
        self.begin(choices[at].snapshot if choices else None)

    def calm(self) -> bool:
        """The store is well from now on; whether all is done."""
        self.world.store.down, self.world.store.lost_reply = False, ""
        return self.uploads.idle

    def launch(self) -> None:
        """All died, and the program is started anew: it needs its store."""
        self.uploads.attempt_ended(self.world.sealed_of)
        self.uploads.new_launch()
        self.world.until(self.calm)
        choices = self.world.result(self.uploads.choices(self.complete()))
        self.begin(choices[0].snapshot if choices else None)

    def play(self) -> None:
        """All of it."""
        for _ in range(ACTIONS):
            match self.random.choice(("save", "save", "die", "launch", "store", "reply", "turn")):
                case "save":
                    self.save(list(range(self.world.ranks)))
                case "die":
                    self.die()
                case "launch":
                    self.launch()
                case "reply":
                    self.world.store.lost_reply = "log/"
                case "store":
                    self.world.store.down = not self.world.store.down
                case _:
                    done = [self.uploads.in_flight]
                    self.world.until(
                        lambda done=done: (
                            self.world.store.down or self.uploads.in_flight < max(1, done[0])
                        )
                    )
        self.save([0])
        self.uploads.attempt_ended(self.world.sealed_of)
        complete = self.complete()
        if complete:
            self.uploads.flush_newest(complete, self.world.sealed_of)
        self.world.until(self.calm)

    def check(self) -> None:
        """What must hold at the end."""
        world, state = self.world, self.world.state()
        assert not world.fences
        assert (state.hole, state.voids_total) == (None, 0)
        assert [(opened.epoch, opened.resume) for opened in state.opens] == self.epochs
        durable = {info.id for *_, info, _ in world.told if info is not None}
        committed = {entry.snapshot for entry in state.snapshots}
        assert durable <= committed
        for pair in committed:
            assert world.readable(pair)
        for pair in self.handed_in:
            outcomes = [info is not None for _, told, info, _ in world.told if told == pair]
            assert outcomes, "each that was handed in is told"
        assert world.pinned() == 0
        for entry in state.snapshots:
            assert entry.writer_epoch >= entry.snapshot.epoch
        complete = self.complete()
        if complete and complete[0].epoch == state.epoch:
            assert state.newest() >= complete[0], "what was settled is durable"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_uploads_survive_a_random_life(make_world, seed: int) -> None:
    run = Run(make_world(2 + seed % 2), seed)
    run.play()
    run.check()
    run.uploads.close(20)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 104))
def test_uploads_survive_many_random_lives(make_world, seed: int) -> None:
    run = Run(make_world(1 + seed % 4), seed)
    run.play()
    run.check()
    run.uploads.close(20)
