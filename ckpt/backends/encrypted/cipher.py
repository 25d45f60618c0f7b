"""AES-GCM over whole objects and ranges of them. The only file that needs the package
``cryptography``.

All passes over bytes release the GIL.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ckpt.backends.base import Buffer
from ckpt.backends.encrypted.layout import (
    FRAME_BYTES,
    HEADER_BYTES,
    TAG_BYTES,
    EncryptedHeader,
    associated_data,
    frames_of,
    nonce,
    sealed_size,
    split_frames,
)
from ckpt.backends.encrypted.secret import EncryptionKey

# Memory for stored bytes on their way, used again and again: new pages cost more time than the
# cipher does.

KEPT_BYTES_MAX = 256 << 20
"""Most memory kept for the next use: four packs. The kernel may take idle pieces of packs back when
it is short."""

_KEPT_BYTES_MIN = 1 << 20
"""Smaller pieces come from the allocator, which keeps its own."""

_FREE_BYTES_MIN = 16 << 20
"""Idle pieces of this size are offered to the kernel: a millisecond of work. Smaller ones come back
within moments."""

_HUGE_BYTES = 2 << 20
"""Pieces are multiples of a huge page, which takes one page fault instead of 512."""

_PRIVATE = (
    {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
)
"""Private memory: the shared kind can neither be huge nor be offered to the kernel."""


class CipherMemory:
    """Hands out page-aligned memory and keeps what comes back, the last used longest.
    Thread-safe."""

    def __init__(self, kept_bytes_max: int = KEPT_BYTES_MAX) -> None:
        self._kept_bytes_max = kept_bytes_max
        self._idle: list[mmap.mmap] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def borrow(self, size_bytes: int) -> Iterator[memoryview]:
        """Memory that holds anything, until the end of the block: others write into it
        afterwards."""
        if size_bytes < _KEPT_BYTES_MIN:
            yield memoryview(bytearray(size_bytes))
            return
        piece = self._take(size_bytes) or _new(size_bytes)
        try:
            yield memoryview(piece)[:size_bytes]
        finally:
            self._give_back(piece)

    @property
    def kept_bytes(self) -> int:
        """Memory that is kept now."""
        with self._lock:
            return sum(len(piece) for piece in self._idle)

    def _take(self, size_bytes: int) -> mmap.mmap | None:
        with self._lock:
            fitting = [piece for piece in self._idle if len(piece) >= size_bytes]
            if not fitting:
                return None
            found = min(fitting, key=len)
            self._idle = [piece for piece in self._idle if piece is not found]
            return found

    def _give_back(self, piece: mmap.mmap) -> None:
        if len(piece) >= _FREE_BYTES_MIN and hasattr(mmap, "MADV_FREE"):
            _advise(piece, mmap.MADV_FREE)
        with self._lock:
            self._idle.append(piece)
            kept = sum(len(one) for one in self._idle)
            while kept > self._kept_bytes_max:
                kept -= len(self._idle.pop(0))  # its memory goes with its last view


def _new(size_bytes: int) -> mmap.mmap:
    piece = mmap.mmap(-1, -(-size_bytes // _HUGE_BYTES) * _HUGE_BYTES, **_PRIVATE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        _advise(piece, mmap.MADV_HUGEPAGE)
    return piece


def _advise(piece: mmap.mmap, advice: int) -> None:
    with contextlib.suppress(
        OSError
    ):  # a kernel that does not know it; the memory is as good without
        piece.madvise(advice)


_UPDATE_BYTES_MAX = 1 << 30
"""Bytes handed to one call of the cipher, whose lengths are C ints."""


class FrameCipher(Protocol):
    """AES-GCM from memory into memory: the tag follows the ciphertext, in both directions."""

    def encrypt_into(
        self, nonce: bytes, data: Buffer, associated_data: bytes, buf: Buffer, /
    ) -> int:
        """Fill ``buf`` with ciphertext and tag."""
        ...

    def decrypt_into(
        self, nonce: bytes, data: Buffer, associated_data: bytes, buf: Buffer, /
    ) -> int:
        """Fill ``buf`` with plaintext; raises InvalidTag."""
        ...


class CopyingCipher:
    """The same through results of its own, for releases of ``cryptography`` that cannot write into
    memory given to them."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    def encrypt_into(
        self, nonce: bytes, data: Buffer, associated_data: bytes, buf: Buffer, /
    ) -> int:
        """See FrameCipher."""
        return _copy(self._cipher.encrypt(nonce, data, associated_data), buf)

    def decrypt_into(
        self, nonce: bytes, data: Buffer, associated_data: bytes, buf: Buffer, /
    ) -> int:
        """See FrameCipher."""
        return _copy(self._cipher.decrypt(nonce, data, associated_data), buf)


