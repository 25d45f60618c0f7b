"""The secret that all nodes of a job share: read from a file, or made beside the membership's."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from pathlib import Path

from ckpt.errors import UsageError
from ckpt.ipc.cluster_spec import NodesSpec

JOB_SECRET_BYTES = 32
_READ_BYTES = 1024
_TEXT = re.compile(rb"[0-9a-f]{64}\n?")


def read_secret(path: Path) -> bytes:
    """The secret in a file of 64 hex digits that only its owner can read: 32 bytes.

    Raises UsageError if other users can read the file, or it holds no secret. No message contains
    any of it.
    """
    try:
        status = path.stat()
        with path.open("rb") as file:
            text = file.read(_READ_BYTES)
    except OSError as error:
        raise UsageError(
            f"the secret of the job's nodes can't be read. path={path} reason={error.strerror}; "
            "make one, the same on all nodes: ckpt key new FILE"
        ) from error
    if status.st_uid not in (os.getuid(), 0) or stat.S_IMODE(status.st_mode) & 0o077:
        raise UsageError(
            f"the secret of the job's nodes can be read by others. path={path} "
            f"owner={status.st_uid} mode={stat.S_IMODE(status.st_mode):o}; chmod 600, and make a "
            "new one"
        )
    if not _TEXT.fullmatch(text):
        raise UsageError(
            f"not a secret: not 64 hex digits. path={path} size_bytes={len(text)}; ckpt key new "
            "FILE makes one"
        )
    return bytes.fromhex(text.decode().strip())


def missing_secret(where: str) -> UsageError:
    """The error of nodes that meet at ``where`` and have no secret, with what to type."""
    return UsageError(
        f"nodes that meet in etcd need a secret, the same on all of them. where={where}; make it "
        "once with 'ckpt key new job.secret', copy it to each node with mode 0600, and start them "
        "with --secret=job.secret (torchrun: --rdzv-conf=secret=job.secret)"
    )


def job_secret(nodes: NodesSpec) -> bytes:
    """The secret of a job's nodes; 32 bytes.

    Nodes whose membership is a file of one machine have it beside that file; the first node makes
    it. Raises UsageError.
    """
    if nodes.secret:
        return read_secret(Path(nodes.secret))
    path = Path(f"{nodes.where}.secret")
    if not path.exists():
        draft = path.with_name(f"{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(os.urandom(JOB_SECRET_BYTES).hex().encode())
        # A link appears whole or not at all, and never replaces the secret of a faster node.
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
        draft.unlink()
    return read_secret(path)
