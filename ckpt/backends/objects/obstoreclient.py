"""What is used of obstore's ``S3Store``, and its listings in the seam's terms."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from ckpt.backends.base import Stat
from ckpt.backends.keys import is_key
from ckpt.errors import UsageError

_PAGE = 1000
"""Entries handed over at once, as many as S3 has on a page."""

Entry = Mapping[str, object]
"""``path``, ``size``, ``last_modified`` and others."""


class Reply(Protocol):
    """An object's bytes on their way."""

    def stream(self, min_chunk_size: int) -> Iterable[bytes]:
        """The bytes in pieces of at least that size."""
        ...


class Client(Protocol):
    """The five calls. All raise obstore's errors, and let other threads run meanwhile."""

    def put(self, path: str, file: object, *, mode: str = ..., use_multipart: bool, **sizes: int) -> object:
        """Store a buffer or a list of them."""
        ...

    def get(self, path: str, *, options: Mapping[str, object]) -> Reply:
        """Begin to read a range."""
        ...

    def head(self, path: str) -> Entry:
        """The facts of one object."""
        ...

    def list(self, prefix: str | None, *, offset: str | None, chunk_size: int) -> Iterable[Sequence[Entry]]:
        """Objects in the folder ``prefix`` that come behind ``offset``."""
        ...

    def delete(self, paths: str) -> None:
        """Remove one object."""
        ...


def stat_of(key: str, entry: Entry) -> Stat:
    """An entry as the seam's facts."""
    size, modified = entry["size"], entry["last_modified"]
    assert isinstance(size, int), "a size is a number of bytes"
    assert isinstance(modified, datetime.datetime), "a store says when an object was written"
    return Stat(key, size, modified.timestamp())


def walk(client: Client, root: str, prefix: str, after: str, *, is_object: Callable[[str], bool]) -> Iterator[Stat]:
    """Objects below ``root`` (empty, or with a slash at its end) in key order. Raises what obstore raises.

    obstore lists whole folders, so other names of the folder are passed over before ``prefix`` and it ends behind it.
    """
    folder = prefix.rpartition("/")[0]
    start = first_after(prefix, after)
    if start is None:
        return
    last = ""
    for page in client.list(root + folder or None, offset=root + start if start else None, chunk_size=_PAGE):
        for entry in page:
            key = str(entry["path"])[len(root) :]
            if not key.startswith(prefix):
                if key > prefix:
                    return
                continue
            if key <= after or not is_key(key):
                continue
            found = stat_of(key, entry)
            # The empty object "folder/", which marks a folder in some stores, is shown as "folder".
            if not found.size_bytes and not is_object(key):
                continue
            if key <= last:
                raise UsageError(f"this S3 store does not list in key order. key={key}; use a general-purpose bucket")
            last = key
            yield found


def first_after(prefix: str, after: str) -> str | None:
    """A key behind which all wanted ones come, as far on as is easily said; empty for the folder's beginning. Pure.

    None where no wanted key can exist. It lies in the folder of ``prefix``, since servers that descend from MinIO refuse
    to start elsewhere.
    """
    if after > prefix and not after.startswith(prefix):
        return None
    folder = prefix[: prefix.rfind("/") + 1]
    starts = [after.rstrip("/")]
    if prefix > folder:
        # Just below the prefix: its last character's predecessor, then one that keys seldom have.
        starts.append(f"{prefix[:-1]}{chr(max(ord(prefix[-1]) - 1, 0))}~")
    fit = [start for start in starts if start > folder and start.startswith(folder) and is_key(start)]
    return max(fit, default="")
