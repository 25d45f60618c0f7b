"""The interface between ckpt and any storage: six operations, one of which is atomic. Pure.

A store is a flat map from keys to immutable bytes. The only atomic operation that ckpt needs is
create-if-absent; there is no rename, no append and no lock. A backend implements these six
operations and passes ``ckpt.testing.contract``.
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
    """A store's description of one object: key and length.

    ``modified_unix_s`` is the time of writing by the store's own clock. Only sweeps use it, to
    spare young objects.
    """

    key: str
    size_bytes: int
    modified_unix_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a store can do. Backends measure or probe it; they never assume it.

    ``create_only``: ``put(..., create_only=True)`` is atomic among all writers everywhere. A store
    without it refuses such a put with UsageError. ``read_bytes_best``: the read size at which the
    fixed cost of a request no longer matters; neighbouring ranges are joined up to it.
    ``concurrency_best``: the number of reads or writes in flight that fills the link.
    ``direct_io``: page-aligned buffers are written past the page cache.
    """

    create_only: bool
    read_bytes_best: int
    concurrency_best: int
    direct_io: bool = False


class Backend(Protocol):
    """One object store prefix. Thread-safe.

    Keys are relative names with ``/`` between their components (see ``check_key``).
    """

    @property
    def url(self) -> str:
        """The store's address for messages, without credentials."""
        ...

    def capabilities(self) -> Capabilities:
        """What this store can do. May probe the store once and remember the answer."""
        ...

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        """Store the concatenation of ``data`` at ``key``, all or nothing, durable on return.

        Readers see the whole object or none. With ``create_only``, raises KeyExistsError if the key
        exists. UnavailableError means that the reply was lost and the outcome is unknown; repeating
        the same put is safe. A repeated put with ``create_only`` may raise KeyExistsError for the
        caller's own bytes; read the key to find out. Raises StoreFullError, StoreDeniedError,
        UnavailableError. The buffers may be reused on return.
        """
        ...

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        """Fill ``out`` with the object's bytes from ``offset_bytes`` on.

        Raises NotFoundError if the key does not exist, and IntegrityError if the object ends before
        ``out`` is full.
        """
        ...

    def stat(self, key: str) -> Stat | None:
        """The object's key, length and time; None if it does not exist."""
        ...

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        """The objects whose key starts with ``prefix`` and is greater than ``after``.

        In key order (Unicode code points).
        """
        ...

    def delete(self, key: str) -> None:
        """Remove the object. A missing key is no error."""
        ...

    def close(self) -> None:
        """Release connections and handles; idempotent."""
        ...


# ---- Keys: the same rules for every store, so that an object can be copied between any two stores.

KEY_BYTES_MAX = 512
"""Longest key in UTF-8 bytes. Object stores take 1,024, and a store's own prefix needs room too."""

COMPONENT_BYTES_MAX = 255
"""Longest component in UTF-8 bytes: what file systems take as one name."""

RESERVED = (".tmp", ".probe")
"""First components that stores use for themselves; listings never show them."""


def check_key(key: str) -> str:
    """Return ``key`` if it can name an object in any store; raise UsageError otherwise.

    A key is relative and at most 512 UTF-8 bytes long, 255 per component. It has no empty, ``.`` or
    ``..`` component, no backslash and no control character, and does not start with a reserved
    component.
    """
    if reason := _key_problem(key):
        raise UsageError(
            f"not a key: {reason}. key={key!r}; use relative names such as 'packs/a.pack'"
        )
    return key


def check_prefix(prefix: str) -> str:
    """Return ``prefix`` if some key can start with it; raise UsageError otherwise.

    The empty prefix matches every key.
    """
    if prefix and (reason := _key_problem(prefix + "x")):
        raise UsageError(
            f"no key can start like this: {reason}. prefix={prefix!r}; use prefixes such as "
            "'packs/'"
        )
    return prefix


def is_key(key: str) -> bool:
    """Whether ``check_key`` accepts the name. Listings use it to leave out foreign files."""
    return _key_problem(key) is None


def _key_problem(key: str) -> str | None:
    try:
        encoded = key.encode()
    except UnicodeEncodeError:
        return "it is not valid Unicode"
    if len(encoded) > KEY_BYTES_MAX:
        return f"it is longer than {KEY_BYTES_MAX} bytes"
    # Control characters are not representable in the XML of object stores' listings.
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
