"""Anonymous shared memory that other processes can be given, and how much memory is left. No torch.

On Linux a region is a memfd: it has no name, no limit of a mounted file system, and the kernel
frees it with its last holder. Without memfds it is an unlinked file; off Linux it is private memory
that can't be shared.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ckpt.errors import IntegrityError, UsageError
from ckpt.ipc.board import open_anonymous
from ckpt.values import PAGE_BYTES

PREFAULT_BYTES = 1 << 20
"""Memory that one system call makes present: about 2.5 ms of first touches, the longest that mmap
and munmap wait.
"""

_MADV_POPULATE_WRITE = 23
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform != "win32" else None


class Region:
    """``size_bytes`` (a multiple of PAGE_BYTES) of zeroed, page-aligned memory, shared if the
    system can.

    ``fd`` refers to it, to give to other processes (None off Linux); ``view`` is all of it. Pages
    are taken on first touch. The region owns its descriptor; its mapping lives until the last view
    of it is gone.
    """

    fd: int | None

    __slots__ = ("__weakref__", "_close_fd", "_map", "address", "fd", "size_bytes", "view")

    def __init__(self, size_bytes: int, *, name: str = "ckpt-slot") -> None:
        _check_size(size_bytes)
        fd = open_anonymous(name) if sys.platform == "linux" else None
        try:
            if fd is not None:
                os.ftruncate(fd, size_bytes)
                _seal_size(fd)
            self._take(fd, size_bytes)
        except BaseException:
            if fd is not None:
                os.close(fd)
            raise

    @classmethod
    def from_fd(cls, fd: int, size_bytes: int) -> Region:
        """The memory that ``fd`` refers to, made by another process. Takes ``fd`` over, and closes
        it on errors.

        Raises IntegrityError if it is not that long: touching memory beyond a file's end kills the
        process.
        """
        region = cls.__new__(cls)
        try:
            _check_size(size_bytes)
            actual_bytes = os.fstat(fd).st_size
            if actual_bytes != size_bytes:
                raise IntegrityError(
                    f"shared memory of another size. size_bytes={size_bytes} "
                    f"found_bytes={actual_bytes}"
                )
            region._take(fd, size_bytes)
        except BaseException:
            os.close(fd)
            raise
        return region

    def _take(self, fd: int | None, size_bytes: int) -> None:
        self._map = mmap.mmap(-1 if fd is None else fd, size_bytes)
        self.fd = fd
        self.size_bytes = size_bytes
        # A region that is dropped unclosed must not keep its memory for the life of the process.
        self._close_fd = None if fd is None else weakref.finalize(self, os.close, fd)
        self.view = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        if hasattr(mmap, "MADV_DONTDUMP"):  # a core of the program would hold the state again
            self._map.madvise(mmap.MADV_DONTDUMP)

    def prefault(self, start: int, stop: int) -> Iterator[int]:
        """Make the pages of a byte range present without changing a byte, PREFAULT_BYTES at a time;
        yields the position.

        Safe beside a writer of the same memory. Ends early if the system offers no way. Releases
        the GIL.
        """
        for at in range(start, stop, PREFAULT_BYTES):
            length = min(PREFAULT_BYTES, stop - at)
            if not self._populate(at, length):
                return
            yield at + length

    def close(self) -> None:
        """Close the descriptor and, once no view of it is left, the mapping. Idempotent."""
        self.fd = None
        if self._close_fd is not None:
            self._close_fd()
        with contextlib.suppress(BufferError):  # a reader still holds a view: releasing it unmaps
            self.view.release()
            self._map.close()

    def _populate(self, start: int, length: int) -> bool:
        if _LIBC is None:
            return False
        address = ctypes.c_void_p(self.address + start)
        if sys.platform == "linux" and not _LIBC.madvise(
            address, ctypes.c_size_t(length), _MADV_POPULATE_WRITE
        ):
            return True
        if self.fd is None:
            return False
        # Kernels before 5.14: taking the pages is the expensive part, mapping them later is not.
        try:
            os.posix_fallocate(self.fd, start, length)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSPC, errno.EBADF):
                return False
            raise
        return True


def _seal_size(fd: int) -> None:
    """Let nobody change the size: touching memory beyond a file's new end kills the process."""
    with contextlib.suppress(OSError):  # an unlinked file, or a kernel without seals
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)


