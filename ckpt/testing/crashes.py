"""Crashes of a writer: failing system calls, SIGKILL at any call, and power cuts.

Wrappers around a file store's system calls number, record and fail them. ``CrashingOps`` and
``CrashingBackend`` kill the process at the n-th change; ``Rehearsal`` repeats a piece of work that
can be cut short anywhere and checked afterwards.

``PowerLossOps`` models a power cut: it carries every call out and keeps a shadow of what is
durable. After ``at`` calls it raises PowerCut, at that and every later call, and does nothing more.
``wreck`` then writes into an empty folder what a disk could hold after the cut. Of each file: what
its last fsync covered, and any part, whole or garbled, of the writes since then. Of each folder:
the names at its last sync, and any of the changes since then. This is harsher than journalling file
systems are.
"""

from __future__ import annotations

import enum
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Protocol, TypeVar

from ckpt.backends.base import Backend, Buffer, Capabilities, Stat
from ckpt.backends.file.store import FileBackend
from ckpt.backends.file.syscalls import REAL_OPS, FileOps
from ckpt.errors import KeyExistsError
from ckpt.testing.contract import buffer

# ---- System calls: number them, record them, let the n-th fail. Every wrapper is a FileOps.

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class OpCall:
    """One call that changes a file system.

    ``number`` counts from 0, ``name`` is the FileOps method, ``path`` the path that it changes.
    """

    number: int
    name: str
    path: str


class CallHook(Protocol):
    """Decides what happens at each call: run it, skip it, or do half of it."""

    def __call__(self, call: OpCall, run: Callable[[], T], half: Callable[[], object]) -> T:
        """Return the result of ``run``.

        ``half`` does the first part of the work: for a write half of the bytes.
        """
        ...


class NumberedOps:
    """FileOps that number every call and pass it to ``around``. As thread-safe as ``around``."""

    def __init__(self, around: CallHook, *, inner: FileOps = REAL_OPS) -> None:
        self._around = around
        self._inner = inner
        self._lock = threading.Lock()
        self._count = 0

    def open(self, path: str, flags: int) -> int:
        return self._do("open", path, lambda: self._inner.open(path, flags))

    def preallocate(self, fd: int, size_bytes: int) -> None:
        half = size_bytes // 2 + 1
        self._do(
            "preallocate",
            path_of(fd),
            lambda: self._inner.preallocate(fd, size_bytes),
            lambda: self._inner.preallocate(fd, half),
        )

    def write(self, fd: int, buffers: Sequence[memoryview], offset_bytes: int) -> int:
        return self._do(
            "write",
            path_of(fd),
            lambda: self._inner.write(fd, buffers, offset_bytes),
            lambda: self._inner.write(fd, first_half(buffers), offset_bytes),
        )

    def fsync(self, fd: int) -> None:
        self._do("fsync", path_of(fd), lambda: self._inner.fsync(fd))

    def link(self, source: str, target: str) -> None:
        self._do("link", target, lambda: self._inner.link(source, target))

    def rename(self, source: str, target: str) -> None:
        self._do("rename", target, lambda: self._inner.rename(source, target))

    def rename_new(self, source: str, target: str) -> None:
        self._do("rename_new", target, lambda: self._inner.rename_new(source, target))

    def unlink(self, path: str) -> None:
        self._do("unlink", path, lambda: self._inner.unlink(path))

    def mkdir(self, path: str) -> None:
        self._do("mkdir", path, lambda: self._inner.mkdir(path))

    def rmdir(self, path: str) -> None:
        self._do("rmdir", path, lambda: self._inner.rmdir(path))

    def fsync_directory(self, path: str) -> None:
        self._do("fsync_directory", path, lambda: self._inner.fsync_directory(path))

    def _do(
        self, name: str, path: str, run: Callable[[], T], half: Callable[[], object] = lambda: None
    ) -> T:
        with self._lock:
            call = OpCall(self._count, name, path)
            self._count += 1
        return self._around(call, run, half)


