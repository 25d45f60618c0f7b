"""AES-256-GMAC.

A module of its own, imported on first use: it needs the optional package ``cryptography``.
"""

from __future__ import annotations

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

_UPDATE_BYTES_MAX = 1 << 30
"""Bytes of one call to ``cryptography``, whose lengths are C ints."""


class Gmac:
    """The GMAC of one body.

    A pair of ``key`` and ``nonce`` must be used for one body only, or the key can be computed.
    """

    __slots__ = ("_cipher",)

    def __init__(self, key: bytes, nonce: bytes) -> None:
        self._cipher = Cipher(algorithms.AES(key), modes.GCM(nonce)).encryptor()

    def update(self, data: memoryview | bytes) -> None:
        """Add bytes. Releases the GIL."""
        view = memoryview(data)
        for start in range(0, len(view), _UPDATE_BYTES_MAX):
            self._cipher.authenticate_additional_data(view[start : start + _UPDATE_BYTES_MAX])

    def tag(self) -> bytes:
        """The MAC, 16 bytes. Ends this object's use."""
        self._cipher.finalize()
        return self._cipher.tag
