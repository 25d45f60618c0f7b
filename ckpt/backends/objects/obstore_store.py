"""A store on S3 through obstore, a client in Rust: uploads without copies, threads without the GIL.

It does what ``FsspecBackend`` does through s3fs. ``obstore_options`` decides when it may be used.
In children of a fork ``ForkAwareBackend`` goes through s3fs instead. Imported without obstore
installed; obstore and botocore are imported lazily.
"""

from __future__ import annotations

import datetime
import functools
import importlib
import importlib.util
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypedDict, cast

from ckpt.backends.base import Backend, Buffer, Capabilities, Stat, check_key, check_prefix, is_key
from ckpt.backends.objects.arrival import ArrivalCheck
from ckpt.backends.objects.errors import public_url, translate_client_errors
from ckpt.backends.objects.fsspec_io import (
    MULTIPART_BYTES_MIN,
    PART_BYTES,
    BufferFiller,
    read_exactly,
)
from ckpt.backends.objects.fsspec_store import CONCURRENCY_BEST, READ_BYTES_BEST
from ckpt.backends.objects.obstore_options import (
    LookedUpCredentials,
    ObstoreSettings,
    S3Credentials,
)
from ckpt.backends.probe import CreateOnceProbe, creates_once
from ckpt.errors import NotFoundError, StoreDeniedError, UnavailableError, UsageError

# ---- obstore's ``S3Store``, as far as it is used here, and its listings.

_PAGE = 1000
"""Entries per page of a listing, as many as S3 has on a page."""

ObstoreEntry = Mapping[str, object]
"""An entry of a listing: ``path``, ``size``, ``last_modified`` and others."""


class ObjectStream(Protocol):
    """An object's bytes as they arrive."""

    def stream(self, min_chunk_size: int) -> Iterable[bytes]:
        """The bytes in pieces of at least that size."""
        ...


class ObstoreClient(Protocol):
    """The five methods in use. All raise obstore's errors and release the GIL."""

    def put(
        self, path: str, file: object, *, mode: str = ..., use_multipart: bool, **sizes: int
    ) -> Mapping[str, object]:
        """Store a buffer or a list of them; the reply has the ``e_tag``."""
        ...

    def get(self, path: str, *, options: Mapping[str, object]) -> ObjectStream:
        """Begin to read a range."""
        ...

    def head(self, path: str) -> ObstoreEntry:
        """The description of one object."""
        ...

    def list(
        self, prefix: str | None, *, offset: str | None, chunk_size: int
    ) -> Iterable[Sequence[ObstoreEntry]]:
        """Objects in the folder ``prefix`` whose path is greater than ``offset``."""
        ...

    def delete(self, paths: str) -> None:
        """Remove one object."""
        ...


def stat_of(key: str, entry: ObstoreEntry) -> Stat:
    """A Stat from an entry."""
    size, modified = entry["size"], entry["last_modified"]
    assert isinstance(size, int), "a size is a number of bytes"
    assert isinstance(modified, datetime.datetime), "a store says when an object was written"
    return Stat(key, size, modified.timestamp())


def walk(
    client: ObstoreClient, root: str, prefix: str, after: str, *, is_object: Callable[[str], bool]
) -> Iterator[Stat]:
    """Objects below ``root`` in key order. Raises obstore's errors.

    ``root`` is empty or ends with a slash. obstore lists whole folders, so keys before ``prefix``
    are skipped and the walk ends behind it.
    """
    folder = prefix.rpartition("/")[0]
    start = listing_start(prefix, after)
    if start is None:
        return
    last = ""
    for page in client.list(
        root + folder or None, offset=root + start if start else None, chunk_size=_PAGE
    ):
        for entry in page:
            key = str(entry["path"])[len(root) :]
            if not key.startswith(prefix):
                if key > prefix:
                    return
                continue
            if key <= after or not is_key(key):
                continue
            stat = stat_of(key, entry)
            # obstore shows the empty object "folder/", which marks a folder in some stores, as
            # "folder".
            if not stat.size_bytes and not is_object(key):
                continue
            if key <= last:
                raise UsageError(
                    f"this S3 store does not list in key order. key={key}; use a general-purpose "
                    "bucket"
                )
            last = key
            yield stat


