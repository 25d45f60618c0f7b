"""Keyspaces of all kinds, and real etcd, for the tests of membership."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault(
    "GRPC_ENABLE_FORK_SUPPORT", "0"
)  # as in ckpt.cluster.membership.open, before anything imports grpc

from ckpt.cluster.membership.member import KeyspaceMembership
from ckpt.cluster.membership.open import open_keyspace
from ckpt.errors import UnavailableError
from ckpt.keyspace.address import EtcdOptions
from ckpt.keyspace.base import Keyspace
from ckpt.keyspace.sqlite import SqliteKeyspace
from kit.etcd import EtcdCluster, require
from kit.membership.memory_keyspace import MemoryKeyspace, MemoryServer

_jobs = itertools.count()

MEMBER_TTL_S = 6.0
"""Of members that are not to be lost because a busy machine stood still for a moment."""


@pytest.fixture(scope="session")
def etcd_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    """A cluster of one, which no test harms."""
    require()
    with EtcdCluster(tmp_path_factory.mktemp("etcd") / "one", 1) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def _etcd_three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    require()
    with EtcdCluster(tmp_path_factory.mktemp("etcd") / "three", 3) as cluster:
        yield cluster


@pytest.fixture
def etcd_three(_etcd_three: EtcdCluster) -> Iterator[EtcdCluster]:
    """A cluster of three, whole again after whatever a test did to it."""
    _etcd_three.start()
    yield _etcd_three
    for member in _etcd_three.members:
        if member.running:
            member.process.thaw()
    _etcd_three.start()


@pytest.fixture
def job() -> str:
    """A job that no other test has."""
    return f"job {os.getpid()}/{next(_jobs)} ü"


@pytest.fixture(params=["memory", "embedded", "etcd"])
def service(request: pytest.FixtureRequest) -> str:
    """Each kind of service in turn."""
    return str(request.param)


@pytest.fixture
def ttl_s() -> float:
    """A short life for leases that are to run out. etcd grants no less."""
    return 2.0


@pytest.fixture
def make_keyspace(
    service: str, request: pytest.FixtureRequest, tmp_path: Path, job: str
) -> Iterator[Callable[[], Keyspace]]:
    """Makes keyspaces of one job, each as another process would have it, over each kind of
    service."""
    made: list[Keyspace] = []
    server = MemoryServer()

    def make() -> Keyspace:
        keyspace: Keyspace
        if service == "memory":
            keyspace = MemoryKeyspace(server)
        elif service == "embedded":
            keyspace = SqliteKeyspace(tmp_path / "state" / "job.sqlite3")
        else:
            keyspace = open_keyspace(EtcdOptions(endpoints=cluster.endpoints, call_s=5.0), job)
        made.append(keyspace)
        return keyspace

    if service == "etcd":
        cluster: EtcdCluster = request.getfixturevalue("etcd_one")
    yield make
    for keyspace in made:
        keyspace.close()


@pytest.fixture
def make_member(
    make_keyspace: Callable[[], Keyspace], job: str
) -> Iterator[Callable[..., KeyspaceMembership]]:
    """Makes what a node has of the job, before it joined."""
    made: list[KeyspaceMembership] = []

    def make(ttl_s: float = MEMBER_TTL_S, **more: Callable[[float], None]) -> KeyspaceMembership:
        made.append(KeyspaceMembership(make_keyspace(), job, ttl_s=ttl_s, **more))
        return made[-1]

    yield make
    for member in made:
        with contextlib.suppress(UnavailableError):  # it left before
            member.leave()
