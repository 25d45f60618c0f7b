"""Stores that stop in the middle, lend, and remember every version that any key ever had; and what
all tests here share."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from ckpt.backends.base import Backend, Buffer, Capabilities, Stat
from ckpt.backends.file.store import FileBackend
from ckpt.backends.file.syscalls import RealOps
from ckpt.backends.memory import MemoryBackend
from ckpt.backends.replicated.policy import ReplicationLimits
from ckpt.backends.replicated.store import ReplicatedBackend
from ckpt.errors import UnavailableError
from ckpt.events import Event

T = TypeVar("T")

WAIT_S = 30.0

QUICK = ReplicationLimits(
    hedge_s_min=0.02,
    hedge_s_first=0.05,
    hedge_s_max=0.2,
    grace_s_min=0.05,
    grace_s_max=0.2,
    stall_s=1.0,
    call_s=1.0,
    probe_s_first=0.05,
    probe_s_max=0.2,
    retry_s_first=0.01,
    retry_s_max=0.05,
)
"""Limits that tests reach quickly."""

STEADY = dataclasses.replace(QUICK, hedge_s_min=WAIT_S, hedge_s_first=WAIT_S, hedge_s_max=WAIT_S)
"""The same without hedging: on a busy machine a bad copy is then still met before another one has
answered."""

PATIENT = ReplicationLimits(
    hedge_s_min=WAIT_S,
    hedge_s_first=WAIT_S,
    hedge_s_max=WAIT_S,
    grace_s_min=WAIT_S,
    grace_s_max=WAIT_S,
)
"""Limits that no test reaches: everybody is waited for."""


class Remembering(MemoryBackend):
    """Keeps every version that any key ever had; can go away, and come back empty."""

    def __init__(self, name: str = "memory") -> None:
        super().__init__(name)
        self.versions: dict[str, set[bytes]] = {}
        self.away: Exception | None = None

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        self._here()
        super().put(key, data, create_only=create_only)
        self.versions.setdefault(key, set()).add(self.held(key))

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        self._here()
        super().read_into(key, out, offset_bytes=offset_bytes)

    def stat(self, key: str) -> Stat | None:
        self._here()
        return super().stat(key)

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        self._here()
        yield from super().list(prefix, after=after)

    def delete(self, key: str) -> None:
        self._here()
        super().delete(key)

    def held(self, key: str) -> bytes | None:
        found = self._objects.get(key)
        return None if found is None else found[0]

    def write_at_rest(self, key: str, body: bytes) -> None:
        """What a bad disk or a careless hand does."""
        self._objects[key] = (body, time.time())

    def wipe(self) -> None:
        self._objects.clear()

    def _here(self) -> None:
        if self.away is not None:
            raise self.away


class Gated:
    """Stops every call of ``ops`` while the gate is shut: puts halfway through their bytes, reads
    with half of them read."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.shut: set[str] = set()
        self.inside = 0
        self.calls: list[tuple[str, str]] = []
        self.change = threading.Condition()

    @property
    def url(self) -> str:
        return self.inner.url

    def capabilities(self) -> Capabilities:
        return self.inner.capabilities()

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        self.inner.put(key, self._taken("put", key, data), create_only=create_only)

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        scratch = bytearray(len(out))
        self._enter("read_into", key)
        self.inner.read_into(key, memoryview(scratch), offset_bytes=offset_bytes)
        half = len(out) // 2
        out[:half] = scratch[:half]
        self._stop("read_into")
        out[half:] = scratch[half:]

    def stat(self, key: str) -> Stat | None:
        self._enter("stat", key)
        self._stop("stat")
        return self.inner.stat(key)

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        self._enter("list", prefix)
        for entry in self.inner.list(prefix, after=after):
            self._stop("list")
            yield entry

    def delete(self, key: str) -> None:
        self._enter("delete", key)
        self._stop("delete")
        self.inner.delete(key)

    def close(self) -> None:
        self.inner.close()

    def stop(self, *ops: str) -> None:
        with self.change:
            self.shut |= set(ops)

    def release(self) -> None:
        with self.change:
            self.shut.clear()
            self.change.notify_all()

    def wait_inside(self, calls: int = 1) -> None:
        with self.change:
            assert self.change.wait_for(lambda: self.inside >= calls, WAIT_S), (
                "nobody came to the gate"
            )

    def count(self, op: str, key: str = "") -> int:
        with self.change:
            return sum(name == op and about.startswith(key) for name, about in self.calls)

    def _taken(self, op: str, key: str, data: Sequence[Buffer]) -> list[bytes]:
        self._enter(op, key)
        half = len(data) // 2
        first = [bytes(one) for one in data[:half]]
        self._stop(op)
        return [*first, *(bytes(one) for one in data[half:])]

    def _enter(self, op: str, key: str) -> None:
        with self.change:
            self.calls.append((op, key))

    def _stop(self, op: str) -> None:
        with self.change:
            self.inside += 1
            self.change.notify_all()
            self.change.wait_for(lambda: op not in self.shut)
            self.inside -= 1


