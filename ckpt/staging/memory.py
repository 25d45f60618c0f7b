"""Anonymous shared memory that other processes can be handed: creating, pre-faulting and protecting it. No torch.

On Linux a region is a memfd: it has no name, no limit of a mounted file system, and the kernel frees it with its last
holder. Where memfds are missing it is an unlinked file; off Linux it is private memory that can't be handed on.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import sys
import weakref
from collections.abc import Iterator

from ckpt.errors import IntegrityError, UsageError
from ckpt.ipc.anonymous import open_anonymous
from ckpt.values import PAGE_BYTES

PREFAULT_BYTES = 1 << 20
"""Memory made present by one system call: about 2.5 ms of first touches, so that mmap and munmap never wait longer."""

_MADV_POPULATE_WRITE = 23
_PROT_READ = 1
_PROT_READ_WRITE = 3
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform != "win32" else None


class Region:
    """``size_bytes`` (a multiple of PAGE_BYTES) of zeroed, page-aligned memory, shared where the system can.

    ``fd`` refers to it for handing on (None off Linux), ``view`` is all of it. Pages are taken on first touch. The region
    owns its descriptor; its mapping lives until the last view of it is gone.
    """

    fd: int | None

    __slots__ = ("__weakref__", "_close_fd", "_map", "address", "fd", "size_bytes", "view")

    def __init__(self, size_bytes: int, *, name: str = "ckpt-slot") -> None:
        _check_size(size_bytes)
        fd = open_anonymous(name) if sys.platform == "linux" else None
        try:
            if fd is not None:
                os.ftruncate(fd, size_bytes)
            self._take(fd, size_bytes)
        except BaseException:
            if fd is not None:
                os.close(fd)
            raise

    @classmethod
    def over(cls, fd: int, size_bytes: int) -> Region:
        """The memory that ``fd`` refers to, as it is: another process made it. Takes ``fd`` over, and closes it on errors.

        Raises IntegrityError where it is not that long: touching memory beyond a file's end kills the process.
        """
        region = cls.__new__(cls)
        try:
            _check_size(size_bytes)
            found = os.fstat(fd).st_size
            if found != size_bytes:
                raise IntegrityError(f"shared memory of another size. size_bytes={size_bytes} found_bytes={found}")
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

    def prefault(self, start: int, stop: int) -> Iterator[int]:
        """Make the pages of a byte range present without changing a byte, PREFAULT_BYTES a time; yields where it is.

        Safe beside a writer of the same memory. Ends early where the system offers no way. Releases the GIL.
        """
        for at in range(start, stop, PREFAULT_BYTES):
            length = min(PREFAULT_BYTES, stop - at)
            if not self._populate(at, length):
                return
            yield at + length

    def protect(self, *, writable: bool) -> None:
        """Map the region read-only (a wild write then kills the process that made it) or writable again.

        Costs about 16 ms a GiB. Raises OSError where the kernel refuses.
        """
        if _LIBC is None:
            return
        flags = _PROT_READ_WRITE if writable else _PROT_READ
        size = ctypes.c_size_t(self.size_bytes)
        if _LIBC.mprotect(ctypes.c_void_p(self.address), size, ctypes.c_int(flags)):
            code = ctypes.get_errno()
            raise OSError(code, f"cannot change a slot's protection: {os.strerror(code)}")

    def close(self) -> None:
        """Give up the descriptor and, once no view of it is left, the mapping. Idempotent."""
        self.fd = None
        if self._close_fd is not None:
            self._close_fd()
        with contextlib.suppress(BufferError):  # a reader still holds a view: its end unmaps
            self.view.release()
            self._map.close()

    def _populate(self, start: int, length: int) -> bool:
        if _LIBC is None:
            return False
        where = ctypes.c_void_p(self.address + start)
        if sys.platform == "linux" and not _LIBC.madvise(where, ctypes.c_size_t(length), _MADV_POPULATE_WRITE):
            return True
        if self.fd is None:
            return False
        # Kernels before 5.14: taking the pages is the dear part, mapping them later is not.
        try:
            os.posix_fallocate(self.fd, start, length)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSPC, errno.EBADF):
                return False
            raise
        return True


def _check_size(size_bytes: int) -> None:
    if size_bytes <= 0 or size_bytes % PAGE_BYTES:
        raise UsageError(f"not a positive multiple of a page. size_bytes={size_bytes} page_bytes={PAGE_BYTES}")


def pages(size_bytes: int) -> int:
    """``size_bytes`` rounded up to whole pages, in bytes."""
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES
