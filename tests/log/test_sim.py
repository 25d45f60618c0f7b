"""Several writers on one store, interleaved operation by operation, with lost replies, late puts
and deaths.

One seed is one run. A writer is stopped in the middle of an operation by running another writer's
whole action first; a death is an exception that no code catches. What must hold after every action
is in ``check``.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.backends.base import Buffer, Capabilities, Stat
from ckpt.backends.memory import MemoryBackend
from ckpt.errors import (
    CommitUnknownError,
    ConflictError,
    FencedError,
    KeyExistsError,
    UnavailableError,
)
from ckpt.format import keys
from ckpt.format.manifest import Manifest, PartRef
from ckpt.format.records import Commit, Open, decode_record
from ckpt.log import stored_fold as folds
from ckpt.log.catalog import load_manifest
from ckpt.log.fold import empty, fold
from ckpt.log.journal import Journal
from ckpt.log.state import LogState
from ckpt.values import SnapshotId

SOAK = os.environ.get("CKPT_SOAK") == "1"

WRITERS = 3
DEPTH_MAX = 3


class Death(BaseException):
    """The process is killed."""


@dataclass
class JournalSimulation:
    dice: random.Random
    store: MemoryBackend = field(default_factory=MemoryBackend)
    first_bytes: dict[str, bytes] = field(default_factory=dict)
    late: list[tuple[str, bytes, bool]] = field(default_factory=list)
    writers: list[Writer] = field(default_factory=list)
    busy: list[Writer] = field(default_factory=list)
    opened: list[int] = field(default_factory=list)
    committed: dict[SnapshotId, str] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    dropped: set[SnapshotId] = field(default_factory=set)

    def state(self) -> LogState:
        """What a reader that meets no trouble sees now."""
        return Journal.open(self.store).refresh()

    def tick(self) -> None:
        """Before any operation of any writer: others may act, and puts whose reply was lost may
        land."""
        if self.late and self.dice.random() < 0.3:
            key, data, create_only = self.late.pop(self.dice.randrange(len(self.late)))
            with contextlib.suppress(KeyExistsError):  # raised where it came too late
                self.store.put(key, [data], create_only=create_only)
        if len(self.busy) < DEPTH_MAX and self.dice.random() < 0.15:
            idle = [writer for writer in self.writers if writer not in self.busy]
            if idle:
                self.dice.choice(idle).act()


class SimBackend:
    """One writer's way to the store."""

    def __init__(self, world: JournalSimulation) -> None:
        self.world = world

    @property
    def url(self) -> str:
        return "sim"

    def capabilities(self) -> Capabilities:
        return Capabilities(create_only=True, read_bytes_best=1, concurrency_best=1)

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        if not create_only:
            self._require_second_copy(key, b"".join(data))
        self.world.tick()
        match self.world.dice.random():
            case x if x < 0.03:
                raise Death
            case x if x < 0.10:
                raise UnavailableError("no route")
            case x if x < 0.14:
                self.world.late.append((key, b"".join(data), create_only))
                raise UnavailableError("reply lost, may land later")
            case x if x < 0.24:
                self.world.store.put(key, data, create_only=create_only)
                raise UnavailableError("reply lost")
            case x if x < 0.27:
                self.world.store.put(key, data, create_only=create_only)
                raise Death
        self.world.store.put(key, data, create_only=create_only)

    def _require_second_copy(self, key: str, data: bytes) -> None:
        """Nothing else in the log's rooms is ever replaced, and it never says more than what
        counts."""
        assert key.startswith(keys.COPIES), key
        first = key.removeprefix(keys.COPIES)
        stat = self.world.store.stat(first)
        assert stat is not None, "a second copy of nothing"
        out = bytearray(stat.size_bytes)
        self.world.store.read_into(first, memoryview(out))
        assert out == data, "a second copy with other bytes"

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        self._look()
        self.world.store.read_into(key, out, offset_bytes=offset_bytes)

    def stat(self, key: str) -> Stat | None:
        self._look()
        return self.world.store.stat(key)

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        self._look()
        return self.world.store.list(prefix, after=after)

    def delete(self, key: str) -> None:
        assert keys.parse_fold_key(key.removeprefix(keys.COPIES)) is not None, (
            "the log deletes nothing but folds"
        )
        self._look()
        self.world.store.delete(key)
        self.world.first_bytes.pop(key, None)

    def close(self) -> None:
        pass

    def _look(self) -> None:
        if self.world.dice.random() < 0.01:
            raise UnavailableError("no route")


