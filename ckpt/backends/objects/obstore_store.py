"""A store on S3 through obstore, a client in Rust: buffers go out uncopied, and its threads need no
interpreter lock.

It does what ``FsspecBackend`` does through s3fs, behind the same seam. ``obstoreoptions`` says when
it may stand in, ``obstorefork`` what happens after a fork.
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

# What is used of obstore's ``S3Store``, and its listings in the seam's terms.

_PAGE = 1000
"""Entries handed over at once, as many as S3 has on a page."""

ObstoreEntry = Mapping[str, object]
"""``path``, ``size``, ``last_modified`` and others."""


class ObjectStream(Protocol):
    """An object's bytes on their way."""

    def stream(self, min_chunk_size: int) -> Iterable[bytes]:
        """The bytes in pieces of at least that size."""
        ...


class ObstoreClient(Protocol):
    """The five calls. All raise obstore's errors, and let other threads run meanwhile."""

    def put(
        self, path: str, file: object, *, mode: str = ..., use_multipart: bool, **sizes: int
    ) -> object:
        """Store a buffer or a list of them."""
        ...

    def get(self, path: str, *, options: Mapping[str, object]) -> ObjectStream:
        """Begin to read a range."""
        ...

    def head(self, path: str) -> ObstoreEntry:
        """The facts of one object."""
        ...

    def list(
        self, prefix: str | None, *, offset: str | None, chunk_size: int
    ) -> Iterable[Sequence[ObstoreEntry]]:
        """Objects in the folder ``prefix`` that come behind ``offset``."""
        ...

    def delete(self, paths: str) -> None:
        """Remove one object."""
        ...


def stat_of(key: str, entry: ObstoreEntry) -> Stat:
    """An entry as the seam's facts."""
    size, modified = entry["size"], entry["last_modified"]
    assert isinstance(size, int), "a size is a number of bytes"
    assert isinstance(modified, datetime.datetime), "a store says when an object was written"
    return Stat(key, size, modified.timestamp())


