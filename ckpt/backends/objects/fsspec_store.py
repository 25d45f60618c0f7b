"""A store behind any URL that fsspec knows: S3, Google Cloud Storage, Azure, sftp and others."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.memory import MemoryFileSystem

from ckpt.backends.base import Buffer, Capabilities, Stat, check_key, check_prefix, is_key
from ckpt.backends.objects.arrival import ArrivalCheck
from ckpt.backends.objects.errors import error_from_client, public_url, translate_client_errors
from ckpt.backends.objects.fsspec_io import (
    ATOMIC_PROTOCOLS,
    S3_PROTOCOLS,
    ObjectWriter,
    protocols_of,
    read_exactly,
    read_range,
    writer_for,
)
from ckpt.backends.probe import CreateOnceProbe, creates_once
from ckpt.errors import NotFoundError, UnavailableError, UsageError

# ---- Listings and descriptions of objects, always fresh and in key order.

_MODIFIED = ("LastModified", "last_modified", "updated", "mtime", "modified", "created")
"""The names that file systems give to the time of writing."""


def has_folders(fs: fsspec.AbstractFileSystem) -> bool:
    """Whether the store knows folders besides objects.

    In such a store a delete could remove more than one object.
    """
    return not (protocols_of(fs) & ATOMIC_PROTOCOLS or isinstance(fs, MemoryFileSystem))


def stat_of(key: str, info: Mapping[str, object]) -> Stat:
    """A Stat from fsspec's description of one object.

    An unknown time counts as now, so that no sweep takes the object for old.
    """
    size = info["size"]
    return Stat(key, int(size) if isinstance(size, int | float) else 0, _modified_unix_s(info))


def walk(fs: fsspec.AbstractFileSystem, root: str, prefix: str, after: str) -> Iterator[Stat]:
    """Objects below ``root`` in key order. Raises what the client library raises."""
    stats = (
        _walk_s3(fs, root, prefix, after)
        if protocols_of(fs) & S3_PROTOCOLS
        else _walk_any(fs, root, prefix)
    )
    yield from (
        entry
        for entry in stats
        if entry.key > after and entry.key.startswith(prefix) and is_key(entry.key)
    )


def _walk_any(fs: fsspec.AbstractFileSystem, root: str, prefix: str) -> Iterator[Stat]:
    folder = f"{root}/{prefix.rpartition('/')[0]}".rstrip("/")
    fs.invalidate_cache(folder)
    try:
        entries = fs.find(folder, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return
    stem = root + "/"
    infos = {name[len(stem) :]: info for name, info in entries.items() if name.startswith(stem)}
    yield from (stat_of(key, infos[key]) for key in sorted(infos))


def _walk_s3(fs: fsspec.AbstractFileSystem, root: str, prefix: str, after: str) -> Iterator[Stat]:
    """S3's listing, in pages of a thousand objects, starting after ``after``.

    The file system's own listing supports neither.
    """
    bucket, _, inside = root.partition("/")
    stem = f"{inside}/" if inside else ""
    request: dict[str, str] = {"Bucket": bucket, "Prefix": stem + prefix}
    # Servers that descend from MinIO refuse to start after a key with another prefix (501).
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
                    f"this S3 store does not list in key order. bucket={bucket}; use a "
                    "general-purpose bucket"
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
                # Python 3.10 does not parse the Z of UTC.
                return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
            case _:
                pass
    return time.time()


# ---- Options: additions for s3fs, so that it works with servers other than Amazon's.

_CHECKSUMS = "request_checksum_calculation"
_ENV = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


def with_s3_defaults(
    protocol: str, options: Mapping[str, object], env: Mapping[str, str]
) -> dict[str, object]:
    """``options`` for S3 over TLS at another server than Amazon's; others are returned unchanged.

    Bodies get a known length and a signed digest. Since 1.36 botocore sends bodies over TLS in
    chunks of unknown length, followed by a checksum. Servers that descend from MinIO, and others,
    refuse that with status 411. What the user sets is kept.
    """
    extended = dict(options)
    boto = extended.get("config_kwargs") or {}
    if (
        protocol not in S3_PROTOCOLS
        or not _endpoint(options, env).startswith("https://")
        or not isinstance(boto, Mapping)
    ):
        return extended
    s3 = boto.get("s3") or {}
    if _CHECKSUMS in boto or f"AWS_{_CHECKSUMS.upper()}" in env or not isinstance(s3, Mapping):
        return extended
    extended["config_kwargs"] = {
        _CHECKSUMS: "when_required",
        **boto,
        "s3": {"payload_signing_enabled": True, **s3},
    }
    return extended


def _endpoint(options: Mapping[str, object], env: Mapping[str, str]) -> str:
    client = options.get("client_kwargs")
    named = options.get("endpoint_url") or (
        client.get("endpoint_url") if isinstance(client, Mapping) else None
    )
    return str(named or next((env[name] for name in _ENV if env.get(name)), ""))


READ_BYTES_BEST = 16 << 20
"""At some 100 MB/s per stream and 30 ms to the first byte, a request's fixed cost is then a sixth.
"""

CONCURRENCY_BEST = 16
"""Requests in flight. Object stores scale with them until the network is full."""

_EXTRAS: Mapping[str, str] = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "az": "azure",
    "abfs": "azure",
    "abfss": "azure",
    "adl": "azure",
}

StorageOptions = Mapping[str, object]
"""Arguments of the URL's fsspec file system, such as ``endpoint_url`` or ``key`` and ``secret``."""


@dataclass(frozen=True, slots=True)
class _FsspecConnection:
    """One process's connection.

    fsspec's file system, the path above all keys, and the object writer.
    """

    pid: int
    fs: fsspec.AbstractFileSystem
    root: str
    writes: ObjectWriter


