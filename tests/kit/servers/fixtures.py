"""Fixtures over the servers, which every test may ask for.

Servers start when the first test asks, once a session, and are running again after whatever a test
did to them. Each test makes buckets of its own, or takes ``s3_bucket``; between tests a gateway
that holds much is emptied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from kit.servers.proxy import FaultProxy
from kit.servers.s3 import Bucket, Gateway, Moto, S3Server

STORED_BYTES_MAX = 1 << 30
"""A gateway that holds more after a test is emptied."""


class Servers:
    """The servers of one test session, each started when it is first asked for."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders
        self._made: dict[tuple[type[S3Server], int], S3Server] = {}

    def get(self, kind: type[S3Server], number: int = 0) -> S3Server:
        """The running server of that kind and number."""
        server = self._made.get((kind, number))
        if server is None:
            folder = self._folders.mktemp(kind.kind) / "server"
            server = self._made[kind, number] = kind(folder)
        server.start()
        return server

    def close(self) -> None:
        """End all of them and remove what they stored."""
        with ExitStack() as ending:
            for server in self._made.values():
                ending.push(server)


def _tidy(server: S3Server) -> None:
    """What tests leave in their buckets stays for the whole session, until it is much."""
    if server.folder.exists() and server.stored_bytes() > STORED_BYTES_MAX:
        server.wipe()


@pytest.fixture(scope="session")
def _s3_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    servers = Servers(tmp_path_factory)
    yield servers
    servers.close()


@pytest.fixture
def s3_server(_s3_servers: Servers) -> Iterator[S3Server]:
    """A running gateway; a test may stop it, freeze it, wipe it."""
    server = _s3_servers.get(Gateway)
    yield server
    _tidy(server)


@pytest.fixture
def two_s3_servers(_s3_servers: Servers) -> Iterator[tuple[S3Server, S3Server]]:
    """Two running gateways that know nothing of each other: two regions."""
    one, other = _s3_servers.get(Gateway, 0), _s3_servers.get(Gateway, 1)
    yield one, other
    _tidy(one)
    _tidy(other)


@pytest.fixture
def moto_server(_s3_servers: Servers) -> S3Server:
    """A running moto server: it honours conditional puts."""
    return _s3_servers.get(Moto)


@pytest.fixture
def s3_bucket(s3_server: S3Server) -> Bucket:
    """A fresh bucket of the gateway."""
    return s3_server.bucket()


@pytest.fixture
def fault_proxy() -> Iterator[Callable[..., FaultProxy]]:
    """Makes proxies before servers (``fault_proxy(server.endpoint, rule)``), closed after the
    test."""
    with ExitStack() as ending:

        def make(*arguments: object, **more: object) -> FaultProxy:
            return ending.enter_context(FaultProxy(*arguments, **more))  # type: ignore[arg-type]

        yield make
