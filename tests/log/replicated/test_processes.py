"""Real processes on one machine over real folders: one is stopped in the middle of a commit while
another opens an epoch."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from kit.logs.sleeper import manifest, sleepy_writer, stores

from ckpt.errors import FencedError
from ckpt.format import keys
from ckpt.format.records import BY_STORES
from ckpt.log.journal import Journal
from ckpt.log.state import LogState
from ckpt.values import SnapshotId

WAIT_S = 120.0
CONTEXT = multiprocessing.get_context("spawn")

Sleeper = tuple[BaseProcess, Connection]


@pytest.fixture
def sleepers() -> Iterator[list[Sleeper]]:
    found: list[Sleeper] = []
    yield found
    for process, _ in found:
        process.kill()
        process.join()


def hear(pipe: Connection) -> object:
    assert pipe.poll(WAIT_S), "the process does not answer"
    return pipe.recv()


def put_to_sleep(
    sleepers: list[Sleeper], folder: Path, *, once: bool, prefix: str, when: str
) -> Sleeper:
    """A process that committed once, and is stopped in the middle of its second commit."""
    mine, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(
        target=sleepy_writer, args=(folder, once, prefix, when, theirs), daemon=True
    )
    process.start()
    sleepers.append((process, mine))
    assert hear(mine) == "ready"
    mine.send("go")
    assert hear(mine) == "stopped"
    assert process.pid is not None
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    return process, mine


def wake(sleeper: Sleeper) -> tuple[str, str]:
    """What the process says after it goes on."""
    process, pipe = sleeper
    assert process.pid is not None
    os.kill(process.pid, signal.SIGCONT)
    said = hear(pipe)
    assert isinstance(said, tuple)
    return said


def folds(folder: Path, *, once: bool) -> list[LogState]:
    """The log as each reader may see it: of all stores, and of any two."""
    found = []
    for away in (None, 0, 1, 2):
        backend = stores(folder, once=once)
        if away is not None:
            hidden = folder / "hidden"
            (folder / f"s{away}").rename(hidden)
        found.append(Journal.open(backend).refresh())
        if away is not None:
            hidden.rename(folder / f"s{away}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("once", "prefix", "when"),
    [
        (True, keys.MANIFESTS, "before"),
        (True, keys.LOG, "before"),
        (True, keys.LOG, "after"),
        (False, keys.MANIFESTS, "before"),
        (False, keys.MANIFESTS, "after"),
    ],
    ids=[
        "vote-manifest",
        "vote-first-vote",
        "vote-one-vote",
        "file-manifest",
        "file-manifest-stored",
    ],
)
def test_who_slept_while_another_opened_an_epoch_is_fenced_and_nothing_of_it_counts(
    tmp_path: Path, sleepers: list[Sleeper], once: bool, prefix: str, when: str
) -> None:
    sleeper = put_to_sleep(sleepers, tmp_path, once=once, prefix=prefix, when=when)
    journal = Journal.open(stores(tmp_path, once=once), job="sleepy", create=True)
    assert journal.open_epoch(resume=SnapshotId(1, 1)) == 2
    journal.commit(manifest(2, 2, "awake"), epoch=2)
    assert wake(sleeper)[0] == FencedError.__name__
    for state in folds(tmp_path, once=once):
        assert [entry.snapshot for entry in state.snapshots] == [SnapshotId(1, 1), SnapshotId(2, 2)]
        assert state.epoch == 2 and not state.voids and not state.stale_reason
        assert state.stores is not None and (state.stores.sequencer == BY_STORES) == once
    assert journal.commit(manifest(2, 3, "awake"), epoch=2).step == 3, "who is awake goes on"


@pytest.mark.slow
def test_a_place_that_a_file_gave_out_is_filled_by_who_comes_next_and_counts(
    tmp_path: Path, sleepers: list[Sleeper]
) -> None:
    sleeper = put_to_sleep(sleepers, tmp_path, once=False, prefix=keys.LOG, when="before")
    journal = Journal.open(stores(tmp_path, once=False), job="sleepy", create=True)
    assert journal.open_epoch(resume=SnapshotId(1, 1)) == 2
    assert [entry.snapshot for entry in journal.refresh().snapshots] == [
        SnapshotId(1, 1),
        SnapshotId(1, 2),
    ]
    assert wake(sleeper) == ("committed", "")
    for state in folds(tmp_path, once=False):
        assert [entry.snapshot for entry in state.snapshots] == [SnapshotId(1, 1), SnapshotId(1, 2)]
        assert state.newest() == SnapshotId(1, 1), "it is beyond what the new epoch resumed"
