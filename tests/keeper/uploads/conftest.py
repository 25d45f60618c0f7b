"""A job in its keeper: real slots, a real store that can misbehave, and a loop that the test
turns."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from ckpt.backends.base import Backend, Buffer, Capabilities, Stat
from ckpt.backends.file.store import FileBackend
from ckpt.errors import UnavailableError
from ckpt.events import Event
from ckpt.format.canonical import digest
from ckpt.ipc.client import KeeperSpec
from ckpt.ipc.messages import RemoteError
from ckpt.keeper.uploads.uploads import Uploads
from ckpt.log.catalog import load_index
from ckpt.log.journal import Journal
from ckpt.log.state import LogState
from ckpt.restore.verify import verify
from ckpt.save.persister import SealedSlot
from ckpt.staging.slot import SlotPool, read_slot
from ckpt.values import Box, Leaf, LeafKind, SnapshotId, SnapshotInfo, StagedIndex, StagedShard

T = TypeVar("T")

WAIT_S = 60.0
ROW_BYTES = 64 << 10
Told = tuple[int, SnapshotId, SnapshotInfo | None, RemoteError | None]


class Store:
    """A folder that can be down, answer nothing for keys below a prefix, lose puts or one reply."""

    def __init__(self, root: Path) -> None:
        self._inner = FileBackend(root)
        self.down = False
        self.lost_reply = self.lost_request = ""
        self.held = ""
        self.waits = threading.Event()
        self.go_on = threading.Event()

    @property
    def url(self) -> str:
        """See Backend."""
        return self._inner.url

    def capabilities(self) -> Capabilities:
        """See Backend."""
        return self._inner.capabilities()

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        """See Backend."""
        self._ask(key)
        if self.lost_request and key.startswith(self.lost_request):
            raise UnavailableError(f"the request was lost. key={key}")
        self._inner.put(key, data, create_only=create_only)
        if self.lost_reply and key.startswith(self.lost_reply):
            self.lost_reply, self.down = "", True
            raise UnavailableError(f"the reply was lost. key={key}")

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        """See Backend."""
        self._ask(key)
        self._inner.read_into(key, out, offset_bytes=offset_bytes)

    def stat(self, key: str) -> Stat | None:
        """See Backend."""
        self._ask(key)
        return self._inner.stat(key)

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        """See Backend."""
        self._ask(prefix)
        return self._inner.list(prefix, after=after)

    def delete(self, key: str) -> None:
        """See Backend."""
        self._ask(key)
        self._inner.delete(key)

    def close(self) -> None:
        """See Backend."""
        self._inner.close()

    def _ask(self, key: str) -> None:
        if self.held and key.startswith(self.held):
            self.waits.set()
            assert self.go_on.wait(WAIT_S)
        if self.down:
            raise UnavailableError(f"the store is down. key={key}")


@dataclass
class JobInKeeper:
    """One keeper's uploads, the slots of its ranks, and what it told."""

    root: Path
    ranks: int
    store: Store
    pools: list[SlotPool]
    told: list[Told] = field(default_factory=list)
    fences: list[str] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    origins: dict[int, str] = field(default_factory=dict)
    """What the next staged indexes of an epoch carry, where it was told."""
    calls: queue.SimpleQueue[Callable[[], object]] = field(default_factory=queue.SimpleQueue)

    def uploads(
        self, *, job: str = "job", open_store: Callable[[], Backend] | None = None
    ) -> Uploads:
        """A keeper's uploads; an earlier keeper's are just forgotten, as they are with its
        process."""
        spec = KeeperSpec(job=job, store=str(self.root), compression="off")
        return Uploads(
            spec,
            ranks=self.ranks,
            post=self.calls.put,
            on_outcome=lambda *told: self.told.append(told),
            on_fenced_text=self.fences.append,
            emit=self.events.append,
            open_store=open_store or (lambda: self.store),
            retry_first_s=0.01,
        )

    def until(self, there: Callable[[], object]) -> None:
        """Turn the loop until something is so."""
        deadline_s = time.monotonic() + WAIT_S
        while not there():
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, "nothing came of it"
            try:
                self.calls.get(timeout=min(left_s, 0.05))()
            except queue.Empty:
                continue

    def opened(self, uploads: Uploads, resume: SnapshotId | None) -> int:
        """Open an epoch; what is staged of it from now on carries its origin."""
        number = self.result(uploads.open_epoch(resume))
        self.origins[number] = uploads.origin_of(number)
        return number

    def stage_all(self, snapshot: SnapshotId) -> SnapshotId:
        """Seal a slot of each rank that nobody hands in."""
        for rank in range(self.ranks):
            self.stage_only(rank, snapshot)
        return snapshot

    def alarms(self, kind: str) -> list[str]:
        """What people were told of one kind."""
        return [event.text for event in self.events if event.kind == kind and event.alarm]

    def result(self, future: Future[T]) -> T:
        """What a future gives, turning the loop meanwhile."""
        self.until(future.done)
        return future.result()

    def stage(self, rank: int, snapshot: SnapshotId, *, rows: int = 4) -> SealedSlot:
        """Seal a slot of ``rank``: the last row tells the step, the others never change."""
        slot = self.pools[rank].acquire(wait_s=WAIT_S)
        assert slot is not None
        pin = slot.pin()
        slot.begin()
        size = rows * ROW_BYTES
        data = np.frombuffer(slot.data, dtype=np.uint8)[:size].reshape(rows, ROW_BYTES)
        data[:] = np.arange(rows, dtype=np.uint8)[:, None] + 10 * rank
        data[-1] = 100 + snapshot.step
        shards, at = [], 0
        for name, held in (("fixed", rows - 1), ("moving", 1)):
            leaf = Leaf(
                name=name, kind=LeafKind.TENSOR, dtype="uint8", shape=(self.ranks * held, ROW_BYTES)
            )
            length = held * ROW_BYTES
            shards.append(
                StagedShard(
                    leaf=leaf,
                    box=Box((rank * held, 0), (held, ROW_BYTES)),
                    offset_bytes=at,
                    size_bytes=length,
                    digests=(digest(slot.data[at : at + length]),),
                )
            )
            at += length
        del data
        index = StagedIndex(
            snapshot=snapshot,
            rank=rank,
            world_size=self.ranks,
            shards=tuple(shards),
            origin=self.origins.get(snapshot.epoch, ""),
        )
        slot.seal(index)
        return SealedSlot(index=index, data=slot.data[:], release=pin.release, shared={})

    def stage_only(self, rank: int, snapshot: SnapshotId) -> None:
        """Seal a slot that nobody hands in."""
        self.stage(rank, snapshot).free()

    def sealed_of(self, rank: int, snapshot: SnapshotId) -> SealedSlot | None:
        """What a keeper finds in the slots."""
        for slot in self.pools[rank].slots:
            if slot.snapshot == snapshot:
                pin = slot.pin()
                found = read_slot(slot.memory)
                assert found is not None
                return SealedSlot(index=found[0], data=slot.data[:], release=pin.release, shared={})
        return None

    def save(
        self, uploads: Uploads, snapshot: SnapshotId, tags: tuple[str, ...] = ()
    ) -> list[Told]:
        """Stage and hand in on all ranks; the outcomes, by rank."""
        for rank in range(self.ranks):
            uploads.persist(rank, self.stage(rank, snapshot), tags)
        return self.outcomes(uploads, snapshot)

    def outcomes(self, uploads: Uploads, snapshot: SnapshotId) -> list[Told]:
        """What all ranks hear of ``snapshot``, and no more."""
        self.until(lambda: len([told for told in self.told if told[1] == snapshot]) == self.ranks)
        self.until(lambda: uploads.in_flight == 0)
        return sorted((told for told in self.told if told[1] == snapshot), key=lambda told: told[0])

    def state(self) -> LogState:
        """The log as anybody reads it."""
        return Journal.open(FileBackend(self.root)).refresh()

    def readable(self, snapshot: SnapshotId) -> bool:
        """Whether each byte of a committed snapshot is there and right."""
        return verify(
            load_index(FileBackend(self.root), self.state(), snapshot), FileBackend(self.root)
        ).ok

    @staticmethod
    def infos(told: list[Told]) -> list[SnapshotInfo | None]:
        """The facts in some outcomes."""
        return [info for _, _, info, _ in told]

    @staticmethod
    def codes(told: list[Told]) -> list[str | None]:
        """The errors' codes in some outcomes."""
        return [error.code if error is not None else None for *_, error in told]

    def pinned(self) -> int:
        """Slots that are held."""
        return sum(slot.pinned for pool in self.pools for slot in pool.slots)


@pytest.fixture
def make_world(tmp_path: Path) -> Iterator[Callable[..., JobInKeeper]]:
    """Makes a world; its slots are freed at the end."""
    worlds: list[JobInKeeper] = []

    def make(ranks: int = 2) -> JobInKeeper:
        pools = [
            SlotPool(count=3, data_bytes=8 * ROW_BYTES, header_bytes=1 << 16, prefault=False)
            for _ in range(ranks)
        ]
        worlds.append(JobInKeeper(tmp_path / "store", ranks, Store(tmp_path / "store"), pools))
        return worlds[-1]

    yield make
    for world in worlds:
        for pool in world.pools:
            pool.close()
