"""Sources of a store's encryption key.

A source names a place and never is the key, so it may appear in options and command lines.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import select
import shlex
import signal
import stat
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from ckpt.backends.encrypted.secret import (
    MATERIAL_BYTES_MAX,
    SECRET_BYTES,
    EncryptionKey,
    EncryptionKeys,
    parse_secret,
)
from ckpt.errors import UnavailableError, UsageError

# ---- Commands: their output, in bounded time and memory. It is a secret, so no message shows it.


def command_output(words: Sequence[str], *, wait_s: float, bytes_max: int) -> bytes:
    """Run ``words`` without a shell and return the standard output; standard error stays ours.

    The command and its children are killed after ``wait_s`` seconds, and if it prints more than
    ``bytes_max``. Raises UsageError if it cannot be started or prints too much, UnavailableError if
    it fails or does not end.
    """
    program = words[0]
    try:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
        )
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the key's command can't be started. program={program} cause={error}; give the "
            "program's full path"
        ) from None
    assert process.stdout is not None
    deadline_s = time.monotonic() + wait_s
    with process:
        try:
            output = _read(process.stdout, deadline_s, bytes_max)
            if output is None:
                raise UsageError(
                    f"the key's command prints more than a key. program={program} "
                    f"limit_bytes={bytes_max}"
                )
            status = process.wait(max(0.0, deadline_s - time.monotonic()))
        except (TimeoutError, subprocess.TimeoutExpired):
            raise UnavailableError(
                f"the key's command did not end. program={program} waited_s={wait_s}; run it by "
                "hand, then repeat"
            ) from None
        finally:
            if (
                process.returncode is None
            ):  # not reaped yet, so its process group id is still its own
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    if status:
        raise UnavailableError(
            f"the key's command failed. program={program} status={status}; run it by hand to see "
            "why, then repeat"
        )
    return output


def _read(pipe: IO[bytes], deadline_s: float, bytes_max: int) -> bytes | None:
    """All of a pipe; None if it is longer than ``bytes_max``. Raises TimeoutError."""
    output = b""
    while len(output) <= bytes_max:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0 or not select.select([pipe], [], [], left_s)[0]:
            raise TimeoutError
        piece = os.read(pipe.fileno(), bytes_max + 1 - len(output))
        if not piece:
            return output
        output += piece
    return None


COMMAND_S = 30.0
"""Longest time that a command may take to print the key."""

_KINDS = "file:PATH, env:NAME or command:WORDS"
_NEXT = re.compile(r",(?=(?:file|env|command):)")


def load_keys(sources: str) -> EncryptionKeys:
    """The keys of ``sources``, separated by commas: the first writes, all read.

    Raises as ``load_key``, and UsageError if one key is given twice.
    """
    first, *others = [load_key(source) for source in _NEXT.split(sources)]
    ids = [key.id for key in (first, *others)]
    if len(set(ids)) < len(ids):
        raise UsageError(
            "an encryption key is given twice; give each key once, the one to write with first"
        )
    return EncryptionKeys(first, tuple(others))


def load_key(source: str) -> EncryptionKey:
    """The key that ``source`` names: ``file:PATH``, ``env:NAME``, or ``command:WORDS``.

    A file holds 32 raw bytes, or their hex or base64 text, and is readable by its owner only. A
    variable holds text. A command prints the key; it runs without a shell, for 30 s at most. Raises
    UsageError if there is no key, UnavailableError if a command fails. No message shows the key,
    nor a source of unknown kind, which may be one.
    """
    kind, colon, location = source.partition(":")
    if not colon or kind not in ("file", "env", "command") or not location.strip():
        raise UsageError(
            f"not a source of a key; write {_KINDS} (not shown: it may be the key itself)"
        )
    match kind:
        case "file":
            return EncryptionKey.of(parse_secret(_read_file(location), source=f"file:{location}"))
        case "env":
            return EncryptionKey.of(
                parse_secret(_read_variable(location), source=f"env:{location}")
            )
        case _:
            words = _words(location)
            output = command_output(words, wait_s=COMMAND_S, bytes_max=MATERIAL_BYTES_MAX)
            return EncryptionKey.of(parse_secret(output, source=f"command:{words[0]}"))


def write_new_key(path: str) -> EncryptionKey:
    """Draw a random key and write it as text to a new file that only its owner can read.

    Keep a copy: without the key the store is lost. Raises UsageError if the file exists or cannot
    be written.
    """
    file_path = Path(path).expanduser()
    secret = secrets.token_bytes(SECRET_BYTES)
    try:
        fd = os.open(file_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(secret.hex().encode() + b"\n")
            file.flush()
            os.fsync(fd)
        folder = os.open(file_path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except FileExistsError:
        raise UsageError(
            f"a key file is never overwritten. path={file_path}; choose another name"
        ) from None
    except OSError as error:
        raise UsageError(
            f"a key file can't be written. path={file_path} cause={error.strerror}"
        ) from error
    return EncryptionKey.of(secret)


def _read_file(path: str) -> bytes:
    file_path = Path(path).expanduser()
    try:
        # O_NONBLOCK: opening a pipe without a writer must not block.
        fd = os.open(file_path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        cause = (
            os.strerror(error.errno or errno.EINVAL) if isinstance(error, OSError) else "not a path"
        )
        raise UsageError(
            f"a key file can't be read. path={file_path} cause={cause}; check the path"
        ) from None
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            raise UsageError(
                f"a key file is not a regular file. path={file_path}; use command: for a pipe"
            )
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise UsageError(
                f"others may read or change a key file. path={file_path} "
                f"mode={stat.S_IMODE(mode):04o}; chmod 600 {file_path} (a mounted secret: "
                "defaultMode 0400)"
            )
        return os.read(fd, MATERIAL_BYTES_MAX + 1)
    except OSError as error:
        raise UsageError(
            f"a key file can't be read. path={file_path} cause={error.strerror}; check the disk"
        ) from None
    finally:
        os.close(fd)


def _read_variable(name: str) -> bytes:
    text = os.environ.get(name)
    if text is None:
        raise UsageError(
            f"the variable with the encryption key is not set. name={name}; set it to 64 hex digits"
        )
    return text.encode(errors="replace").strip() + b"\n"


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        raise UsageError(
            f"the key's command can't be split into words. cause={error}; check its quotes"
        ) from None
