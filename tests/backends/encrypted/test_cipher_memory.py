"""Memory for stored bytes is used again, bounded, and never two users' at once."""

from __future__ import annotations

import hashlib
import random
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest

from ckpt.backends.encrypted.cipher import CipherMemory
from ckpt.backends.encrypted.open import encrypted
from ckpt.backends.encrypted.secret import EncryptionKey, EncryptionKeys
from ckpt.backends.memory import MemoryBackend
from ckpt.testing.contract import read

KEYS = EncryptionKeys(EncryptionKey.of(hashlib.sha256(b"memory").digest()))
MIB = 1 << 20


def test_what_came_back_is_lent_again() -> None:
    memory = CipherMemory()
    with memory.borrow(3 * MIB) as first:
        first[:5] = b"stays"
    with memory.borrow(2 * MIB) as second:
        assert len(second) == 2 * MIB
        assert bytes(second[:5]) == b"stays"
    assert memory.kept_bytes == 4 * MIB


def test_two_borrowers_never_share() -> None:
    memory = CipherMemory()
    with memory.borrow(MIB) as one, memory.borrow(MIB) as other:
        one[:] = b"1" * MIB
        other[:] = b"2" * MIB
        assert bytes(one) == b"1" * MIB


def test_no_more_is_kept_than_allowed_and_the_oldest_goes_first() -> None:
    memory = CipherMemory(kept_bytes_max=8 * MIB)
    with memory.borrow(2 * MIB), memory.borrow(4 * MIB), memory.borrow(6 * MIB):
        assert memory.kept_bytes == 0
    assert memory.kept_bytes == 6 * MIB  # the largest came back first, and went
    with memory.borrow(20 * MIB):
        pass
    assert memory.kept_bytes == 0


def test_memory_lent_to_a_block_that_fails_comes_back() -> None:
    memory = CipherMemory()
    try:
        with memory.borrow(MIB) as piece:
            kept = piece[:10]
            raise RuntimeError("planned")
    except RuntimeError:
        assert len(kept) == 10
    assert memory.kept_bytes == 2 * MIB


def test_small_pieces_are_not_kept() -> None:
    memory = CipherMemory()
    with memory.borrow(0) as none, memory.borrow(1000) as some:
        assert (len(none), len(some)) == (0, 1000)
    assert memory.kept_bytes == 0


@pytest.mark.slow
def test_objects_written_and_read_at_once_never_mix() -> None:
    store = encrypted(MemoryBackend(), KEYS)

    def work(me: int) -> None:
        rng = random.Random(me)
        for turn in range(4):
            body = rng.randbytes(rng.randrange(MIB, 4 * MIB))
            name = f"packs/{me}-{turn}"
            store.put(name, [body[:100_001], body[100_001:]])
            start = rng.randrange(len(body) // 2)
            assert read(store, name) == body
            assert read(store, name, start, start + MIB // 3) == body[start : start + MIB // 3]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_put_and_read_take_no_memory_from_the_allocator_beside_what_is_lent() -> None:
    inner = MemoryBackend()
    store = encrypted(inner, KEYS)
    body = bytes(32 * MIB)
    out = memoryview(bytearray(4 * MIB))
    tracemalloc.start()
    try:
        store.put("packs/a", [body])
        kept = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        for at in range(0, 28 * MIB, 4 * MIB):
            store.read_into("packs/a", out, offset_bytes=at + 4096)
        assert tracemalloc.get_traced_memory()[1] - kept < MIB
    finally:
        tracemalloc.stop()