class RecordingOps(NumberedOps):
    """Runs and records every call: ``calls`` shows how many crash points some work has."""

    def __init__(self, *, inner: FileOps = REAL_OPS) -> None:
        self.calls: list[OpCall] = []
        super().__init__(self._record, inner=inner)

    def _record(self, call: OpCall, run: Callable[[], T], half: Callable[[], object]) -> T:
        self.calls.append(call)
        return run()


class FailingOps(NumberedOps):
    """Raises ``OSError(error)`` at call ``at`` (None: at each one) named ``op`` (None: any).

    With ``effect`` the call is carried out before it fails, as if the reply were lost. ``failed``
    counts the failures.
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
    """The path that a descriptor was opened with, from Linux's /proc."""
    return os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115


def first_half(buffers: Sequence[memoryview]) -> list[memoryview]:
    """The first half of the buffers' bytes.

    Cut on a page boundary if there are whole pages, so that direct I/O accepts it.
    """
    left = sum(len(block) for block in buffers) // 2
    left = left // 4096 * 4096 or left
    half = []
    for block in buffers:
        half.append(block[:left])
        left -= len(half[-1])
    return [block for block in half if len(block)]


# ---- Crash points: die by SIGKILL at the n-th change of a store, before, after or half-way
# through.
#
# Run the work once with RecordingOps (or CountingBackend) to learn how many points it has. Then,
# for each point, run it in a child process with CrashingOps (or CrashingBackend), watch the child
# die, and check from outside what is left.

_CHILD_S = 120.0


class CrashMode(str, enum.Enum):
    """When the process dies: before the call, after it, or with half of it done."""

    BEFORE = "before"
    AFTER = "after"
    TORN = "torn"


class CrashingOps(NumberedOps):
    """FileOps that kill their process at call ``at``.

    In mode ``torn`` a call that cannot be halved is not made at all.
    """

    def __init__(
        self, *, at: int, mode: CrashMode | str = CrashMode.BEFORE, inner: FileOps = REAL_OPS
    ) -> None:
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
                # A call that fails, such as a link to a taken name, is a crash point too.
                die()
        return run()


class CrashingBackend:
    """A store that kills its process at its ``at``-th put or delete (from 0), before or after it.

    It wraps any store.
    """

    def __init__(
        self, inner: Backend, *, at: int, mode: CrashMode | str = CrashMode.BEFORE
    ) -> None:
        self._inner = inner
        self._at = at
        self._mode = CrashMode(mode)
        if self._mode is CrashMode.TORN:
            raise ValueError(
                "a store's put is never torn. mode=torn; use before or after, or CrashingOps for a "
                "file store"
            )
        self._lock = threading.Lock()
        self._count = 0

    @property
    def url(self) -> str:
        return self._inner.url

    def capabilities(self) -> Capabilities:
        return self._inner.capabilities()

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        self._change(lambda: self._inner.put(key, data, create_only=create_only))

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        self._inner.read_into(key, out, offset_bytes=offset_bytes)

    def stat(self, key: str) -> Stat | None:
        return self._inner.stat(key)

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        return self._inner.list(prefix, after=after)

    def delete(self, key: str) -> None:
        self._change(lambda: self._inner.delete(key))

    def close(self) -> None:
        self._inner.close()

    def _change(self, run: Callable[[], None]) -> None:
        with self._lock:
            at_crash_point = self._count == self._at
            self._count += 1
        if at_crash_point and self._mode is CrashMode.BEFORE:
            die()
        try:
            run()
        finally:
            if at_crash_point:
                die()


def die() -> NoReturn:
    """End this process like a crash: no handler, no cleanup, no flush."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL cannot be survived")


def run_in_child(work: Callable[[], None]) -> int:
    """Run ``work`` in a child process; returns its exit status, ``-signal.SIGKILL`` if killed.

    ``work`` is pickled by name, so it must be defined in a module that the child can import;
    ``Rehearsal`` is one. The child is forked from a small server without threads and so costs
    milliseconds after the first one. Raises TimeoutError, and kills the child, after two minutes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ckpt.testing.crashes", "ckpt.backends.file.store"])
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