class Writer:
    """A process: opens epochs, commits what it or a dead one captured, drops and tags; starts anew
    when killed."""

    def __init__(self, world: JournalSimulation, name: str) -> None:
        self.world = world
        self.name = name
        self.lives = 0
        self.journal: Journal | None = None
        self.epoch = 0
        self.step = 0

    def act(self) -> None:
        self.world.busy.append(self)
        try:
            self._act()
        except Death:
            self.journal, self.epoch = None, 0
        except CommitUnknownError:
            pass  # the session would repeat; another action here is as good
        except FencedError:
            assert self.world.state().epoch > self.epoch
        except ConflictError:
            pass
        except UnavailableError:
            pass
        finally:
            self.world.busy.remove(self)

    def _act(self) -> None:
        if self.journal is None:
            self.lives += 1
            self.journal = Journal.open(SimBackend(self.world), job="sim", create=True)
        dice = self.world.dice
        if self.epoch == 0 or dice.random() < 0.1:
            self.epoch = self.journal.open_epoch(resume=self._resume())
            self.world.opened.append(self.epoch)
            return
        match dice.random():
            case x if x < 0.7:
                self._commit()
            case x if x < 0.85:
                line = self.journal.refresh().snapshots
                if len(line) > 1:
                    pair = line[0].snapshot
                    self.world.dropped.add(pair)  # from now on either is right
                    self.journal.drop([pair], floor=pair if dice.random() < 0.5 else None)
            case _:
                newest = self.journal.refresh().newest()
                if newest is not None:
                    self.journal.tag(dice.choice("ab"), newest)

    def _resume(self) -> SnapshotId | None:
        assert self.journal is not None
        line = self.journal.refresh().lineage
        return self.world.dice.choice([*line[:2], None]) if line else None

    def _commit(self) -> None:
        assert self.journal is not None
        self.step += 1
        captured = self.epoch if self.world.dice.random() < 0.8 else max(1, self.epoch - 1)
        base = self.journal.refresh().newest()
        pair = SnapshotId(captured, self.step)
        writer = keys.writer_name(self.name, f"{self.lives:016x}")
        ref = PartRef(key=keys.part_key(pair, writer), digest="0" * 32, size_bytes=1, rank=0)
        found = Manifest(
            job="sim",
            snapshot=pair,
            world_size=1,
            base=base if base != pair else None,
            parts=(ref,),
            size_bytes=1,
            new_bytes=1,
            created_unix_s=float(self.epoch),
        )
        try:
            self.journal.commit(found, epoch=self.epoch)
        except ConflictError:
            self.world.refused.add(found.digest)
            raise
        self.world.committed[pair] = found.digest
        self.world.refused.discard(found.digest)


def check(world: JournalSimulation) -> None:
    found = {stat.key: read(world.store, stat.key) for stat in world.store.list("")}
    for key, data in found.items():
        assert world.first_bytes.setdefault(key, data) == data, "the bytes of a key never change"
    assert set(world.first_bytes) == set(found)
    if keys.JOB_KEY not in found:
        return
    state = world.state()
    assert state.hole is None, "no death or lost reply leaves a hole"
    records = [decode_record(data) for key, data in found.items() if key.startswith(keys.LOG)]
    assert [record.seq for record in records] == list(range(state.next_seq)), (
        "one record a seq, without gaps"
    )
    assert fold(empty("sim"), records) == state, "stored folds change nothing"
    assert not set(state.voids) - {void for void in state.voids if void.code == "repeat"}, (
        "writers see voids beforehand"
    )
    highest = 0
    for record in records:
        void = state.void_at(record.seq)
        match record.body:
            case Open(epoch) if void is None:
                assert epoch > highest, "an opened epoch exceeds all epochs seen"
                highest = epoch
            case Commit() if void is None:
                assert record.epoch == highest, "no counted commit of a writer below an open epoch"
            case _:
                pass
    assert len(world.opened) == len(set(world.opened)), "no epoch is given to two writers"
    for pair, digest in world.committed.items():
        entry = state.find(pair)
        assert pair in world.dropped or (entry is not None and entry.manifest_digest == digest), (
            "what was told durable is"
        )
    for entry in state.snapshots:
        assert load_manifest(world.store, state, entry.snapshot).snapshot == entry.snapshot
        assert entry.manifest_digest not in world.refused, "what was refused does not count"
    newest = state.newest()
    if newest is not None and newest.epoch != state.epoch:
        resume = state.opens[-1].resume
        assert resume is not None and newest <= resume, (
            "newest is never beyond what training resumed"
        )


def read(store: MemoryBackend, key: str) -> bytes:
    stat = store.stat(key)
    assert stat is not None
    out = bytearray(stat.size_bytes)
    store.read_into(key, memoryview(out))
    return bytes(out)


def run(seed: int, actions: int) -> JournalSimulation:
    world = JournalSimulation(random.Random(seed))
    world.writers = [Writer(world, f"node{n}") for n in range(WRITERS)]
    for _ in range(actions):
        world.dice.choice(world.writers).act()
        check(world)
    return world


@pytest.fixture(autouse=True)
def _often_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folds, "FOLD_EVERY", 4)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_the_log_keeps_its_promises_whatever_dies_or_is_lost(seed: int) -> None:
    run(seed, 25)


@pytest.mark.slow
def test_the_log_keeps_its_promises_over_many_seeds() -> None:
    worlds = [run(seed, 40) for seed in range(600 if SOAK else 60)]
    assert sum(len(world.committed) for world in worlds) > 3 * len(worlds), "the runs get somewhere"
    assert (
        sum(writer.lives - 1 for world in worlds for writer in world.writers) > len(worlds) // 2
    ), "deaths happen"
