"""An encrypted store is a store: the whole contract, with its keys encrypted and with its keys
passed through."""

from __future__ import annotations

import hashlib
import itertools
import random
from pathlib import Path

import pytest

from ckpt.backends.encrypted.open import encrypted
from ckpt.backends.encrypted.secret import EncryptionKey, EncryptionKeys
from ckpt.backends.file.store import FileBackend
from ckpt.backends.memory import MemoryBackend
from ckpt.testing.contract import BackendContract, Opener, buffer, read
from ckpt.testing.faults import CountingBackend


def keys_named(name: str) -> EncryptionKeys:
    return EncryptionKeys(EncryptionKey.of(hashlib.sha256(name.encode()).digest()))


def every(_: str) -> bool:
    return True


def none(_: str) -> bool:
    return False


class TestEncryptedMemory(BackendContract):
    def opener(self, folder: Path) -> Opener:
        inner = MemoryBackend()
        return lambda: encrypted(inner, keys_named("contract"), is_sealed=every)


class TestPassedThroughMemory(BackendContract):
    def opener(self, folder: Path) -> Opener:
        inner = MemoryBackend()
        return lambda: encrypted(inner, keys_named("contract"), is_sealed=none)


class TestMixedMemory(BackendContract):
    """Packs are encrypted and the log isn't, as in use."""

    def opener(self, folder: Path) -> Opener:
        inner = MemoryBackend()
        return lambda: encrypted(inner, keys_named("contract"))


class TestEncryptedFolder(BackendContract):
    def opener(self, folder: Path) -> Opener:
        return lambda: encrypted(
            FileBackend(folder / "store"), keys_named("contract"), is_sealed=every
        )


class TestPassedThroughFolder(BackendContract):
    def opener(self, folder: Path) -> Opener:
        return lambda: encrypted(
            FileBackend(folder / "store"), keys_named("contract"), is_sealed=none
        )


@pytest.fixture
def counting() -> CountingBackend:
    return CountingBackend(MemoryBackend())


def test_chunks_of_a_pack_are_read_by_ranges_one_request_each(counting: CountingBackend) -> None:
    chunk = 4 << 20
    body = random.Random(5).randbytes(3 * chunk + 4096)
    encrypted(counting, keys_named("a")).put("packs/a", [body])
    store = encrypted(counting, keys_named("a"))
    counting.forget()
    for offset in (0, 4096 + chunk, 2 * chunk + 4096):
        assert read(store, "packs/a", offset, offset + chunk) == body[offset : offset + chunk]
    assert len(counting.calls("read_into")) == 3
    assert counting.size_bytes("read_into") < 3 * chunk * 1.04


def test_first_read_from_the_middle_takes_one_request_more_for_the_header(
    counting: CountingBackend,
) -> None:
    store = encrypted(counting, keys_named("a"))
    store.put("packs/a", [bytes(1 << 20)])
    counting.forget()
    for offset in (4096, 8192, 300_000):
        assert read(store, "packs/a", offset, offset + 4096) == bytes(4096)
    assert [call.size_bytes for call in counting.calls("read_into")].count(64) == 1
    assert len(counting.calls("read_into")) == 4


@pytest.mark.parametrize("size_bytes", [1, 1000, 131_072, 131_073, 1_000_000])
def test_whole_object_is_read_in_one_request(counting: CountingBackend, size_bytes: int) -> None:
    body = random.Random(1).randbytes(size_bytes)
    encrypted(counting, keys_named("a")).put("parts/a", [body])
    counting.forget()
    store = encrypted(counting, keys_named("a"))
    assert read(store, "parts/a", 0, size_bytes) == body
    assert len(counting.calls()) == 1


def test_direct_io_is_not_promised(tmp_path: Path) -> None:
    inner = FileBackend(tmp_path)
    store = encrypted(inner, keys_named("a"))
    assert not store.capabilities().direct_io
    assert store.capabilities().create_only == inner.capabilities().create_only
    assert store.capabilities().concurrency_best == inner.capabilities().concurrency_best


def test_stored_object_is_the_same_whether_put_in_one_buffer_or_many() -> None:
    inner = MemoryBackend()
    store = encrypted(inner, keys_named("a"))
    whole = buffer(1_000_003, aligned=True, seed=3)
    for at, cuts in enumerate(
        ([], [1], [131_072], [131_071, 131_073, 500_000], [0, 0, 262_144, 262_144])
    ):
        edges = [0, *cuts, len(whole)]
        pieces = [whole[low:high] for low, high in itertools.pairwise(edges)]
        store.put("packs/a", pieces)
        found = bytearray(inner.stat("packs/a").size_bytes)  # type: ignore[union-attr]
        inner.read_into("packs/a", memoryview(found))
        if at == 0:
            first = found
        assert found == first
