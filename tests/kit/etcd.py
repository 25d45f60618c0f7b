"""Real etcd on loopback: members that can be killed, frozen, wiped and started again."""

from __future__ import annotations

import json
import os
import shutil
import time
import urllib.request
from pathlib import Path

import pytest

from kit.servers.process import POLL_S, READY_S, ServerProcess, free_port

PACKAGES = {
    "etcd": "etcd-server",
    "etcdctl": "etcd-client",
    "haproxy": "haproxy",
    "openssl": "openssl",
}
"""The programs that these tests need, and Debian's packages that have them."""


def require(program: str = "etcd") -> str:
    """The program's path. Skips the test where it isn't installed; in CI that is a failure."""
    found = shutil.which(program)
    if found is None:
        if os.environ.get("CI"):
            pytest.fail(f"{program} is not installed: .ci/run has to install {PACKAGES[program]}")
        pytest.skip(f"{program} is not installed (Debian: apt-get install {PACKAGES[program]})")
    return found


class EtcdMember:
    """One member of a cluster."""

    def __init__(
        self, name: str, folder: Path, *, scheme: str = "http", more: tuple[str, ...] = ()
    ) -> None:
        self.name = name
        self.folder = folder
        self.client_port = free_port()
        self.peer_port = free_port()
        self.metrics_port = free_port()
        self._scheme = scheme
        self._more = more
        self._process: ServerProcess | None = None

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.client_port}"

    @property
    def peer_url(self) -> str:
        return f"http://127.0.0.1:{self.peer_port}"

    def start(self, initial: str) -> None:
        """Start it; it answers once a majority runs."""
        binary = require()
        self.folder.mkdir(parents=True, exist_ok=True)
        client_url = f"{self._scheme}://{self.endpoint}"
        metrics_url = f"http://127.0.0.1:{self.metrics_port}"
        self._process = ServerProcess(
            [
                binary,
                "--name",
                self.name,
                "--data-dir",
                str(self.folder / "data"),
                "--listen-client-urls",
                client_url,
                "--advertise-client-urls",
                client_url,
                "--listen-peer-urls",
                self.peer_url,
                "--initial-advertise-peer-urls",
                self.peer_url,
                "--listen-metrics-urls",
                metrics_url,
                "--initial-cluster",
                initial,
                "--initial-cluster-state",
                "new",
                "--unsafe-no-fsync",
                "--logger",
                "zap",
                "--log-level",
                "error",
                *self._more,
            ],
            ready_url=f"{metrics_url}/health",
            log=self.folder / "log",
            env={},
        )

    @property
    def process(self) -> ServerProcess:
        assert self._process is not None
        return self._process

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.running

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()

    def wipe(self) -> None:
        """Lose all its data. Call it while it is dead."""
        assert not self.running
        shutil.rmtree(self.folder / "data", ignore_errors=True)

    def is_leader(self) -> bool:
        """Whether this member leads the cluster, as its metrics say."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(url, timeout=2) as reply:
                return b"\netcd_server_is_leader 1" in reply.read()
        except OSError:
            return False


class EtcdCluster:
    """Members that know each other; use as a context."""

    def __init__(
        self, folder: Path, count: int, *, scheme: str = "http", more: tuple[str, ...] = ()
    ) -> None:
        self.folder = folder
        self.members = [
            EtcdMember(f"m{n}", folder / f"m{n}", scheme=scheme, more=more) for n in range(count)
        ]

    @property
    def endpoints(self) -> tuple[str, ...]:
        return tuple(member.endpoint for member in self.members)

    @property
    def _initial(self) -> str:
        return ",".join(f"{member.name}={member.peer_url}" for member in self.members)

    def start(self) -> None:
        """Start those that don't run, and wait until all answer."""
        for member in self.members:
            if not member.running:
                member.start(self._initial)
        for member in self.members:
            member.process.wait_ready()

    def leader(self) -> EtcdMember:
        """Who leads; waits until somebody does."""
        deadline_s = time.monotonic() + READY_S
        while time.monotonic() < deadline_s:
            for member in self.members:
                if member.running and member.is_leader():
                    return member
            time.sleep(POLL_S)
        raise TimeoutError("no member leads")

    def stop(self) -> None:
        """Kill all that run; frozen ones too."""
        for member in self.members:
            member.kill()

    def wipe(self) -> None:
        """A fresh cluster at the same addresses."""
        self.stop()
        for member in self.members:
            member.wipe()
        self.start()

    def __enter__(self) -> EtcdCluster:
        self.start()
        return self

    def __exit__(self, *args: object) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


def revision_of(endpoint: str) -> int:
    """The revision of a member's own data."""
    request = urllib.request.Request(
        f"http://{endpoint}/v3/kv/range",
        data=json.dumps({"key": "AA==", "serializable": True}).encode(),
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=5) as reply:
        return int(json.load(reply)["header"]["revision"])