def listing_start(prefix: str, after: str) -> str | None:
    """A key below all wanted ones, as close to them as is simple; empty for the folder's beginning.

    None if no wanted key can exist. The key is in the folder of ``prefix``, because servers that
    descend from MinIO refuse to start elsewhere.
    """
    if after > prefix and not after.startswith(prefix):
        return None
    folder = prefix[: prefix.rfind("/") + 1]
    starts = [after.rstrip("/")]
    if prefix > folder:
        # Just below the prefix: its last character's predecessor, then a character rare in keys.
        starts.append(f"{prefix[:-1]}{chr(max(ord(prefix[-1]) - 1, 0))}~")
    fit = [
        start for start in starts if start > folder and start.startswith(folder) and is_key(start)
    ]
    return max(fit, default="")


# ---- AWS credentials and profile settings, found by botocore: files, roles, containers, instances,
# single sign-on.

_ASK_AGAIN = datetime.timedelta(minutes=5)
"""botocore renews credentials ten minutes before they expire, so they are valid for at least this
long.
"""


class AwsCredential(TypedDict):
    """The fields that obstore expects from a provider."""

    access_key_id: str
    secret_access_key: str
    token: str | None
    expires_at: datetime.datetime | None


class _FrozenCredentials(Protocol):
    access_key: str
    secret_key: str
    token: str | None


class _BotoCredentials(Protocol):
    def get_frozen_credentials(self) -> _FrozenCredentials: ...


class _BotoSession(Protocol):
    def get_credentials(self) -> _BotoCredentials | None: ...

    def get_scoped_config(self) -> Mapping[str, object]: ...


def profile_settings(profile: str | None, env: Mapping[str, str]) -> Mapping[str, object] | None:
    """The AWS configuration files' settings for the profile in use.

    Empty without files, None if they cannot be read. Imports botocore only if there are files or a
    profile is named.
    """
    named = profile or env.get("AWS_PROFILE") or env.get("AWS_DEFAULT_PROFILE")
    files = (
        env.get("AWS_CONFIG_FILE", "~/.aws/config"),
        env.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"),
    )
    if not named and not any(Path(os.path.expanduser(file)).exists() for file in files):  # noqa: PTH111
        return {}
    try:
        return _session(profile).get_scoped_config()
    except Exception:  # noqa: BLE001  no botocore, no such profile, a broken file: s3fs will say which
        return None


def credential_provider(profile: str | None) -> Callable[[], AwsCredential]:
    """A function that gives obstore the current credentials.

    Raises ImportError without botocore, and StoreDeniedError without credentials.
    """
    credentials = _session(profile).get_credentials()
    if credentials is None:
        raise StoreDeniedError(
            "no AWS credentials found. set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or pass "
            "key and secret as storage options, or anon=True for a public bucket"
        )

    def current() -> AwsCredential:
        frozen = credentials.get_frozen_credentials()
        return AwsCredential(
            access_key_id=frozen.access_key,
            secret_access_key=frozen.secret_key,
            token=frozen.token,
            expires_at=datetime.datetime.now(datetime.timezone.utc) + _ASK_AGAIN,
        )

    return current


def has_botocore() -> bool:
    """Whether botocore is installed."""
    return importlib.util.find_spec("botocore") is not None


def _session(profile: str | None) -> _BotoSession:
    return cast(_BotoSession, importlib.import_module("botocore.session").Session(profile=profile))


# ---- Retries that obstore lacks. It takes a deletion for something that may not be repeated, and
# gives up if a page of a listing, or an object without an ETag, breaks off.

_PAUSE_S = 0.1
"""Pause before the first repetition, doubled each time up to _PAUSE_MAX_S."""

_PAUSE_MAX_S = 5.0


def retry(call: Callable[[], None], *, times: int, progress: Callable[[], int] = int) -> None:
    """Do ``call``, and repeat it after a broken connection.

    Gives up, with the last error, after ``times`` repetitions in a row without growth of
    ``progress()``.
    """
    broken, before = 0, progress()
    while True:
        try:
            return call()
        except UnavailableError as error:
            broken, before = (0, progress()) if progress() > before else (broken, before)
            if broken >= times or not _broke(error):
                raise
        _pause(broken)
        broken += 1