_PAGE = 4096


class PowerCut(BaseException):
    """The power is gone. Code under test must not catch it and continue."""


@dataclass(slots=True)
class _File:
    """One file's bytes as of its last fsync, and the writes since then, in order."""

    synced: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes]] = field(default_factory=list)

    def sync(self) -> None:
        for offset, data in self.pending:
            _write(self.synced, offset, data)
        self.pending.clear()


@dataclass(slots=True)
class _Folder:
    """One folder's names now, and as of its last sync."""

    now: dict[str, _File | _Folder] = field(default_factory=dict)
    synced: dict[str, _File | _Folder] = field(default_factory=dict)


class PowerLossOps:
    """FileOps over the real folder ``top`` that lose power after ``at`` calls (None: never).

    What exists at the start is durable.
    """

    def __init__(
        self, top: str | os.PathLike[str], *, at: int | None = None, inner: FileOps = REAL_OPS
    ) -> None:
        self._top = Path(top)
        self._at = at
        self._inner = inner
        self._lock = threading.RLock()
        self._open: dict[int, _File] = {}
        self._tree = _load(self._top)
        self.count = 0

    def open(self, path: str, flags: int) -> int:
        with self._lock:
            self._tick()
            fd = self._inner.open(path, flags)
            folder, name = self._at_path(path)
            file = folder.now.setdefault(name, _File())
            assert isinstance(file, _File), "only files are opened"
            self._open[fd] = file
            return fd

    def preallocate(self, fd: int, size_bytes: int) -> None:
        with self._lock:
            self._tick()
            self._inner.preallocate(fd, size_bytes)
            self._open[fd].pending.append((size_bytes, b""))

    def write(self, fd: int, buffers: Sequence[memoryview], offset_bytes: int) -> int:
        with self._lock:
            self._tick()
            taken = self._inner.write(fd, buffers, offset_bytes)
            self._open[fd].pending.append((offset_bytes, b"".join(buffers)[:taken]))
            return taken

    def fsync(self, fd: int) -> None:
        with self._lock:
            self._tick()
            self._inner.fsync(fd)
            self._open[fd].sync()

    def link(self, source: str, target: str) -> None:
        with self._lock:
            self._tick()
            self._inner.link(source, target)
            self._name(target, self._entry(source))

    def rename(self, source: str, target: str) -> None:
        with self._lock:
            self._tick()
            self._inner.rename(source, target)
            self._name(target, self._entry(source))
            self._forget(source)

    def rename_new(self, source: str, target: str) -> None:
        with self._lock:
            self._tick()
            self._inner.rename_new(source, target)
            self._name(target, self._entry(source))
            self._forget(source)

    def unlink(self, path: str) -> None:
        with self._lock:
            self._tick()
            self._inner.unlink(path)
            self._forget(path)

    def mkdir(self, path: str) -> None:
        with self._lock:
            self._tick()
            self._inner.mkdir(path)
            self._name(path, _Folder())

    def rmdir(self, path: str) -> None:
        with self._lock:
            self._tick()
            self._inner.rmdir(path)
            self._forget(path)

    def fsync_directory(self, path: str) -> None:
        """Syncing a folder above ``top`` changes nothing in the shadow."""
        with self._lock:
            self._tick()
            self._inner.fsync_directory(path)
            if Path(path).is_relative_to(self._top):
                folder = self._folder(Path(path))
                folder.synced = dict(folder.now)

    def wreck(self, into: str | os.PathLike[str], *, seed: int) -> None:
        """Write one possible state after the cut into the empty folder ``into``.

        ``seed`` 0 loses everything that was not synced.
        """
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

    def _entry(self, path: str) -> _File | _Folder:
        folder, name = self._at_path(path)
        return folder.now[name]

    def _name(self, path: str, entry: _File | _Folder) -> None:
        folder, name = self._at_path(path)
        folder.now[name] = entry

    def _forget(self, path: str) -> None:
        folder, name = self._at_path(path)
        folder.now.pop(name, None)


