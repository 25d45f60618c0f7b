"""Memory without a name."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def open_anonymous(name: str) -> int:
    """The descriptor of fresh memory that has no name in any file system and goes with its last holder. Closed on exec.

    A memfd; where there are none, an unlinked file.
    """
    if hasattr(os, "memfd_create"):
        try:
            return os.memfd_create(name)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EPERM):
                raise
    folder = Path("/dev/shm")
    path = (folder if folder.is_dir() else Path("/tmp")) / f"{name}-{os.urandom(8).hex()}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    path.unlink()
    return fd
