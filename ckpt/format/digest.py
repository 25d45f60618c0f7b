"""The one digest of ckpt: xxh3-128, at memory speed."""

from __future__ import annotations

import xxhash

from ckpt.values import Digest

Buffer = bytes | bytearray | memoryview
"""Contiguous bytes, as the storage seam takes them."""

DIGEST_NAME = "xxh3-128"
"""What ``ckpt.json`` calls this digest."""


def digest(data: Buffer) -> Digest:
    """The 16-byte xxh3-128 digest of ``data`` (seed 0, big-endian). About 30 GB/s; releases the GIL."""
    return bytes(xxhash.xxh3_128_digest(data))


def digest_hex(data: Buffer) -> str:
    """The same as 32 lower-case hex digits, as JSON records spell every digest."""
    return digest(data).hex()
