"""Agents of both kinds of membership, real etcd among them, and a torchrun that knows ckpt's
rendezvous."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kit.agents import Agents, Etcd

HERE = Path(__file__).parent
TESTS = HERE.parents[1]

_jobs = itertools.count()


@pytest.fixture(scope="session")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    """One etcd, which no test harms."""
    if shutil.which("etcd") is None:
        if os.environ.get("CI"):
            pytest.fail("etcd is not installed: .ci/run has to install etcd-server")
        pytest.skip("etcd is not installed (Debian: apt-get install etcd-server)")
    server = Etcd(tmp_path_factory.mktemp("etcd"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(params=["embedded", "etcd"])
def driver(request: pytest.FixtureRequest) -> str:
    """Each kind of membership in turn."""
    return str(request.param)


@pytest.fixture
def endpoint(driver: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where agents meet."""
    if driver == "etcd":
        server: Etcd = request.getfixturevalue("etcd")
        return server.endpoint
    return str(tmp_path / "members")


@pytest.fixture
def agents(
    driver: str, endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Agents]]:
    """Makes the agents of one job: ``agents(nodes_min, nodes_max, **config)``."""
    made: list[Agents] = []
    file = tmp_path / "job.secret"
    file.touch(0o600)
    file.write_text("0" * 64)
    secret = {"secret": str(file)} if driver == "etcd" else {}

    def make(nodes_min: int, nodes_max: int, **config: object) -> Agents:
        ttl = {"embedded": "1.0", "etcd": "2"}[driver]
        job = f"job {os.getpid()}/{next(_jobs)}"
        made.append(
            Agents(
                endpoint,
                job,
                nodes_min,
                nodes_max,
                {"ttl": ttl, "last_call_timeout": "0.5", **secret, **config},
            )
        )
        return made[-1]

    for name in ("CKPT_NODES", "CKPT_VERDICT"):  # what handlers set is gone after the test
        monkeypatch.setenv(name, "")
    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH that tells torch of the entry point, as an installed ckpt does."""
    folder = tmp_path_factory.mktemp("plugin")
    about = folder / "ckpt_plugin-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: ckpt-plugin\nVersion: 0\n")
    (about / "entry_points.txt").write_text(
        "[torchrun.handlers]\nckpt = ckpt.elastic.rendezvous:handler\n"
    )
    return folder
