"""The secret that all nodes of a job share, and the keys that one connection makes of it. Pure but
for reading the file."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import stat
from pathlib import Path

from ckpt.cluster.peermem.auth import SECRET_BYTES, PeerSecret
from ckpt.errors import UsageError
from ckpt.ipc.cluster_spec import NodesSpec

JOB_SECRET_BYTES = 32
NONCE_BYTES = 16
MAC_BYTES = 16


_TEXT = re.compile(rb"[0-9a-f]{64}\n?")


def read_secret(path: Path) -> bytes:
    """The secret in a file of 64 hex digits that only its owner can read: 32 bytes.

    Raises UsageError where others can read it, or where it is none. No message holds any of it.
    """
    try:
        found = path.stat()
        with path.open("rb") as file:
            text = file.read(1024)
    except OSError as error:
        raise UsageError(
            f"the secret of the job's nodes can't be read. path={path} why={error.strerror}; make "
            "one, the same on "
            "all nodes: ckpt key new FILE"
        ) from error
    if found.st_uid not in (os.getuid(), 0) or stat.S_IMODE(found.st_mode) & 0o077:
        raise UsageError(
            f"the secret of the job's nodes can be read by others. path={path} "
            f"owner={found.st_uid} "
            f"mode={stat.S_IMODE(found.st_mode):o}; chmod 600, and make a new one"
        )
    if not _TEXT.fullmatch(text):
        raise UsageError(
            f"not a secret: not 64 hex digits. path={path} size_bytes={len(text)}; ckpt key new "
            "FILE makes one"
        )
    return bytes.fromhex(text.decode().strip())


def job_secret(nodes: NodesSpec) -> bytes:
    """The secret of a job's nodes. Those that meet in a file of one machine have it beside it, made
    by whoever comes first."""
    if nodes.secret:
        return read_secret(Path(nodes.secret))
    path = Path(f"{nodes.where}.secret")
    if not path.exists():
        draft = path.with_name(f"{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(os.urandom(JOB_SECRET_BYTES).hex().encode())
        with contextlib.suppress(FileExistsError):  # another node was faster
            os.link(draft, path)
        draft.unlink()
    return read_secret(path)


def connection_keys(
    secret: bytes, *, job: str, dialler: bytes, listener: bytes
) -> tuple[bytes, bytes]:
    """The keys of one line, one for each direction: what the dialler sends, and what the listener
    sends.

    ``dialler`` and ``listener`` are the two ends' nonces, so no two lines share a key. HKDF (RFC
    5869) with SHA-256.
    """
    salt = dialler + listener
    root = hmac.digest(salt, secret, hashlib.sha256)
    info = b"ckpt line 1\0" + job.encode()
    to_listener = hmac.digest(root, info + b"\0to listener\1", hashlib.sha256)
    to_dialler = hmac.digest(root, info + b"\0to dialler\1", hashlib.sha256)
    return to_listener, to_dialler


def frame_mac(key: bytes, number: int, body: bytes | memoryview) -> bytes:
    """The authentication of the frame ``number`` (from 0) of one direction: 128 bits of
    HMAC-SHA256."""
    made = hmac.new(key, number.to_bytes(8, "little"), hashlib.sha256)
    made.update(body)
    return made.digest()[:MAC_BYTES]


# Where a job's secret lies: a file that only its owner reads.

_SECRET_TEXT = re.compile(rb"[0-9a-f]{64}\n?")
_READ_BYTES = 1024


def load_secret(path: str | os.PathLike[str]) -> PeerSecret:
    """The secret in the file ``path``, 64 hex digits.

    Raises UsageError where it can't be read, is no regular file, holds something else, or others
    than its owner may do anything with it. No message holds any of it.
    """
    place = Path(path).expanduser()
    try:
        fd = os.open(
            place, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        )  # a pipe must not hold us up
        try:
            mode = os.fstat(fd).st_mode
            if not stat.S_ISREG(mode):
                raise UsageError(f"a peer secret is not a regular file. path={place}")
            if mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise UsageError(
                    f"others may read or change a peer secret. path={place} "
                    f"mode={stat.S_IMODE(mode):04o}; "
                    f"chmod 600 {place}, and draw a new one if somebody could have read it"
                )
            text = os.read(fd, _READ_BYTES)
        finally:
            os.close(fd)
    except OSError as error:
        raise UsageError(
            f"a peer secret can't be read. path={place} cause={error.strerror}; check the path"
        ) from error
    if not _SECRET_TEXT.fullmatch(text):
        raise UsageError(
            f"no peer secret here: not 64 hex digits. path={place} size_bytes={len(text)}; "
            "make one with ckpt.cluster.secret.write_new_secret(path)"
        )
    return PeerSecret.of(bytes.fromhex(text.decode().strip()))


def write_new_secret(path: str | os.PathLike[str]) -> PeerSecret:
    """Draw a secret and write it to a new file of mode 0600. Raises UsageError where the file
    exists or can't be written."""
    place = Path(path).expanduser()
    raw = secrets.token_bytes(SECRET_BYTES)
    try:
        fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(raw.hex().encode() + b"\n")
    except OSError as error:
        raise UsageError(
            f"a peer secret can't be written. path={place} cause={error.strerror}"
        ) from error
    return PeerSecret.of(raw)
