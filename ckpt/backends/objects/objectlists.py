"""Listings and facts of objects behind fsspec, always fresh and in key order."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from datetime import datetime

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from ckpt.backends.base import Stat
from ckpt.backends.keys import is_key
from ckpt.backends.objects.fsspec_io import S3_PROTOCOLS
from ckpt.backends.objects.objectwrites import ATOMIC_PROTOCOLS, protocols_of
from ckpt.errors import UsageError

_MODIFIED = ("LastModified", "last_modified", "updated", "mtime", "modified", "created")
"""What the file systems call the time of writing."""


def has_folders(fs: fsspec.AbstractFileSystem) -> bool:
    """Whether the store knows folders beside objects, so that removing one could remove more than an object."""
    return not (protocols_of(fs) & ATOMIC_PROTOCOLS or isinstance(fs, MemoryFileSystem))


def stat_of(key: str, info: Mapping[str, object]) -> Stat:
    """Facts from what fsspec says of one object. An unknown time counts as now, so that no sweep takes it for old."""
    size = info["size"]
    return Stat(key, int(size) if isinstance(size, int | float) else 0, _modified_unix_s(info))


def walk(fs: fsspec.AbstractFileSystem, root: str, prefix: str, after: str) -> Iterator[Stat]:
    """Objects below ``root`` in key order. Raises what the client library raises."""
    stats = _walk_s3(fs, root, prefix, after) if _is_s3(fs) else _walk_any(fs, root, prefix)
    yield from (entry for entry in stats if entry.key > after and entry.key.startswith(prefix) and is_key(entry.key))


def _walk_any(fs: fsspec.AbstractFileSystem, root: str, prefix: str) -> Iterator[Stat]:
    folder = f"{root}/{prefix.rpartition('/')[0]}".rstrip("/")
    fs.invalidate_cache(folder)
    try:
        found = fs.find(folder, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return
    stem = root + "/"
    infos = {name[len(stem) :]: info for name, info in found.items() if name.startswith(stem)}
    yield from (stat_of(key, infos[key]) for key in sorted(infos))


def _walk_s3(fs: fsspec.AbstractFileSystem, root: str, prefix: str, after: str) -> Iterator[Stat]:
    """One page of a thousand at a time, starting behind ``after``: the file system's own listing can do neither."""
    bucket, _, inside = root.partition("/")
    stem = f"{inside}/" if inside else ""
    request: dict[str, str] = {"Bucket": bucket, "Prefix": stem + prefix}
    # Servers that descend from MinIO refuse to start behind a key that has another prefix (501).
    if after.startswith(prefix):
        if after:
            request["StartAfter"] = stem + after
    elif after > prefix:
        return
    last = ""
    while True:
        page = fs.call_s3("list_objects_v2", **request)
        for entry in page.get("Contents", []):
            key = entry["Key"][len(stem) :]
            if key <= last:
                raise UsageError(
                    f"this S3 store does not list in key order. bucket={bucket}; use a general-purpose bucket"
                )
            last = key
            yield Stat(key, entry["Size"], _modified_unix_s(entry))
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def _modified_unix_s(info: Mapping[str, object]) -> float:
    for name in _MODIFIED:
        match info.get(name):
            case datetime() as moment:
                return moment.timestamp()
            case int() | float() as seconds:
                return float(seconds)
            case str() as text:
                # Python 3.10 does not read the Z of UTC.
                return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
            case _:
                pass
    return time.time()


def _is_s3(fs: fsspec.AbstractFileSystem) -> bool:
    return bool(protocols_of(fs) & S3_PROTOCOLS)