def resume_listing(
    listing: Callable[[str], Iterator[Stat]], after: str, *, times: int
) -> Iterator[Stat]:
    """``listing(after)``, started again after the last key if it breaks off.

    At most ``times`` in a row without a new entry.
    """
    broken = 0
    while True:
        try:
            for stat in listing(after):
                yield stat
                after, broken = stat.key, 0
        except UnavailableError as error:
            if broken >= times or not _broke(error):
                raise
        else:
            return
        _pause(broken)
        broken += 1


def _broke(error: UnavailableError) -> bool:
    """Whether there was no answer at all.

    obstore itself repeats requests after transient answers.
    """
    return type(error) is UnavailableError and "status=-" in str(error)


def _pause(done: int) -> None:
    time.sleep(min(_PAUSE_S * 2**done, _PAUSE_MAX_S))


_PIECE_BYTES = 1 << 20
"""Replies are copied to the caller's memory in pieces of this size."""

_PARTS_MAX = 4
"""Parts of one object in flight; they take no memory."""

_BACKOFF = {
    "init_backoff": datetime.timedelta(seconds=0.1),
    "max_backoff": datetime.timedelta(seconds=5),
    "base": 2,
}
_RETRY_TIMEOUT = datetime.timedelta(minutes=2)


class ObstoreBackend:
    """A store at ``s3://bucket/folder``. Thread-safe.

    Only for the process that made it: obstore's threads do not survive a fork. Listings are always
    fresh; create-only puts are probed as by FsspecBackend. Raises ImportError if obstore is not
    installed.
    """

    def __init__(self, url: str, settings: ObstoreSettings) -> None:
        self._make_client = importlib.import_module("obstore.store").S3Store
        self._url = public_url(url)
        self._settings = settings
        self._root = f"{settings.folder}/" if settings.folder else ""
        self._creates = CreateOnceProbe(self._probe, self._url)
        self._arrival = ArrivalCheck(self._url)
        self._client: ObstoreClient | None = None

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
        """Takes no memory; large objects are uploaded in parts of 16 MiB, four at once. What
        arrives is compared with what was sent: see ``ArrivalCheck``.
        """
        path = self._path(key)
        if create_only:
            self._creates.require()

        def store(only_if_absent: bool) -> str | None:
            with translate_client_errors("put", self._where(key)):
                return self._put(path, data, create_only=only_if_absent)

        self._arrival.put(
            key,
            data,
            store,
            lambda at, out: self._fill(key, path, out, at),
            create_only=create_only,
            part_bytes=0 if self._in_one_request(data, create_only) else PART_BYTES,
        )

    @property
    def arrival_check(self) -> str:
        """How this store tells that objects arrived as they were sent."""
        return self._arrival.how

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        """One ranged request, copied once, 1 MiB at a time."""
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
                return stat_of(key, self._live().head(path))
        except NotFoundError:
            return None

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        """Page by page, from ``after`` or ``prefix`` on, until keys no longer start with it."""
        check_prefix(prefix)
        yield from resume_listing(
            lambda start: self._walk(prefix, start), after, times=self._settings.retries
        )

    def delete(self, key: str) -> None:
        """One request per key: several S3 servers refuse the batch form."""
        path = self._path(key)
        try:
            retry(lambda: self._delete(key, path), times=self._settings.retries)
        except NotFoundError:
            return

    def close(self) -> None:
        """Drops the connections; a later call connects again."""
        self._client = None

    def _live(self) -> ObstoreClient:
        client = self._client
        if client is None:
            self._client = client = self._connect()
        return client

    def _connect(self) -> ObstoreClient:
        settings = self._settings
        options: dict[str, object] = {}
        match settings.credentials:
            case S3Credentials(key, secret, token):
                credential = {
                    "access_key_id": key,
                    "secret_access_key": secret,
                    "token": token,
                    "expires_at": None,
                }
                # As a provider: obstore would combine keys in the configuration with a session
                # token from the environment.
                options["credential_provider"] = lambda: credential
            case LookedUpCredentials(profile):
                options["credential_provider"] = credential_provider(profile)
            case _:
                pass
        client = self._make_client(
            settings.bucket,
            config=dict(settings.config),
            client_options=dict(settings.client),
            retry_config={
                "max_retries": settings.retries,
                "retry_timeout": _RETRY_TIMEOUT,
                "backoff": _BACKOFF,
            },
            **options,
        )
        return cast(ObstoreClient, client)

    def _path(self, key: str) -> str:
        return self._root + check_key(key)

    def _where(self, key: str) -> str:
        return f"{self._url.rstrip('/')}/{key}"

    def _in_one_request(self, data: Sequence[Buffer], create_only: bool) -> bool:
        # Conditions on multipart uploads are newer than on puts and are not probed.
        return create_only or sum(memoryview(one).nbytes for one in data) < MULTIPART_BYTES_MIN

    def _put(self, path: str, data: Sequence[Buffer], *, create_only: bool) -> str | None:
        pieces = [memoryview(buffer).cast("B") for buffer in data if len(buffer)]
        # obstore takes a list's buffers without a copy, but makes an empty list a multipart upload.
        body = pieces if len(pieces) > 1 else pieces[0] if pieces else b""
        if self._in_one_request(data, create_only):
            reply = self._live().put(
                path, body, mode="create" if create_only else "overwrite", use_multipart=False
            )
        else:
            reply = self._live().put(
                path, body, use_multipart=True, chunk_size=PART_BYTES, max_concurrency=_PARTS_MAX
            )
        etag = reply.get("e_tag")
        return etag if isinstance(etag, str) else None

    def _fill(self, key: str, path: str, out: memoryview, offset_bytes: int) -> int:
        """The bytes filled in ``out``; 0 if the object ends before ``offset_bytes``."""
        filled = BufferFiller(out)

        def stream() -> None:
            with translate_client_errors("read", self._where(key)):
                byte_range = (offset_bytes + filled.filled_bytes, offset_bytes + len(out))
                for piece in (
                    self._live()
                    .get(path, options={"range": byte_range})
                    .stream(min_chunk_size=_PIECE_BYTES)
                ):
                    filled.add(piece)

        try:
            # obstore itself resumes a broken reply only if the server sent an ETag.
            retry(stream, times=self._settings.retries, progress=lambda: filled.filled_bytes)
        except UnavailableError as error:
            if "status=416" not in str(error):
                raise
        return filled.filled_bytes

    def _walk(self, prefix: str, after: str) -> Iterator[Stat]:
        with translate_client_errors("list", self._where(prefix)):
            yield from walk(
                self._live(),
                self._root,
                prefix,
                after,
                is_object=lambda key: self.stat(key) is not None,
            )

    def _delete(self, key: str, path: str) -> None:
        with translate_client_errors("delete", self._where(key)):
            self._live().delete(path)

    def _probe(self) -> bool | None:
        path = f"{self._root}.probe/{secrets.token_hex(16)}"

        def create() -> None:
            with translate_client_errors("probe", self._where(".probe")):
                self._put(path, [b"ckpt"], create_only=True)

        def remove() -> None:
            self._delete(".probe", path)

        return creates_once(create, remove)