def walk(
    client: ObstoreClient, root: str, prefix: str, after: str, *, is_object: Callable[[str], bool]
) -> Iterator[Stat]:
    """Objects below ``root`` (empty, or with a slash at its end) in key order. Raises what obstore
    raises.

    obstore lists whole folders, so other names of the folder are passed over before ``prefix`` and
    it ends behind it.
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
            found = stat_of(key, entry)
            # The empty object "folder/", which marks a folder in some stores, is shown as "folder".
            if not found.size_bytes and not is_object(key):
                continue
            if key <= last:
                raise UsageError(
                    f"this S3 store does not list in key order. key={key}; use a general-purpose "
                    "bucket"
                )
            last = key
            yield found


def listing_start(prefix: str, after: str) -> str | None:
    """A key behind which all wanted ones come, as far on as is easily said; empty for the folder's
    beginning. Pure.

    None where no wanted key can exist. It lies in the folder of ``prefix``, since servers that
    descend from MinIO refuse to start elsewhere.
    """
    if after > prefix and not after.startswith(prefix):
        return None
    folder = prefix[: prefix.rfind("/") + 1]
    starts = [after.rstrip("/")]
    if prefix > folder:
        # Just below the prefix: its last character's predecessor, then one that keys seldom have.
        starts.append(f"{prefix[:-1]}{chr(max(ord(prefix[-1]) - 1, 0))}~")
    fit = [
        start for start in starts if start > folder and start.startswith(folder) and is_key(start)
    ]
    return max(fit, default="")


# AWS credentials and profile settings as botocore finds them: files, roles, containers,
# instances, single sign-on.

_ASK_AGAIN = datetime.timedelta(minutes=5)
"""botocore renews credentials ten minutes before they expire, so what it gives is good for as long
at least."""


class AwsCredential(TypedDict):
    """What obstore asks a provider for."""

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
    """What the AWS configuration files say for the profile in use; empty without files, None where
    they cannot be read.

    Imports botocore only where there are files or a profile is named.
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
    """What gives obstore the current credentials. Raises ImportError without botocore,
    StoreDeniedError without any."""
    credentials = _session(profile).get_credentials()
    if credentials is None:
        raise StoreDeniedError(
            "no AWS credentials are found. set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "pass key and secret as "
            "storage options, or anon=True for a public bucket"
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


# Repeats what obstore does not: it takes a deletion for something that may not be done twice, and
# gives up where a page of a listing, or an object without a tag, breaks off.

_PAUSE_S = 0.1
"""Before the first repetition, then twice as long each time, at most 5 s."""

_PAUSE_MAX_S = 5.0


def retry(call: Callable[[], None], *, times: int, progress: Callable[[], int] = int) -> None:
    """Do ``call``, again where the connection broke, ``times`` in a row at most without
    ``progress`` having grown.

    Raises what the last one raised.
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
    """``listing(after)``, begun again behind the last key where it broke off; ``times`` in a row at
    most."""
    broken = 0
    while True:
        try:
            for found in listing(after):
                yield found
                after, broken = found.key, 0
        except UnavailableError as error:
            if broken >= times or not _broke(error):
                raise
        else:
            return
        _pause(broken)
        broken += 1


def _broke(error: UnavailableError) -> bool:
    """Whether there was no answer: answers that promise better luck were repeated already."""
    return type(error) is UnavailableError and "status=-" in str(error)


def _pause(done: int) -> None:
    time.sleep(min(_PAUSE_S * 2**done, _PAUSE_MAX_S))


_PIECE_BYTES = 1 << 20
"""A reply is copied into the caller's memory in pieces of this size."""

_PARTS_MAX = 4
"""Parts of one object on their way at once; they take no memory."""

_BACKOFF = {
    "init_backoff": datetime.timedelta(seconds=0.1),
    "max_backoff": datetime.timedelta(seconds=5),
    "base": 2,
}
_RETRY_TIMEOUT = datetime.timedelta(minutes=2)


class ObstoreBackend:
    """A store at ``s3://bucket/folder``. Listings are fresh; whether it creates once is found out
    as by ObjectsBackend.

    Only for the process that made it. Thread-safe. Raises ImportError where obstore is not
    installed.
    """

    def __init__(self, url: str, settings: ObstoreSettings) -> None:
        self._make_client = importlib.import_module("obstore.store").S3Store
        self._url = public_url(url)
        self._settings = settings
        self._root = f"{settings.folder}/" if settings.folder else ""
        self._creates = CreateOnceProbe(self._probe, self._url)
        self._client: ObstoreClient | None = None

    @property
    def url(self) -> str:
        """The URL without credentials."""
        return self._url

    def capabilities(self) -> Capabilities:
        """See Backend. Probes with at most three small requests once; where it may not write,
        create_only is False."""
        return Capabilities(
            create_only=self._creates(),
            read_bytes_best=READ_BYTES_BEST,
            concurrency_best=CONCURRENCY_BEST,
        )

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        """See Backend. Takes no memory; large objects go up in parts of 16 MiB, four at once."""
        path = self._path(key)
        if create_only:
            self._creates.require()
        with translate_client_errors("put", self._where(key)):
            self._put(path, data, create_only=create_only)

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        """See Backend. One ranged request, copied once, 1 MiB at a time."""
        path = self._path(key)
        read_exactly(
            self,
            key,
            out.cast("B"),
            offset_bytes,
            lambda flat: self._fill(key, path, flat, offset_bytes),
        )

    def stat(self, key: str) -> Stat | None:
        """See Backend. One request."""
        path = self._path(key)
        try:
            with translate_client_errors("stat", self._where(key)):
                return stat_of(key, self._live().head(path))
        except NotFoundError:
            return None

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        """See Backend. Page by page, from ``after`` or ``prefix`` on, until keys no longer begin
        with it."""
        check_prefix(prefix)
        yield from resume_listing(
            lambda start: self._walk(prefix, start), after, times=self._settings.retries
        )

    def delete(self, key: str) -> None:
        """See Backend. One request a key: several S3 servers refuse the batch form."""
        path = self._path(key)
        try:
            retry(lambda: self._delete(key, path), times=self._settings.retries)
        except NotFoundError:
            return

    def close(self) -> None:
        """See Backend. The connections go with their last user; a later call connects anew."""
        self._client = None

    def _live(self) -> ObstoreClient:
        client = self._client
        if client is None:
            self._client = client = self._connect()
        return client

    def _connect(self) -> ObstoreClient:
        settings = self._settings
        more: dict[str, object] = {}
        match settings.credentials:
            case S3Credentials(key, secret, token):
                given = {
                    "access_key_id": key,
                    "secret_access_key": secret,
                    "token": token,
                    "expires_at": None,
                }
                # As a provider: keys in the configuration would be joined with a session token of
                # the environment.
                more["credential_provider"] = lambda: given
            case LookedUpCredentials(profile):
                more["credential_provider"] = credential_provider(profile)
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
            **more,
        )
        return cast(ObstoreClient, client)

    def _path(self, key: str) -> str:
        return self._root + check_key(key)

    def _where(self, key: str) -> str:
        return f"{self._url.rstrip('/')}/{key}"

    def _put(self, path: str, data: Sequence[Buffer], *, create_only: bool) -> None:
        pieces = [memoryview(buffer).cast("B") for buffer in data if len(buffer)]
        # A list's pieces are taken as they lie, too, but a list without any would become a
        # multipart upload.
        body = pieces if len(pieces) > 1 else pieces[0] if pieces else b""
        if create_only or sum(map(len, pieces)) < MULTIPART_BYTES_MIN:
            # Always one request: conditions on multipart uploads are newer than on puts, and not
            # probed.
            self._live().put(
                path, body, mode="create" if create_only else "overwrite", use_multipart=False
            )
        else:
            self._live().put(
                path, body, use_multipart=True, chunk_size=PART_BYTES, max_concurrency=_PARTS_MAX
            )

    def _fill(self, key: str, path: str, out: memoryview, offset_bytes: int) -> int:
        """How many bytes of ``out`` were filled, none where the object ends before them."""
        filled = BufferFiller(out)

        def stream() -> None:
            with translate_client_errors("read", self._where(key)):
                span = (offset_bytes + filled.filled_bytes, offset_bytes + len(out))
                for piece in (
                    self._live()
                    .get(path, options={"range": span})
                    .stream(min_chunk_size=_PIECE_BYTES)
                ):
                    filled.add(piece)

        try:
            # obstore itself goes on where a reply broke off only if the server gave the object a
            # tag.
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


