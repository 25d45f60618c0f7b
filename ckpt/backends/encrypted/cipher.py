"""AES-GCM over whole objects and over ranges of them.

Apart from the rest of the package: only this module needs the package ``cryptography``. All passes
over bytes release the GIL.
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

# ---- Memory for ciphertext, reused: fresh pages cost more time than the cipher does.

KEPT_BYTES_MAX = 256 << 20
"""Most memory kept for reuse: four packs. The kernel may take idle pack-sized pieces back when
memory is short.
"""

_KEPT_BYTES_MIN = 1 << 20
"""Smaller pieces are left to the allocator, which keeps its own."""

_FREE_BYTES_MIN = 16 << 20
"""Idle pieces of this size are offered to the kernel, which costs a millisecond. Smaller ones are
used again within moments.
"""

_HUGE_BYTES = 2 << 20
"""Pieces are multiples of a huge page, which takes one page fault instead of 512."""

_PRIVATE = (
    {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
)
"""Private memory: shared memory can neither use huge pages nor be offered to the kernel."""


class CipherMemory:
    """Lends page-aligned memory, and keeps returned pieces for reuse. Thread-safe.

    Above the limit the piece that was returned first is dropped.
    """

    def __init__(self, kept_bytes_max: int = KEPT_BYTES_MAX) -> None:
        self._kept_bytes_max = kept_bytes_max
        self._idle: list[mmap.mmap] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def borrow(self, size_bytes: int) -> Iterator[memoryview]:
        """Memory with arbitrary content, until the end of the block; then others write into it."""
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
        """Memory kept for reuse now."""
        with self._lock:
            return sum(len(piece) for piece in self._idle)

    def _take(self, size_bytes: int) -> mmap.mmap | None:
        with self._lock:
            fitting = [piece for piece in self._idle if len(piece) >= size_bytes]
            if not fitting:
                return None
            smallest = min(fitting, key=len)
            self._idle = [piece for piece in self._idle if piece is not smallest]
            return smallest

    def _give_back(self, piece: mmap.mmap) -> None:
        if len(piece) >= _FREE_BYTES_MIN and hasattr(mmap, "MADV_FREE"):
            _advise(piece, mmap.MADV_FREE)
        with self._lock:
            self._idle.append(piece)
            kept = sum(len(idle) for idle in self._idle)
            while kept > self._kept_bytes_max:
                kept -= len(self._idle.pop(0))  # its memory is freed with its last view


def _new(size_bytes: int) -> mmap.mmap:
    piece = mmap.mmap(-1, -(-size_bytes // _HUGE_BYTES) * _HUGE_BYTES, **_PRIVATE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        _advise(piece, mmap.MADV_HUGEPAGE)
    return piece


def _advise(piece: mmap.mmap, advice: int) -> None:
    with contextlib.suppress(OSError):  # an older kernel; the advice is optional
        piece.madvise(advice)


_UPDATE_BYTES_MAX = 1 << 30
"""Bytes per call of the cipher, whose lengths are C ints."""


class FrameCipher(Protocol):
    """AES-GCM from memory to memory. The tag follows the ciphertext, in both directions."""

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
    """A FrameCipher over an API that returns new bytes.

    For releases of ``cryptography`` that cannot write into given memory.
    """

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    def encrypt_into(
        self, nonce: bytes, data: Buffer, associated_data: bytes, buf: Buffer, /
    ) -> int:
        return _copy(self._cipher.encrypt(nonce, data, associated_data), buf)

    def decrypt_into(
        self, nonce: bytes, data: Buffer, associated_data: bytes, buf: Buffer, /
    ) -> int:
        return _copy(self._cipher.decrypt(nonce, data, associated_data), buf)


def frame_cipher(key: bytes) -> FrameCipher:
    """The cipher of one object's frames."""
    return AESGCM(key) if hasattr(AESGCM, "encrypt_into") else CopyingCipher(key)


def digest_of(data: Sequence[Buffer], key: EncryptionKey) -> bytes:
    """A digest of the plaintext by GMAC with one fixed nonce, at 20 GB/s.

    It must stay secret: only its MAC, the salt, is ever stored.
    """
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
    """The object ``name`` as stored, in page-aligned memory lent until the end of the block.

    The same name, plaintext and key give the same bytes. The buffers must not change meanwhile:
    then the salt would belong to other bytes than are encrypted, and a repeated put could reuse a
    nonce.
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
    """Fill ``out`` with the plaintext from ``offset_bytes`` on, or return what is wrong.

    After a failure the content of ``out`` is undefined. ``stored`` starts with the first frame of
    that range. ``header`` is genuine, and its plaintext covers ``out``.
    """
    cipher = frame_cipher(key.frame_key(header, name))
    bound = associated_data(header, name)
    stop_bytes = offset_bytes + len(out)
    at = 0
    for number in frames_of(offset_bytes, len(out)):  # 14 us per frame: allocate nothing here
        start = number * FRAME_BYTES
        stop = min(start + FRAME_BYTES, header.plain_bytes)
        low, high = max(start, offset_bytes), min(stop, stop_bytes)
        target = out[low - offset_bytes : high - offset_bytes]
        # Frames that are wanted whole are decrypted in place; the two at the ends of a range go
        # through memory of their own, because GCM authenticates whole frames only.
        is_whole = high - low == stop - start
        plain = target if is_whole else memoryview(bytearray(stop - start))
        after = at + stop - start + TAG_BYTES
        try:
            cipher.decrypt_into(
                nonce(number), stored[at:after], bound + number.to_bytes(8, "big"), plain
            )
        except InvalidTag:
            return f"encrypted bytes are damaged. frame={number}"
        if not is_whole:
            target[:] = plain[low - start : high - start]
        at = after
    return None


def _copy(data: bytes, out: Buffer) -> int:
    memoryview(out)[:] = data
    return len(data)