# ---- Forks: obstore in the process that used it first, s3fs in children of a fork. obstore's
# threads are not copied into a child, where a call into obstore would wait for ever.


class ForkAwareBackend:
    """``backend`` in the process that runs obstore's threads, ``reopen()`` in its children."""

    def __init__(self, backend: Backend, reopen: Callable[[], Backend]) -> None:
        self._backend = backend
        self._reopen = reopen
        self._forked_store: Backend | None = None

    @property
    def url(self) -> str:
        return self._backend.url

    @property
    def arrival_check(self) -> str:
        """How the store tells that objects arrived as they were sent."""
        return str(getattr(self._store(), "arrival_check", "unknown"))

    @property
    def client_name(self) -> str:
        """The name of the library in use, for reports."""
        return "obstore" if _obstore_pid() == os.getpid() else "s3fs"

    def capabilities(self) -> Capabilities:
        return self._store().capabilities()

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        self._store().put(key, data, create_only=create_only)

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        self._store().read_into(key, out, offset_bytes=offset_bytes)

    def stat(self, key: str) -> Stat | None:
        return self._store().stat(key)

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        return self._store().list(prefix, after=after)

    def delete(self, key: str) -> None:
        self._store().delete(key)

    def close(self) -> None:
        (self._forked_store or self._backend).close()

    def _store(self) -> Backend:
        if _obstore_pid() == os.getpid():
            return self._backend
        if self._forked_store is None:
            self._forked_store = self._reopen()
        return self._forked_store


@functools.cache
def _obstore_pid() -> int:
    """The process that runs obstore's threads: the first caller.

    A child inherits the cached answer.
    """
    return os.getpid()
