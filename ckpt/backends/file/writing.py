"""Writing one file from the caller's memory, and the temporary files that are being written.

Bytes go past the page cache if the memory allows it, through it otherwise. Direct writes need
memory address, file offset and length on page boundaries. Aligned buffers are written from where
they are; others are gathered in one page-aligned bounce buffer of bounded size. The rest at the
end, shorter than a page, is written through the page cache.
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
"""Smaller objects go through the page cache: their fsync costs more than the copy."""

WRITE_BYTES_MAX = 16 << 20
"""Bytes per system call; larger calls measured no faster."""

BOUNCE_BYTES = 8 << 20
"""The size of the bounce buffer: the most that a put copies at a time."""

_RUN_BYTES_MIN = 256 << 10
"""Shorter aligned stretches are copied too: a write of their own would cost more than the copy."""

_BUFFERS_MAX = 512
"""Buffers per system call; Linux allows 1,024."""

_O_DIRECT = getattr(os, "O_DIRECT", 0)


def write_all(ops: FileOps, fd: int, pieces: Sequence[memoryview], *, direct: bool) -> None:
    """Write the concatenation of ``pieces`` to the empty file ``fd`` from offset 0. Does not sync.

    ``direct`` asks for direct writes if the data is large enough; if the file system refuses them,
    the bytes go through the page cache. Raises OSError. Copies only what is not page-aligned,
    through BOUNCE_BYTES of memory.
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
    """Turn direct I/O of an open file on or off; False if the file system lacks it."""
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
    """The memory address of a buffer's first byte; 0 for an empty buffer."""
    return int(np.frombuffer(piece, dtype=np.uint8).ctypes.data) if len(piece) else 0


def _preallocate(ops: FileOps, fd: int, size_bytes: int) -> None:
    try:
        ops.preallocate(fd, size_bytes)
    except OSError as error:
        # Reserving is optional: it speeds up the write and reports a full disk earlier.
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


@dataclass(slots=True)
class _Writer:
    """One file written from front to back.

    Leaves direct mode when the file system or a tail that is no whole page demands it.
    """

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
    """What is left of ``pieces`` after their first ``taken`` bytes are written."""
    left = []
    for piece in pieces:
        if taken < len(piece):
            left.append(piece[taken:])
        taken = max(0, taken - len(piece))
    return left


def _plain_batches(pieces: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """The pieces unchanged, up to _BUFFERS_MAX per system call."""
    filled = [piece for piece in pieces if len(piece)]
    for first in range(0, len(filled), _BUFFERS_MAX):
        yield filled[first : first + _BUFFERS_MAX]


@dataclass(slots=True)
class _Run:
    """Aligned stretches of the caller's memory that are written in one system call."""

    pieces: list[memoryview] = field(default_factory=list)
    size_bytes: int = 0

    @property
    def full(self) -> bool:
        return self.size_bytes == WRITE_BYTES_MAX or len(self.pieces) == _BUFFERS_MAX

    def add(self, piece: memoryview) -> int:
        """Take as many whole pages of ``piece`` as fit; returns the bytes taken."""
        taken = min(len(piece) // PAGE_BYTES * PAGE_BYTES, WRITE_BYTES_MAX - self.size_bytes)
        self.pieces.append(piece[:taken])
        self.size_bytes += taken
        return taken

    def drain(self) -> list[memoryview]:
        drained, self.pieces, self.size_bytes = self.pieces, [], 0
        return drained


def _direct_batches(pieces: Sequence[memoryview], total: int) -> Iterator[list[memoryview]]:
    """Batches whose parts are all page-aligned in memory and length, except the last one.

    A batch may be in the bounce buffer, which the next batch overwrites: write each batch before
    asking for the next.
    """
    bounce = memoryview(mmap.mmap(-1, min(BOUNCE_BYTES, total + -total % PAGE_BYTES)))
    filled = 0
    run = _Run()
    for piece in pieces:
        address = memory_address(piece)
        at = 0
        while at < len(piece):
            # Bytes that complete the bounce buffer's current page: the file offset must be on a
            # page boundary before memory can be written from where it is.
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
    """The bounce buffer's whole pages, then the rest that is shorter than a page."""
    whole = len(rest) // PAGE_BYTES * PAGE_BYTES
    yield from ([part] for part in (rest[:whole], rest[whole:]) if len(part))


# ---- Temporary files: their names, their locks, and the sweep after their writer died.
#
# A temporary file is called ``<boot>-<random>``, and its writer holds a lock (flock) on it from
# just after its creation until it is closed; the kernel drops the lock when the writer dies. So on
# the machine that made the file a free lock always means a dead writer, and the name says which
# boot of which machine that was. A network file system may keep locks local to each machine. So for
# files of other machines the sweep also requires an hour without a write, by the store's own clock.
# A live file that is swept by mistake does no harm: its writer notices that the name is gone, and
# its put fails with nothing visible.

TEMP_FOLDER = ".tmp"
"""The folder of unfinished files below the store's root; never listed."""

FOREIGN_IDLE_S = 3600
"""Age since the last write before another machine's unlocked temporary file is swept."""

_NAMES_TRIED_MAX = 16
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class TempFile:
    """An open temporary file that only this process writes."""

    path: str
    fd: int


@contextlib.contextmanager
def new_temp_file(ops: FileOps, folder: str, *, prefix: str = "") -> Iterator[TempFile]:
    """Create and lock a temporary file in ``folder``; remove its name and close it after the block.

    Raises FileNotFoundError if the folder is missing, and OSError.
    """
    temp = _create(ops, folder, prefix)
    try:
        yield temp
    finally:
        # The put has succeeded or failed by now. A file that cannot be removed is swept later, so
        # its error must hide neither outcome.
        try:
            with contextlib.suppress(OSError):
                ops.unlink(temp.path)
        finally:
            os.close(temp.fd)


def sweep(ops: FileOps, folder: str) -> int:
    """Remove the temporary files of dead writers from ``folder``; returns how many.

    Leaves files that it may not touch.
    """
    swept = 0
    try:
        names = os.listdir(folder)  # noqa: PTH208
    except OSError:
        return 0
    now_s = _store_clock_s(ops, folder) if names else 0.0
    for name in names:
        with contextlib.suppress(OSError):
            swept += _sweep_file(ops, f"{folder}/{name}", now_s=now_s)
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
            if _lock_new_file(fd):
                return TempFile(path, fd)
        except BaseException:
            os.close(fd)
            raise
        # A sweep saw the file between its creation and the lock and removes its name: take
        # another name.
        os.close(fd)
    raise OSError(errno.EBUSY, "temporary files vanish as soon as they are made", folder)


def _lock_new_file(fd: int) -> bool:
    """Lock a file just made; False if a sweep was quicker."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        # No locks on this file system: no sweep gets one either, so nothing is ever swept.
    return os.fstat(fd).st_nlink > 0


def _sweep_file(ops: FileOps, path: str, *, now_s: float) -> int:
    # Opened for writing: network file systems turn flock into a lock that needs write access.
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
