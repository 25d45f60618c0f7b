"""Where a job's secret lies: a file that only its owner reads."""

from __future__ import annotations

import os
import re
import secrets
import stat
from pathlib import Path

from ckpt.cluster.peermem.auth import SECRET_BYTES, Secret
from ckpt.errors import UsageError

_SECRET_TEXT = re.compile(rb"[0-9a-f]{64}\n?")
_READ_BYTES = 1024


def load_secret(path: str | os.PathLike[str]) -> Secret:
    """The secret in the file ``path``, 64 hex digits.

    Raises UsageError where it can't be read, is no regular file, holds something else, or others than its owner may do anything
    with it. No message holds any of it.
    """
    place = Path(path).expanduser()
    try:
        fd = os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not hold us up
        try:
            mode = os.fstat(fd).st_mode
            if not stat.S_ISREG(mode):
                raise UsageError(f"a peer secret is not a regular file. path={place}")
            if mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise UsageError(
                    f"others may read or change a peer secret. path={place} mode={stat.S_IMODE(mode):04o}; "
                    f"chmod 600 {place}, and draw a new one if somebody could have read it"
                )
            text = os.read(fd, _READ_BYTES)
        finally:
            os.close(fd)
    except OSError as error:
        raise UsageError(f"a peer secret can't be read. path={place} cause={error.strerror}; check the path") from error
    if not _SECRET_TEXT.fullmatch(text):
        raise UsageError(
            f"no peer secret here: not 64 hex digits. path={place} size_bytes={len(text)}; "
            "make one with ckpt.cluster.secret_file.write_new_secret(path)"
        )
    return Secret.of(bytes.fromhex(text.decode().strip()))


def write_new_secret(path: str | os.PathLike[str]) -> Secret:
    """Draw a secret and write it to a new file of mode 0600. Raises UsageError where the file exists or can't be written."""
    place = Path(path).expanduser()
    raw = secrets.token_bytes(SECRET_BYTES)
    try:
        fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(raw.hex().encode() + b"\n")
    except OSError as error:
        raise UsageError(f"a peer secret can't be written. path={place} cause={error.strerror}") from error
    return Secret.of(raw)
