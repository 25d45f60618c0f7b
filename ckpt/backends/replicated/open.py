"""What users' lists of URLs mean."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from ckpt.backends.base import Backend
from ckpt.backends.objects.fsspec_store import StorageOptions
from ckpt.backends.open import address_of, open_backend
from ckpt.backends.replicated.quorum import quorum_of
from ckpt.backends.replicated.store import ReplicatedBackend
from ckpt.errors import UsageError
from ckpt.events import Tell


def open_stores(
    urls: Sequence[str],
    storage_options: StorageOptions | Sequence[StorageOptions | None] | None = None,
    *,
    write_quorum: int | None = None,
    tell: Tell,
) -> Backend:
    """The store over all ``urls``, each holding every object; for one URL that store itself.

    ``storage_options``: one mapping for every URL that is no folder, or one for each URL. ``write_quorum``: in how many an
    object must be before it counts as stored, by default the majority. Opens and touches as little as ``open_backend``.
    Raises UsageError for no URL, one that is named twice, options that do not fit, and a quorum that is no majority.
    """
    if isinstance(urls, str):
        raise UsageError(f"URLs of stores come in a list. urls={urls!r}; write [{urls!r}]")
    quorum_of(len(urls), write_quorum)
    _refuse_twice(urls)
    options = _options_of(urls, storage_options)
    stores = [open_backend(url, option) for url, option in zip(urls, options, strict=True)]
    return stores[0] if len(stores) == 1 else ReplicatedBackend(stores, write_quorum=write_quorum, tell=tell)


def _refuse_twice(urls: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for url in urls:
        address = address_of(url)
        # Two names of one folder would be two copies on one disk.
        address = os.path.realpath(address) if _is_folder(url) else address.rstrip("/")
        if address in seen:
            raise UsageError(
                f"one store is named twice. urls={seen[address]!r}, {url!r}; a second copy in the same place protects "
                f"from nothing"
            )
        seen[address] = url


def _options_of(
    urls: Sequence[str], options: StorageOptions | Sequence[StorageOptions | None] | None
) -> list[StorageOptions | None]:
    if options is None:
        return [None] * len(urls)
    if isinstance(options, Mapping):
        if all(_is_folder(url) for url in urls):
            return [options] * len(urls)  # which refuses them
        return [None if _is_folder(url) else options for url in urls]
    if len(options) != len(urls):
        raise UsageError(
            f"storage options are one mapping for all stores, or one for each. urls={len(urls)} options={len(options)}"
        )
    return list(options)


def _is_folder(url: str) -> bool:
    return address_of(url) != url or "://" not in url
