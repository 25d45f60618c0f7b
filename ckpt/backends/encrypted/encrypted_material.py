"""From what a file, variable or command holds to the 32 bytes of a key. Pure; no message holds any of it."""

from __future__ import annotations

import base64
import binascii
import re

from ckpt.backends.encrypted.secret import SECRET_BYTES
from ckpt.errors import UsageError

MATERIAL_BYTES_MAX = 1024
"""More than any spelling of a key takes; whatever is longer is something else."""

_HEX = re.compile(rb"[0-9A-Fa-f]{64}")
_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{43}=?")
_TEXT = re.compile(rb"[\t\n\r -~]*")


def secret_of(material: bytes, *, source: str) -> bytes:
    """The key in ``material``: 32 raw bytes, or 64 hex digits, or base64 of 32 bytes, with white space around.

    Raises UsageError for everything else; a passphrase of whatever length is no key. ``source`` names it in the message.
    """
    if len(material) == SECRET_BYTES and not _TEXT.fullmatch(material):
        return material
    text = material.strip()
    if _HEX.fullmatch(text):
        return bytes.fromhex(text.decode())
    if _BASE64.fullmatch(text):
        try:
            secret = base64.b64decode(text.rstrip(b"=") + b"=", altchars=b"-_" if re.search(rb"[-_]", text) else None)
        except binascii.Error:
            secret = b""
        if len(secret) == SECRET_BYTES:
            return secret
    what = "it is empty" if not text else "it is neither 32 raw bytes nor 64 hex digits nor base64 of 32 bytes"
    raise UsageError(
        f"no encryption key here: {what}. source={source} size_bytes={len(material)}; passphrases are no keys, make one with "
        "ckpt.backends.encrypted.keys.write_new_key(path)"
    )
