"""A job's store, written, verified and restored through encryption, by the rooms that training
uses."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from ckpt.backends.base import Backend
from ckpt.backends.encrypted.open import encrypted
from ckpt.backends.encrypted.secret import EncryptionKey, EncryptionKeys
from ckpt.backends.file.store import FileBackend
from ckpt.backends.memory import MemoryBackend
from ckpt.errors import IntegrityError, UsageError
from ckpt.log.catalog import load_index, snapshots
from ckpt.restore.reader import SnapshotReader
from ckpt.restore.verify import verify
from ckpt.testing.sample import SampleWriter, damage, sample_ranks, sample_state, write_sample_store
from ckpt.values import SnapshotId

KEYS = EncryptionKeys(EncryptionKey.of(hashlib.sha256(b"flow").digest()))
NEWEST = SnapshotId(1, 30)


@pytest.fixture(params=["memory", "folder"])
def inner(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    return MemoryBackend() if request.param == "memory" else FileBackend(tmp_path / "store")


def holds(store: Backend, needle: bytes) -> list[str]:
    found = []
    for entry in store.list(""):
        body = bytearray(entry.size_bytes)
        store.read_into(entry.key, memoryview(body))
        if needle in body:
            found.append(entry.key)
    return found


def test_what_was_written_is_verified_and_restored(inner: Backend) -> None:
    writer = write_sample_store(encrypted(inner, KEYS))
    store = encrypted(inner, KEYS)
    state = writer.journal.refresh()
    listed = snapshots(store, state)
    assert [(info.step, info.problem) for info in listed] == [(10, None), (20, None), (30, None)]
    assert listed[1].metadata["note"] == "sample"
    for info in listed:
        index = load_index(store, state, info.id)
        assert verify(index, store).ok
        expected = sample_state(info.step)
        with SnapshotReader(store, index) as reader:
            assert np.array_equal(reader.read("model/fc.weight").array, expected.weight)
            assert np.array_equal(
                reader.read("model/fc.weight", rows=slice(20, 30)).array, expected.weight[20:30]
            )
            assert np.array_equal(reader.read("model/head.weight").array, expected.embed_bits)
            assert reader.read_object("progress", rank=1)["step"] == info.step


@pytest.mark.slow
def test_store_holds_no_plaintext(inner: Backend) -> None:
    write_sample_store(encrypted(inner, KEYS))
    plain = MemoryBackend()
    write_sample_store(plain)
    state = sample_state(30)
    needles = {
        "values": state.weight.tobytes()[:64],
        "bias": state.bias.tobytes()[:64],
        "objects": b"exp_avg",
        "metadata": b'"note"',
        "digests": b"packs/sample-",
    }
    for what, needle in needles.items():
        if what == "digests":
            assert all(
                key.startswith(("packs/", "log/", "ckpt", "folds")) for key in holds(inner, needle)
            )
            continue
        assert what == "objects" or holds(plain, needle), what
        assert not holds(inner, needle), what


def test_damage_is_found_and_named_as_in_any_store(inner: Backend) -> None:
    writer = write_sample_store(encrypted(inner, KEYS))
    store = encrypted(inner, KEYS)
    index = load_index(store, writer.journal.refresh(), NEWEST)
    place = index.shards("model/fc.weight", None)[0].locations[0]
    damage(inner, place.pack, 64 + place.offset_bytes)
    report = verify(index, store)
    assert "model/fc.weight" in {name for one in report.damaged for name in one.leaves}
    with SnapshotReader(store, index) as reader, pytest.raises(IntegrityError):
        reader.read("model/fc.weight")


def test_wrong_key_neither_lists_nor_restores_nor_looks_damaged(inner: Backend) -> None:
    writer = write_sample_store(encrypted(inner, KEYS))
    state = writer.journal.refresh()
    stranger = encrypted(
        inner, EncryptionKeys(EncryptionKey.of(hashlib.sha256(b"stranger").digest()))
    )
    for act in (lambda: snapshots(stranger, state), lambda: load_index(stranger, state, NEWEST)):
        with pytest.raises(UsageError, match="wrong encryption key"):
            act()
    index = load_index(encrypted(inner, KEYS), state, NEWEST)
    with pytest.raises(UsageError, match="wrong encryption key"):
        verify(index, stranger)


def test_job_goes_on_under_a_new_key_and_shares_old_chunks(inner: Backend) -> None:
    write_sample_store(encrypted(inner, KEYS))
    fresh = EncryptionKey.of(hashlib.sha256(b"fresh").digest())
    store = encrypted(inner, EncryptionKeys(fresh, (KEYS.writing,)))
    writer = SampleWriter(store)
    pair = SnapshotId(writer.open_epoch(resume=NEWEST), 40)
    writer.write(pair, sample_ranks(40))
    state = writer.journal.refresh()
    assert [info.problem for info in snapshots(store, state)] == [None] * 4
    for snapshot in (NEWEST, pair):
        assert verify(load_index(store, state, snapshot), store).ok
    assert verify(
        load_index(encrypted(inner, EncryptionKeys(fresh)), state, pair),
        encrypted(inner, EncryptionKeys(fresh)),
    ).ok
