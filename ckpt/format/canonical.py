"""Sealed JSON: one value has one spelling, which contains its own digest. Pure.

The spelling: object keys sorted, no white space, UTF-8, integers plain, floats as the shortest
decimal that reads back equal. The member ``digest`` holds the xxh3-128 of the same spelling without
that member. A reader spells what it decoded again and compares, so it refuses repeated keys, other
spellings and unknown members.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec
import xxhash

from ckpt.errors import FormatVersionError, IntegrityError, UsageError
from ckpt.values import Digest

# ---- digest: xxh3-128 everywhere

Buffer = bytes | bytearray | memoryview
"""Contiguous bytes, as backends take them."""

DIGEST_NAME = "xxh3-128"
"""What ``ckpt.json`` calls this digest."""


def digest(data: Buffer) -> Digest:
    """The 16-byte xxh3-128 digest of ``data`` (seed 0, big-endian). About 30 GB/s; releases the
    GIL."""
    return bytes(xxhash.xxh3_128_digest(data))


def digest_hex(data: Buffer) -> str:
    """The digest as 32 lower-case hex digits, as JSON records spell it."""
    return digest(data).hex()


T = TypeVar("T", bound=msgspec.Struct)

UPGRADE = "pip install --upgrade torch-ckpt"


def prepare_decoders(*kinds: type) -> None:
    """Let msgspec compile decoders for ``kinds`` now. Call it in the module that defines them.

    msgspec compiles a type at its first use, without a lock: two threads that decode a type for the
    first time at the same moment crash the process. At import, the import lock prevents that.
    """
    for kind in kinds:
        msgspec.json.Decoder(kind)


class _V(msgspec.Struct):
    v: int


class _FormatVersion(msgspec.Struct):
    format_version: int


prepare_decoders(_V, _FormatVersion)


def seal(value: msgspec.Struct, *, label: str, bytes_max: int) -> tuple[bytes, str]:
    """The canonical bytes of ``value`` and the digest inside them; its ``digest`` field is ignored.

    Raises UsageError if the bytes exceed ``bytes_max`` or a text cannot be encoded in UTF-8.
    """
    try:
        data, value_digest = _spell(value)
    except (UnicodeError, OverflowError, msgspec.MsgspecError) as error:
        raise UsageError(f"cannot be written as JSON. what={label} why={error}") from error
    if len(data) > bytes_max:
        raise UsageError(f"too large. what={label} size_bytes={len(data)} limit_bytes={bytes_max}")
    return data, value_digest


def unseal(
    data: bytes,
    kind: type[T],
    *,
    label: str,
    version: int,
    bytes_max: int,
    older_versions: tuple[int, ...] = (),
) -> T:
    """The value whose sealed bytes are ``data``, of ``version`` or one of ``older_versions``.

    Raises FormatVersionError if they are of another format version, IntegrityError for anything
    else that is not exactly what ``seal`` gives.
    """
    if len(data) > bytes_max:
        raise IntegrityError(
            f"too large to be read. what={label} size_bytes={len(data)} limit_bytes={bytes_max}"
        )
    field = "v" if "v" in kind.__struct_fields__ else "format_version"
    try:
        # The version is read first: a newer release's record may have other members, and would
        # look like damage.
        written = _version(data, field)
        if written not in older_versions:
            check_version(written, supported=version, label=label)
        value = msgspec.json.decode(data, type=kind)
        spelled, value_digest = _spell(value)
    except (msgspec.MsgspecError, UnicodeError, OverflowError, RecursionError) as error:
        raise IntegrityError(f"not a valid record. what={label} why={error}") from error
    if getattr(value, "digest", None) != value_digest:
        raise IntegrityError(
            f"bytes differ from their own digest. what={label} computed={value_digest}"
        )
    # The digest covers the spelled value, not the bytes read, so the bytes are compared as well.
    if spelled != data:
        raise IntegrityError(f"not the canonical spelling. what={label}")
    return value


def check_version(found: int, *, supported: int, label: str) -> None:
    """Raise FormatVersionError unless ``found`` is ``supported``."""
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
    members: dict[str, object] = msgspec.to_builtins(value)
    members.pop("digest", None)
    value_digest = digest_hex(msgspec.json.encode(members, order="sorted"))
    members["digest"] = value_digest
    return msgspec.json.encode(members, order="sorted"), value_digest
