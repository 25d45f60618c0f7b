"""Saves, takeovers, zombies, drops, sweeps and deaths at any moment: no snapshot that exists ever
lacks a byte."""

from __future__ import annotations

import os
import random
import threading
from dataclasses import dataclass, field

import pytest
from kit.collected_store import CollectedStore, Death, Process, Watched

from ckpt.errors import CkptError, ConflictError, FencedError, UnavailableError
from ckpt.format.index import SnapshotIndex
from ckpt.log.catalog import load_index
from ckpt.log.journal import Journal
from ckpt.maintenance.gc.drop import drop, fenced_journal
from ckpt.maintenance.gc.sweep import sweep
from ckpt.maintenance.retention import (
    KeepPolicy,
    keep_best,
    keep_every,
    keep_for,
    keep_last,
    keep_tagged,
)
from ckpt.restore.verify import verify
from ckpt.values import SnapshotId

SOAK = os.environ.get("CKPT_SOAK") == "1"
SEEDS = 5000 if SOAK else 60
ACTIONS = 40
GRACE_S = 50.0
BATCH = 20


@dataclass
class Reader:
    """A restore in progress."""

    snapshot: SnapshotId
    index: SnapshotIndex
    began: float


@dataclass
class Run:
    """One seed's run."""

    seed: int
    world: CollectedStore = field(init=False)
    dice: random.Random = field(init=False)
    readers: list[Reader] = field(default_factory=list)
    dropped_at: dict[SnapshotId, float] = field(default_factory=dict)
    depth: int = 0

    def __post_init__(self) -> None:
        self.world = CollectedStore(self.seed)
        self.dice = self.world.dice

    def act(self) -> None:
        """One thing that somebody does."""
        world, dice = self.world, self.dice
        world.now += dice.choice([0.0, 1.0, 5.0, 20.0])
        process = dice.choice(world.processes) if world.processes else world.start()
        match dice.random():
            case x if x < 0.08:
                world.start()
            case x if x < 0.38:
                self.capture(process)
            case x if x < 0.66:
                self.commit(process)
            case x if x < 0.70:
                process.open_again()
            case x if x < 0.80:
                self.drop()
            case x if x < 0.86:
                self.begin_restore()
            case x if x < 0.92:
                self.end_restore()
            case _ if self.depth == 0:
                self.sweep(grace_s=self.dice.choice([GRACE_S, GRACE_S, GRACE_S, 0.0]))

    def capture(self, process: Process) -> None:
        left = self.dice.choice([99, 99, 99, self.dice.randrange(6)])

        def before(op: str, key: str) -> None:
            nonlocal left
            if op == "put":
                if not left:
                    raise Death
                left -= 1

        try:
            process.capture(Watched(self.world.store, before))
        except Death:
            self.world.processes.remove(process)  # killed in the middle of an upload

    def commit(self, process: Process) -> None:
        try:
            process.commit()
        except CkptError as error:
            raise AssertionError(f"seed={self.seed}") from error

    def policy(self) -> KeepPolicy:
        every = (
            keep_last(self.dice.randint(1, 3)),
            keep_every(self.dice.randint(2, 6)),
            keep_tagged(),
            keep_best("loss", 1),
            keep_for(self.dice.randint(1, 60)),
        )
        chosen = self.dice.choice(every)
        return chosen | self.dice.choice(every) if self.dice.random() < 0.3 else chosen

    def drop(self) -> None:
        store = self.world.store
        before = {entry.snapshot for entry in self.world.state().snapshots}
        if before and self.dice.random() < 0.2:
            Journal.open(store).tag(self.dice.choice("ab"), self.dice.choice(sorted(before)))
        # Whoever writes drops as the one that it is, overtaken or not; people's tools drop as
        # nobody.
        process = self.dice.choice([None, *self.world.processes])
        journal = (
            Journal.open(store) if process is None else fenced_journal(store, lambda: process.epoch)
        )
        try:
            plan, state = drop(store, journal, self.policy(), now_unix_s=self.world.now)
        except FencedError:
            assert process is not None and process.epoch < self.world.state().epoch, (
                f"seed={self.seed}"
            )
            assert {entry.snapshot for entry in self.world.state().snapshots} == before, (
                f"seed={self.seed}"
            )
            return
        assert plan.empty or process is None or process.epoch == state.epoch, f"seed={self.seed}"
        left = {entry.snapshot for entry in state.snapshots}
        assert left == before - set(plan.drops)
        for pair in before - left:
            self.dropped_at[pair] = self.world.now

    def begin_restore(self) -> None:
        state = self.world.state()
        if state.snapshots:
            pair = self.dice.choice(state.snapshots).snapshot
            self.readers.append(
                Reader(pair, load_index(self.world.store, state, pair), self.world.now)
            )

    def end_restore(self) -> None:
        """A restore finds all bytes, unless its snapshot was dropped longer ago than the grace."""
        if self.readers:
            self.read(self.readers.pop(self.dice.randrange(len(self.readers))))

    def read(self, reader: Reader) -> None:
        if self.world.now - self.dropped_at.get(reader.snapshot, self.world.now) >= GRACE_S:
            return
        for place in reader.index.locations().values():
            data = memoryview(bytearray(place.stored_bytes))
            self.world.store.read_into(place.pack, data, offset_bytes=place.offset_bytes)

    def sweep(self, *, grace_s: float) -> None:
        """A sweep beside which everything goes on, and which may die at any of its operations."""
        if grace_s == 0.0:
            self.readers.clear()
        dies_at = self.dice.choice([None, None, self.dice.randrange(40)])
        deletes = 0

        def before(op: str, key: str) -> None:
            nonlocal deletes
            if op == "delete" and not key.startswith("probes/"):
                if deletes == dies_at:
                    raise Death
                deletes += 1
            if threading.current_thread() is threading.main_thread() and self.dice.random() < 0.1:
                self.depth += 1
                try:
                    self.act()
                finally:
                    self.depth -= 1

        store = Watched(self.world.store, before)
        try:
            state = Journal.open(self.world.store).refresh()
            if self.dice.random() < 0.3:
                self.act_within()  # the sweep acts on a state that is older than the log is by now
            report = sweep(store, state, grace_s=grace_s)
            assert report.ok, f"seed={self.seed} {report}"
        except Death:
            pass
        self.world.check()
        if grace_s:
            for reader in self.readers:
                self.read(reader)

    def act_within(self) -> None:
        self.depth += 1
        try:
            for _ in range(3):
                self.act()
        finally:
            self.depth -= 1

    def finish(self) -> None:
        """A last process takes over, saves, and drops and sweeps without grace."""
        last = self.world.start()
        while True:
            last.capture(self.world.store)
            last.commit()
            if self.world.state().find(SnapshotId(last.captured, last.step)) is not None:
                break
        drop(
            self.world.store,
            Journal.open(self.world.store),
            keep_last(2),
            now_unix_s=self.world.now,
        )
        assert sweep(self.world.store, self.world.state(), grace_s=0.0).ok
        assert self.world.objects() == self.world.needed(), f"seed={self.seed}"
        for zombie in self.world.processes[:-1]:
            while zombie.in_flight:
                zombie.commit()
        self.world.check()
        for entry in self.world.state().snapshots:
            assert verify(
                load_index(self.world.store, self.world.state(), entry.snapshot), self.world.store
            ).ok


def run(seed: int) -> Run:
    made = Run(seed)
    for _ in range(ACTIONS):
        made.act()
    made.world.check()
    made.finish()
    return made


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_nothing_that_exists_is_ever_swept_and_nothing_else_stays(first: int) -> None:
    for seed in range(first, first + BATCH):
        try:
            run(seed)
        except (ConflictError, UnavailableError, AssertionError) as error:
            raise AssertionError(f"seed={seed}: {error}") from error
