from __future__ import annotations

import errno
import os
import socket
import uuid

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ckpt.backends.objects.errors import error_from_client, public_url, translate_client_errors
from ckpt.backends.objects.fsspec_io import FsspecMemoryWriter, JoinedBuffers
from ckpt.backends.objects.fsspec_store import FsspecBackend
from ckpt.errors import (
    CkptError,
    IntegrityError,
    KeyExistsError,
    NotFoundError,
    StoreDeniedError,
    StoreFullError,
    UnavailableError,
    UsageError,
)
from ckpt.testing.contract import keys, read


class ReplyError(Exception):
    """What a client library raises for a reply with a status and a code."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {"Code": code}}


class StatusError(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status_code = status


class NoCredentialsError(Exception):
    """Named as botocore names it."""


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (FileNotFoundError("x"), NotFoundError),
        (FileExistsError("x"), KeyExistsError),
        (PermissionError("x"), StoreDeniedError),
        (TimeoutError("x"), UnavailableError),
        (ConnectionResetError(errno.ECONNRESET, "x"), UnavailableError),
        (OSError(errno.ENOSPC, "x"), StoreFullError),
        (OSError(errno.EROFS, "x"), StoreDeniedError),
        (OSError(errno.EINVAL, "x"), UnavailableError),
        (ReplyError(403, "SignatureDoesNotMatch"), StoreDeniedError),
        (ReplyError(404, "NoSuchBucket"), NotFoundError),
        (ReplyError(412, "PreconditionFailed"), KeyExistsError),
        (ReplyError(409, "ConditionalRequestConflict"), UnavailableError),
        (ReplyError(503, "SlowDown"), UnavailableError),
        (ReplyError(507, "XMinioStorageFull"), StoreFullError),
        (ReplyError(403, "QuotaExceeded"), StoreFullError),
        (caused(OSError(errno.EINVAL, "x"), ReplyError(412, "PreconditionFailed")), KeyExistsError),
        (caused(OSError(errno.EBUSY, "x"), ReplyError(503, "SlowDown")), UnavailableError),
        (StatusError(401), StoreDeniedError),
        (StatusError(404), NotFoundError),
        (StatusError(500), UnavailableError),
        (NoCredentialsError(), StoreDeniedError),
        (RuntimeError("event loop is closed"), UnavailableError),
    ],
    ids=repr,
)
def test_client_errors_are_translated_by_what_their_handler_does(
    raised: Exception, expected: type[CkptError]
) -> None:
    assert type(error_from_client(raised, doing="put", where="s3://b/k")) is expected
    with pytest.raises(expected) as caught, translate_client_errors("put", "s3://b/k"):
        raise raised
    assert caught.value.__cause__ is raised
    assert "s3://b/k" in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/run", "s3://bucket/run"),
        ("s3://AKIA:secret@bucket/run", "s3://bucket/run"),
        ("https://token@host/x?sig=secret#frag", "https://host/x"),
        (
            "abfs://container@account.dfs.core.windows.net/x",
            "abfs://container@account.dfs.core.windows.net/x",
        ),
        ("sftp://me:secret@host/x", "sftp://host/x"),
    ],
)
def test_shown_url_has_no_credentials(url: str, shown: str) -> None:
    assert public_url(url) == shown


def test_joined_slices_equal_the_joined_bytes() -> None:
    pieces = [b"abc", bytearray(b""), memoryview(b"defgh"), b"i"]
    whole, joined = b"abcdefghi", JoinedBuffers(pieces)
    assert len(joined) == 9
    for start in range(10):
        for stop in range(12):
            assert joined[start:stop] == whole[start:stop]


@pytest.fixture
def store() -> FsspecBackend:
    return FsspecBackend(f"memory://{uuid.uuid4().hex}/run")


def test_store_whose_create_replaces_is_found_out(
    store: FsspecBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FsspecMemoryWriter, "create", FsspecMemoryWriter.replace)
    assert not store.capabilities().create_only
    assert keys(store) == []
    assert not any(
        ".probe" in name for name in MemoryFileSystem.store if store.url.partition("//")[2] in name
    )
    with pytest.raises(UsageError, match="only once"):
        store.put("a", [b"x"], create_only=True)


def test_store_that_could_not_be_probed_is_asked_again(
    store: FsspecBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(self: FsspecMemoryWriter, path: str, data: object) -> None:
        raise PermissionError(path)

    with monkeypatch.context() as patch:
        patch.setattr(FsspecMemoryWriter, "create", denied)
        assert not store.capabilities().create_only
    assert store.capabilities().create_only


def test_object_larger_than_one_request_is_read_in_pieces(store: FsspecBackend) -> None:
    body = os.urandom(1000) * (34 * 1024)
    store.put("a", [body])
    assert read(store, "a") == body
    with pytest.raises(IntegrityError):
        store.read_into("a", memoryview(bytearray(len(body))), offset_bytes=1)


def test_closed_store_connects_anew(store: FsspecBackend) -> None:
    store.put("a", [b"x"])
    store.close()
    assert read(store, "a") == b"x"


@pytest.mark.slow
def test_unreachable_server_is_unavailable_and_says_no_secret() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {
        "endpoint_url": f"http://127.0.0.1:{port}",
        "key": "k",
        "secret": "hush",
        "config_kwargs": {"retries": {"max_attempts": 1}, "connect_timeout": 1},
    }
    store = FsspecBackend("s3://bucket/run", options)
    with pytest.raises(UnavailableError) as caught:
        store.put("a", [b"x"])
    assert "hush" not in str(caught.value)
    assert caught.value.__cause__ is not None


def test_child_of_a_fork_makes_its_own_connection(store: FsspecBackend) -> None:
    """The parent's event loop thread does not exist in the child."""
    store.put("a", [b"x"])
    before = store._live()
    assert before.pid == os.getpid()
    store._client = type(before)(before.pid + 1, before.fs, before.root, before.writes)
    assert read(store, "a") == b"x"
    assert store._live().fs is not before.fs


def test_wrong_options_are_refused_with_a_remedy() -> None:
    with pytest.raises(UsageError, match="storage options"):
        FsspecBackend("github://owner/repository", {"no_such_option": 1})
