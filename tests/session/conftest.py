"""Ranks as threads: one in-process channel, one store, one saver and one restorer a rank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import pytest

from ckpt.backends.base import Backend
from ckpt.backends.memory import MemoryBackend
from ckpt.capture.leaves import World
from ckpt.errors import CkptError
from ckpt.events import Event
from ckpt.format.keys import writer_name
from ckpt.log.journal import Journal
from ckpt.save.persister import SaveTarget
from ckpt.session.options import SessionOptions
from ckpt.session.restoring import Restoring
from ckpt.session.saving import Saving
from ckpt.values import SnapshotId

T = TypeVar("T")

JOIN_WAIT_S = 30.0


class SharedKeys:
    """What the channels of one world share."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.values: dict[str, bytes] = {}
        self.counts: dict[str, int] = {}


class ThreadChannel:
    """A channel between threads. Refuses a key that is posted twice: keys are written once."""

    def __init__(self, shared: SharedKeys, *, rank: int, size: int) -> None:
        self._shared = shared
        self.rank = rank
        self.size = size

    def post(self, key: str, value: bytes) -> None:
        """See ``Channel``."""
        with self._shared.lock:
            assert key not in self._shared.values, f"posted twice: {key}"
            self._shared.values[key] = value

    def peek(self, key: str) -> bytes | None:
        """See ``Channel``."""
        with self._shared.lock:
            return self._shared.values.get(key)

    def count(self, key: str, amount: int = 0) -> int:
        """See ``Channel``."""
        with self._shared.lock:
            self._shared.counts[key] = self._shared.counts.get(key, 0) + amount
            return self._shared.counts[key]

    def forget(self, key: str) -> None:
        """See ``Channel``."""
        with self._shared.lock:
            self._shared.values.pop(key, None)


def channels(size: int) -> list[ThreadChannel]:
    """The channels of a fresh world of ``size`` ranks."""
    shared = SharedKeys()
    return [ThreadChannel(shared, rank=rank, size=size) for rank in range(size)]


def together(size: int, call: Callable[[int], T]) -> list[T | CkptError]:
    """Run ``call(rank)`` in one thread a rank; each rank's result, or the CkptError that it
    raised."""

    def guarded(rank: int) -> T | CkptError:
        try:
            return call(rank)
        except CkptError as error:
            return error

    pool = ThreadPoolExecutor(size)
    futures = [pool.submit(guarded, rank) for rank in range(size)]
    try:
        return [future.result(JOIN_WAIT_S) for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@dataclass
class Rank:
    """One rank of a threaded job."""

    channel: ThreadChannel
    backend: Backend
    saving: Saving
    epoch: int
    events: list[Event]

    def save(self, items: dict[str, object], step: int, **more: object):
        """Hand in one snapshot."""
        tags = more.get("tags", ())
        metadata = more.get("metadata", {})
        return self.saving.snapshot(
            items, SnapshotId(self.epoch, step), metadata=metadata, tags=tags
        )


@dataclass
class Job:
    """A store, and worlds of ranks over it, one after the other."""

    store: Backend = field(default_factory=lambda: MemoryBackend("job"))
    boots: int = 0
    made: list[Rank] = field(default_factory=list)

    def leave(self) -> None:
        """All ranks are gone: a thread that still waits for one would keep the process alive."""
        for rank in self.made:
            rank.channel.post(f"bye/{rank.channel.rank}", b"1")

    def ranks(
        self,
        size: int,
        *,
        backends: dict[int, Backend] | None = None,
        slots: int = 2,
        journal: Journal | None = None,
    ) -> list[Rank]:
        """A fresh epoch of ``size`` ranks that goes on from the newest snapshot. ``backends``
        replaces some ranks' store."""
        mine = (backends or {}).get(0, self.store)
        log = journal or Journal.open(mine, job="job", create=True)
        state = log.refresh()
        epoch = log.open_epoch(resume=state.newest())
        made = []
        for channel in channels(size):
            backend = (backends or {}).get(channel.rank, self.store)
            events: list[Event] = []
            saving = Saving(channel, SessionOptions(slots=slots), events.append)
            self.boots += 1
            place = SaveTarget(
                backend=backend,
                writer=writer_name("node", f"{self.boots:016x}"),
                epoch=lambda: epoch,
                journal=log if channel.rank == 0 else None,
            )
            saving.write_locally(place, base=None, known_chunks=dict)
            made.append(Rank(channel, backend, saving, epoch, events))
        self.made += made
        return made

    def restorers(
        self, size: int, *, backends: dict[int, Backend] | None = None
    ) -> tuple[list[Restoring], list[list[Event]]]:
        """One restorer a rank, in a fresh world, and what each told."""
        told: list[list[Event]] = [[] for _ in range(size)]
        made = []
        for channel in channels(size):
            backend = (backends or {}).get(channel.rank, self.store)
            journal = Journal.open(backend)
            made.append(
                Restoring(
                    channel,
                    backend,
                    world=World(channel.rank, size),
                    state=journal.refresh,
                    emit=told[channel.rank].append,
                    threads=2,
                    budget_bytes=8 << 20,
                )
            )
        return made, told


@pytest.fixture
def job() -> Iterator[Job]:
    """A job over a store in memory."""
    made = Job()
    yield made
    made.leave()


@pytest.fixture
def make_channels() -> Callable[[int], list[ThreadChannel]]:
    """Makes the channels of a fresh world."""
    return channels


@pytest.fixture
def run_ranks() -> Callable[..., list[object]]:
    """Runs a call in one thread a rank."""
    return together


@pytest.fixture
def rank_over() -> Callable[[Backend], Rank]:
    """Makes the only rank of a job over a store."""
    return lambda store: Job(store).ranks(1)[0]
