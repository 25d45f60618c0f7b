"""Sealed JSON: one value, one spelling, with the digest of itself inside.

The spelling: object keys sorted, no white space, UTF-8, integers plain, floats as the shortest
decimal that reads back equal. The member ``digest`` holds the xxh3-128 of the same spelling without
that member. A reader spells what it read once more and compares, so doubled keys, other spellings
and unknown members are all refused alike.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec
import xxhash

from ckpt.errors import FormatVersionError, IntegrityError, UsageError
from ckpt.values import Digest

# The one digest of ckpt: xxh3-128, at memory speed.

Buffer = bytes | bytearray | memoryview
"""Contiguous bytes, as the storage seam takes them."""

DIGEST_NAME = "xxh3-128"
"""What ``ckpt.json`` calls this digest."""


def digest(data: Buffer) -> Digest:
    """The 16-byte xxh3-128 digest of ``data`` (seed 0, big-endian). About 30 GB/s; releases the
    GIL."""
    return bytes(xxhash.xxh3_128_digest(data))


def digest_hex(data: Buffer) -> str:
    """The same as 32 lower-case hex digits, as JSON records spell every digest."""
    return digest(data).hex()


T = TypeVar("T", bound=msgspec.Struct)

UPGRADE = "pip install --upgrade torch-ckpt"


def prepare_decoders(*kinds: type) -> None:
    """Let msgspec learn ``kinds`` now; call it where they are defined, so that it runs under the
    import's lock.

    msgspec learns a type at its first use, without a lock of its own: two threads that decode a
    type for the first time at the same moment crash the process.
    """
    for kind in kinds:
        msgspec.json.Decoder(kind)


class _V(msgspec.Struct):
    v: int


class _FormatVersion(msgspec.Struct):
    format_version: int


prepare_decoders(_V, _FormatVersion)


def seal(value: msgspec.Struct, *, label: str, bytes_max: int) -> tuple[bytes, str]:
    """The canonical bytes of ``value`` and the digest inside them; the value's own ``digest`` field
    is ignored.

    Raises UsageError where the bytes exceed ``bytes_max`` or a text can't be spelled in UTF-8.
    """
    try:
        data, seen = _spell(value)
    except (UnicodeError, OverflowError, msgspec.MsgspecError) as error:
        raise UsageError(f"cannot be written as JSON. what={label} why={error}") from error
    if len(data) > bytes_max:
        raise UsageError(f"too large. what={label} size_bytes={len(data)} limit_bytes={bytes_max}")
    return data, seen


def unseal(data: bytes, kind: type[T], *, label: str, version: int, bytes_max: int) -> T:
    """The value whose sealed bytes are ``data``.

    Raises FormatVersionError where they were written in another format version, IntegrityError for
    anything else that is not exactly what ``seal`` gives.
    """
    if len(data) > bytes_max:
        raise IntegrityError(
            f"too large to be read. what={label} size_bytes={len(data)} limit_bytes={bytes_max}"
        )
    field = "v" if "v" in kind.__struct_fields__ else "format_version"
    try:
        found = _version(data, field)
        check_version(found, supported=version, label=label)
        value = msgspec.json.decode(data, type=kind)
        spelled, seen = _spell(value)
    except (msgspec.MsgspecError, UnicodeError, OverflowError, RecursionError) as error:
        raise IntegrityError(f"not a valid record. what={label} why={error}") from error
    if getattr(value, "digest", None) != seen:
        raise IntegrityError(f"bytes differ from their own digest. what={label} computed={seen}")
    if spelled != data:
        raise IntegrityError(f"not the canonical spelling. what={label}")
    return value


def check_version(found: int, *, supported: int, label: str) -> None:
    """Raises FormatVersionError unless ``found`` is ``known``."""
    if found != supported:
        raise FormatVersionError(
            f"written in a format version that this release does not read. what={label} "
            f"found={found} known={supported} "
            f"upgrade torch-ckpt: {UPGRADE}"
        )


def _version(data: bytes, field: str) -> int:
    if field == "v":
        return msgspec.json.decode(data, type=_V).v
    return msgspec.json.decode(data, type=_FormatVersion).format_version


def _spell(value: msgspec.Struct) -> tuple[bytes, str]:
    plain: dict[str, object] = msgspec.to_builtins(value)
    plain.pop("digest", None)
    seen = digest_hex(msgspec.json.encode(plain, order="sorted"))
    plain["digest"] = seen
    return msgspec.json.encode(plain, order="sorted"), seen
