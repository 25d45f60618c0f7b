"""What the operating system's errors mean for a caller of a store."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from ckpt.errors import CkptError, StoreDeniedError, StoreFullError, UnavailableError, UsageError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMLINK})
_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


def os_fault(error: OSError, *, doing: str, where: str) -> CkptError:
    """The error to raise for ``error``. ``doing`` is the operation, ``where`` a path or URL without credentials."""
    name = errno.errorcode.get(error.errno or 0, type(error).__name__)
    facts = f"operation={doing} path={where} error={name}"
    if error.errno in _FULL:
        return StoreFullError(
            f"the store is full. {facts}; free space or raise the quota or file size limit, then repeat"
        )
    if error.errno in _DENIED:
        return StoreDeniedError(f"the store refuses. {facts}; grant permission or mount it writable, then repeat")
    if error.errno == errno.ENOTDIR:
        return UsageError(f"a part of the key is a file already. {facts}; choose another key or store folder")
    if error.errno == errno.EISDIR:
        return UsageError(f"the key is a folder already. {facts}; choose another key or store folder")
    if error.errno == errno.ELOOP:
        return UsageError(
            f"a symbolic link stands where an object belongs. {facts}; replace the link by the real thing"
        )
    if error.errno == errno.ENAMETOOLONG:
        return UsageError(f"the path is too long for this file system. {facts}; choose a shorter store folder")
    return UnavailableError(
        f"the store failed. {facts} detail={error.strerror!r}; check the disk or mount, then repeat"
    )


@contextlib.contextmanager
def translated(doing: str, where: str) -> Iterator[None]:
    """Raise every OSError of the block as a CkptError with the cause chained."""
    try:
        yield
    except OSError as error:
        raise os_fault(error, doing=doing, where=where) from error
