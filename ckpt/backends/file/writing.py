"""Bytes from the caller's memory into one open file: past the page cache where the memory allows,
through it elsewhere.

Direct writes need memory, file offset and length on page boundaries. Buffers that are so go down as
they lie; the others are gathered in one page-aligned bounce buffer of bounded size. What is left at
the end, less than a page, is written through the page cache.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ckpt.backends.file.syscalls import FileOps
from ckpt.values import PAGE_BYTES

DIRECT_BYTES_MIN = 1 << 20
"""Smaller objects go through the page cache: for them the fsync costs more than the copy."""

WRITE_BYTES_MAX = 16 << 20
"""Bytes handed to one system call; larger ones were not faster."""

BOUNCE_BYTES = 8 << 20
"""The bounce buffer's size: the most that a put copies at a time."""

_RUN_BYTES_MIN = 256 << 10
"""An aligned stretch shorter than this is copied too: a write of its own would cost more than the
copy."""

_BUFFERS_MAX = 512
"""Buffers a system call takes at once; Linux allows 1,024."""

_O_DIRECT = getattr(os, "O_DIRECT", 0)


def write_all(ops: FileOps, fd: int, pieces: Sequence[memoryview], *, direct: bool) -> None:
    """Write the concatenation of ``pieces`` to the empty file ``fd`` from offset 0. Does not sync.

    ``direct`` asks for direct writes where there is enough to write; where the file system refuses
    them the bytes go through the page cache. Raises OSError. Copies at most what is not
    page-aligned, through BOUNCE_BYTES of memory.
    """
    total = sum(len(piece) for piece in pieces)
    wants_direct = direct and total >= DIRECT_BYTES_MIN
    if wants_direct:
        _preallocate(ops, fd, total)
    writer = _Writer(ops, fd, direct=wants_direct and set_direct(fd, on=True))
    batches = _direct_batches(pieces, total) if writer.direct else _plain_batches(pieces)
    for batch in batches:
        writer.write(batch)


def set_direct(fd: int, *, on: bool) -> bool:
    """Turn direct I/O of an open file on or off; False where the file system does not know it."""
    if not _O_DIRECT:
        return False
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | _O_DIRECT if on else flags & ~_O_DIRECT)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return False
        raise
    return True


def memory_address(piece: memoryview) -> int:
    """Where a buffer's first byte lies in memory; 0 for an empty one."""
    return int(np.frombuffer(piece, dtype=np.uint8).ctypes.data) if len(piece) else 0


def _preallocate(ops: FileOps, fd: int, size_bytes: int) -> None:
    try:
        ops.preallocate(fd, size_bytes)
    except OSError as error:
        # Reserving only makes writing quicker and a full disk known earlier; a file system may well
        # lack it.
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


@dataclass(slots=True)
class _Writer:
    """One file being written front to back; leaves direct mode when the file system or the tail
    demands it."""

    ops: FileOps
    fd: int
    direct: bool
    offset_bytes: int = 0

    def write(self, batch: Sequence[memoryview]) -> None:
        left = list(batch)
        while left:
            if self.direct and sum(len(piece) for piece in left) % PAGE_BYTES:
                self._leave_direct()
            try:
                taken = self.ops.write(self.fd, left, self.offset_bytes)
            except OSError as error:
                if not (self.direct and error.errno == errno.EINVAL):
                    raise
                self._leave_direct()
                continue
            if taken == 0:
                raise OSError(errno.ENOSPC, "a write took no bytes")
            self.offset_bytes += taken
            left = _after(left, taken)

    def _leave_direct(self) -> None:
        set_direct(self.fd, on=False)
        self.direct = False


def _after(pieces: Sequence[memoryview], taken: int) -> list[memoryview]:
    """What is left of ``pieces`` once their first ``taken`` bytes are written."""
    left = []
    for piece in pieces:
        if taken < len(piece):
            left.append(piece[taken:])
        taken = max(0, taken - len(piece))
    return left


