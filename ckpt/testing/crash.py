"""Crash points: die by SIGKILL at the n-th change of a store, before it, after it, or half-way through it.

Run the work once with RecordingOps (or CountingBackend) to learn how many points it has; then run it once for each point in
a child process with CrashingOps (or CrashingBackend), see the child die, and check from outside what is left.
"""

from __future__ import annotations

import enum
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from ckpt.backends.base import Backend, Buffer, Capabilities, Stat
from ckpt.backends.file.syscalls import REAL_OPS, FileOps
from ckpt.testing.fileops import NumberedOps, OpCall, T

_CHILD_S = 120.0


class CrashMode(str, enum.Enum):
    """When the process dies: before the call, after it, or with half of a write or reservation done."""

    BEFORE = "before"
    AFTER = "after"
    TORN = "torn"


class CrashingOps(NumberedOps):
    """FileOps that kills its process at call ``at``. A torn call that cannot be halved is not made at all."""

    def __init__(self, *, at: int, mode: CrashMode | str = CrashMode.BEFORE, inner: FileOps = REAL_OPS) -> None:
        self._at = at
        self._mode = CrashMode(mode)
        super().__init__(self._maybe_die, inner=inner)

    def _maybe_die(self, call: OpCall, run: Callable[[], T], half: Callable[[], object]) -> T:
        if call.number == self._at:
            try:
                if self._mode is CrashMode.TORN:
                    half()
                if self._mode is CrashMode.AFTER:
                    run()
            finally:
                # A call that fails, such as linking to a name that is taken, is a crash point too.
                die()
        return run()


class CrashingBackend:
    """A store that kills its process at its ``at``-th put or delete (from 0), before or after it; for any store."""

    def __init__(self, inner: Backend, *, at: int, mode: CrashMode | str = CrashMode.BEFORE) -> None:
        self._inner = inner
        self._at = at
        self._mode = CrashMode(mode)
        if self._mode is CrashMode.TORN:
            raise ValueError(
                "a store's put is never torn. mode=torn; use before or after, or CrashingOps for a file store"
            )
        self._lock = threading.Lock()
        self._count = 0

    @property
    def url(self) -> str:
        """See Backend."""
        return self._inner.url

    def capabilities(self) -> Capabilities:
        """See Backend."""
        return self._inner.capabilities()

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        """See Backend."""
        self._change(lambda: self._inner.put(key, data, create_only=create_only))

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        """See Backend."""
        self._inner.read_into(key, out, offset_bytes=offset_bytes)

    def stat(self, key: str) -> Stat | None:
        """See Backend."""
        return self._inner.stat(key)

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        """See Backend."""
        return self._inner.list(prefix, after=after)

    def delete(self, key: str) -> None:
        """See Backend."""
        self._change(lambda: self._inner.delete(key))

    def close(self) -> None:
        """See Backend."""
        self._inner.close()

    def _change(self, run: Callable[[], None]) -> None:
        with self._lock:
            here = self._count == self._at
            self._count += 1
        if here and self._mode is CrashMode.BEFORE:
            die()
        try:
            run()
        finally:
            if here:
                die()


def die() -> NoReturn:
    """End this process as a crash does: no handler, no cleanup, no flush."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL cannot be survived")


def run_in_child(work: Callable[[], None]) -> int:
    """Run ``work`` in a child process; returns its exit status, ``-signal.SIGKILL`` where it was killed.

    ``work`` is pickled by name, so it must be defined in a module that the child can import (``Rehearsal`` is one).
    The child is forked from a small server without threads, so it costs milliseconds after the first. Raises TimeoutError
    (and kills the child) after two minutes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ckpt.testing.crash", "ckpt.backends.file.store"])
    process = context.Process(target=work)
    process.start()
    try:
        process.join(_CHILD_S)
        if process.exitcode is None:
            raise TimeoutError(f"the child did not end. pid={process.pid} waited_s={_CHILD_S}")
        return process.exitcode
    finally:
        process.kill()
        process.join()
        process.close()
