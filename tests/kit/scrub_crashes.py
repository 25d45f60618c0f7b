"""Scrubs and syncs whose process dies at some system call; a child process can import them."""

from __future__ import annotations

from dataclasses import dataclass

from ckpt.backends.file.store import FileBackend
from ckpt.backends.file.syscalls import FileOps
from ckpt.maintenance.replica import SyncLimits
from ckpt.maintenance.scrub.scrub import scrub
from ckpt.maintenance.sync.sync import sync
from ckpt.testing.crashes import CrashingOps, CrashMode


@dataclass(frozen=True)
class Work:
    """Mend store 2 of three below ``root``, or fill ``root/new`` from ``root/0``."""

    root: str
    kind: str

    def run(self, ops: FileOps) -> None:
        """Do it, with the system calls of the store that is written to going through ``ops``."""
        if self.kind == "scrub":
            stores = [FileBackend(f"{self.root}/{number}") for number in (0, 1)]
            scrub([*stores, FileBackend(f"{self.root}/2", ops=ops)], 2)
        else:
            sync(
                FileBackend(f"{self.root}/0"),
                FileBackend(f"{self.root}/new", ops=ops),
                limits=SyncLimits(threads=1),
            )


@dataclass(frozen=True)
class Dying:
    """``work`` in a process that is killed at system call ``at``."""

    work: Work
    at: int
    mode: CrashMode

    def __call__(self) -> None:
        """Do it, and die."""
        self.work.run(CrashingOps(at=self.at, mode=self.mode))
