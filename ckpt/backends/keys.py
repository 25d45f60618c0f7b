"""Which names may be keys, the same for every store, so that an object can be copied from any store to any other."""

from __future__ import annotations

from ckpt.errors import UsageError

KEY_BYTES_MAX = 512
"""Longest key in UTF-8 bytes; object stores take 1,024, and a store's own prefix needs room too."""

COMPONENT_BYTES_MAX = 255
"""Longest part between slashes in UTF-8 bytes: what file systems take as one name."""

RESERVED = (".tmp", ".probe")
"""First components that stores keep for themselves; they are never listed."""


def check_key(key: str) -> str:
    """Return ``key`` where it can name an object in any store.

    A key is relative, has no empty, ``.`` or ``..`` component, no backslash and no control character, is at most 512
    UTF-8 bytes long, 255 a component, and does not start with a reserved component. Raises UsageError otherwise.
    """
    if why := _why_bad(key):
        raise UsageError(f"not a key: {why}. key={key!r}; use relative names such as 'packs/a.pack'")
    return key


def check_prefix(prefix: str) -> str:
    """Return ``prefix`` where some key can start with it; raises UsageError otherwise. Empty means every key."""
    if prefix and (why := _why_bad(prefix + "x")):
        raise UsageError(f"no key starts so: {why}. prefix={prefix!r}; use prefixes such as 'packs/'")
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
