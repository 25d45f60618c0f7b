"""Files that are still being written: how they are named, held, and swept once their writer is dead.

A temporary file is called ``<machine>-<random>`` and its writer holds a lock (flock) on it from just after creating it
until it is closed; the kernel drops the lock when the writer dies. So a free lock means a dead writer, always on the
machine that made the file, whose name says which boot of which machine that was. For other machines' files, where a
network file system may keep locks local, an hour without a write (by the store's own clock) is asked for as well. A live
file taken by mistake is harmless: its writer notices that the name is gone, and its put fails with nothing visible.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ckpt.backends.file.syscalls import FileOps

TEMP_FOLDER = ".tmp"
"""Where unfinished files lie, below the store's root; never listed."""

STRANGER_IDLE_S = 3600
"""How long another machine's unlocked temporary file must have been left alone before it is swept."""

_NAMES_TRIED_MAX = 16
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Temp:
    """An open temporary file that this process alone writes."""

    path: str
    fd: int


@contextlib.contextmanager
def new_temp(ops: FileOps, folder: str, *, prefix: str = "") -> Iterator[Temp]:
    """Create and lock a temporary file in ``folder``; its name is removed and it is closed at the end of the block.

    Raises FileNotFoundError where the folder is missing, and OSError.
    """
    temp = _create(ops, folder, prefix)
    try:
        yield temp
    finally:
        # The object is safe or failed already; what cannot be removed now is swept later, so it must not hide either.
        try:
            with contextlib.suppress(OSError):
                ops.unlink(temp.path)
        finally:
            os.close(temp.fd)


def sweep(ops: FileOps, folder: str) -> int:
    """Remove the temporary files of dead writers from ``folder``; returns how many. Leaves what it may not touch."""
    swept = 0
    try:
        names = os.listdir(folder)  # noqa: PTH208
    except OSError:
        return 0
    now_s = _store_clock_s(ops, folder) if names else 0.0
    for name in names:
        with contextlib.suppress(OSError):
            swept += _sweep_one(ops, f"{folder}/{name}", now_s=now_s)
    return swept


def machine_mark() -> str:
    """Short text that differs between machines and between boots of one; ``unknown`` off Linux."""
    try:
        return _BOOT_ID.read_text()[:8]
    except OSError:
        return "unknown"


def _create(ops: FileOps, folder: str, prefix: str) -> Temp:
    for _ in range(_NAMES_TRIED_MAX):
        path = f"{folder}/{prefix}{machine_mark()}-{secrets.token_hex(8)}"
        fd = ops.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
        try:
            if _hold(fd):
                return Temp(path, fd)
        except BaseException:
            os.close(fd)
            raise
        # A sweeper saw the file between its creation and the lock; it removes the name, so take another.
        os.close(fd)
    raise OSError(errno.EBUSY, "temporary files vanish as soon as they are made", folder)


def _hold(fd: int) -> bool:
    """Lock a file just made; False where a sweeper was quicker."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        # No locks on this file system: then no sweeper gets one either, and nothing is ever swept.
    return os.fstat(fd).st_nlink > 0


def _sweep_one(ops: FileOps, path: str, *, now_s: float) -> int:
    # Opened for writing, because network file systems turn flock into a write lock.
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = machine_mark() != "unknown" and Path(path).name.startswith(machine_mark() + "-")
        if not ours and now_s - os.fstat(fd).st_mtime < STRANGER_IDLE_S:
            return 0
        ops.unlink(path)
        return 1
    finally:
        os.close(fd)


def _store_clock_s(ops: FileOps, folder: str) -> float:
    with new_temp(ops, folder) as temp:
        return os.fstat(temp.fd).st_mtime