def _load(path: Path) -> _Folder:
    names: dict[str, _File | _Folder] = {
        entry.name: _load(entry) if entry.is_dir() else _File(bytearray(entry.read_bytes()))
        for entry in path.iterdir()
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
    """A file's bytes after the cut.

    Of each unsynced write nothing, all, the first part, or all with one garbled page survives.
    """
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


# ---- Rehearsal: work on a store that can be repeated, cut short anywhere, and checked afterwards.


@dataclass(frozen=True, slots=True)
class PutStep:
    """Store ``size_bytes`` of bytes made from ``seed``.

    ``aligned``: in page-aligned memory, so that large puts use direct writes.
    """

    key: str
    size_bytes: int
    seed: int
    create_only: bool = False
    aligned: bool = True

    def body(self) -> memoryview:
        """The bytes, the same with each call."""
        return buffer(self.size_bytes, aligned=self.aligned, seed=self.seed)


@dataclass(frozen=True, slots=True)
class DeleteStep:
    """Remove ``key``."""

    key: str


Step = PutStep | DeleteStep


def run_steps(store: Backend, steps: Sequence[Step], *, done: Callable[[int], None]) -> None:
    """Carry out ``steps``; call ``done`` with a step's number once its operation has returned.

    A create-once put that finds its own bytes counts as done, as for any writer that repeats a put
    after a crash.
    """
    for number, step in enumerate(steps):
        match step:
            case PutStep():
                try:
                    store.put(step.key, [step.body()], create_only=step.create_only)
                except KeyExistsError:
                    if _body(store, step.key) != bytes(step.body()):
                        raise
            case DeleteStep():
                store.delete(step.key)
        done(number)


@dataclass(frozen=True, slots=True)
class DoneFile:
    """Step numbers appended to a file, each by one system call, so that they survive a SIGKILL."""

    path: str

    def add(self, number: int) -> None:
        """Record that step ``number`` is done."""
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(fd, f"{number}\n".encode())
        finally:
            os.close(fd)

    def count(self) -> int:
        """The number of steps done."""
        path = Path(self.path)
        return len(path.read_text().splitlines()) if path.exists() else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """Steps on the file store at ``root`` that end by SIGKILL at call ``at``.

    Run it in a child process. With ``whole_puts``, ``at`` counts the store's puts and deletes,
    otherwise the system calls.
    """

    root: str
    steps: tuple[Step, ...]
    done: DoneFile
    at: int
    mode: CrashMode
    whole_puts: bool = False

    def __call__(self) -> None:
        """Carry the steps out, and die."""
        store: Backend
        if self.whole_puts:
            store = CrashingBackend(FileBackend(self.root), at=self.at, mode=self.mode)
        else:
            store = FileBackend(self.root, ops=CrashingOps(at=self.at, mode=self.mode))
        run_steps(store, self.steps, done=self.done.add)


def faults_found(store: Backend, steps: Sequence[Step], *, done: int) -> list[str]:
    """What is wrong with a store whose writer was cut short after ``done`` steps.

    Empty if nothing is. Each key must hold, whole, what the last completed step on it left, or what
    the interrupted step would leave.
    """
    wrong = []
    for key in sorted({step.key for step in steps}):
        allowed: set[bytes | None] = {None}
        for number, step in enumerate(steps[: done + 1]):
            if step.key == key:
                after = bytes(step.body()) if isinstance(step, PutStep) else None
                allowed = (
                    {after} if number < done and isinstance(step, PutStep) else allowed | {after}
                )
        if _body(store, key) not in allowed:
            wrong.append(
                f"{key}: holds other bytes than a completed or the interrupted step wrote. "
                f"done={done}"
            )
    unknown_keys = {entry.key for entry in store.list("")} - {step.key for step in steps}
    return wrong + [f"{key}: no step put it" for key in sorted(unknown_keys)]


def _body(store: Backend, key: str) -> bytes | None:
    stat = store.stat(key)
    if stat is None:
        return None
    out = bytearray(stat.size_bytes)
    store.read_into(key, memoryview(out))
    return bytes(out)
