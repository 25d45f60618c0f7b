"""A piece of work on a file store that can be repeated anywhere, cut short anywhere, and checked afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt.backends.base import Backend
from ckpt.backends.file.store import FileBackend
from ckpt.errors import KeyExistsError
from ckpt.testing.buffers import buffer
from ckpt.testing.crash import CrashingBackend, CrashingOps, CrashMode


@dataclass(frozen=True, slots=True)
class Put:
    """Store ``size_bytes`` of bytes made from ``seed``; ``aligned`` ones take the direct way when they are large."""

    key: str
    size_bytes: int
    seed: int
    create_only: bool = False
    aligned: bool = True

    def body(self) -> memoryview:
        """The bytes, the same each time."""
        return buffer(self.size_bytes, aligned=self.aligned, seed=self.seed)


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove ``key``."""

    key: str


Step = Put | Delete


def run_steps(store: Backend, steps: Sequence[Step], *, done: Callable[[int], None]) -> None:
    """Carry out ``steps``, calling ``done`` with a step's number once its operation has returned.

    A create-once put that finds its own bytes counts as done, as for any writer that repeats a put after a crash.
    """
    for number, step in enumerate(steps):
        match step:
            case Put():
                try:
                    store.put(step.key, [step.body()], create_only=step.create_only)
                except KeyExistsError:
                    if _body(store, step.key) != bytes(step.body()):
                        raise
            case Delete():
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
    """Steps on the file store at ``root`` that end by SIGKILL at call ``at``; call it in a child process.

    With ``whole_puts`` the calls that count are the store's puts and deletes, else the system calls behind them.
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
    """What is wrong with a store after its writer was cut short with ``done`` steps returned; empty where all is well.

    Each key must hold what the last returned step on it left, or what the step in flight would; whole, never half.
    """
    wrong = []
    for key in sorted({step.key for step in steps}):
        allowed: set[bytes | None] = {None}
        for number, step in enumerate(steps[: done + 1]):
            if step.key == key:
                after = bytes(step.body()) if isinstance(step, Put) else None
                allowed = {after} if number < done and isinstance(step, Put) else allowed | {after}
        if _body(store, key) not in allowed:
            wrong.append(f"{key}: holds other bytes than a returned or a running step wrote. done={done}")
    strangers = {entry.key for entry in store.list("")} - {step.key for step in steps}
    return wrong + [f"{key}: nobody put it" for key in sorted(strangers)]


def _body(store: Backend, key: str) -> bytes | None:
    found = store.stat(key)
    if found is None:
        return None
    out = bytearray(found.size_bytes)
    store.read_into(key, memoryview(out))
    return bytes(out)
