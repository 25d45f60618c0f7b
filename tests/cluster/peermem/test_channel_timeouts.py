"""Who stands still is given up, who moves is not; and a cap is kept, changed and shared."""

from __future__ import annotations

import threading
import time

import pytest
from kit.peers.raw import RawPeer
from kit.peers.servers import WAIT_S, PeerServers, until

from ckpt.cluster.peermem.channel import PeerTimeouts
from ckpt.cluster.peermem.server import PeerServerLimits
from ckpt.errors import UsageError
from ckpt.rate_limit import RATE_BYTES_MIN, RateLimit

MIB = 1 << 20


def test_lateness_is_made_up_for_by_speed_which_earns_nothing() -> None:
    patience = PeerTimeouts(grace_s=10.0, bytes_per_s_min=100)
    assert patience.late_s(0.0, took_s=3.0, moved_bytes=0) == 3.0
    assert patience.late_s(3.0, took_s=1.0, moved_bytes=100) == 3.0
    assert patience.late_s(3.0, took_s=1.0, moved_bytes=300) == 1.0
    assert patience.late_s(3.0, took_s=1.0, moved_bytes=10**9) == 0.0
    assert patience.late_s(0.0, took_s=9.9, moved_bytes=1) > 9.8


@pytest.mark.slow
def test_a_peer_that_was_quick_and_then_stands_still_is_given_up_like_any_other(
    world: PeerServers,
) -> None:
    server = world.serve(limits=PeerServerLimits(timeouts=PeerTimeouts(grace_s=1.5)))
    with RawPeer(server) as peer:
        size = 24 * MIB
        raw = peer.put_bytes(
            peer.request(verb="PUT", key="a", body_bytes=size, waits=True), bytes(size)
        )
        peer.send(raw[: -size - 16])
        assert peer.channel.read_head() is not None
        peer.send(raw[-size - 16 : -1])
        assert peer.hear() is None
    until(lambda: server.stats().connections == 0)
    assert server.memory.stats().incoming_bytes == 0


@pytest.mark.slow
def test_a_cap_lets_through_what_it_says(world: PeerServers) -> None:
    cap = RateLimit(8 * MIB)
    cap.take(8 * MIB)  # owed from here on
    began_s = time.monotonic()
    for _ in range(4):
        cap.take(MIB)
    assert 0.9 * 11 / 8 <= time.monotonic() - began_s < WAIT_S


def test_without_a_cap_nobody_waits_and_nothing_is_owed() -> None:
    cap = RateLimit()
    for _ in range(100):
        assert cap.take(1 << 40) < 1.0
    cap.set(RATE_BYTES_MIN)
    assert cap.take(1) < 1.0


def test_a_cap_that_is_lifted_frees_who_waits() -> None:
    cap = RateLimit(RATE_BYTES_MIN)
    cap.take(1 << 40)
    waited = threading.Thread(target=lambda: cap.take(1))
    waited.start()
    cap.set(None)
    waited.join(WAIT_S)
    assert not waited.is_alive()
    assert cap.bytes_per_s is None


def test_a_cap_that_is_no_rate_is_refused() -> None:
    for rate in (0.0, -1.0, float("nan"), RATE_BYTES_MIN - 1.0):
        with pytest.raises(UsageError):
            RateLimit(rate)
        with pytest.raises(UsageError):
            RateLimit().set(rate)


@pytest.mark.slow
def test_puts_of_several_stores_share_a_cap_that_reads_do_not_know(world: PeerServers) -> None:
    cap = RateLimit(16 * MIB)
    server = world.serve()
    stores = [world.store(server, cap=cap) for _ in range(2)]
    began_s = time.monotonic()
    threads = [
        threading.Thread(target=store.put, args=(f"a/{at}", [bytes(4 * MIB)]))
        for at, store in enumerate(stores)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert time.monotonic() - began_s > 0.3
    cap.set(RATE_BYTES_MIN)
    cap.take(1 << 40)  # nothing is put from here on
    out = bytearray(4 * MIB)
    stores[0].read_into("a/1", memoryview(out))
    assert out == bytes(4 * MIB)


def test_a_cap_changed_in_the_middle_of_a_put_holds_for_the_rest_of_it(world: PeerServers) -> None:
    cap = RateLimit(RATE_BYTES_MIN)
    server = world.serve()
    store = world.store(server, cap=cap)
    thread = threading.Thread(target=store.put, args=("a", [bytes(64 * MIB)]))
    began_s = time.monotonic()
    thread.start()
    until(lambda: server.memory.stats().incoming_bytes)
    cap.set(None)
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert time.monotonic() - began_s < 30, "at the old cap it would take a minute"
    assert server.memory.stat("a") is not None
