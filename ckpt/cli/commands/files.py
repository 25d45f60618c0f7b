"""One output file, whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from ckpt.errors import UnavailableError, UsageError


def write_file(path: Path, write: Callable[[BinaryIO], object], *, force: bool) -> None:
    """Let ``write`` fill a temporary file, sync it, and only then give it its name.

    Raises UsageError where ``path`` exists and ``force`` is off, UnavailableError where the folder cannot take the file.
    """
    if not force and os.path.lexists(path):
        raise UsageError(f"a file is in the way. path={path}; name another or pass --force")
    temp = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        try:
            with temp.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temp.replace(path)
        finally:
            temp.unlink(missing_ok=True)
    except OSError as error:
        raise UnavailableError(
            f"the file cannot be written: {error.strerror}. path={path} errno={error.errno}"
        ) from error
