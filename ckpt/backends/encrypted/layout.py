"""The layout of an encrypted object: a header of 64 bytes, then frames of equal size. Pure.

docs/design/010-encryption.md describes the bytes. The stored length determines the plaintext's
length and the other way round, so listings need not open any object. Knows no cipher.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ckpt.backends.base import Buffer
from ckpt.errors import UsageError

VERSION = 1
"""The format version that this release writes and reads."""

HEADER_BYTES = 64
"""The header's length in every version, checksum included."""

FRAME_BYTES = 128 << 10
"""Plaintext of every frame but the last. Larger frames measured hardly faster, and each end of a
range reads a whole frame.
"""

TAG_BYTES = 16
"""The difference between a frame and its plaintext."""

PLAIN_BYTES_MAX = FRAME_BYTES << 32
"""Longest plaintext: 2^32 frames, 512 TiB."""

_MAGIC = b"ckptenc"
_HEADER = struct.Struct(">7sB8sQ16s16s8s")
_CHECKED_BYTES = HEADER_BYTES - 8
_BOUND_BYTES = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class EncryptedHeader:
    """The header of an encrypted object. ``plain_bytes`` is its plaintext's length.

    ``salt`` selects the object's own key. ``mac`` proves to a holder of the key that the rest of
    the header is genuine.
    """

    key_id: bytes
    plain_bytes: int
    salt: bytes
    mac: bytes = b""
    version: int = VERSION

    def bound_bytes(self) -> bytes:
        """The bytes that ``mac`` and every frame authenticate: all before the ``mac``."""
        return self._pack(b"")[:_BOUND_BYTES]

    def encode(self, name: str) -> bytes:
        """The 64 bytes at the start of the object ``name``."""
        return self._pack(_checksum(self._pack(b"")[:_CHECKED_BYTES], name))

    def _pack(self, checksum: bytes) -> bytes:
        return _HEADER.pack(
            _MAGIC, self.version, self.key_id, self.plain_bytes, self.salt, self.mac, checksum
        )


def decode_header(data: Buffer, name: str) -> EncryptedHeader | str:
    """The header in the first bytes of the object ``name``, or what is wrong with it.

    The result is undamaged but not yet proven genuine. Its checksum needs no key, so that damage
    can be told from a key that is not available.
    """
    if len(data) < HEADER_BYTES:
        return f"an encrypted object is shorter than its header. size_bytes={len(data)}"
    head = bytes(data[:HEADER_BYTES])
    magic, version, key_id, plain_bytes, salt, mac, checksum = _HEADER.unpack(head)
    # The order matters. The checksum needs no key: with it a flipped bit in the key's id is damage,
    # and an id that is unknown after this check is another key.
    if magic != _MAGIC:
        return "not an encrypted object"
    if checksum != _checksum(head[:_CHECKED_BYTES], name):
        return "an encrypted object's header is damaged"
    return EncryptedHeader(
        key_id=key_id, plain_bytes=plain_bytes, salt=salt, mac=mac, version=version
    )


def looks_encrypted(data: Buffer) -> bool:
    """Whether the bytes start like an encrypted object of any version."""
    return bytes(data[: len(_MAGIC)]) == _MAGIC


def sealed_size(plain_bytes: int) -> int:
    """The stored length of an object of ``plain_bytes``.

    Raises UsageError above PLAIN_BYTES_MAX.
    """
    if plain_bytes > PLAIN_BYTES_MAX:
        raise UsageError(
            f"too long to be encrypted. size_bytes={plain_bytes} limit_bytes={PLAIN_BYTES_MAX}"
        )
    return HEADER_BYTES + plain_bytes + TAG_BYTES * _frame_count(plain_bytes)


def plain_size(sealed_bytes: int) -> int | None:
    """The plaintext's length of an object that takes ``sealed_bytes`` in the store.

    None if no encrypted object has that length.
    """
    body = sealed_bytes - HEADER_BYTES
    # The inverse of sealed_size(): each stored length belongs to one plaintext length or to none.
    count = -(-body // (FRAME_BYTES + TAG_BYTES))
    plain = body - TAG_BYTES * count
    if body < 0 or plain > PLAIN_BYTES_MAX or _frame_count(plain) != count:
        return None
    return plain


def nonce(frame: int) -> bytes:
    """The nonce of a frame. Its AES key encrypts only one object, so the number is enough."""
    return frame.to_bytes(12, "big")


def associated_data(header: EncryptedHeader, name: str) -> bytes:
    """What every frame of the object ``name`` authenticates; its number in 8 bytes follows."""
    return header.bound_bytes() + name.encode()


def frames_of(offset_bytes: int, size_bytes: int) -> range:
    """The numbers of the frames that hold a range of the plaintext; none for an empty range."""
    first = offset_bytes // FRAME_BYTES
    return range(first, -(-(offset_bytes + size_bytes) // FRAME_BYTES) if size_bytes else first)


def sealed_range(offset_bytes: int, size_bytes: int, plain_bytes: int) -> tuple[int, int]:
    """Start and stop in the stored object of the frames of a range that is not empty."""
    frames = frames_of(offset_bytes, size_bytes)
    plain_stop = min(frames.stop * FRAME_BYTES, plain_bytes)
    return HEADER_BYTES + frames.start * (
        FRAME_BYTES + TAG_BYTES
    ), HEADER_BYTES + plain_stop + frames.stop * TAG_BYTES


def split_frames(data: Sequence[Buffer]) -> Iterator[memoryview]:
    """The concatenation of ``data``, frame by frame.

    A frame that spans several buffers is copied to memory that the next such frame overwrites.
    """
    gathered = memoryview(bytearray(FRAME_BYTES))
    gathered_bytes = 0
    for buffer in data:
        view = memoryview(buffer)
        at = 0
        while at < len(view):
            if not gathered_bytes and len(view) - at >= FRAME_BYTES:
                yield view[at : at + FRAME_BYTES]
                at += FRAME_BYTES
                continue
            taken = min(FRAME_BYTES - gathered_bytes, len(view) - at)
            gathered[gathered_bytes : gathered_bytes + taken] = view[at : at + taken]
            gathered_bytes, at = gathered_bytes + taken, at + taken
            if gathered_bytes == FRAME_BYTES:
                yield gathered
                gathered_bytes = 0
    if gathered_bytes:
        yield gathered[:gathered_bytes]


def _frame_count(plain_bytes: int) -> int:
    return -(-plain_bytes // FRAME_BYTES)


def _checksum(head: bytes, name: str) -> bytes:
    return hashlib.sha256(head + name.encode()).digest()[:8]
