"""Several stores as one keep the contract of one."""

from __future__ import annotations

from pathlib import Path

from ckpt.backends.base import Backend
from ckpt.backends.checked import MultiStoreBackend
from ckpt.backends.file.store import FileBackend
from ckpt.backends.memory import MemoryBackend
from ckpt.backends.replicated.store import ReplicatedBackend
from ckpt.events import Event
from ckpt.testing.contract import BackendContract, Opener


def deaf(event: Event) -> None:
    """Nobody listens."""


class TestThreeFolders(BackendContract):
    def opener(self, folder: Path) -> Opener:
        return lambda: ReplicatedBackend([FileBackend(folder / name) for name in "abc"], emit=deaf)


class TestThreeMemories(BackendContract):
    def opener(self, folder: Path) -> Opener:
        stores = [MemoryBackend(name) for name in "abc"]
        return lambda: ReplicatedBackend(stores, emit=deaf)


class TestMixedPair(BackendContract):
    def opener(self, folder: Path) -> Opener:
        memory = MemoryBackend("a")
        return lambda: ReplicatedBackend([memory, FileBackend(folder / "b")], emit=deaf)


class TestOneOfOne(BackendContract):
    def opener(self, folder: Path) -> Opener:
        return lambda: ReplicatedBackend([FileBackend(folder / "a")], emit=deaf)


def test_it_is_replicated_and_a_backend() -> None:
    store = ReplicatedBackend([MemoryBackend(name) for name in "abc"], emit=deaf)
    assert isinstance(store, MultiStoreBackend)
    typed: Backend = store
    assert typed.url == "memory:a + memory:b + memory:c"
    assert store.write_quorum == 2
    assert len(store.stores) == 3
    store.close()
