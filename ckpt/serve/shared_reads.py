"""Ranges of packs that one process of this machine has read, for the others that need them too.

Replicas of one model on a machine follow the same snapshots, so they plan the same reads. The first
that needs a range locks its file, reads the store and writes the file; the others wait for the lock
and read memory. Nothing here is trusted: readers check every chunk against its digest as if it came
from a store. Locks are the kernel's and go with their holder, and one that hangs is waited for two
seconds, no longer. Files are in ``/dev/shm``, for this user alone, and live a
minute. The last follower that closes or exits removes them; after a SIGKILL of all, the next one
that starts, of whichever log.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ckpt.format.canonical import digest_hex
from ckpt.ipc.runtime_dir import runtime_root
from ckpt.restore.fetch import CachedRange

SHARED_MEMORY = Path("/dev/shm")
LIFETIME_S = 60.0
"""How long a range stays: replicas that follow one log read the same within seconds."""
WAIT_S = 2.0
"""How long a range is waited for that another process reads."""
PAUSE_S = 0.002
MEMBERS = "members"
"""The file that every follower of the log holds a shared lock on."""
FREE_SHARE_MIN = 0.1
"""A range is kept only while this share of the file system is free."""


class SharedReads:
    """A ``RangeCache`` in a folder that all followers of one log on this machine use."""

    def __init__(self, log_id: str, *, folder: Path | None = None) -> None:
        self._lock = threading.Lock()
        self.shared_bytes = 0
        """What came from here rather than from the store."""
        private = folder or _private_folder()
        remove_unused(private)
        self._folder = private / log_id
        self._member: int | None = _joined(self._folder)
        atexit.register(self.close)

    @contextlib.contextmanager
    def range(self, pack: str, offset_bytes: int, size_bytes: int) -> Iterator[CachedRange | None]:
        """The range's place, held by this process alone; None if another holds it for too long, or
        if the machine gives no memory for it."""
        name = digest_hex(f"{pack}\0{offset_bytes}\0{size_bytes}".encode())
        try:
            handle = _locked(self._folder / name)
        except OSError:
            handle = None  # full, or not ours: the store is read instead
        if handle is None:
            yield None
            return
        try:
            yield _SharedRange(handle, size_bytes, self._note)
        finally:
            os.close(handle)

    def _note(self, size_bytes: int) -> None:
        with self._lock:
            self.shared_bytes += size_bytes

    def close(self) -> None:
        """Leave; the last one removes all that is left. Idempotent."""
        member, self._member = self._member, None
        if member is None:
            return
        atexit.unregister(self.close)
        try:
            fcntl.flock(member, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass  # others still use it
        else:
            # Who joins now waits for this lock, sees that its file is gone, and makes another.
            shutil.rmtree(self._folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # another log's followers
                self._folder.parent.rmdir()
        finally:
            os.close(member)

    def tidy(self) -> None:
        """Remove ranges that are older than a minute. Call it after a fill."""
        oldest = time.time() - LIFETIME_S
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self._folder):
                with contextlib.suppress(FileNotFoundError):
                    if entry.name != MEMBERS and entry.stat().st_mtime < oldest:
                        Path(entry.path).unlink()


def remove_unused(folder: Path | None = None) -> None:
    """Remove what followers left that were killed: the folders of logs that nobody follows."""
    with contextlib.suppress(OSError):
        for log in (folder or _private_folder()).iterdir():
            with contextlib.suppress(OSError):  # in use, or removed by another one
                member = os.open(log / MEMBERS, os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.flock(member, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    # Who joins now waits for this lock, sees that its file is gone, and makes
                    # another.
                    shutil.rmtree(log, ignore_errors=True)
                finally:
                    os.close(member)


class _SharedRange:
    """One range's file, locked."""

    def __init__(self, handle: int, size_bytes: int, note: Callable[[int], None]) -> None:
        self._handle = handle
        self._size_bytes = size_bytes
        self._note = note

    def read_into(self, out: memoryview) -> bool:
        if os.fstat(self._handle).st_size != self._size_bytes:
            return False
        if os.preadv(self._handle, [out], 0) != self._size_bytes:
            return False
        self._note(self._size_bytes)
        return True

    def keep(self, data: memoryview) -> None:
        free = os.fstatvfs(self._handle)
        if free.f_bavail < free.f_blocks * FREE_SHARE_MIN:
            return
        try:
            os.ftruncate(self._handle, 0)
            # The last byte makes the length right, so a torn file is never taken for a whole one.
            at = 0
            while at < len(data):
                at += os.pwrite(self._handle, data[at:], at)
        except OSError:
            os.ftruncate(self._handle, 0)


def _joined(folder: Path) -> int:
    """The folder's file of members, locked for sharing."""
    while True:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            member = os.open(folder / MEMBERS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # the last one of before was removing the folder
        fcntl.flock(member, fcntl.LOCK_SH)
        if os.fstat(member).st_nlink:
            return member
        os.close(member)


def _locked(path: Path) -> int | None:
    """The open file, locked; None after ``WAIT_S``."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(PAUSE_S)
            else:
                break
            if os.fstat(handle).st_nlink:
                kept, handle = handle, -1
                return kept
            # Someone tidied it away before it was locked here.
        finally:
            if handle >= 0:
                os.close(handle)
    return None


def _private_folder() -> Path:
    """This user's folder in shared memory; the runtime folder if there is none, or another user
    took its name."""
    folder = SHARED_MEMORY / f"ckpt-reads-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return runtime_root() / "reads"
    private = status.st_uid == os.getuid() and not status.st_mode & 0o077
    return (
        folder
        if private and folder.is_dir() and not folder.is_symlink()
        else (runtime_root() / "reads")
    )
