"""A power cut, modelled: what was not synced is lost, kept or garbled, as a seed decides.

PowerLossOps carries every call out and keeps a shadow of what is durable. After ``at`` calls it
raises PowerCut, at that and every later call, without doing anything more. ``wreck`` then writes
into an empty folder what a disk could hold after the cut: of each file what its last fsync covered,
and of the writes since then any part, whole or garbled; of each folder the names at its last sync,
and of the changes since then any. This is harsher than journalling file systems are.
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

# Wrappers around a file store's system calls: number them, record them, let the n-th fail.
# Wrappers are FileOps.

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class OpCall:
    """One call that changes a file system: its number from 0, the FileOps method's name, and the
    path it is about."""

    number: int
    name: str
    path: str


class CallHook(Protocol):
    """What happens at each call: run it, or not, or half of it."""

    def __call__(self, call: OpCall, run: Callable[[], T], half: Callable[[], object]) -> T:
        """Return what ``run`` does. ``half`` does the first part of what ``run`` would: for a write
        half of the bytes."""
        ...


class NumberedOps:
    """FileOps that numbers every call and hands it to ``around``. Thread-safe as far as ``around``
    is."""

    def __init__(self, around: CallHook, *, inner: FileOps = REAL_OPS) -> None:
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

    def _do(
        self, name: str, path: str, run: Callable[[], T], half: Callable[[], object] = lambda: None
    ) -> T:
        with self._lock:
            call = OpCall(self._count, name, path)
            self._count += 1
        return self._around(call, run, half)


class RecordingOps(NumberedOps):
    """Lets every call through and keeps them: ``calls`` tells how many crash points a piece of work
    has."""

    def __init__(self, *, inner: FileOps = REAL_OPS) -> None:
        self.calls: list[OpCall] = []
        super().__init__(self._record, inner=inner)

    def _record(self, call: OpCall, run: Callable[[], T], half: Callable[[], object]) -> T:
        self.calls.append(call)
        return run()


class FailingOps(NumberedOps):
    """Raises ``OSError(error)`` at call ``at`` (None: at every one) named ``op`` (None: any).

    With ``effect`` the call is carried out before it fails, as when a reply is lost. ``failed``
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
    """The path that a descriptor was opened with, as Linux knows it."""
    return os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115


def first_half(buffers: Sequence[memoryview]) -> list[memoryview]:
    """The first half of the buffers' bytes; cut on pages where there are pages, so that direct I/O
    takes it."""
    left = sum(len(block) for block in buffers) // 2
    left = left // 4096 * 4096 or left
    half = []
    for block in buffers:
        half.append(block[:left])
        left -= len(half[-1])
    return [block for block in half if len(block)]


# Crash points: die by SIGKILL at the n-th change of a store, before it, after it, or half-way
# through it.
#
# Run the work once with RecordingOps (or CountingBackend) to learn how many points it has; then
# run it once for each point in a child process with CrashingOps (or CrashingBackend), see the
# child die, and check from outside what is left.

_CHILD_S = 120.0


class CrashMode(str, enum.Enum):
    """When the process dies: before the call, after it, or with half of a write or reservation
    done."""

    BEFORE = "before"
    AFTER = "after"
    TORN = "torn"


class CrashingOps(NumberedOps):
    """FileOps that kills its process at call ``at``. A torn call that cannot be halved is not made
    at all."""

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
                # A call that fails, such as linking to a name that is taken, is a crash point too.
                die()
        return run()


class CrashingBackend:
    """A store that kills its process at its ``at``-th put or delete (from 0), before or after it;
    for any store."""

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
    """Run ``work`` in a child process; returns its exit status, ``-signal.SIGKILL`` where it was
    killed.

    ``work`` is pickled by name, so it must be defined in a module that the child can import
    (``Rehearsal`` is one). The child is forked from a small server without threads, so it costs
    milliseconds after the first. Raises TimeoutError (and kills the child) after two minutes.
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
    """FileOps over the real folder ``top`` whose power goes after ``at`` calls (None: never). What
    exists is durable."""

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
        """Write one possible state after the cut into the empty folder ``into``. ``seed`` 0 loses
        all that was not synced."""
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
    """A file's bytes after the cut: of each unsynced write nothing, all, the first part, or garbage
    in one page."""
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


# A piece of work on a file store that can be repeated anywhere, cut short anywhere, and checked
# afterwards.


@dataclass(frozen=True, slots=True)
class PutStep:
    """Store ``size_bytes`` of bytes made from ``seed``; ``aligned`` ones take the direct way when
    they are large."""

    key: str
    size_bytes: int
    seed: int
    create_only: bool = False
    aligned: bool = True

    def body(self) -> memoryview:
        """The bytes, the same each time."""
        return buffer(self.size_bytes, aligned=self.aligned, seed=self.seed)


@dataclass(frozen=True, slots=True)
class DeleteStep:
    """Remove ``key``."""

    key: str


Step = PutStep | DeleteStep


def run_steps(store: Backend, steps: Sequence[Step], *, done: Callable[[int], None]) -> None:
    """Carry out ``steps``, calling ``done`` with a step's number once its operation has returned.

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
    """Step numbers appended to a file, each by one system call, so that they outlive a SIGKILL."""

    path: str

    def add(self, number: int) -> None:
        """Record that step ``number`` is done."""
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(fd, f"{number}\n".encode())
        finally:
            os.close(fd)

    def count(self) -> int:
        """How many steps are done."""
        path = Path(self.path)
        return len(path.read_text().splitlines()) if path.exists() else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """Steps on the file store at ``root`` that end by SIGKILL at call ``at``; call it in a child
    process.

    With ``whole_puts`` the calls that count are the store's puts and deletes, else the system calls
    behind them.
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
    """What is wrong with a store after its writer was cut short with ``done`` steps returned; empty
    where all is well.

    Each key must hold what the last returned step on it left, or what the step in flight would;
    whole, never half.
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
                f"{key}: holds other bytes than a returned or a running step wrote. done={done}"
            )
    strangers = {entry.key for entry in store.list("")} - {step.key for step in steps}
    return wrong + [f"{key}: nobody put it" for key in sorted(strangers)]


def _body(store: Backend, key: str) -> bytes | None:
    found = store.stat(key)
    if found is None:
        return None
    out = bytearray(found.size_bytes)
    store.read_into(key, memoryview(out))
    return bytes(out)
