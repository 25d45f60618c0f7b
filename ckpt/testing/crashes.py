"""A power cut, modelled: what was not synced is lost, kept or garbled, as a seed decides.

PowerLossOps carries every call out and keeps a shadow of what is durable. After ``at`` calls it raises PowerCut, at that and
every later call, without doing anything more. ``wreck`` then writes into an empty folder what a disk could hold after the
cut: of each file what its last fsync covered, and of the writes since then any part, whole or garbled; of each folder
the names at its last sync, and of the changes since then any. This is harsher than journalling file systems are.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ckpt.backends.file.syscalls import REAL_OPS, FileOps

_PAGE = 4096


class PowerCut(BaseException):
    """The power is gone. No code under test may catch it and go on."""


@dataclass(slots=True)
class _File:
    """One file's bytes: as of its last fsync, and the writes since then, in order."""

    synced: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes]] = field(default_factory=list)

    def sync(self) -> None:
        for offset, data in self.pending:
            _write(self.synced, offset, data)
        self.pending.clear()


@dataclass(slots=True)
class _Folder:
    """One folder's names: now, and as of its last sync."""

    now: dict[str, _File | _Folder] = field(default_factory=dict)
    synced: dict[str, _File | _Folder] = field(default_factory=dict)


class PowerLossOps:
    """FileOps over the real folder ``top`` whose power goes after ``at`` calls (None: never). What exists is durable."""

    def __init__(self, top: str | os.PathLike[str], *, at: int | None = None, inner: FileOps = REAL_OPS) -> None:
        self._top = Path(top)
        self._at = at
        self._inner = inner
        self._lock = threading.RLock()
        self._open: dict[int, _File] = {}
        self._tree = _load(self._top)
        self.count = 0

    def open(self, path: str, flags: int) -> int:
        """See FileOps."""
        with self._lock:
            self._tick()
            fd = self._inner.open(path, flags)
            folder, name = self._at_path(path)
            file = folder.now.setdefault(name, _File())
            assert isinstance(file, _File), "only files are opened"
            self._open[fd] = file
            return fd

    def preallocate(self, fd: int, size_bytes: int) -> None:
        """See FileOps."""
        with self._lock:
            self._tick()
            self._inner.preallocate(fd, size_bytes)
            self._open[fd].pending.append((size_bytes, b""))

    def write(self, fd: int, buffers: Sequence[memoryview], offset_bytes: int) -> int:
        """See FileOps."""
        with self._lock:
            self._tick()
            taken = self._inner.write(fd, buffers, offset_bytes)
            self._open[fd].pending.append((offset_bytes, b"".join(buffers)[:taken]))
            return taken

    def fsync(self, fd: int) -> None:
        """See FileOps."""
        with self._lock:
            self._tick()
            self._inner.fsync(fd)
            self._open[fd].sync()

    def link(self, source: str, target: str) -> None:
        """See FileOps."""
        with self._lock:
            self._tick()
            self._inner.link(source, target)
            self._name(target, self._found(source))

    def rename(self, source: str, target: str) -> None:
        """See FileOps."""
        with self._lock:
            self._tick()
            self._inner.rename(source, target)
            self._name(target, self._found(source))
            self._forget(source)

    def rename_new(self, source: str, target: str) -> None:
        """See FileOps."""
        with self._lock:
            self._tick()
            self._inner.rename_new(source, target)
            self._name(target, self._found(source))
            self._forget(source)

    def unlink(self, path: str) -> None:
        """See FileOps."""
        with self._lock:
            self._tick()
            self._inner.unlink(path)
            self._forget(path)

    def mkdir(self, path: str) -> None:
        """See FileOps."""
        with self._lock:
            self._tick()
            self._inner.mkdir(path)
            self._name(path, _Folder())

    def rmdir(self, path: str) -> None:
        """See FileOps."""
        with self._lock:
            self._tick()
            self._inner.rmdir(path)
            self._forget(path)

    def fsync_directory(self, path: str) -> None:
        """See FileOps. Syncing a folder above ``top`` changes nothing that is shadowed."""
        with self._lock:
            self._tick()
            self._inner.fsync_directory(path)
            if Path(path).is_relative_to(self._top):
                folder = self._folder(Path(path))
                folder.synced = dict(folder.now)

    def wreck(self, into: str | os.PathLike[str], *, seed: int) -> None:
        """Write one possible state after the cut into the empty folder ``into``. ``seed`` 0 loses all that was not synced."""
        rng = random.Random(seed)
        with self._lock:
            _write_out(self._tree, Path(into), None if seed == 0 else rng)

    def _tick(self) -> None:
        if self._at is not None and self.count >= self._at:
            raise PowerCut(f"after {self._at} calls")
        self.count += 1

    def _folder(self, path: Path) -> _Folder:
        folder = self._tree
        for name in path.relative_to(self._top).parts:
            below = folder.now[name]
            assert isinstance(below, _Folder), "a path leads through folders"
            folder = below
        return folder

    def _at_path(self, path: str) -> tuple[_Folder, str]:
        return self._folder(Path(path).parent), Path(path).name

    def _found(self, path: str) -> _File | _Folder:
        folder, name = self._at_path(path)
        return folder.now[name]

    def _name(self, path: str, what: _File | _Folder) -> None:
        folder, name = self._at_path(path)
        folder.now[name] = what

    def _forget(self, path: str) -> None:
        folder, name = self._at_path(path)
        folder.now.pop(name, None)


def _load(path: Path) -> _Folder:
    names: dict[str, _File | _Folder] = {
        entry.name: _load(entry) if entry.is_dir() else _File(bytearray(entry.read_bytes())) for entry in path.iterdir()
    }
    return _Folder(names, dict(names))


def _write(memory: bytearray, offset: int, data: bytes) -> None:
    if len(memory) < offset + len(data):
        memory.extend(bytes(offset + len(data) - len(memory)))
    memory[offset : offset + len(data)] = data


def _write_out(folder: _Folder, into: Path, rng: random.Random | None) -> None:
    for name in sorted(folder.now.keys() | folder.synced.keys()):
        before, after = folder.synced.get(name), folder.now.get(name)
        survivor = before if rng is None or before is after or rng.random() < 0.5 else after
        match survivor:
            case None:
                pass
            case _Folder():
                (into / name).mkdir()
                _write_out(survivor, into / name, rng)
            case _File():
                (into / name).write_bytes(_after_cut(survivor, rng))


def _after_cut(file: _File, rng: random.Random | None) -> bytes:
    """A file's bytes after the cut: of each unsynced write nothing, all, the first part, or garbage in one page."""
    memory = bytearray(file.synced)
    for offset, data in file.pending if rng else ():
        assert rng is not None, "the loop runs with a seed only"
        fate = rng.choice(("lost", "kept", "cut", "garbled"))
        if fate in ("kept", "garbled"):
            _write(memory, offset, data)
        if fate == "cut":
            _write(memory, offset, data[: rng.randrange(len(data) + 1)])
        if fate == "garbled" and data:
            at = offset + rng.randrange(len(data)) // _PAGE * _PAGE
            noise = rng.randbytes(min(_PAGE, offset + len(data) - at))
            _write(memory, at, noise)
    return bytes(memory)