# obstore in the process that used it first, s3fs in children of a fork: obstore's threads are not
# copied into them.
#
# A call into obstore would wait there for ever.


class ForkAwareBackend:
    """A store that is ``here`` in the process where obstore's threads run, and ``forked()`` in
    children of it."""

    def __init__(self, here: Backend, forked: Callable[[], Backend]) -> None:
        self._here = here
        self._forked = forked
        self._other: Backend | None = None

    @property
    def url(self) -> str:
        """See Backend."""
        return self._here.url

    @property
    def client_name(self) -> str:
        """The name of the library in use, for reports."""
        return "obstore" if _home() == os.getpid() else "s3fs"

    def capabilities(self) -> Capabilities:
        """See Backend."""
        return self._store().capabilities()

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        """See Backend."""
        self._store().put(key, data, create_only=create_only)

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        """See Backend."""
        self._store().read_into(key, out, offset_bytes=offset_bytes)

    def stat(self, key: str) -> Stat | None:
        """See Backend."""
        return self._store().stat(key)

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        """See Backend."""
        return self._store().list(prefix, after=after)

    def delete(self, key: str) -> None:
        """See Backend."""
        self._store().delete(key)

    def close(self) -> None:
        """See Backend."""
        (self._other or self._here).close()

    def _store(self) -> Backend:
        if _home() == os.getpid():
            return self._here
        if self._other is None:
            self._other = self._forked()
        return self._other


@functools.cache
def _home() -> int:
    """The process where obstore's threads run: the first that asked, and what a child of it is told
    too."""
    return os.getpid()