def _check_size(size_bytes: int) -> None:
    if size_bytes <= 0 or size_bytes % PAGE_BYTES:
        raise UsageError(
            f"not a positive multiple of a page. size_bytes={size_bytes} page_bytes={PAGE_BYTES}"
        )


def round_to_pages(size_bytes: int) -> int:
    """``size_bytes`` rounded up to whole pages, in bytes."""
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


# ---- available memory: by the machine and by this process's control groups


FREE_SHARE_AUTO = 0.1
"""The part of the machine's and of each control group's memory that stays free with
``slots="auto"``: a trainer takes more after its slots were laid out."""


def available_bytes(
    *,
    free_share: float = 0.0,
    proc: Path = Path("/proc"),
    cgroup: Path = Path("/sys/fs/cgroup"),
) -> int | None:
    """Bytes that can be taken without swapping or being killed, or None if the system does not say.

    The least of the kernel's MemAvailable and what each control group above this process (v1 or v2)
    has left, not counting page cache that can be dropped as used. ``free_share`` of each one's
    whole memory is to stay free.
    """
    sources = (_machine(proc), *_groups(proc, cgroup))
    amounts = [
        max(0, source.left_bytes - int(free_share * source.total_bytes))
        for source in sources
        if source is not None
    ]
    return min(amounts, default=None)


def check_available(
    needed_bytes: int,
    *,
    purpose: str,
    freed_bytes: int = 0,
    available: int | None = None,
    free_share: float = 0.0,
) -> None:
    """Raise UsageError if ``needed_bytes`` exceed what is available and what is about to be freed.

    ``available`` replaces asking the system, and is the whole memory then. ``free_share``: see
    ``available_bytes``.
    """
    if available is None:
        left_bytes = available_bytes(free_share=free_share)
    else:
        left_bytes = available - int(free_share * available)
    if left_bytes is not None and needed_bytes > left_bytes + freed_bytes:
        kept = f", {free_share:.0%} of all memory kept free" if free_share else ""
        raise UsageError(
            f"not enough memory for {purpose}{kept}. needed_bytes={needed_bytes} "
            f"available_bytes={left_bytes + freed_bytes} "
            "use fewer slots, shard the state over more ranks, or raise the memory limit"
        )


@dataclass(frozen=True, slots=True)
class MemoryRoom:
    """How much memory there is, and how much of it stays free. ``available_bytes`` replaces asking
    the system.
    """

    available_bytes: int | None = None
    free_share: float = 0.0


class _Source(NamedTuple):
    """What one machine or control group has left, of how much."""

    left_bytes: int
    total_bytes: int


def _machine(proc: Path) -> _Source | None:
    fields = {
        name: int(rest.split()[0]) * 1024
        for name, _, rest in (line.partition(":") for line in _lines(proc / "meminfo"))
        if name in ("MemAvailable", "MemTotal")
    }
    left = fields.get("MemAvailable")
    return None if left is None else _Source(left, fields.get("MemTotal", left))


def _groups(proc: Path, root: Path) -> Iterator[_Source | None]:
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            for folder in _upwards(root, path):
                yield _left(folder, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            for folder in _upwards(root / "memory", path):
                yield _left(
                    folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
                )


def _upwards(root: Path, path: str) -> Iterator[Path]:
    """The group's folder and those above it; if the group's folder is not visible here, those that
    are.
    """
    parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
    for length in range(len(parts), -1, -1):
        yield root.joinpath(*parts[:length])


def _left(folder: Path, limit: str, usage: str, cache: str) -> _Source | None:
    most, used = _number(folder / limit), _number(folder / usage)
    if most is None or used is None:
        return None
    droppable = 0
    for line in _lines(folder / "memory.stat"):
        name, _, value = line.partition(" ")
        if name == cache:
            droppable = int(value)
    return _Source(max(0, most - max(0, used - droppable)), most)


def _number(path: Path) -> int | None:
    text = next(iter(_lines(path)), "max").strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # another system or mount: no answer from this source
        return []