def _plain_batches(pieces: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """The pieces as they are, some hundred to a system call."""
    filled = [piece for piece in pieces if len(piece)]
    for first in range(0, len(filled), _BUFFERS_MAX):
        yield filled[first : first + _BUFFERS_MAX]


@dataclass(slots=True)
class _Run:
    """Aligned stretches of the caller's memory that wait to go down in one system call."""

    pieces: list[memoryview] = field(default_factory=list)
    size_bytes: int = 0

    @property
    def full(self) -> bool:
        return self.size_bytes == WRITE_BYTES_MAX or len(self.pieces) == _BUFFERS_MAX

    def add(self, piece: memoryview) -> int:
        """Take as many whole pages of ``piece`` as fit; returns how many bytes."""
        taken = min(len(piece) // PAGE_BYTES * PAGE_BYTES, WRITE_BYTES_MAX - self.size_bytes)
        self.pieces.append(piece[:taken])
        self.size_bytes += taken
        return taken

    def drain(self) -> list[memoryview]:
        drained, self.pieces, self.size_bytes = self.pieces, [], 0
        return drained


def _direct_batches(pieces: Sequence[memoryview], total: int) -> Iterator[list[memoryview]]:
    """Batches whose every part is page-aligned in memory and length, but for the last one.

    A batch may lie in the bounce buffer, which the next one overwrites: write each before asking
    for the next.
    """
    bounce = memoryview(mmap.mmap(-1, min(BOUNCE_BYTES, total + -total % PAGE_BYTES)))
    filled = 0
    run = _Run()
    for piece in pieces:
        address = memory_address(piece)
        at = 0
        while at < len(piece):
            gap = -filled % PAGE_BYTES
            left = len(piece) - at
            aligned_after_gap = (
                address + at + gap
            ) % PAGE_BYTES == 0 and left - gap >= _RUN_BYTES_MIN
            if aligned_after_gap and gap == 0:
                if filled:
                    yield [bounce[:filled]]
                    filled = 0
                at += run.add(piece[at:])
                if run.full:
                    yield run.drain()
                continue
            if run.pieces:
                yield run.drain()
            taken = gap if aligned_after_gap else min(left, len(bounce) - filled)
            bounce[filled : filled + taken] = piece[at : at + taken]
            filled += taken
            at += taken
            if filled == len(bounce):
                yield [bounce]
                filled = 0
    if run.pieces:
        yield run.drain()
    yield from _last_batches(bounce[:filled])


def _last_batches(rest: memoryview) -> Iterator[list[memoryview]]:
    """The bounce buffer's whole pages, then what is shorter than a page."""
    whole = len(rest) // PAGE_BYTES * PAGE_BYTES
    yield from ([part] for part in (rest[:whole], rest[whole:]) if len(part))


# Files that are still being written: how they are named, held, and swept once their writer is
# dead.
#
# A temporary file is called ``<machine>-<random>`` and its writer holds a lock (flock) on it from
# just after creating it until it is closed; the kernel drops the lock when the writer dies. So a
# free lock means a dead writer, always on the machine that made the file, whose name says which
# boot of which machine that was. For other machines' files, where a network file system may keep
# locks local, an hour without a write (by the store's own clock) is asked for as well. A live
# file taken by mistake is harmless: its writer notices that the name is gone, and its put fails
# with nothing visible.

TEMP_FOLDER = ".tmp"
"""Where unfinished files lie, below the store's root; never listed."""

FOREIGN_IDLE_S = 3600
"""How long another machine's unlocked temporary file must have been left alone before it is
swept."""

_NAMES_TRIED_MAX = 16
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class TempFile:
    """An open temporary file that this process alone writes."""

    path: str
    fd: int


@contextlib.contextmanager
def new_temp_file(ops: FileOps, folder: str, *, prefix: str = "") -> Iterator[TempFile]:
    """Create and lock a temporary file in ``folder``; its name is removed and it is closed at the
    end of the block.

    Raises FileNotFoundError where the folder is missing, and OSError.
    """
    temp = _create(ops, folder, prefix)
    try:
        yield temp
    finally:
        # The object is safe or failed already; what cannot be removed now is swept later, so it
        # must not hide either.
        try:
            with contextlib.suppress(OSError):
                ops.unlink(temp.path)
        finally:
            os.close(temp.fd)


def sweep(ops: FileOps, folder: str) -> int:
    """Remove the temporary files of dead writers from ``folder``; returns how many. Leaves what it
    may not touch."""
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


def boot_mark() -> str:
    """Short text that differs between machines and between boots of one; ``unknown`` off Linux."""
    try:
        return _BOOT_ID.read_text()[:8]
    except OSError:
        return "unknown"


def _create(ops: FileOps, folder: str, prefix: str) -> TempFile:
    for _ in range(_NAMES_TRIED_MAX):
        path = f"{folder}/{prefix}{boot_mark()}-{secrets.token_hex(8)}"
        fd = ops.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
        try:
            if _hold(fd):
                return TempFile(path, fd)
        except BaseException:
            os.close(fd)
            raise
        # A sweeper saw the file between its creation and the lock; it removes the name, so take
        # another.
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
        ours = boot_mark() != "unknown" and Path(path).name.startswith(boot_mark() + "-")
        if not ours and now_s - os.fstat(fd).st_mtime < FOREIGN_IDLE_S:
            return 0
        ops.unlink(path)
        return 1
    finally:
        os.close(fd)


def _store_clock_s(ops: FileOps, folder: str) -> float:
    with new_temp_file(ops, folder) as temp:
        return os.fstat(temp.fd).st_mtime
