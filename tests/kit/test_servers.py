"""The servers and the proxy do what other tests rely on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import botocore.exceptions
import pytest

from kit.servers.proxy import FaultProxy
from kit.servers.rules import (
    Answer,
    Flip,
    Request,
    ResetBefore,
    Truncate,
    always,
    first,
    let_through,
    scripted,
    seeded,
)
from kit.servers.s3 import Gateway, S3Server

pytestmark = pytest.mark.slow


def test_killed_gateway_comes_back_at_its_port_with_its_data(s3_server: S3Server) -> None:
    bucket, endpoint = s3_server.bucket(), s3_server.endpoint
    s3_server.client().put_object(Bucket=bucket.name, Key="a", Body=b"x")
    s3_server.stop()
    assert not s3_server.running
    with pytest.raises(botocore.exceptions.EndpointConnectionError):
        s3_server.client().list_buckets()
    s3_server.start()
    assert s3_server.endpoint == endpoint
    assert s3_server.client().get_object(Bucket=bucket.name, Key="a")["Body"].read() == b"x"


@pytest.mark.parametrize("kind", ["s3_server", "moto_server"])
def test_wiped_server_is_empty(kind: str, request: pytest.FixtureRequest) -> None:
    server: S3Server = request.getfixturevalue(kind)
    server.bucket()
    server.wipe()
    assert server.client().list_buckets()["Buckets"] == []


def test_two_gateways_share_nothing(two_s3_servers: tuple[S3Server, S3Server]) -> None:
    one, other = two_s3_servers
    name = one.bucket().name
    assert name not in {bucket["Name"] for bucket in other.client().list_buckets()["Buckets"]}


def test_server_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    with Gateway(tmp_path / "server") as server:
        process = server._process
        assert process is not None
        pid = process._process.pid
        server.bucket()
    assert not (tmp_path / "server").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_proxy_passes_on_records_and_spoils(
    s3_server: S3Server, fault_proxy: Callable[..., FaultProxy]
) -> None:
    bucket, proxy = s3_server.bucket(), fault_proxy(s3_server.endpoint)
    body = bytes(range(256)) * 10_000
    s3_server.client().put_object(Bucket=bucket.name, Key="a b", Body=body)
    port = s3_server.port
    s3_server.port = proxy.port
    try:
        client = s3_server.client()
    finally:
        s3_server.port = port

    def get() -> bytes:
        got: bytes = client.get_object(Bucket=bucket.name, Key="a b")["Body"].read()
        return got

    assert get() == body
    assert (proxy.seen[0].request.method, proxy.seen[0].request.path) == (
        "GET",
        f"/{bucket.name}/a b",
    )
    proxy.rule = first(1, Flip(1000))
    spoiled = get()
    assert [at for at in range(len(body)) if spoiled[at] != body[at]] == [1000]
    proxy.rule = scripted([Answer(503), ResetBefore(), Truncate(100)])
    for error in (botocore.exceptions.ClientError, botocore.exceptions.ConnectionClosedError):
        with pytest.raises(error):
            get()
    with pytest.raises(botocore.exceptions.ResponseStreamingError):
        get()
    assert get() == body
    proxy.rule = always(Flip(7, "request"), when=lambda request: request.method == "PUT")
    with pytest.raises(botocore.exceptions.ClientError, match="XAmzContentSHA256Mismatch"):
        client.put_object(Bucket=bucket.name, Key="a b", Body=body)
    proxy.rule = let_through
    assert get() == body
    assert proxy.count(Answer) == 1


def test_seeded_faults_depend_on_the_seed_and_not_on_the_order() -> None:
    requests = [Request(n, "PUT", f"/b/{n % 10}", {}) for n in range(300)]
    chances = {ResetBefore(): 0.3, Answer(): 0.3}
    rule = seeded(1, chances)
    forward = {request.number: rule(request) for request in requests}
    by_target: dict[str, list[object]] = {}
    for request in requests:
        by_target.setdefault(request.target, []).append(forward[request.number])
    again = seeded(1, chances)
    other: dict[str, list[object]] = {}
    for request in sorted(requests, key=lambda request: (request.target, request.number)):
        other.setdefault(request.target, []).append(again(request))
    assert other == by_target
    assert [seeded(2, chances)(request) for request in requests] != list(forward.values())
    assert 100 < sum(fault is not None for fault in forward.values()) < 250
