"""Agents in this process, each of which waits for its round in a thread of its own; and an etcd to
meet in."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from torch.distributed.elastic.rendezvous.api import RendezvousInfo, RendezvousParameters

from ckpt.elastic.rendezvous.agent import ROUND_TTL_S
from ckpt.elastic.rendezvous.plugin import Rendezvous, handler_of
from kit.servers.process import ServerProcess, free_port

TESTS = Path(__file__).parents[1]
WAIT_S = 90.0
"""No single wait takes longer; against hangs only."""


def wait_for(until: Callable[[], bool], what: str, *, wait_s: float = WAIT_S) -> None:
    """Wait for a condition."""
    deadline_s = time.monotonic() + wait_s
    while not until():
        if time.monotonic() > deadline_s:
            pytest.fail(f"not within {wait_s:.0f} s: {what}")
        time.sleep(0.01)


class Waiting:
    """A call of ``next_rendezvous`` in a thread of its own."""

    def __init__(self, handler: Rendezvous) -> None:
        self.handler = handler
        self.error: BaseException | None = None
        self._info: RendezvousInfo | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._info = self.handler.next_rendezvous()
        except BaseException as error:  # noqa: BLE001  looked at in the test
            self.error = error

    @property
    def waits(self) -> bool:
        return self._thread.is_alive()

    @property
    def info(self) -> RendezvousInfo:
        """What it returned; waits for that."""
        self._thread.join(WAIT_S)
        assert self.error is None, repr(self.error)
        assert self._info is not None, "next_rendezvous did not return"
        return self._info

    def fails(self) -> BaseException:
        """What it raised; waits for that."""
        self._thread.join(WAIT_S)
        assert self.error is not None, "next_rendezvous did not raise"
        return self.error


class Agents:
    """Makes handlers of one job, and ends them."""

    def __init__(
        self, endpoint: str, job: str, nodes_min: int, nodes_max: int, config: Mapping[str, object]
    ) -> None:
        self.endpoint, self.job, self.range, self.config = (
            endpoint,
            job,
            (nodes_min, nodes_max),
            config,
        )
        self.made: list[Rendezvous] = []

    def make(self, **config: object) -> Rendezvous:
        """One more agent, which has not come yet."""
        parameters = RendezvousParameters(
            "ckpt", self.endpoint, self.job, *self.range, **{**self.config, **config}
        )
        self.made.append(handler_of(parameters))
        return self.made[-1]

    def come(self, count: int, **config: object) -> list[Waiting]:
        """That many agents come to the rendezvous."""
        return [Waiting(self.make(**config)) for _ in range(count)]

    def close(self) -> None:
        for handler in self.made:
            handler._agent.leave()


def seated(waiting: list[Waiting]) -> list[Waiting]:
    """All of them, in the order of their ranks."""
    return sorted(waiting, key=lambda one: one.info.rank)


class Etcd:
    """One etcd on loopback."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports = [free_port() for _ in range(3)]
        self._process: ServerProcess | None = None

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self._ports[0]}"

    def start(self) -> None:
        """Start it, with the data that it had; returns when it answers."""
        client, peer, metrics = (f"http://127.0.0.1:{port}" for port in self._ports)
        self._process = ServerProcess(
            [
                "etcd",
                "--name",
                "one",
                "--data-dir",
                str(self._folder / "data"),
                "--listen-client-urls",
                client,
                "--advertise-client-urls",
                client,
                "--listen-peer-urls",
                peer,
                "--initial-advertise-peer-urls",
                peer,
                "--initial-cluster",
                f"one={peer}",
                "--listen-metrics-urls",
                metrics,
                "--unsafe-no-fsync",
                "--logger",
                "zap",
                "--log-level",
                "error",
            ],
            ready_url=f"{metrics}/health",
            log=self._folder / "log",
            env={},
        )
        self._process.wait_ready()

    def leases(self) -> list[int]:
        """Those of nodes: all but the stores of rounds, which live for an hour."""
        found = [int(one["ID"]) for one in self._ask("lease/leases", {}).get("leases", ())]
        ttls = [
            self._ask("lease/timetolive", {"ID": str(one)}).get("grantedTTL", 0) for one in found
        ]
        return [one for one, ttl_s in zip(found, ttls, strict=True) if 0 < int(ttl_s) < ROUND_TTL_S]

    def _ask(self, what: str, body: dict) -> dict:  # type: ignore[type-arg]
        request = urllib.request.Request(
            f"http://{self.endpoint}/v3/{what}", data=json.dumps(body).encode()
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            request, timeout=10
        ) as reply:
            return dict(json.load(reply))

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
