"""Wrappers around a file store's system calls: number them, record them, let the n-th fail. Wrappers are FileOps."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ckpt.backends.file.syscalls import REAL_OPS, FileOps

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class OpCall:
    """One call that changes a file system: its number from 0, the FileOps method's name, and the path it is about."""

    number: int
    name: str
    path: str


class Around(Protocol):
    """What happens at each call: run it, or not, or half of it."""

    def __call__(self, call: OpCall, run: Callable[[], T], half: Callable[[], object]) -> T:
        """Return what ``run`` does. ``half`` does the first part of what ``run`` would: for a write half of the bytes."""
        ...


class NumberedOps:
    """FileOps that numbers every call and hands it to ``around``. Thread-safe as far as ``around`` is."""

    def __init__(self, around: Around, *, inner: FileOps = REAL_OPS) -> None:
        self._around = around
        self._inner = inner
        self._lock = threading.Lock()
        self._count = 0

    def open(self, path: str, flags: int) -> int:
        """See FileOps."""
        return self._do("open", path, lambda: self._inner.open(path, flags))

    def preallocate(self, fd: int, size_bytes: int) -> None:
        """See FileOps."""
        half = size_bytes // 2 + 1
        self._do(
            "preallocate",
            path_of(fd),
            lambda: self._inner.preallocate(fd, size_bytes),
            lambda: self._inner.preallocate(fd, half),
        )

    def write(self, fd: int, buffers: Sequence[memoryview], offset_bytes: int) -> int:
        """See FileOps."""
        return self._do(
            "write",
            path_of(fd),
            lambda: self._inner.write(fd, buffers, offset_bytes),
            lambda: self._inner.write(fd, first_half(buffers), offset_bytes),
        )

    def fsync(self, fd: int) -> None:
        """See FileOps."""
        self._do("fsync", path_of(fd), lambda: self._inner.fsync(fd))

    def link(self, source: str, target: str) -> None:
        """See FileOps."""
        self._do("link", target, lambda: self._inner.link(source, target))

    def rename(self, source: str, target: str) -> None:
        """See FileOps."""
        self._do("rename", target, lambda: self._inner.rename(source, target))

    def rename_new(self, source: str, target: str) -> None:
        """See FileOps."""
        self._do("rename_new", target, lambda: self._inner.rename_new(source, target))

    def unlink(self, path: str) -> None:
        """See FileOps."""
        self._do("unlink", path, lambda: self._inner.unlink(path))

    def mkdir(self, path: str) -> None:
        """See FileOps."""
        self._do("mkdir", path, lambda: self._inner.mkdir(path))

    def rmdir(self, path: str) -> None:
        """See FileOps."""
        self._do("rmdir", path, lambda: self._inner.rmdir(path))

    def fsync_directory(self, path: str) -> None:
        """See FileOps."""
        self._do("fsync_directory", path, lambda: self._inner.fsync_directory(path))

    def _do(self, name: str, path: str, run: Callable[[], T], half: Callable[[], object] = lambda: None) -> T:
        with self._lock:
            call = OpCall(self._count, name, path)
            self._count += 1
        return self._around(call, run, half)


class RecordingOps(NumberedOps):
    """Lets every call through and keeps them: ``calls`` tells how many crash points a piece of work has."""

    def __init__(self, *, inner: FileOps = REAL_OPS) -> None:
        self.calls: list[OpCall] = []
        super().__init__(self._record, inner=inner)

    def _record(self, call: OpCall, run: Callable[[], T], half: Callable[[], object]) -> T:
        self.calls.append(call)
        return run()


class FailingOps(NumberedOps):
    """Raises ``OSError(error)`` at call ``at`` (None: at every one) named ``op`` (None: any).

    With ``effect`` the call is carried out before it fails, as when a reply is lost. ``failed`` counts the failures.
    """

    def __init__(
        self,
        error: int,
        *,
        at: int | None = None,
        op: str | None = None,
        effect: bool = False,
        inner: FileOps = REAL_OPS,
    ) -> None:
        self.failed = 0
        self._error = error
        self._at = at
        self._op = op
        self._effect = effect
        super().__init__(self._maybe_fail, inner=inner)

    def _maybe_fail(self, call: OpCall, run: Callable[[], T], half: Callable[[], object]) -> T:
        if self._at not in (None, call.number) or self._op not in (None, call.name):
            return run()
        self.failed += 1
        if self._effect:
            done = run()
            if call.name == "open" and isinstance(done, int):
                os.close(done)
        raise OSError(self._error, os.strerror(self._error), call.path)


def path_of(fd: int) -> str:
    """The path that a descriptor was opened with, as Linux knows it."""
    return os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115


def first_half(buffers: Sequence[memoryview]) -> list[memoryview]:
    """The first half of the buffers' bytes; cut on pages where there are pages, so that direct I/O takes it."""
    left = sum(len(block) for block in buffers) // 2
    left = left // 4096 * 4096 or left
    half = []
    for block in buffers:
        half.append(block[:left])
        left -= len(half[-1])
    return [block for block in half if len(block)]
