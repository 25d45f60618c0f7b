"""Every store that ships keeps the contract that ships."""

from __future__ import annotations

import functools
import uuid
from pathlib import Path

import pytest

from ckpt.backends.file.store import FileBackend
from ckpt.backends.memory import MemoryBackend
from ckpt.backends.objects.fsspec_store import FsspecBackend
from ckpt.backends.open import open_backend
from ckpt.testing.contract import BackendContract, BackendRaceContract, Opener


class TestFileDirect(BackendContract):
    def opener(self, folder: Path) -> Opener:
        return functools.partial(FileBackend, folder / "store")


class TestFileBuffered(BackendContract):
    def opener(self, folder: Path) -> Opener:
        return functools.partial(FileBackend, folder / "deep/er/store", direct_io=False)


class TestMemory(BackendContract):
    def opener(self, folder: Path) -> Opener:
        store = MemoryBackend(folder.name)
        return lambda: store


class TestFsspecMemory(BackendContract):
    def opener(self, folder: Path) -> Opener:
        return functools.partial(open_backend, f"memory://{uuid.uuid4().hex}/run")


class TestFsspecLocal(BackendContract):
    def opener(self, folder: Path) -> Opener:
        return functools.partial(FsspecBackend, f"file://{folder}/store")


@pytest.mark.slow
class TestFileRaces(BackendRaceContract):
    def opener(self, folder: Path) -> Opener:
        return functools.partial(FileBackend, folder / "store")
