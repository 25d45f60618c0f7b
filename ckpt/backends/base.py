"""The seam between ckpt and any storage: six operations, one of them atomic.

A store is a flat map from keys to immutable bytes. Create-if-absent is the only atomic operation
that ckpt needs; there is no rename, no append, no lock. Implementers write these six and pass
``ckpt.testing.contract``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ckpt.errors import UsageError

Buffer = bytes | bytearray | memoryview
"""Contiguous bytes. A memoryview must be one-dimensional with itemsize 1."""


@dataclass(frozen=True, slots=True)
class Stat:
    """What a store says of one object: its key and length. ``modified_unix_s`` is the store's own
    clock, for sweeps only."""

    key: str
    size_bytes: int
    modified_unix_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a store can do, found out by asking it, never assumed.

    ``create_only``: ``put(..., create_only=True)`` is atomic among all writers of the world. A
    store without it refuses such a put with UsageError. ``read_bytes_best``: the read size at which
    a request's fixed cost stops to matter; neighbouring ranges are joined up to it.
    ``concurrency_best``: how many reads or writes in flight fill the link.
    """

    create_only: bool
    read_bytes_best: int
    concurrency_best: int
    direct_io: bool = False


class Backend(Protocol):
    """One object store prefix. Keys are ``/``-separated relative names (see ``check_key``).
    Thread-safe."""

    @property
    def url(self) -> str:
        """The store's address for messages, credentials removed."""
        ...

    def capabilities(self) -> Capabilities:
        """What this store can do; may probe it once and remember."""
        ...

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        """Store the concatenation of ``data`` at ``key``, all or nothing, durable on return.

        Readers see the whole object or none. With ``create_only`` raises KeyExistsError where the
        key exists. A lost reply raises UnavailableError: whether it landed is then unknown, and
        repeating the same put is safe (with ``create_only`` it may then raise KeyExistsError for
        the caller's own bytes; settle that by reading them). Raises StoreFullError,
        StoreDeniedError, UnavailableError. The buffers may be reused on return.
        """
        ...

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        """Fill ``out`` with the bytes from ``offset_bytes`` on.

        Raises NotFoundError where there is no such key and IntegrityError where the object ends
        before ``out`` is full.
        """
        ...

    def stat(self, key: str) -> Stat | None:
        """The object's facts, or None where there is none."""
        ...

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        """Objects whose key starts with ``prefix`` and is greater than ``after``, in key order
        (Unicode code points)."""
        ...

    def delete(self, key: str) -> None:
        """Remove the object; a missing key is no error."""
        ...

    def close(self) -> None:
        """Release connections and handles; idempotent."""
        ...


# Which names may be keys, the same for every store, so that an object can be copied from any
# store to any other.

KEY_BYTES_MAX = 512
"""Longest key in UTF-8 bytes; object stores take 1,024, and a store's own prefix needs room too."""

COMPONENT_BYTES_MAX = 255
"""Longest part between slashes in UTF-8 bytes: what file systems take as one name."""

RESERVED = (".tmp", ".probe")
"""First components that stores keep for themselves; they are never listed."""


def check_key(key: str) -> str:
    """Return ``key`` where it can name an object in any store.

    A key is relative, has no empty, ``.`` or ``..`` component, no backslash and no control
    character, is at most 512 UTF-8 bytes long, 255 a component, and does not start with a reserved
    component. Raises UsageError otherwise.
    """
    if why := _why_bad(key):
        raise UsageError(
            f"not a key: {why}. key={key!r}; use relative names such as 'packs/a.pack'"
        )
    return key


def check_prefix(prefix: str) -> str:
    """Return ``prefix`` where some key can start with it; raises UsageError otherwise. Empty means
    every key."""
    if prefix and (why := _why_bad(prefix + "x")):
        raise UsageError(
            f"no key starts so: {why}. prefix={prefix!r}; use prefixes such as 'packs/'"
        )
    return prefix


def is_key(key: str) -> bool:
    """Whether ``check_key`` takes it; listings leave out foreign files with it."""
    return _why_bad(key) is None


def _why_bad(key: str) -> str | None:
    try:
        encoded = key.encode()
    except UnicodeEncodeError:
        return "it is not valid Unicode"
    if len(encoded) > KEY_BYTES_MAX:
        return f"it is longer than {KEY_BYTES_MAX} bytes"
    # Control characters cannot travel in the XML that object stores list with.
    if any(c < " " or "\x7f" <= c <= "\x9f" or c in "\\\ufffe\uffff" for c in key):
        return "it has a backslash or a control character"
    components = key.split("/")
    if any(c in ("", ".", "..") for c in components):
        return "a component is empty, '.' or '..'"
    if any(len(c.encode()) > COMPONENT_BYTES_MAX for c in components):
        return f"a component is longer than {COMPONENT_BYTES_MAX} bytes"
    if components[0] in RESERVED:
        return f"{components[0]!r} is reserved for the store itself"
    return None
