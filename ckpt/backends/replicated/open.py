"""Opening a job's stores by their URLs: one or several, encrypted or not."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from ckpt.backends.base import Backend
from ckpt.backends.encrypted.keys import load_keys
from ckpt.backends.encrypted.open import encrypted, require_matching_keys
from ckpt.backends.objects.fsspec_store import StorageOptions
from ckpt.backends.open import address_of, open_backend
from ckpt.backends.replicated.policy import quorum_of
from ckpt.backends.replicated.store import ReplicatedBackend
from ckpt.errors import UsageError
from ckpt.events import Emit


def open_stores(
    urls: Sequence[str],
    storage_options: StorageOptions | Sequence[StorageOptions | None] | None = None,
    *,
    write_quorum: int | None = None,
    emit: Emit,
) -> Backend:
    """The store over all ``urls``, each holding every object; for one URL that store itself.

    ``storage_options``: one mapping for every URL that is not a folder, or one for each URL.
    ``write_quorum``: number of stores that must hold an object before it counts as stored; by
    default the majority. Opens and touches as little as ``open_backend``. Raises UsageError for no
    URL, a URL given twice, options that do not fit, and a quorum that is not a majority.
    """
    if isinstance(urls, str):
        raise UsageError(f"URLs of stores come in a list. urls={urls!r}; write [{urls!r}]")
    quorum_of(len(urls), write_quorum)
    _refuse_twice(urls)
    options = _options_of(urls, storage_options)
    stores = [open_backend(url, option) for url, option in zip(urls, options, strict=True)]
    return (
        stores[0]
        if len(stores) == 1
        else ReplicatedBackend(stores, write_quorum=write_quorum, emit=emit)
    )


def _refuse_twice(urls: Sequence[str]) -> None:
    urls_by_address: dict[str, str] = {}
    for url in urls:
        address = address_of(url)
        # Resolve links: two names of one folder would be two copies on one disk.
        address = os.path.realpath(address) if _is_folder(url) else address.rstrip("/")
        if address in urls_by_address:
            raise UsageError(
                f"one store is named twice. urls={urls_by_address[address]!r}, {url!r}; a second "
                "copy in the same place protects from nothing"
            )
        urls_by_address[address] = url


def _options_of(
    urls: Sequence[str], options: StorageOptions | Sequence[StorageOptions | None] | None
) -> list[StorageOptions | None]:
    if options is None:
        return [None] * len(urls)
    if isinstance(options, Mapping):
        if all(_is_folder(url) for url in urls):
            return [options] * len(urls)  # a folder refuses them with the message
        return [None if _is_folder(url) else options for url in urls]
    if len(options) != len(urls):
        raise UsageError(
            f"storage options are one mapping for all stores, or one for each. urls={len(urls)} "
            f"options={len(options)}"
        )
    return list(options)


def _is_folder(url: str) -> bool:
    return address_of(url) != url or "://" not in url


KEY_VARIABLE = "CKPT_ENCRYPTION_KEY"
"""Environment variable with the key's source, for programs and commands without an option."""

_FILE = "file:"

StorageOptionsByStore = Mapping[str, object] | Sequence[Mapping[str, object] | None] | None


def open_job_stores(
    urls: Sequence[str],
    storage_options: StorageOptionsByStore = None,
    *,
    write_quorum: int | None = None,
    encryption_key: str | None = None,
    emit: Emit,
) -> Backend:
    """The stores at ``urls`` as one, encrypted under the key that ``encryption_key`` names.

    Opening a folder touches nothing. Raises UsageError for addresses, options or keys that cannot
    work.
    """
    keys = load_keys(encryption_key) if encryption_key is not None else None
    stores = open_stores(urls, storage_options, write_quorum=write_quorum, emit=emit)
    return encrypted(stores, keys) if keys is not None else stores


def require_key_fits(backend: Backend, encryption_key: str | None) -> None:
    """Raise UsageError if the objects in ``backend`` were not written with that key, or with none.

    They would look damaged. Reads the start of a listing and at most three manifests.
    """
    require_matching_keys(
        getattr(backend, "inner", backend),
        load_keys(encryption_key) if encryption_key is not None else None,
    )


def key_source(explicit: str | None) -> str | None:
    """The key's source: the given one, or the environment's.

    Paths become absolute, because a keeper has another working directory.
    """
    source = explicit if explicit is not None else os.environ.get(KEY_VARIABLE) or None
    if source is None:
        return None
    return ",".join(_absolute(source.strip()) for source in source.split(","))


def _absolute(source: str) -> str:
    if not source.startswith(_FILE):
        return source
    return _FILE + os.path.abspath(os.path.expanduser(source[len(_FILE) :]))  # noqa: PTH100, PTH111  as FileBackend does
