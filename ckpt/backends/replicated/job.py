"""Opening a job's stores: one or several, encrypted or not. What programs, keepers and tools all come through."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from ckpt.backends.base import Backend
from ckpt.backends.encrypted.keys import load_keys
from ckpt.backends.encrypted.open import encrypted, refuse_mismatch
from ckpt.backends.replicated.open import open_stores
from ckpt.events import Tell

KEY_VARIABLE = "CKPT_ENCRYPTION_KEY"
"""Where the key is, for programs and commands that are not told otherwise."""

_FILE = "file:"

Options = Mapping[str, object] | Sequence[Mapping[str, object] | None] | None


def open_job(
    urls: Sequence[str],
    storage_options: Options = None,
    *,
    write_quorum: int | None = None,
    encryption_key: str | None = None,
    tell: Tell,
) -> Backend:
    """The stores at ``urls`` as one, through the key that ``encryption_key`` leads to.

    Opening a folder touches nothing. Raises UsageError for addresses, options or keys that can't work.
    """
    keys = load_keys(encryption_key) if encryption_key is not None else None
    opened = open_stores(urls, storage_options, write_quorum=write_quorum, tell=tell)
    return encrypted(opened, keys) if keys is not None else opened


def require_key_fits(backend: Backend, encryption_key: str | None) -> None:
    """Raises UsageError where what ``backend`` holds was not written with that key, or with none: it would look damaged.

    Reads the beginning of a listing and of at most three manifests.
    """
    refuse_mismatch(
        getattr(backend, "inner", backend), load_keys(encryption_key) if encryption_key is not None else None
    )


def key_source(given: str | None) -> str | None:
    """Where the key is: as given, or as the environment says; paths absolute, for a keeper works elsewhere."""
    source = given if given is not None else os.environ.get(KEY_VARIABLE) or None
    if source is None:
        return None
    return ",".join(_absolute(one.strip()) for one in source.split(","))


def _absolute(source: str) -> str:
    if not source.startswith(_FILE):
        return source
    return _FILE + os.path.abspath(os.path.expanduser(source[len(_FILE) :]))  # noqa: PTH100, PTH111  as FileBackend does
