"""Encryption around the real replicated store: a job's store survives damage in each copy and the
loss of one."""

from __future__ import annotations

import hashlib
import random

import pytest

from ckpt.backends.encrypted.open import encrypted, require_matching_keys
from ckpt.backends.encrypted.secret import EncryptionKey, EncryptionKeys
from ckpt.backends.memory import MemoryBackend
from ckpt.backends.replicated.store import ReplicatedBackend
from ckpt.errors import UnavailableError, UsageError
from ckpt.events import Event
from ckpt.format.canonical import digest
from ckpt.log.catalog import load_index, snapshots
from ckpt.restore.verify import verify
from ckpt.testing.contract import read
from ckpt.testing.faults import Fault, FaultyBackend, Harm
from ckpt.testing.sample import damage, write_sample_store

KEYS = EncryptionKeys(EncryptionKey.of(hashlib.sha256(b"replicated").digest()))
STRANGER = EncryptionKeys(EncryptionKey.of(hashlib.sha256(b"stranger").digest()))
PACK = "packs/a"


@pytest.mark.parametrize("seed", range(6))
def test_damage_anywhere_in_two_of_three_copies_is_read_around(seed: int) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    stores = [MemoryBackend(str(n)) for n in range(3)]
    body = rng.randbytes(400_000)
    for store in stores:
        encrypted(store, KEYS).put(PACK, [body])
    length = stores[0].stat(PACK).size_bytes  # type: ignore[union-attr]
    for store in rng.sample(stores, 2):
        for _ in range(3):
            damage(store, PACK, rng.choice((rng.randrange(64), rng.randrange(64, length))))
    several = ReplicatedBackend(stores, emit=lambda _: None, seed=seed)
    try:
        store = encrypted(several, KEYS)
        for _ in range(5):
            start = rng.randrange(len(body))
            stop = rng.randrange(start, len(body)) + 1
            assert digest(read(store, PACK, start, stop)) == digest(body[start:stop])
        with pytest.raises(UsageError, match="wrong encryption key"):
            read(encrypted(several, STRANGER), PACK, 1, 5)
    finally:
        several.close()


@pytest.mark.slow
def test_job_written_to_three_stores_is_whole_in_any_two() -> None:
    told: list[Event] = []
    stores = [MemoryBackend(str(n)) for n in range(3)]
    several = ReplicatedBackend(stores, emit=told.append, seed=1)
    writer = write_sample_store(encrypted(several, KEYS))
    state = writer.journal.refresh()
    several.close()
    for lost in range(3):
        left = ReplicatedBackend(
            [store for n, store in enumerate(stores) if n != lost], emit=told.append, seed=1
        )
        store = encrypted(left, KEYS)
        for info in snapshots(store, state):
            assert info.problem is None
            assert verify(load_index(store, state, info.id), store).ok
        left.close()


def silent(store: MemoryBackend) -> FaultyBackend:
    """The store, which answers nothing."""
    return FaultyBackend(store, [Fault(harm=Harm.LOST_REQUEST, times=None)])


def three_encrypted() -> list[MemoryBackend]:
    stores = [MemoryBackend(str(n)) for n in range(3)]
    for store in stores:
        for n in range(2):
            encrypted(store, KEYS).put(f"manifests/{n}", [b"{}"])
    return stores


@pytest.mark.parametrize("answering", range(3))
def test_the_one_store_that_answers_tells_whether_the_key_fits(answering: int) -> None:
    stores = [
        store if n == answering else silent(store) for n, store in enumerate(three_encrypted())
    ]
    several = ReplicatedBackend(stores, emit=lambda _: None, seed=1)
    require_matching_keys(several, KEYS)
    with pytest.raises(UsageError, match="wrong encryption key"):
        require_matching_keys(several, STRANGER)
    with pytest.raises(UsageError, match="is encrypted"):
        require_matching_keys(several, None)
    several.close()


def test_where_no_store_answers_nothing_is_said_about_the_key() -> None:
    several = ReplicatedBackend(
        [silent(store) for store in three_encrypted()], emit=lambda _: None, seed=1
    )
    with pytest.raises(UnavailableError):
        require_matching_keys(several, KEYS)
    several.close()


@pytest.mark.parametrize("rotten", range(3))
def test_a_store_whose_manifests_all_rotted_does_not_hide_that_they_are_encrypted(
    rotten: int,
) -> None:
    stores = three_encrypted()
    for n in range(2):
        stores[rotten].put(f"manifests/{n}", [b"rot"])
    several = ReplicatedBackend(stores, emit=lambda _: None, prefer=[rotten], seed=1)
    require_matching_keys(several, KEYS)
    several.close()