def frame_cipher(key: bytes) -> FrameCipher:
    """The cipher of one object's frames."""
    return AESGCM(key) if hasattr(AESGCM, "encrypt_into") else CopyingCipher(key)


def digest_of(data: Sequence[Buffer], key: EncryptionKey) -> bytes:
    """A digest of the plaintext by GMAC with one fixed nonce: 20 GB/s. To be kept secret; only its
    MAC is ever shown."""
    mac = Cipher(algorithms.AES(key.digest_key), modes.GCM(bytes(12))).encryptor()
    for buffer in data:
        view = memoryview(buffer)
        for at in range(0, len(view), _UPDATE_BYTES_MAX):
            mac.authenticate_additional_data(view[at : at + _UPDATE_BYTES_MAX])
    mac.finalize()
    return mac.tag


@contextlib.contextmanager
def sealed(
    name: str, data: Sequence[Buffer], key: EncryptionKey, memory: CipherMemory
) -> Iterator[memoryview]:
    """The object ``name`` as it is stored, in page-aligned memory of its size that is lent until
    the end of the block.

    The same name, plaintext and key give the same bytes. The buffers must not change meanwhile.
    """
    plain_bytes = sum(len(buffer) for buffer in data)
    header = key.header(name, digest=digest_of(data, key), plain_bytes=plain_bytes)
    with memory.borrow(sealed_size(plain_bytes)) as out:
        out[:HEADER_BYTES] = header.encode(name)
        cipher = frame_cipher(key.frame_key(header, name))
        bound = associated_data(header, name)
        at = HEADER_BYTES
        for number, plain in enumerate(split_frames(data)):
            stop = at + len(plain) + TAG_BYTES
            cipher.encrypt_into(
                nonce(number), plain, bound + number.to_bytes(8, "big"), out[at:stop]
            )
            at = stop
        yield out


def unseal(
    name: str,
    header: EncryptedHeader,
    stored: memoryview,
    out: memoryview,
    key: EncryptionKey,
    *,
    offset_bytes: int,
) -> str | None:
    """Fill ``out`` with the plaintext from ``offset_bytes`` on, or say what is wrong; ``out`` then
    holds anything.

    ``stored`` starts with the first frame of that range. ``header`` is genuine, and its plaintext
    covers ``out``.
    """
    cipher = frame_cipher(key.frame_key(header, name))
    bound = associated_data(header, name)
    stop_bytes = offset_bytes + len(out)
    at = 0
    for number in frames_of(offset_bytes, len(out)):  # a frame takes 14 us: no objects here
        start = number * FRAME_BYTES
        stop = min(start + FRAME_BYTES, header.plain_bytes)
        low, high = max(start, offset_bytes), min(stop, stop_bytes)
        target = out[low - offset_bytes : high - offset_bytes]
        whole = high - low == stop - start
        plain = target if whole else memoryview(bytearray(stop - start))
        after = at + stop - start + TAG_BYTES
        try:
            cipher.decrypt_into(
                nonce(number), stored[at:after], bound + number.to_bytes(8, "big"), plain
            )
        except InvalidTag:
            return f"encrypted bytes are not what was written. frame={number}"
        if not whole:
            target[:] = plain[low - start : high - start]
        at = after
    return None


def _copy(data: bytes, out: Buffer) -> int:
    memoryview(out)[:] = data
    return len(data)
