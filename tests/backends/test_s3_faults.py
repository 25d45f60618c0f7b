"""What the network and the server do wrong becomes the right error or is healed; no wrong data, no
harm to other objects."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest
import s3fs
from kit.s3_clients import HASTY, ONCE, open_with, through
from kit.servers.proxy import FaultProxy
from kit.servers.rules import (
    Answer,
    Delay,
    Fault,
    Flip,
    ResetAfter,
    ResetBefore,
    Truncate,
    always,
    first,
    let_through,
    seeded,
)
from kit.servers.s3 import S3Server

from ckpt.backends.base import Backend
from ckpt.errors import (
    CkptError,
    KeyExistsError,
    NotFoundError,
    StoreDeniedError,
    StoreFullError,
    UnavailableError,
)
from ckpt.testing.contract import create, keys, read

pytestmark = pytest.mark.slow

SEED = os.environ.get("CKPT_SEED", "1")
SOAK = os.environ.get("CKPT_SOAK") == "1"
ROUNDS = 400 if SOAK else 12
BODY = bytes(range(256)) * 8
LARGE = os.urandom(1 << 20) * 40


class FaultyServer:
    """A store behind a proxy, and the same store reached directly."""

    def __init__(self, proxy: FaultProxy, store: Backend, direct: Backend) -> None:
        self.proxy, self.store, self.direct = proxy, store, direct


@pytest.fixture(params=["gateway", "moto"])
def server(request: pytest.FixtureRequest) -> S3Server:
    server: S3Server = request.getfixturevalue(
        "s3_server" if request.param == "gateway" else "moto_server"
    )
    return server


@pytest.fixture
def make(
    server: S3Server,
    client: str,
    fault_proxy: Callable[..., FaultProxy],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., FaultyServer]]:
    bucket = server.bucket()
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)  # beside botocore's, which options name
    with contextlib.ExitStack() as ending:

        def make(**options: object) -> FaultyServer:
            proxy = fault_proxy(server.endpoint)
            store = open_with(
                client, monkeypatch, bucket.url, through(bucket, proxy.endpoint, **options)
            )
            direct = open_with(client, monkeypatch, bucket.url, bucket.options)
            for one in (store, direct):
                ending.callback(one.close)
            return FaultyServer(proxy, store, direct)

        yield make


@pytest.fixture
def world(make: Callable[..., FaultyServer]) -> FaultyServer:
    """With a client that gives up at once, as far as it lets itself be told so."""
    return make(config_kwargs=HASTY)


BEFORE_ANY_SERVER = pytest.mark.parametrize("server", ["gateway"], indirect=True)
"""For what the proxy answers, or does not: which server would have stands behind it."""

BROKEN = [
    ResetBefore(),
    ResetAfter(),
    Answer(503, "SlowDown"),
    Answer(500, "InternalError"),
    Delay(100),
]


@BEFORE_ANY_SERVER
@pytest.mark.parametrize("fault", BROKEN, ids=repr)
def test_store_that_never_answers_is_unavailable_in_every_operation(
    make: Callable[..., FaultyServer], fault: Fault
) -> None:
    world = make(config_kwargs=HASTY if isinstance(fault, Delay) else ONCE)
    world.direct.put("a", [BODY])
    world.proxy.rule = always(fault)
    acts: list[Callable[[], object]] = [
        lambda: world.store.put("b", [BODY]),
        lambda: world.store.read_into("a", memoryview(bytearray(10))),
        lambda: world.store.stat("a"),
        lambda: keys(world.store),
        lambda: world.store.delete("c"),
    ]
    for act in acts[:2] if isinstance(fault, Delay) else acts:
        with pytest.raises(UnavailableError) as caught:
            act()
        assert type(caught.value) is UnavailableError
        assert caught.value.__cause__ is not None
    world.proxy.rule = let_through
    assert read(world.store, "a") == BODY


@pytest.mark.parametrize(
    "fault",
    [ResetBefore(), ResetAfter(), Answer(503, "SlowDown"), Truncate(0), Truncate(300)],
    ids=repr,
)
def test_one_failure_is_healed_by_repeating(
    make: Callable[..., FaultyServer], fault: Fault
) -> None:
    world = make()
    for number, method in enumerate(("PUT", "GET", "HEAD", "DELETE")):
        world.proxy.rule = first(
            1, fault, when=lambda request, method=method: request.method == method
        )
        key = f"k{number}"
        world.store.put(key, [BODY])
        assert read(world.store, key) == BODY
        assert keys(world.store) == [key]
        world.store.delete(key)
        assert world.direct.stat(key) is None
    assert world.proxy.count(type(fault)) == 4


@BEFORE_ANY_SERVER
@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (401, "InvalidAccessKeyId", StoreDeniedError),
        (403, "AccessDenied", StoreDeniedError),
        (403, "SignatureDoesNotMatch", StoreDeniedError),
        (403, "QuotaExceeded", StoreFullError),
        (507, "XMinioStorageFull", StoreFullError),
        (404, "NoSuchBucket", NotFoundError),
        (409, "ConditionalRequestConflict", UnavailableError),
        (412, "PreconditionFailed", KeyExistsError),
        (501, "NotImplemented", UnavailableError),
    ],
)
def test_refusal_is_the_error_that_its_handler_needs(
    make: Callable[..., FaultyServer], status: int, code: str, expected: type[CkptError]
) -> None:
    world = make(config_kwargs=ONCE)
    world.proxy.rule = always(Answer(status, code))
    with pytest.raises(expected) as caught:
        world.store.put("a", [BODY])
    assert type(caught.value) is expected
    assert "ckpt-tests-secret" not in str(caught.value)


def test_reply_that_always_breaks_off_is_unavailable_and_never_short_data(
    world: FaultyServer,
) -> None:
    world.store.put("a", [BODY])
    world.proxy.rule = always(Truncate(0), when=lambda request: request.method == "GET")
    with pytest.raises(UnavailableError):
        world.store.read_into("a", memoryview(bytearray(len(BODY))))


def test_reply_that_breaks_off_again_and_again_arrives_whole_in_pieces(
    make: Callable[..., FaultyServer],
) -> None:
    world = make()
    world.store.put("a", [LARGE])
    world.proxy.rule = first(3, Truncate(5 << 20), when=lambda request: request.method == "GET")
    world.proxy.forget()
    out = bytearray(len(LARGE))
    world.store.read_into("a", memoryview(out))
    assert out == LARGE
    assert world.proxy.count(Truncate) == 3


def test_byte_that_changes_on_its_way_in_is_refused_by_a_server_that_checks(
    make: Callable[..., FaultyServer], server: S3Server
) -> None:
    if server.kind == "moto":
        pytest.skip("moto compares no digest")
    world = make(config_kwargs=HASTY)
    world.store.put("a", [b"old"])
    world.proxy.rule = always(Flip(100, "request"), when=lambda request: request.method == "PUT")
    with pytest.raises(UnavailableError):
        world.store.put("a", [BODY])
    with pytest.raises(UnavailableError):
        world.store.put("large", [LARGE])
    assert read(world.direct, "a") == b"old"
    assert keys(world.direct) == ["a"]


def test_byte_that_changes_on_its_way_in_is_noticed_without_a_server_that_checks(
    make: Callable[..., FaultyServer],
) -> None:
    world = make(config_kwargs=HASTY)
    for key, body in (("a", BODY), ("large", LARGE)):
        world.proxy.rule = first(
            1, Flip(100, "request"), when=lambda request: request.method == "PUT"
        )
        with contextlib.suppress(UnavailableError):  # a server that checks refuses it
            world.store.put(key, [body])
            assert read(world.direct, key) == body
    world.proxy.rule = always(Flip(100, "request"), when=lambda request: request.method == "PUT")
    with pytest.raises(UnavailableError):
        world.store.put("never", [BODY])


def test_created_object_that_arrived_wrong_is_set_right_by_its_creator(
    make: Callable[..., FaultyServer], server: S3Server
) -> None:
    if server.kind != "moto":
        pytest.skip("this server checks what it gets, or does not create once")
    world = make(config_kwargs=HASTY)
    assert world.store.capabilities().create_only
    world.proxy.rule = first(1, Flip(100, "request"), when=lambda request: request.method == "PUT")
    world.store.put("log/1", [BODY], create_only=True)
    assert read(world.direct, "log/1") == BODY
    assert not create(world.store, "log/1", b"other")


def test_upload_in_parts_that_fails_leaves_no_object_and_no_parts(
    world: FaultyServer, server: S3Server
) -> None:
    world.proxy.rule = always(
        Answer(503), when=lambda request: request.query.get("partNumber") == "2"
    )
    with pytest.raises(UnavailableError):
        world.store.put("large", [LARGE])
    assert keys(world.direct) == []
    bucket = world.store.url.split("/")[2]
    client = server.client()
    # A beginning whose reply came too late and was asked for again leaves a name without parts.
    for left in client.list_multipart_uploads(Bucket=bucket).get("Uploads", ()):
        parts = client.list_parts(Bucket=bucket, Key=left["Key"], UploadId=left["UploadId"])
        assert not parts.get("Parts")


def test_lost_reply_to_a_creation_is_settled_by_reading(world: FaultyServer) -> None:
    if not world.store.capabilities().create_only:
        pytest.skip("this store does not create once")
    world.proxy.rule = first(1, ResetAfter(), when=lambda request: request.method == "PUT")
    with pytest.raises((UnavailableError, KeyExistsError)):
        world.store.put("log/1", [BODY], create_only=True)
    assert not create(world.store, "log/1", b"other")
    assert read(world.store, "log/1") == BODY


def test_frozen_server_is_unavailable_and_serves_again_afterwards(
    world: FaultyServer, server: S3Server
) -> None:
    world.store.put("a", [BODY])
    server.freeze()
    try:
        with pytest.raises(UnavailableError):
            world.store.read_into("a", memoryview(bytearray(10)))
    finally:
        server.thaw()
    assert read(world.store, "a") == BODY


def test_killed_server_is_unavailable_and_has_all_that_was_put_once_it_is_back(
    make: Callable[..., FaultyServer], server: S3Server
) -> None:
    if not server.keeps_data:
        pytest.skip("this server forgets")
    world = make(config_kwargs={"retries": {"max_attempts": 1}})
    world.store.put("a", [BODY])
    world.store.put("large", [LARGE])
    server.stop()
    with pytest.raises(UnavailableError):
        world.store.stat("a")
    server.start()
    assert read(world.store, "a") == BODY
    assert read(world.store, "large") == LARGE


def test_random_faults_lose_nothing_that_was_acknowledged_and_give_no_wrong_byte(
    make: Callable[..., FaultyServer],
) -> None:
    print(f"CKPT_SEED={SEED}")
    world = make(config_kwargs={"retries": {"max_attempts": 1}})
    chances: dict[Fault, float] = {
        ResetBefore(): 0.1,
        ResetAfter(): 0.1,
        Answer(503): 0.1,
        Answer(500, "InternalError"): 0.05,
        Truncate(7): 0.1,
        Delay(0.05): 0.1,
    }
    world.proxy.rule = seeded(SEED, chances)
    acknowledged: dict[str, bytes] = {}
    maybe: dict[str, list[bytes]] = {}
    for turn in range(ROUNDS):
        key, body = f"k/{turn % 7}", os.urandom(1000 + turn)
        try:
            world.store.put(key, [body])
        except UnavailableError:
            maybe.setdefault(key, []).append(body)
        else:
            acknowledged[key], maybe[key] = body, []
        for known in list(acknowledged):
            out = bytearray(len(acknowledged[known]))
            try:
                world.store.read_into(known, memoryview(out), offset_bytes=0)
            except CkptError:
                continue
            assert bytes(out) in {acknowledged[known]} | {late[: len(out)] for late in maybe[known]}
    world.proxy.rule = let_through
    for key, body in acknowledged.items():
        assert read(world.direct, key) in (body, *maybe[key])
