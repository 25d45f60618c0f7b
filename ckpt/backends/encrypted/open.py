"""Client-side encryption of a store: what its owner, or whoever copies it, gets to see is not the
training state.

    store = encrypted(open_backend(url), load_keys("file:~/job.key"))

What is encrypted, what is not, and the bytes: docs/dev/design/010-encryption.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from itertools import islice
from typing import cast

from ckpt.backends.base import Backend
from ckpt.backends.checked import MultiStoreBackend, stores_of
from ckpt.backends.encrypted.layout import HEADER_BYTES, decode_header, looks_encrypted
from ckpt.backends.encrypted.secret import EncryptionKeys
from ckpt.errors import NotFoundError, UnavailableError, UsageError
from ckpt.format.keys import MANIFESTS, PACKS, PARTS

SEALED_PREFIXES = (PACKS, PARTS, MANIFESTS)
"""Where encrypted objects lie. The log and ``ckpt.json`` are read by many, among them those who
have no key."""

_LOOKS_MAX = 3
"""Manifests looked at to tell whether a store is encrypted: one may be damaged."""


def is_sealed_key(key: str) -> bool:
    """Whether the object at ``key`` is encrypted in an encrypted store."""
    return key.startswith(SEALED_PREFIXES)


def encrypted(
    inner: Backend, keys: EncryptionKeys, *, is_sealed: Callable[[str], bool] = is_sealed_key
) -> Backend:
    """``inner`` with its state encrypted under ``keys``; where ``inner`` is several stores, so is
    the result.

    Touches no store. ``is_sealed`` says which keys hold encrypted objects. Raises UsageError where
    the package ``cryptography`` is not installed.
    """
    try:
        home = importlib.import_module("ckpt.backends.encrypted.store")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "cryptography":
            raise
        raise UsageError(
            "encryption needs the package 'cryptography', which is not installed; pip install "
            "'torch-ckpt[crypt]'"
        ) from error
    return cast("Backend", home.encrypted_store(inner, keys, is_sealed=is_sealed))


def require_matching_keys(inner: Backend, keys: EncryptionKeys | None) -> None:
    """Raise UsageError where ``inner``'s snapshots are encrypted and ``keys`` is None, or the other
    way round, or a wrong key.

    Without it a store read in the wrong way would look damaged. ``inner`` is the bare store. Costs
    the beginning of a listing and of at most three manifests; an empty store fits any keys. Of
    several stores each is asked by itself where too few answer for a listing of all, or one seems
    not to be encrypted, for it may be damaged. Raises UnavailableError.
    """
    heads = _known_heads(inner, encrypted=keys is not None)
    sealed = [head for _, head in heads if looks_encrypted(head)]
    if keys is None and sealed:
        raise UsageError(
            f"the store is encrypted. store={inner.url}; give its key with encryption_key"
        )
    if keys is not None and heads and not sealed:
        raise UsageError(
            f"the store holds snapshots that are not encrypted. store={inner.url}; leave the key "
            "out, or use a new store"
        )
    if keys is None:
        return
    found = [
        header for key, head in heads if not isinstance(header := decode_header(head, key), str)
    ]
    if found and all(keys.find(header.key_id) is None for header in found):
        raise UsageError(
            f"wrong encryption key. encrypted_with={found[0].key_id.hex()} given={keys.ids} "
            f"store={inner.url}; "
            "give the key that this store was written with (after a change of keys both: "
            "'file:new,file:old')"
        )


def _known_heads(inner: Backend, *, encrypted: bool) -> Sequence[tuple[str, bytes]]:
    """How some manifests begin, of as many stores as have to be asked to know whether all is as it
    should be."""
    heads: list[tuple[str, bytes]] = []
    silent: UnavailableError | None = None
    for store in (inner, *(stores_of(inner) if isinstance(inner, MultiStoreBackend) else ())):
        try:
            found = _first_heads(store)
        except UnavailableError as error:
            silent = silent or error
            continue
        except NotFoundError:
            continue  # deleted meanwhile, or the bucket is gone
        heads += found
        settled = not encrypted or any(looks_encrypted(head) for _, head in heads)
        if settled or (store is inner and not heads):
            return heads
    if silent is not None and not heads:
        raise silent
    return heads


def _first_heads(inner: Backend) -> Sequence[tuple[str, bytes]]:
    heads = []
    for found in islice(inner.list(MANIFESTS), _LOOKS_MAX):
        head = memoryview(bytearray(min(found.size_bytes, HEADER_BYTES)))
        inner.read_into(found.key, head)
        heads.append((found.key, bytes(head)))
    return heads
