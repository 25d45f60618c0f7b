"""The clients for S3 that stores may speak through, and stores that give up after one try."""

from __future__ import annotations

import pytest

from ckpt.backends.base import Backend
from ckpt.backends.objects.s3 import CLIENT_VARIABLE
from ckpt.backends.open import open_backend
from kit.servers.s3 import Bucket

CLIENTS = ("s3fs", "obstore")

HASTY: dict[str, object] = {
    "retries": {"max_attempts": 0},
    "connect_timeout": 10,
    "read_timeout": 1,
}
"""Options for botocore's configuration: no repetition, short waits."""

ONCE: dict[str, object] = {**HASTY, "read_timeout": 30}
"""The same for servers that do answer, however busy the machine is."""


def open_with(
    client: str, patch: pytest.MonkeyPatch, url: str, options: dict[str, object]
) -> Backend:
    """The store through that client, or a UsageError."""
    patch.setenv(CLIENT_VARIABLE, client)
    return open_backend(url, options)


def through(bucket: Bucket, endpoint: str, **more: object) -> dict[str, object]:
    """The bucket's options, with another endpoint, such as a proxy's."""
    return {**bucket.options, "endpoint_url": endpoint, **more}
