"""What the tests of peers share: servers and stores with short limits, and waiting for a
condition."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Sequence

from ckpt.cluster.endpoint import Endpoint
from ckpt.cluster.peermem.auth import PeerSecret
from ckpt.cluster.peermem.channel import PeerTimeouts
from ckpt.cluster.peermem.memory import PeerMemory, ServedSource
from ckpt.cluster.peermem.server import PeerServer, PeerServerLimits
from ckpt.cluster.peermem.store import PeerClientLimits, PeerStore
from ckpt.events import Event
from ckpt.rate_limit import RateLimit

WAIT_S = 30.0
SECRET = PeerSecret.of(bytes(range(32)))
OTHER_SECRET = PeerSecret.of(bytes(range(100, 132)))
BUDGET_BYTES = 160 << 20

PATIENT = PeerServerLimits(stranger_s=WAIT_S, idle_s=WAIT_S, timeouts=PeerTimeouts(grace_s=WAIT_S))
BRIEF = PeerServerLimits(
    stranger_s=3.0, idle_s=3.0, timeouts=PeerTimeouts(grace_s=3.0, bytes_per_s_min=8 << 20)
)
"""Limits that a test reaches at once, and ones that none reaches."""


class Epoch:
    """An epoch that a test sets."""

    def __init__(self, now: int = 1) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


class PeerServers:
    """Servers and stores of one test."""

    def __init__(self) -> None:
        self.told: list[Event] = []
        self._servers: list[PeerServer] = []
        self._stores: list[PeerStore] = []

    def serve(
        self,
        *,
        vault: PeerMemory | None = None,
        limits: PeerServerLimits = PATIENT,
        port: int = 0,
        tls: ssl.SSLContext | None = None,
        epoch: int = 0,
        sources: Sequence[ServedSource] = (),
    ) -> PeerServer:
        server = PeerServer(
            vault or PeerMemory(BUDGET_BYTES),
            SECRET,
            endpoint=Endpoint(port=port, tls=tls),
            limits=limits,
            epoch=epoch,
            sources=sources,
            emit=self.told.append,
        )
        server.start()
        self._servers.append(server)
        return server

    def store(
        self,
        server: PeerServer,
        *,
        secret: PeerSecret = SECRET,
        epoch: Callable[[], int] | None = None,
        cap: RateLimit | None = None,
        tls: ssl.SSLContext | None = None,
        limits: PeerClientLimits | None = None,
    ) -> PeerStore:
        endpoint = Endpoint(*server.address, tls=tls)
        store = PeerStore(endpoint, secret, epoch=epoch or Epoch(), cap=cap, limits=limits)
        self._stores.append(store)
        return store

    def close(self) -> None:
        for store in self._stores:
            store.close()
        for server in self._servers:
            server.stop()


def until(condition: Callable[[], object]) -> None:
    """Wait for a condition."""
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "it never came to that"
        time.sleep(0.005)


def read(store: PeerStore, key: str) -> bytes | None:
    """The whole object, or None."""
    found = store.stat(key)
    if found is None:
        return None
    out = bytearray(found.size_bytes)
    store.read_into(key, memoryview(out))
    return bytes(out)
