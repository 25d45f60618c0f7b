"""Damage at rest, made by hand in files, and what must be true of stores afterwards."""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

from ckpt.backends.base import Backend
from ckpt.backends.file.store import FileBackend
from ckpt.format import keys
from ckpt.format.store import JobRecord
from ckpt.log.catalog import load_index
from ckpt.log.journal import Journal
from ckpt.log.reader import read_new
from ckpt.log.state import LogState
from ckpt.restore.verify import verify

SOAK = os.environ.get("CKPT_SOAK") == "1"
PREFIXES = (keys.PACKS, keys.PARTS, keys.MANIFESTS, keys.LOG, keys.FOLDS)


def bytes_of(store: Backend, key: str) -> bytes | None:
    found = store.stat(key)
    if found is None:
        return None
    out = bytearray(found.size_bytes)
    store.read_into(key, memoryview(out))
    return bytes(out)


def without_second_copies(store: Backend) -> None:
    """Make a store as one from before there were second copies."""
    for stat in list(store.list(keys.COPIES)):
        store.delete(stat.key)


def objects_of(store: Backend, *prefixes: str) -> dict[str, bytes | None]:
    """Every object but ckpt.json, which each store has its own of."""
    return {
        stat.key: bytes_of(store, stat.key)
        for prefix in prefixes or PREFIXES
        for stat in store.list(prefix)
    }


def record_of(store: Backend) -> JobRecord:
    data = bytes_of(store, keys.JOB_KEY)
    assert data is not None
    return JobRecord.decode(data)


def replicate(source: Path, target: Path, number: int | None) -> FileBackend:
    """A copy in another folder; with ``number`` a replica with an id of its own, but for number
    0."""
    shutil.copytree(source, target)
    record = JobRecord.decode((source / keys.JOB_KEY).read_bytes())
    if number:
        (target / keys.JOB_KEY).write_bytes(replace(record, store_id=f"{number:032x}").encode())
    return FileBackend(target)


def harm(root: str, key: str, rng: random.Random) -> str:
    """Flip a bit of an object's file, cut it short, empty it, fill it with noise, lengthen it, or
    remove it."""
    path = Path(root) / key
    data = bytearray(path.read_bytes())
    how = rng.choice(("flip", "flip", "cut", "empty", "noise", "longer", "remove"))
    match how:
        case "remove":
            path.unlink()
            return how
        case "flip":
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case "cut":
            del data[rng.randrange(len(data)) :]
        case "empty":
            data.clear()
        case "longer":
            data += rng.randbytes(100)
        case _:
            data = bytearray(rng.randbytes(len(data)))
    path.write_bytes(data)
    return how


def flip(root: str, key: str, at: int) -> None:
    path = Path(root) / key
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)


def folded(store: Backend) -> LogState:
    """The log as this one store alone holds it."""
    return read_new(store, LogState(job=record_of(store).job))


def faults_of(store: Backend, truth: Backend) -> list[str]:
    """What ``store`` alone does not have as ``truth`` has it: records byte for byte, packs chunk
    for chunk."""
    small = (keys.PARTS, keys.MANIFESTS, keys.LOG, keys.FOLDS)
    mine, right = objects_of(store, *small), objects_of(truth, *small)
    wrong = [key for key in right if mine.get(key) != right[key]]
    if wrong:
        return wrong
    state = folded(store)
    assert state.hole is None
    for entry in state.snapshots:
        report = verify(load_index(store, state, entry.snapshot), store)
        wrong += [damaged.message for damaged in report.damaged]
    return wrong


def names_nothing_missing(store: Backend) -> bool:
    """Whether every snapshot that the store's own log names can be read from it, whole."""
    if store.stat(keys.JOB_KEY) is None:
        return True
    state = Journal.open(store).refresh()
    return all(verify(load_index(store, state, one.snapshot), store).ok for one in state.snapshots)
