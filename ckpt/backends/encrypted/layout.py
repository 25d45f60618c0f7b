"""Where the bytes of an encrypted object lie: a header of 64 bytes, then frames of equal size.
Pure; knows no cipher.

docs/dev/design/010-encryption.md describes the bytes. All sizes are functions of the plaintext's
length and back, so that listings need not open any object.
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
"""The same in every version, checksum included."""

FRAME_BYTES = 128 << 10
"""Plaintext of every frame but the last. Larger frames are hardly quicker, and a range's ends are
read by whole frames."""

TAG_BYTES = 16
"""What a frame is longer than its plaintext."""

PLAIN_BYTES_MAX = FRAME_BYTES << 32
"""Longest plaintext: 2^32 frames, 512 TiB."""

_MAGIC = b"ckptenc"
_HEADER = struct.Struct(">7sB8sQ16s16s8s")
_CHECKED_BYTES = HEADER_BYTES - 8
_BOUND_BYTES = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class EncryptedHeader:
    """What an encrypted object says of itself. ``plain_bytes`` is its plaintext's length.

    ``salt`` chooses the object's own key, ``mac`` shows whoever has the key that the rest of the
    header is genuine.
    """

    key_id: bytes
    plain_bytes: int
    salt: bytes
    mac: bytes = b""
    version: int = VERSION

    def bound_bytes(self) -> bytes:
        """The bytes that ``mac`` and every frame are bound to: all before the ``mac``."""
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

    It is whole, not yet genuine: its checksum needs no key, so that damage can be told from a key
    that isn't here.
    """
    if len(data) < HEADER_BYTES:
        return f"an encrypted object is shorter than its header. size_bytes={len(data)}"
    head = bytes(data[:HEADER_BYTES])
    magic, version, key_id, plain_bytes, salt, mac, checksum = _HEADER.unpack(head)
    if magic != _MAGIC:
        return "not an encrypted object"
    if checksum != _checksum(head[:_CHECKED_BYTES], name):
        return "an encrypted object's header is damaged"
    return EncryptedHeader(
        key_id=key_id, plain_bytes=plain_bytes, salt=salt, mac=mac, version=version
    )


def looks_encrypted(data: Buffer) -> bool:
    """Whether bytes start as an encrypted object of any version does."""
    return bytes(data[: len(_MAGIC)]) == _MAGIC


def sealed_size(plain_bytes: int) -> int:
    """How long an object of ``plain_bytes`` is in the store. Raises UsageError above
    PLAIN_BYTES_MAX."""
    if plain_bytes > PLAIN_BYTES_MAX:
        raise UsageError(
            f"too long to be encrypted. size_bytes={plain_bytes} limit_bytes={PLAIN_BYTES_MAX}"
        )
    return HEADER_BYTES + plain_bytes + TAG_BYTES * _frame_count(plain_bytes)


def plain_size(sealed_bytes: int) -> int | None:
    """The plaintext's length of an object that takes ``sealed_bytes`` in the store; None where no
    object can."""
    body = sealed_bytes - HEADER_BYTES
    count = -(-body // (FRAME_BYTES + TAG_BYTES))
    plain = body - TAG_BYTES * count
    if body < 0 or plain > PLAIN_BYTES_MAX or _frame_count(plain) != count:
        return None
    return plain


def nonce(frame: int) -> bytes:
    """The nonce of a frame; its key is used for one object only."""
    return frame.to_bytes(12, "big")


def associated_data(header: EncryptedHeader, name: str) -> bytes:
    """What every frame of the object ``name`` is bound to; the frame's number in 8 bytes
    follows."""
    return header.bound_bytes() + name.encode()


def frames_of(offset_bytes: int, size_bytes: int) -> range:
    """The numbers of the frames that hold a range of the plaintext; none for an empty range."""
    first = offset_bytes // FRAME_BYTES
    return range(first, -(-(offset_bytes + size_bytes) // FRAME_BYTES) if size_bytes else first)


def sealed_range(offset_bytes: int, size_bytes: int, plain_bytes: int) -> tuple[int, int]:
    """Where the frames of a range, which is not empty, start and stop in the stored object."""
    frames = frames_of(offset_bytes, size_bytes)
    plain_stop = min(frames.stop * FRAME_BYTES, plain_bytes)
    return HEADER_BYTES + frames.start * (
        FRAME_BYTES + TAG_BYTES
    ), HEADER_BYTES + plain_stop + frames.stop * TAG_BYTES


def split_frames(data: Sequence[Buffer]) -> Iterator[memoryview]:
    """The concatenation of ``data`` in frames. A frame over several buffers is copied, to memory
    used again by the next."""
    gathered = memoryview(bytearray(FRAME_BYTES))
    held = 0
    for buffer in data:
        view = memoryview(buffer)
        at = 0
        while at < len(view):
            if not held and len(view) - at >= FRAME_BYTES:
                yield view[at : at + FRAME_BYTES]
                at += FRAME_BYTES
                continue
            taken = min(FRAME_BYTES - held, len(view) - at)
            gathered[held : held + taken] = view[at : at + taken]
            held, at = held + taken, at + taken
            if held == FRAME_BYTES:
                yield gathered
                held = 0
    if held:
        yield gathered[:held]


def _frame_count(plain_bytes: int) -> int:
    return -(-plain_bytes // FRAME_BYTES)


def _checksum(head: bytes, name: str) -> bytes:
    return hashlib.sha256(head + name.encode()).digest()[:8]
