"""A writer that stops itself in the middle of a commit, as a paused machine would. Importable by a
spawned process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from ckpt.backends.base import Buffer, Capabilities
from ckpt.backends.file.store import FileBackend
from ckpt.errors import CkptError, UsageError
from ckpt.format import keys
from ckpt.format.manifest import Manifest, PartRef
from ckpt.log.journal import Journal
from ckpt.values import SnapshotId
from kit.logs.stores import SmallReplicated

JOB = "sleepy"


class Sleep:
    """Where the process stops: ``before`` the first put below a prefix, or ``after`` it; once."""

    def __init__(self, prefix: str, when: str, say: Connection) -> None:
        self.prefix = prefix
        self.when = when
        self.say = say
        self.lock = threading.Lock()
        self.armed = False

    def here(self) -> None:
        if self.armed:
            self.armed = False
            self.say.send("stopped")
            os.kill(os.getpid(), signal.SIGSTOP)


class Files(FileBackend):
    """A folder; ``once`` False: it replaces what is there, as some object stores do."""

    def __init__(self, root: Path, *, once: bool, sleep: Sleep | None = None) -> None:
        super().__init__(root)
        self._once = once
        self._sleep = sleep

    def capabilities(self) -> Capabilities:
        found = super().capabilities()
        return Capabilities(
            create_only=found.create_only and self._once,
            read_bytes_best=found.read_bytes_best,
            concurrency_best=found.concurrency_best,
        )

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        if create_only and not self._once:
            raise UsageError("this store does not create a key only once")
        sleep = self._sleep
        if sleep is None or not key.startswith(sleep.prefix):
            super().put(key, data, create_only=create_only)
            return
        with sleep.lock:  # one store at a time, so that it is known what was done before
            if sleep.when == "before":
                sleep.here()
            super().put(key, data, create_only=create_only)
            if sleep.when == "after":
                sleep.here()


def stores(folder: Path, *, once: bool, sleep: Sleep | None = None) -> SmallReplicated:
    """Three stores, two of which must hold what counts."""
    return SmallReplicated([Files(folder / f"s{n}", once=once, sleep=sleep) for n in range(3)], 2)


def manifest(epoch: int, step: int, note: str) -> Manifest:
    """A snapshot of nothing."""
    pair = SnapshotId(epoch, step)
    ref = PartRef(
        key=keys.part_key(pair, keys.writer_name(note, "0" * 16)),
        digest="0" * 32,
        size_bytes=1,
        rank=0,
    )
    return Manifest(
        job=JOB,
        snapshot=pair,
        world_size=1,
        base=None,
        parts=(ref,),
        size_bytes=1,
        new_bytes=1,
        created_unix_s=0.0,
        metadata={"by": note},
    )


def sleepy_writer(folder: Path, once: bool, prefix: str, when: str, pipe: Connection) -> None:
    """Open an epoch and commit; then commit once more, stopping in the middle; say what came of
    it."""
    os.setsid()  # see kit.servers.process: it stops itself
    sleep = Sleep(prefix, when, pipe)
    journal = Journal.open(stores(folder, once=once, sleep=sleep), job=JOB, create=True)
    epoch = journal.open_epoch(resume=None)
    journal.commit(manifest(epoch, 1, "sleeper"), epoch=epoch)
    pipe.send("ready")
    assert pipe.recv() == "go"
    sleep.armed = True
    try:
        journal.commit(manifest(epoch, 2, "sleeper"), epoch=epoch)
    except CkptError as error:
        pipe.send((type(error).__name__, str(error)))
    else:
        pipe.send(("committed", ""))
