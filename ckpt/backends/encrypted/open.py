"""Client-side encryption of a store: its owner, and anyone who copies it, cannot read the state.

    store = encrypted(open_backend(url), load_keys("file:~/job.key"))

What is encrypted, what is not, and the format: docs/design/010-encryption.md. The store itself is
imported lazily, because only it needs the package ``cryptography``.
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
from ckpt.format.keys import COPIES, MANIFESTS, PACKS, PARTS

SEALED_PREFIXES = (PACKS, PARTS, MANIFESTS)
"""Prefixes of encrypted objects. The log and ``ckpt.json`` stay plain: readers without a key need
them too.
"""

_LOOKS_MAX = 3
"""Manifests read to tell whether a store is encrypted; one of them may be damaged."""


def is_sealed_key(key: str) -> bool:
    """Whether the object at ``key`` is encrypted in an encrypted store."""
    return key.removeprefix(COPIES).startswith(SEALED_PREFIXES)


def encrypted(
    inner: Backend, keys: EncryptionKeys, *, is_sealed: Callable[[str], bool] = is_sealed_key
) -> Backend:
    """``inner`` with its state encrypted under ``keys``; several stores if ``inner`` is several.

    Touches no store. ``is_sealed`` says which keys name encrypted objects. Raises UsageError if the
    package ``cryptography`` is not installed.
    """
    try:
        module = importlib.import_module("ckpt.backends.encrypted.store")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "cryptography":
            raise
        raise UsageError(
            "encryption needs the package 'cryptography', which is not installed; pip install "
            "'torch-ckpt[crypt]'"
        ) from error
    return cast("Backend", module.encrypted_store(inner, keys, is_sealed=is_sealed))


def require_matching_keys(inner: Backend, keys: EncryptionKeys | None) -> None:
    """Raise UsageError if ``keys`` do not fit the snapshots in ``inner``.

    They do not fit if the snapshots are encrypted and ``keys`` is None, if they are plain and keys
    are given, or if they are encrypted under other keys. Without this check a store read in the
    wrong way would look damaged. ``inner`` is the bare store. Costs the start of a listing and of
    at most three manifests; an empty store fits any keys. Several stores are also asked one by one
    if too few answer for a joint listing, or if the manifests found look plain, since they may be
    damaged. Raises UnavailableError.
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
    headers = [
        header for key, head in heads if not isinstance(header := decode_header(head, key), str)
    ]
    if headers and all(keys.find(header.key_id) is None for header in headers):
        raise UsageError(
            f"wrong encryption key. encrypted_with={headers[0].key_id.hex()} given={keys.ids} "
            f"store={inner.url}; give the key that this store was written with (after a change of "
            "keys both: 'file:new,file:old')"
        )


def _known_heads(inner: Backend, *, encrypted: bool) -> Sequence[tuple[str, bytes]]:
    """The first bytes of some manifests, from as many stores as must be asked for a sure answer."""
    heads: list[tuple[str, bytes]] = []
    unavailable: UnavailableError | None = None
    for store in (inner, *(stores_of(inner) if isinstance(inner, MultiStoreBackend) else ())):
        try:
            store_heads = _first_heads(store)
        except UnavailableError as error:
            unavailable = unavailable or error
            continue
        except NotFoundError:
            continue  # deleted meanwhile, or no bucket
        heads += store_heads
        # Enough, unless the store should be encrypted and its manifests look plain: they may be
        # damaged, and another store then shows a sound one.
        settled = not encrypted or any(looks_encrypted(head) for _, head in heads)
        if settled or (store is inner and not heads):
            return heads
    if unavailable is not None and not heads:
        raise unavailable
    return heads


def _first_heads(inner: Backend) -> Sequence[tuple[str, bytes]]:
    heads = []
    for stat in islice(inner.list(MANIFESTS), _LOOKS_MAX):
        head = memoryview(bytearray(min(stat.size_bytes, HEADER_BYTES)))
        inner.read_into(stat.key, head)
        heads.append((stat.key, bytes(head)))
    return heads