class Lending(Gated):
    """A gated store that can be lent memory, and keeps what it was handed."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.handed: list[Sequence[Buffer]] = []

    def put_lent(
        self,
        key: str,
        data: Sequence[Buffer],
        still_lent: Callable[[], None],
        *,
        create_only: bool = False,
    ) -> None:
        self.handed.append(data)
        taken = self._taken("put", key, data)
        still_lent()
        self.inner.put(key, taken, create_only=create_only)


class LendingFolder(FileBackend):
    """A folder that looks, before it names an object, whether its bytes were still lent."""

    def put_lent(
        self,
        key: str,
        data: Sequence[Buffer],
        still_lent: Callable[[], None],
        *,
        create_only: bool = False,
    ) -> None:
        FileBackend(self.url, ops=LookingOps(still_lent)).put(key, data, create_only=create_only)


class LookingOps(RealOps):
    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look

    def rename(self, source: str, target: str) -> None:
        self._look()
        super().rename(source, target)


class Heard:
    """What was told."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._change = threading.Condition()

    def __call__(self, event: Event) -> None:
        with self._change:
            self.events.append(event)
            self._change.notify_all()

    def kinds(self) -> list[str]:
        with self._change:
            return [event.kind for event in self.events]

    def wait_for(self, kind: str) -> Event:
        with self._change:
            assert self._change.wait_for(
                lambda: kind in [event.kind for event in self.events], WAIT_S
            ), self.events
            return next(event for event in self.events if event.kind == kind)


@contextmanager
def replicated(
    stores: Sequence[Backend],
    *,
    pace: ReplicationLimits = QUICK,
    write_quorum: int | None = None,
    tell: Callable[[Event], None] | None = None,
    prefer: Sequence[int] = (),
    budget_bytes: int = 64 << 20,
) -> Iterator[ReplicatedBackend]:
    """A group of ``stores`` that ends with the block, hung stores released first."""
    store = ReplicatedBackend(
        stores,
        write_quorum=write_quorum,
        emit=tell or Heard(),
        limits=pace,
        prefer=prefer,
        budget_bytes=budget_bytes,
        seed=7,
    )
    try:
        yield store
    finally:
        for one in stores:
            if isinstance(one, Gated):
                one.release()
        store.close()


def wait_until(true: Callable[[], bool]) -> None:
    """Wait for a condition that nothing announces."""
    deadline_s = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline_s, "it did not come true"
        time.sleep(0.005)


def away(store: Backend) -> UnavailableError:
    return UnavailableError(f"the store is away. store={store.url}")


def read(store: Backend, key: str, size: int, offset: int = 0) -> bytes:
    out = bytearray(size)
    store.read_into(key, memoryview(out), offset_bytes=offset)
    return bytes(out)
