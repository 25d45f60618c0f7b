"""The system calls by which a file store changes anything, behind one protocol.

Tests number, fail and interrupt each of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol

from ckpt.errors import CkptError, StoreDeniedError, StoreFullError, UnavailableError, UsageError

_RENAME_NOREPLACE = 1
_AT_FDCWD = -100


class FileOps(Protocol):
    """Every change that a FileBackend makes to the file system.

    Each method raises OSError as the system call behind it does. Reading, locking and closing are
    not included: they change nothing that outlives the process.
    """

    def open(self, path: str, flags: int) -> int:
        """Open a file with mode 0666 less the umask; returns the descriptor."""
        ...

    def preallocate(self, fd: int, size_bytes: int) -> None:
        """Reserve blocks for ``size_bytes`` bytes and set the length."""
        ...

    def write(self, fd: int, buffers: Sequence[memoryview], offset_bytes: int) -> int:
        """Write the buffers one after another from ``offset_bytes`` on.

        Returns the number of bytes written, which may be fewer than given.
        """
        ...

    def fsync(self, fd: int) -> None:
        """Make a file's bytes and length durable."""
        ...

    def link(self, source: str, target: str) -> None:
        """Give a file a second name. Raises FileExistsError if the name is taken."""
        ...

    def rename(self, source: str, target: str) -> None:
        """Move a name, replacing the target."""
        ...

    def rename_new(self, source: str, target: str) -> None:
        """Move a name. Raises FileExistsError if the target exists.

        Raises ENOSYS or EINVAL if the system cannot promise that.
        """
        ...

    def unlink(self, path: str) -> None:
        """Remove a file's name."""
        ...

    def mkdir(self, path: str) -> None:
        """Make one directory."""
        ...

    def rmdir(self, path: str) -> None:
        """Remove one empty directory."""
        ...

    def fsync_directory(self, path: str) -> None:
        """Make the names in a directory durable."""
        ...


class RealOps:
    """The operating system itself."""

    def open(self, path: str, flags: int) -> int:
        return os.open(path, flags, 0o666)

    def preallocate(self, fd: int, size_bytes: int) -> None:
        os.posix_fallocate(fd, 0, size_bytes)

    def write(self, fd: int, buffers: Sequence[memoryview], offset_bytes: int) -> int:
        return os.pwritev(fd, buffers, offset_bytes)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def link(self, source: str, target: str) -> None:
        os.link(source, target, follow_symlinks=False)

    def rename(self, source: str, target: str) -> None:
        Path(source).rename(target)

    def rename_new(self, source: str, target: str) -> None:
        _rename_noreplace(source, target)

    def unlink(self, path: str) -> None:
        Path(path).unlink()

    def mkdir(self, path: str) -> None:
        Path(path).mkdir()

    def rmdir(self, path: str) -> None:
        Path(path).rmdir()

    def fsync_directory(self, path: str) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


REAL_OPS: Final[FileOps] = RealOps()
"""The operating system, stateless and shared."""


def _rename_noreplace(source: str, target: str) -> None:
    """renameat2 with RENAME_NOREPLACE, which Python does not offer."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, "this C library has no renameat2", source)
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), source, None, target)


# ---- Errors: from the operating system's to those of a store's caller.

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMLINK})
_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


def error_from_os(error: OSError, *, doing: str, where: str) -> CkptError:
    """The error to raise for ``error``.

    ``doing`` names the operation, ``where`` is a path or a URL without credentials.
    """
    error_name = errno.errorcode.get(error.errno or 0, type(error).__name__)
    facts = f"operation={doing} path={where} error={error_name}"
    if error.errno in _FULL:
        return StoreFullError(
            f"the store is full. {facts}; free space or raise the quota or file size limit, then "
            "repeat"
        )
    if error.errno in _DENIED:
        return StoreDeniedError(
            f"the store refuses. {facts}; grant permission or mount it writable, then repeat"
        )
    if error.errno == errno.ENOTDIR:
        return UsageError(
            f"a component of the key is already a file. {facts}; choose another key or store folder"
        )
    if error.errno == errno.EISDIR:
        return UsageError(
            f"the key is already a folder. {facts}; choose another key or store folder"
        )
    if error.errno == errno.ELOOP:
        return UsageError(
            f"a symbolic link is in the place of an object. {facts}; replace the link by the real "
            "file"
        )
    if error.errno == errno.ENAMETOOLONG:
        return UsageError(
            f"the path is too long for this file system. {facts}; choose a shorter store folder"
        )
    return UnavailableError(
        f"the store failed. {facts} detail={error.strerror!r}; check the disk or mount, then repeat"
    )


@contextlib.contextmanager
def translate_os_errors(doing: str, where: str) -> Iterator[None]:
    """Raise every OSError of the block as a CkptError with the cause chained."""
    try:
        yield
    except OSError as error:
        raise error_from_os(error, doing=doing, where=where) from error