class FsspecBackend:
    """A store at an fsspec URL, such as ``s3://bucket/run``. Thread-safe.

    Listings are never cached, so they show other writers' objects. After a fork the child makes its
    own connection. Whether the store creates a key only once is probed by creating the same random
    key twice below ``.probe/``. Raises UsageError for a URL that fsspec does not know or whose
    library is not installed.
    """

    def __init__(self, url: str, storage_options: StorageOptions | None = None) -> None:
        self._full_url = url
        self._options = dict(storage_options or {})
        self._url = public_url(url)
        self._creates = CreateOnceProbe(self._probe, self._url)
        self._arrival = ArrivalCheck(self._url)
        self._client: _FsspecConnection | None = self._connect()

    @property
    def url(self) -> str:
        """The URL without credentials."""
        return self._url

    def capabilities(self) -> Capabilities:
        """Probes once, with at most three small requests.

        In a store that is not writable ``create_only`` is False.
        """
        return Capabilities(
            create_only=self._creates(),
            read_bytes_best=READ_BYTES_BEST,
            concurrency_best=CONCURRENCY_BEST,
        )

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        """Joins the buffers in memory, except for large objects on S3.

        Those are uploaded in parts of 16 MiB, three at once. What arrives is compared with what was
        sent: see ``ArrivalCheck``.
        """
        path = self._path(key)
        if create_only:
            self._creates.require()

        def store(only_if_absent: bool) -> str | None:
            with translate_client_errors("put", self._where(key)):
                writes = self._live().writes
                return writes.create(path, data) if only_if_absent else writes.replace(path, data)

        self._arrival.put(
            key,
            data,
            store,
            lambda at, out: self._fill(key, path, out, at),
            create_only=create_only,
            part_bytes=self._live().writes.part_bytes(data, create_only=create_only),
        )

    @property
    def arrival_check(self) -> str:
        """How this store tells that objects arrived as they were sent."""
        return self._arrival.how

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        """One ranged request on S3, otherwise one for each 16 MiB. Copies once."""
        path = self._path(key)
        read_exactly(
            self,
            key,
            out.cast("B"),
            offset_bytes,
            lambda flat: self._fill(key, path, flat, offset_bytes),
        )

    def stat(self, key: str) -> Stat | None:
        """One request."""
        path = self._path(key)
        try:
            with translate_client_errors("stat", self._where(key)):
                fs = self._live().fs
                # Other writers' objects must be seen, whatever the file system cached.
                fs.invalidate_cache(path.rpartition("/")[0])
                info = fs.info(path)
        except NotFoundError:
            return None
        return None if info["type"] == "directory" else stat_of(key, info)

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        """S3 is listed page by page from ``after`` on, other stores whole below the folder."""
        check_prefix(prefix)
        with translate_client_errors("list", self._where(prefix)):
            client = self._live()
            yield from walk(client.fs, client.root, prefix, after)

    def delete(self, key: str) -> None:
        """One request per key: several S3 servers refuse the batch form."""
        path = self._path(key)
        try:
            with translate_client_errors("delete", self._where(key)):
                fs = self._live().fs
                if has_folders(fs) and fs.isdir(path):
                    return
                fs.rm_file(path)
        except NotFoundError:
            return

    def close(self) -> None:
        """Drops the connection; a later call connects again."""
        self._client = None

    def _connect(self) -> _FsspecConnection:
        protocol = self._full_url.partition("://")[0]
        try:
            options = with_s3_defaults(protocol.lower(), self._options, os.environ)
            fs, root = url_to_fs(
                self._full_url, use_listings_cache=False, skip_instance_cache=True, **options
            )
        except ImportError as error:
            extra = _EXTRAS.get(protocol)
            remedy = (
                f"pip install 'torch-ckpt[{extra}]'" if extra else f"install what it names: {error}"
            )
            raise UsageError(
                f"the library for this kind of store is not installed. url={self._url}; {remedy}"
            ) from error
        except (ValueError, TypeError) as error:
            raise UsageError(
                f"invalid store URL or storage options. url={self._url} "
                f"error={type(error).__name__}; check the URL and the storage options "
                f"{sorted(self._options)}"
            ) from error
        except Exception as error:
            raise error_from_client(error, doing="connect", where=self._url) from error
        root = root.rstrip("/")
        return _FsspecConnection(os.getpid(), fs, root, writer_for(fs, f"{root}/.tmp"))

    def _live(self) -> _FsspecConnection:
        """This process's connection.

        Its threads and sockets do not survive a fork, so a child makes its own.
        """
        client = self._client
        if client is None or client.pid != os.getpid():
            self._client = client = self._connect()
        return client

    def _path(self, key: str) -> str:
        return f"{self._live().root}/{check_key(key)}"

    def _where(self, key: str) -> str:
        return f"{self._url.rstrip('/')}/{key}"

    def _fill(self, key: str, path: str, out: memoryview, offset_bytes: int) -> int:
        """Fill ``out``; the number of bytes read, 0 if the object ends before ``offset_bytes``."""
        try:
            with translate_client_errors("read", self._where(key)):
                return read_range(self._live().fs, path, out, offset_bytes)
        except UnavailableError as error:
            # HTTP stores answer a range behind the object's end with "range not satisfiable".
            if "status=416" in str(error):
                return 0
            raise

    def _probe(self) -> bool | None:
        client = self._live()
        path = f"{client.root}/.probe/{secrets.token_hex(16)}"

        def create() -> None:
            with translate_client_errors("probe", self._where(".probe")):
                client.writes.create(path, [b"ckpt"])

        def remove() -> None:
            with translate_client_errors("probe", self._where(".probe")):
                client.fs.rm_file(path)

        return creates_once(create, remove)
