"""A store on S3 through obstore, a client in Rust: buffers go out uncopied, and its threads need no interpreter lock.

It does what ``ObjectsBackend`` does through s3fs, behind the same seam. ``obstoreoptions`` says when it may stand in,
``obstorefork`` what happens after a fork.
"""

from __future__ import annotations

import datetime
import importlib
import secrets
from collections.abc import Iterator, Sequence
from typing import cast

from ckpt.backends.base import Buffer, Capabilities, Stat
from ckpt.backends.keys import check_key, check_prefix
from ckpt.backends.objects.errors import public_url, translated_reply
from ckpt.backends.objects.fsspec_io import MULTIPART_BYTES_MIN, PART_BYTES
from ckpt.backends.objects.fsspec_store import CONCURRENCY_BEST, READ_BYTES_BEST
from ckpt.backends.objects.objectreads import Filling, settle_read
from ckpt.backends.objects.obstore_options import Found, Keys, Settings
from ckpt.backends.objects.obstoreclient import Client, stat_of, walk
from ckpt.backends.objects.obstorecredentials import provider
from ckpt.backends.objects.obstorerepeat import repeat, resume
from ckpt.backends.probe import CreateOnce, creates_once
from ckpt.errors import NotFoundError, UnavailableError

_PIECE_BYTES = 1 << 20
"""A reply is copied into the caller's memory in pieces of this size."""

_PARTS_MAX = 4
"""Parts of one object on their way at once; they take no memory."""

_BACKOFF = {"init_backoff": datetime.timedelta(seconds=0.1), "max_backoff": datetime.timedelta(seconds=5), "base": 2}
_RETRY_TIMEOUT = datetime.timedelta(minutes=2)


class ObstoreBackend:
    """A store at ``s3://bucket/folder``. Listings are fresh; whether it creates once is found out as by ObjectsBackend.

    Only for the process that made it. Thread-safe. Raises ImportError where obstore is not installed.
    """

    def __init__(self, url: str, settings: Settings) -> None:
        self._make_client = importlib.import_module("obstore.store").S3Store
        self._url = public_url(url)
        self._settings = settings
        self._root = f"{settings.folder}/" if settings.folder else ""
        self._creates = CreateOnce(self._probe, self._url)
        self._client: Client | None = None

    @property
    def url(self) -> str:
        """The URL without credentials."""
        return self._url

    def capabilities(self) -> Capabilities:
        """See Backend. Probes with at most three small requests once; where it may not write, create_only is False."""
        return Capabilities(
            create_only=self._creates(), read_bytes_best=READ_BYTES_BEST, concurrency_best=CONCURRENCY_BEST
        )

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        """See Backend. Takes no memory; large objects go up in parts of 16 MiB, four at once."""
        path = self._path(key)
        if create_only:
            self._creates.insist()
        with translated_reply("put", self._where(key)):
            self._put(path, data, create_only=create_only)

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        """See Backend. One ranged request, copied once, 1 MiB at a time."""
        path = self._path(key)
        settle_read(self, key, out.cast("B"), offset_bytes, lambda flat: self._fill(key, path, flat, offset_bytes))

    def stat(self, key: str) -> Stat | None:
        """See Backend. One request."""
        path = self._path(key)
        try:
            with translated_reply("stat", self._where(key)):
                return stat_of(key, self._live().head(path))
        except NotFoundError:
            return None

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        """See Backend. Page by page, from ``after`` or ``prefix`` on, until keys no longer begin with it."""
        check_prefix(prefix)
        yield from resume(lambda start: self._walk(prefix, start), after, times=self._settings.retries)

    def delete(self, key: str) -> None:
        """See Backend. One request a key: several S3 servers refuse the batch form."""
        path = self._path(key)
        try:
            repeat(lambda: self._delete(key, path), times=self._settings.retries)
        except NotFoundError:
            return

    def close(self) -> None:
        """See Backend. The connections go with their last user; a later call connects anew."""
        self._client = None

    def _live(self) -> Client:
        client = self._client
        if client is None:
            self._client = client = self._connect()
        return client

    def _connect(self) -> Client:
        settings = self._settings
        more: dict[str, object] = {}
        match settings.credentials:
            case Keys(key, secret, token):
                given = {"access_key_id": key, "secret_access_key": secret, "token": token, "expires_at": None}
                # As a provider: keys in the configuration would be joined with a session token of the environment.
                more["credential_provider"] = lambda: given
            case Found(profile):
                more["credential_provider"] = provider(profile)
            case _:
                pass
        client = self._make_client(
            settings.bucket,
            config=dict(settings.config),
            client_options=dict(settings.client),
            retry_config={"max_retries": settings.retries, "retry_timeout": _RETRY_TIMEOUT, "backoff": _BACKOFF},
            **more,
        )
        return cast(Client, client)

    def _path(self, key: str) -> str:
        return self._root + check_key(key)

    def _where(self, key: str) -> str:
        return f"{self._url.rstrip('/')}/{key}"

    def _put(self, path: str, data: Sequence[Buffer], *, create_only: bool) -> None:
        pieces = [memoryview(buffer).cast("B") for buffer in data if len(buffer)]
        # A list's pieces are taken as they lie, too, but a list without any would become a multipart upload.
        body = pieces if len(pieces) > 1 else pieces[0] if pieces else b""
        if create_only or sum(map(len, pieces)) < MULTIPART_BYTES_MIN:
            # Always one request: conditions on multipart uploads are newer than on puts, and not probed.
            self._live().put(path, body, mode="create" if create_only else "overwrite", use_multipart=False)
        else:
            self._live().put(path, body, use_multipart=True, chunk_size=PART_BYTES, max_concurrency=_PARTS_MAX)

    def _fill(self, key: str, path: str, out: memoryview, offset_bytes: int) -> int:
        """How many bytes of ``out`` were filled, none where the object ends before them."""
        filled = Filling(out)

        def stream() -> None:
            with translated_reply("read", self._where(key)):
                span = (offset_bytes + filled.got, offset_bytes + len(out))
                for piece in self._live().get(path, options={"range": span}).stream(min_chunk_size=_PIECE_BYTES):
                    filled.add(piece)

        try:
            # obstore itself goes on where a reply broke off only if the server gave the object a tag.
            repeat(stream, times=self._settings.retries, progress=lambda: filled.got)
        except UnavailableError as error:
            if "status=416" not in str(error):
                raise
        return filled.got

    def _walk(self, prefix: str, after: str) -> Iterator[Stat]:
        with translated_reply("list", self._where(prefix)):
            yield from walk(self._live(), self._root, prefix, after, is_object=lambda key: self.stat(key) is not None)

    def _delete(self, key: str, path: str) -> None:
        with translated_reply("delete", self._where(key)):
            self._live().delete(path)

    def _probe(self) -> bool | None:
        path = f"{self._root}.probe/{secrets.token_hex(16)}"

        def create() -> None:
            with translated_reply("probe", self._where(".probe")):
                self._put(path, [b"ckpt"], create_only=True)

        def remove() -> None:
            self._delete(".probe", path)

        return creates_once(create, remove)
