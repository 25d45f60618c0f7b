"""A node's own memory, served read-only beside what it holds for others."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from kit.peers.servers import WAIT_S, PeerServers, read, until

from ckpt.backends.base import Stat
from ckpt.cluster.peermem.memory import ServedObject, ServedSource
from ckpt.errors import NotFoundError, UnavailableError, UsageError

SLOT_BYTES = 3 << 20
HEADER_BYTES = 4096


class Slots:
    """Memfds with a header, as a keeper has them: the object is what lies behind the header."""

    prefix = "slot/"

    def __init__(self, count: int) -> None:
        self.generation = 1
        self.pins = 0
        self.meddle = False
        self._fds = [os.memfd_create(f"slot{number}") for number in range(count)]
        for number, fd in enumerate(self._fds):
            os.ftruncate(fd, HEADER_BYTES + SLOT_BYTES)
            os.pwrite(fd, bytes([number + 1]) * SLOT_BYTES, HEADER_BYTES)
        self._maps = [mmap.mmap(fd, HEADER_BYTES + SLOT_BYTES) for fd in self._fds]

    @contextlib.contextmanager
    def reading(self, key: str) -> Iterator[ServedObject]:
        number = self._number(key)
        begun = self.generation
        self.pins += 1
        if self.meddle:
            self.generation += 1
        view = memoryview(self._maps[number])[HEADER_BYTES:]
        try:
            yield ServedObject(
                view=view,
                fd=self._fds[number],
                offset_bytes=HEADER_BYTES,
                version=begun,
                modified_unix_s=5.0,
                unchanged=lambda: self.generation == begun,
            )
        finally:
            self.pins -= 1

    def stat(self, key: str) -> Stat | None:
        return next((one for one in self.list() if one.key == key), None)

    def list(self) -> list[Stat]:
        return [Stat(f"slot/{number}", SLOT_BYTES, 5.0) for number in range(len(self._fds))]

    def close(self) -> None:
        for one in self._fds:
            os.close(one)

    def _number(self, key: str) -> int:
        if self.stat(key) is None:
            raise NotFoundError(f"no such slot. key={key}")
        return int(key.removeprefix("slot/"))


@pytest.fixture
def slots() -> Iterator[Slots]:
    made = Slots(2)
    yield made
    made.close()


def test_a_sources_objects_are_read_and_listed_among_the_vaults(
    world: PeerServers, slots: Slots
) -> None:
    typed: ServedSource = slots
    server = world.serve(sources=[typed])
    store = world.store(server)
    for key in ("a", "slots", "z"):
        store.put(key, [key.encode()])
    assert [one.key for one in store.list("")] == ["a", "slot/0", "slot/1", "slots", "z"]
    assert [one.key for one in store.list("slot/", after="slot/0")] == ["slot/1"]
    assert [one.key for one in store.list("slot")] == ["slot/0", "slot/1", "slots"]
    assert read(store, "slot/1") == b"\2" * SLOT_BYTES
    out = bytearray(10)
    store.read_into("slot/0", memoryview(out), offset_bytes=SLOT_BYTES - 10)
    assert out == b"\1" * 10
    assert store.stat("slot/0") == Stat("slot/0", SLOT_BYTES, 5.0)
    assert store.stat("slot/2") is None
    with pytest.raises(NotFoundError):
        store.read_into("slot/2", memoryview(out))
    until(lambda: slots.pins == 0)


def test_nobody_writes_to_a_source(world: PeerServers, slots: Slots) -> None:
    server = world.serve(sources=[slots])
    store = world.store(server)
    for act in (
        lambda: store.put("slot/0", [b"x"]),
        lambda: store.put("slot/new", [bytes(1 << 20)]),
        lambda: store.delete("slot/0"),
    ):
        with pytest.raises(UsageError, match="read-only"):
            act()
    assert server.stats().refused == {"read-only": 3}
    assert read(store, "slot/0") == b"\1" * SLOT_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("size", [10, SLOT_BYTES])
def test_memory_overwritten_while_it_is_sent_is_an_error_not_bytes(
    world: PeerServers, slots: Slots, size: int
) -> None:
    server = world.serve(sources=[slots])
    store = world.store(server)
    slots.meddle = True
    with pytest.raises(UnavailableError):
        store.read_into("slot/0", memoryview(bytearray(size)))
    slots.meddle = False
    store.read_into("slot/0", memoryview(bytearray(size)))
    until(lambda: slots.pins == 0)


def test_a_source_has_a_prefix(world: PeerServers, slots: Slots) -> None:
    slots.prefix = ""
    with pytest.raises(UsageError):
        world.serve(sources=[slots])


class Stuck:
    """A source that answers nobody before it may."""

    prefix = "stuck/"

    def __init__(self) -> None:
        self.asked, self.may = threading.Event(), threading.Event()

    @contextlib.contextmanager
    def reading(self, key: str) -> Iterator[ServedObject]:
        self.asked.set()
        assert self.may.wait(WAIT_S)
        raise NotFoundError(key)
        yield

    def stat(self, key: str) -> Stat | None:
        return None

    def list(self) -> list[Stat]:
        return []


def test_store_that_is_closed_breaks_the_calls_that_wait_for_its_peer(world: PeerServers) -> None:
    source = Stuck()
    store = world.store(world.serve(sources=[source]))
    with ThreadPoolExecutor(1) as pool:
        try:
            reading = pool.submit(store.read_into, "stuck/a", memoryview(bytearray(8)))
            assert source.asked.wait(WAIT_S)
            store.close()
            with pytest.raises(UnavailableError, match=r"broke|closed"):
                reading.result(WAIT_S)
        finally:
            source.may.set()
