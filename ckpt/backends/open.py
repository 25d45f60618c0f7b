"""Opening one store by its URL."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote

from ckpt.backends.base import Backend
from ckpt.backends.file.store import FileBackend
from ckpt.backends.objects.fsspec_io import S3_PROTOCOLS
from ckpt.backends.objects.fsspec_store import FsspecBackend, StorageOptions
from ckpt.backends.objects.s3 import open_s3
from ckpt.errors import UsageError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/*)")


def open_backend(url: str, storage_options: StorageOptions | None = None) -> Backend:
    """The store at ``url``: a path or ``file://`` URL is a folder, ``s3://`` uses obstore or s3fs.

    Any other scheme goes through fsspec. ``storage_options`` are the arguments of the URL's fsspec
    file system; a folder takes none. Opening a folder touches nothing. Raises UsageError for a URL
    of unknown kind, a missing library, or options that do not fit.
    """
    scheme, path = _split(url)
    if scheme in S3_PROTOCOLS:
        return open_s3(url, storage_options)
    if scheme not in ("", "file", "local"):
        return FsspecBackend(url, storage_options)
    if storage_options:
        raise UsageError(
            f"a folder takes no storage options. url={url} options={sorted(storage_options)}; "
            "leave them out"
        )
    return FileBackend(path)


def address_of(url: str) -> str:
    """The name of the store at ``url`` that other processes can use.

    For a folder its absolute path, otherwise the URL unchanged. Opens and touches nothing. Raises
    UsageError for an invalid URL.
    """
    scheme, path = _split(url)
    if scheme not in ("", "file", "local"):
        return url
    return os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111  as FileBackend does


def _split(url: str) -> tuple[str, str]:
    """The scheme (empty for a plain path) and, for folders, the path."""
    if not url:
        raise UsageError(
            "a store's URL is empty; pass a folder such as 'runs/a' or a URL such as "
            "'s3://bucket/run'"
        )
    match = _SCHEME.match(url)
    if match is None:
        return "", url
    scheme, slashes = match[1].lower(), len(match[2])
    if scheme in ("file", "local"):
        path = unquote(
            url[match.end() - min(slashes, 1) :]
            if slashes != 2
            else _without_host(url[match.end() :], url)
        )
        return scheme, path
    if slashes < 2:
        raise UsageError(
            f"neither a path nor a URL. url={url}; write '{scheme}://...', or './{url}' for a "
            "folder of that name"
        )
    return scheme, ""


def _without_host(rest: str, url: str) -> str:
    host, _, path = rest.partition("/")
    if host not in ("", "localhost"):
        raise UsageError(
            f"a file URL names another host. url={url}; write file:///path with three slashes"
        )
    return "/" + path
