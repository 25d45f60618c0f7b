"""A store's encryption key, and the keys for single purposes derived from it. Pure.

Needs no cipher.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
from dataclasses import dataclass, field
from typing import NoReturn

from ckpt.backends.encrypted.layout import EncryptedHeader
from ckpt.errors import UsageError

SECRET_BYTES = 32
"""Length of a key: what AES-256 takes."""

_DISTINCT_MIN = 12
"""Fewest different bytes in a key. 32 random bytes have 30 on average; fewer than 12 occur once in
10^22 keys.
"""

_DOMAIN = b"ckpt encrypted objects 1"


@dataclass(frozen=True, slots=True)
class EncryptionKey:
    """A key of 32 random bytes, held as what is derived from it.

    Its ``id`` is public; nothing else is ever shown or pickled.
    """

    id: bytes
    digest_key: bytes = field(repr=False)
    _salt_key: bytes = field(repr=False)
    _header_key: bytes = field(repr=False)
    _frames_key: bytes = field(repr=False)

    @classmethod
    def of(cls, secret: bytes) -> EncryptionKey:
        """The key made of 32 random bytes.

        Raises UsageError for another length, and for bytes that are evidently not random.
        """
        if len(secret) != SECRET_BYTES:
            raise UsageError(
                f"wrong length of an encryption key. size_bytes={len(secret)} "
                f"wanted={SECRET_BYTES}; make a new one"
            )
        if len(set(secret)) < _DISTINCT_MIN:
            raise UsageError(
                "a key isn't random: it holds only a few different bytes; make a new one"
            )
        # HKDF-SHA256, one output block per purpose: extract, then expand with the counter byte 01.
        root = _mac(_DOMAIN, secret)
        public, *private = (
            _mac(root, use + b"\x01") for use in (b"id", b"digest", b"salt", b"header", b"frames")
        )
        return cls(public[:8], *private)

    def __repr__(self) -> str:
        return f"Key(id={self.id.hex()})"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a key isn't pickled: hand its source to the other process and load it there"
        )

    def header(self, name: str, *, digest: bytes, plain_bytes: int) -> EncryptedHeader:
        """The header of the object ``name`` whose plaintext has ``digest`` under ``digest_key``."""
        # The salt is a function of key, name and plaintext, not random: a repeated put stores the
        # same bytes, and another plaintext at the same name gets another AES key, so no nonce
        # repeats.
        salt = _mac(self._salt_key, digest + plain_bytes.to_bytes(8, "big") + name.encode())[:16]
        bare = EncryptedHeader(key_id=self.id, plain_bytes=plain_bytes, salt=salt)
        return EncryptedHeader(
            key_id=self.id, plain_bytes=plain_bytes, salt=salt, mac=self._mac_of(bare, name)
        )

    def authenticates(self, header: EncryptedHeader, name: str) -> bool:
        """Whether a writer with this key made ``header`` for the object ``name``."""
        return hmac.compare_digest(header.mac, self._mac_of(header, name))

    def frame_key(self, header: EncryptedHeader, name: str) -> bytes:
        """The AES-256 key of one object's frames."""
        return _mac(self._frames_key, header.salt + name.encode())

    def _mac_of(self, header: EncryptedHeader, name: str) -> bytes:
        return _mac(self._header_key, header.bound_bytes() + name.encode())[:16]


@dataclass(frozen=True, slots=True)
class EncryptionKeys:
    """The key to write with, and older keys that only read."""

    writing: EncryptionKey
    older: tuple[EncryptionKey, ...] = ()

    def find(self, key_id: bytes) -> EncryptionKey | None:
        """The key with this id, or None."""
        for key in (self.writing, *self.older):
            if key.id == key_id:
                return key
        return None

    @property
    def ids(self) -> str:
        """The ids of all keys, for messages."""
        return ",".join(key.id.hex() for key in (self.writing, *self.older))


def _mac(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, "sha256")


# ---- Key material: from the content of a file, variable or command to 32 bytes. No message shows
# it.

MATERIAL_BYTES_MAX = 1024
"""More than any spelling of a key takes; longer content is no key."""

_HEX = re.compile(rb"[0-9A-Fa-f]{64}")
_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{43}=?")
_TEXT = re.compile(rb"[\t\n\r -~]*")


def parse_secret(material: bytes, *, source: str) -> bytes:
    """The key in ``material``: 32 raw bytes, 64 hex digits, or base64 of 32 bytes.

    Text may have white space around it. Raises UsageError for anything else; a passphrase of any
    length is no key. ``source`` names the material in messages.
    """
    if len(material) == SECRET_BYTES and not _TEXT.fullmatch(material):
        return material
    text = material.strip()
    if _HEX.fullmatch(text):
        return bytes.fromhex(text.decode())
    if _BASE64.fullmatch(text):
        try:
            secret = base64.b64decode(
                text.rstrip(b"=") + b"=", altchars=b"-_" if re.search(rb"[-_]", text) else None
            )
        except binascii.Error:
            secret = b""
        if len(secret) == SECRET_BYTES:
            return secret
    problem = (
        "it is empty"
        if not text
        else "it is neither 32 raw bytes nor 64 hex digits nor base64 of 32 bytes"
    )
    raise UsageError(
        f"no encryption key: {problem}. source={source} size_bytes={len(material)}; passphrases "
        "are no keys, make one with ckpt.backends.encrypted.keys.write_new_key(path)"
    )
