"""A client's connections: used again, replaced when they ended, bounded, and no fork's business."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from kit.peers.proxy import Proxy
from kit.peers.servers import SECRET, WAIT_S, Epoch, PeerServers, read, until

from ckpt.cluster.endpoint import Endpoint
from ckpt.cluster.peermem.channel import PeerTimeouts
from ckpt.cluster.peermem.server import PeerServerLimits
from ckpt.cluster.peermem.store import PeerClientLimits, PeerStore
from ckpt.errors import (
    UnavailableError,
)

MIB = 1 << 20


def test_nobody_there_is_unavailable(world: PeerServers) -> None:
    server = world.serve()
    endpoint = Endpoint(*server.address)
    server.stop()
    store = PeerStore(endpoint, SECRET, epoch=Epoch())
    for act in (
        lambda: store.stat("a"),
        lambda: store.put("a", [b""]),
        lambda: list(store.list("")),
    ):
        with pytest.raises(UnavailableError):
            act()
    store.close()
    with pytest.raises(UnavailableError, match="closed"):
        store.stat("a")


def test_connections_that_the_server_ended_are_replaced_unseen(world: PeerServers) -> None:
    server = world.serve(
        limits=PeerServerLimits(idle_s=0.05, timeouts=PeerTimeouts(grace_s=WAIT_S))
    )
    store = world.store(server)
    for turn in range(3):
        store.put("a", [bytes([turn])])
        store.put("log/1", [b"x"], create_only=True) if not turn else None
        until(lambda: server.stats().connections == 0)
    assert read(store, "a") == b"\2"
    assert read(store, "log/1") == b"x"


def test_a_connection_that_breaks_unheard_is_tried_once_more_and_only_once(
    world: PeerServers,
) -> None:
    server = world.serve()
    proxy = Proxy(server)
    store = PeerStore(
        Endpoint(*proxy.address), SECRET, epoch=Epoch(), limits=PeerClientLimits(crowded_s=0.0)
    )
    store.put("a", [b"one"])
    cuts = []

    def cut(offset: int, data: bytes) -> bytes | None:
        cuts.append(offset)
        proxy.up = proxy.up if len(cuts) > 1 else cut
        return None

    proxy.up = cut
    with pytest.raises(UnavailableError):
        store.put("a", [b"two"])
    assert len(cuts) == 2
    proxy.up = lambda offset, data: data
    assert read(store, "a") == b"one"
    store.close()
    proxy.close()


def test_a_silent_peer_is_given_up_in_time(world: PeerServers) -> None:
    server = world.serve()
    proxy = Proxy(server)
    proxy.down = lambda offset, data: b""
    store = PeerStore(
        Endpoint(*proxy.address),
        SECRET,
        epoch=Epoch(),
        limits=PeerClientLimits(timeouts=PeerTimeouts(grace_s=0.2)),
    )
    with pytest.raises(UnavailableError):
        store.stat("a")
    store.close()
    proxy.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_shares_no_connection_with_its_parent(world: PeerServers) -> None:
    server = world.serve()
    store = world.store(server)
    store.put("a", [b"parent"])
    child = os.fork()
    if not child:
        status = 1
        try:
            store.put("child", [b"child"])
            status = 0 if read(store, "a") == b"parent" else 2
        finally:
            os._exit(status)
    _, found = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(found) == 0
    assert read(store, "child") == b"child"
    assert read(store, "a") == b"parent"
    assert "replay" not in server.stats().refused


def test_connections_are_bounded_and_waited_for(world: PeerServers) -> None:
    server = world.serve()
    store = world.store(server, limits=PeerClientLimits(connections_max=1, pool_wait_s=0.1))
    gate, inside = threading.Event(), threading.Event()

    def hold() -> None:
        inside.set()
        assert gate.wait(WAIT_S)

    with ThreadPoolExecutor(1) as pool:
        holding = pool.submit(store.put_lent, "a", [bytes(MIB)], hold)
        assert inside.wait(WAIT_S)
        with pytest.raises(UnavailableError, match="busy"):
            store.stat("a")
        gate.set()
        holding.result(WAIT_S)
    assert store.stat("a") is not None
    assert server.stats().connections == 1
