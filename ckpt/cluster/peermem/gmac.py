"""AES-256-GMAC. The only file here that needs the package ``cryptography``."""

from __future__ import annotations

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

_UPDATE_BYTES_MAX = 1 << 30
"""Bytes handed to one call, whose lengths are C ints."""


class Gmac:
    """One body's MAC. ``key`` and ``nonce`` together are used for one body only, or the key is
    given away."""

    __slots__ = ("_cipher",)

    def __init__(self, key: bytes, nonce: bytes) -> None:
        self._cipher = Cipher(algorithms.AES(key), modes.GCM(nonce)).encryptor()

    def update(self, data: memoryview | bytes) -> None:
        """Take bytes in. Releases the GIL."""
        view = memoryview(data)
        for at in range(0, len(view), _UPDATE_BYTES_MAX):
            self._cipher.authenticate_additional_data(view[at : at + _UPDATE_BYTES_MAX])

    def tag(self) -> bytes:
        """The MAC, 16 bytes. Ends this object's use."""
        self._cipher.finalize()
        return self._cipher.tag
