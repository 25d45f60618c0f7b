"""A server bears guests who are slow, many, rude or gone, and ends when it is told to."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from kit.peers.raw import RawPeer
from kit.peers.servers import BRIEF, BUDGET_BYTES, PATIENT, SECRET, WAIT_S, PeerServers, read, until

from ckpt.backends.base import Stat
from ckpt.cluster.endpoint import Endpoint
from ckpt.cluster.peermem.channel import PeerTimeouts
from ckpt.cluster.peermem.client import CrowdedError
from ckpt.cluster.peermem.memory import PeerMemory, ServedObject
from ckpt.cluster.peermem.server import PeerServer, PeerServerLimits
from ckpt.cluster.peermem.store import PeerClientLimits, PeerStore
from ckpt.errors import StoreFullError, UnavailableError, UsageError

OLD, NEW = b"the old object", b"n" * 300
LARGE_BYTES = 32 << 20


def put(server: PeerServer, key: str, body: bytes) -> None:
    with server.memory.incoming(key, len(body)) as incoming:
        incoming.view[:] = body
        incoming.publish()


def held(server: PeerServer, key: str) -> bytes | None:
    if server.memory.stat(key) is None:
        return None
    with server.memory.reading(key) as found:
        return bytes(found.view)


def deserted(server: PeerServer) -> bool:
    return server.stats().connections == 0


@pytest.mark.slow
def test_a_put_cut_off_at_any_byte_leaves_the_old_object_or_none(world: PeerServers) -> None:
    server = world.serve()
    put(server, "old", OLD)
    with RawPeer(server) as peer:
        length = len(peer.put_bytes(peer.request(verb="PUT", key="old", body_bytes=len(NEW)), NEW))
    for cut in range(0, length, 3):
        for key in ("old", "new"):
            with RawPeer(server) as peer:
                peer.send(
                    peer.put_bytes(peer.request(verb="PUT", key=key, body_bytes=len(NEW)), NEW)[
                        :cut
                    ]
                )
    until(lambda: deserted(server))
    assert held(server, "old") == OLD
    assert held(server, "new") is None
    assert server.memory.stats().incoming_bytes == 0


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999999])
def test_a_large_announced_put_cut_off_gives_its_memory_back(
    world: PeerServers, share: float
) -> None:
    server = world.serve()
    put(server, "old", OLD)
    body = bytes(LARGE_BYTES)
    with RawPeer(server) as peer:
        raw = peer.put_bytes(
            peer.request(verb="PUT", key="old", body_bytes=len(body), waits=True), body
        )
        peer.send(raw[: -len(body) - 16])
        assert peer.channel.read_head() == b"HTTP/1.1 100 Continue\r\n\r\n"
        peer.send(raw[-len(body) - 16 :][: int((len(body) + 16) * share)])
    until(lambda: deserted(server))
    assert held(server, "old") == OLD
    assert server.memory.stats().incoming_bytes == 0


def test_a_put_beyond_the_budget_is_refused_before_a_byte_comes(world: PeerServers) -> None:
    server = world.serve(vault=PeerMemory(1 << 20))
    put(server, "full", bytes(600_000))
    before = server.memory.stats()
    with RawPeer(server) as peer:
        for size, status in ((1 << 50, 413), ((1 << 20) + 1, 413), (500_000, 507)):
            said = peer.ask(
                peer.sign(
                    peer.request(verb="PUT", key="a", body_bytes=size, waits=True).encode("t")
                )
            )
            assert said is not None
            assert said.status == status
        assert server.memory.stats() == before
        said = peer.ask(peer.put_bytes(peer.request(verb="PUT", key="a", body_bytes=5), b"small"))
        assert said is not None
        assert said.status == 201, "the connection is still of use"
    assert (server.stats().refused["too-large"], server.stats().refused["full"]) == (2, 1)


def test_a_small_body_that_came_unasked_is_dropped_with_its_refusal(world: PeerServers) -> None:
    server = world.serve(vault=PeerMemory(8192))
    with RawPeer(server) as peer:
        for _ in range(3):
            said = peer.ask(
                peer.put_bytes(peer.request(verb="PUT", key="a", body_bytes=60_000), bytes(60_000))
            )
            assert said is not None
            assert said.status == 413
        said = peer.ask(
            peer.put_bytes(peer.request(verb="PUT", key="a", body_bytes=70_000), bytes(70_000))
        )
        assert said is not None
        assert said.status == 400, "so much is announced first"
        assert peer.hear() is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "what", ["nothing", "a hello's start", "a head's start", "a body's start", "idle"]
)
def test_a_guest_that_stands_still_is_ended_and_its_memory_comes_back(
    world: PeerServers, what: str
) -> None:
    server = world.serve(limits=BRIEF)
    with RawPeer(server, meet=what not in ("nothing", "a hello's start")) as peer:
        if what == "a hello's start":
            peer.send(b"GET /hello HT")
        elif what == "idle":
            peer.ask(peer.sign(peer.request(key="a").encode("t")))
        elif what != "nothing":
            raw = peer.put_bytes(peer.request(verb="PUT", key="a", body_bytes=3000), bytes(3000))
            peer.send(raw[:20] if what == "a head's start" else raw[:-500])
        began_s = time.monotonic()
        assert peer.hear() is None
        assert time.monotonic() - began_s < WAIT_S / 3
    until(lambda: deserted(server))
    assert server.memory.stats().incoming_bytes == 0
    assert server.stats().refused.get("slow", 0) + server.stats().refused.get("mac", 0) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("what", ["head", "body", "hello"])
def test_a_trickle_holds_no_connection(world: PeerServers, what: str) -> None:
    server = world.serve(limits=BRIEF)
    with RawPeer(server, meet=what != "hello") as peer:
        raw = b"GET /hello HTTP/1.1\r\n" * 1000
        if what != "hello":
            raw = peer.put_bytes(
                peer.request(verb="PUT", key="a", body_bytes=60_000), bytes(60_000)
            )
            if what == "body":
                peer.send(raw[:1000])
                raw = raw[1000:]
        began_s = time.monotonic()
        for at in range(len(raw)):
            try:
                peer.socket.sendall(raw[at : at + 1])
            except OSError:
                break
            if deserted(server):
                break
            assert time.monotonic() - began_s < WAIT_S / 2
            threading.Event().wait(0.01)  # slower than any limit allows, faster than any silence
    until(lambda: deserted(server))
    assert server.memory.stats().total_bytes == 0


@pytest.mark.slow
def test_a_reader_that_takes_nothing_is_ended_and_lets_go_of_the_object(world: PeerServers) -> None:
    server = world.serve(limits=BRIEF)
    put(server, "a", bytes(LARGE_BYTES))
    with RawPeer(server) as peer:
        peer.send(peer.sign(peer.request(verb="GET", key="a", span=(0, LARGE_BYTES)).encode("t")))
        until(lambda: server.stats().refused.get("slow"))
        server.memory.delete("a")
        until(lambda: server.memory.stats().removed_bytes == 0)


def test_strangers_never_keep_a_holder_of_the_secret_out(world: PeerServers) -> None:
    limits = PeerServerLimits(
        connections_max=3,
        strangers_max=2,
        stranger_s=WAIT_S,
        idle_s=WAIT_S,
        timeouts=PeerTimeouts(grace_s=WAIT_S),
    )
    server = world.serve(limits=limits)
    crowd = [socket.create_connection(server.address) for _ in range(10)]
    store = world.store(server)
    store.put("a", [b"x"])
    assert read(store, "a") == b"x"
    assert server.stats().strangers <= 2
    for one in crowd:
        one.close()
    assert server.stats().refused["crowded"] >= 8


TWO = PeerServerLimits(
    connections_max=2,
    strangers_max=2,
    stranger_s=WAIT_S,
    idle_s=10 * WAIT_S,
    timeouts=PeerTimeouts(grace_s=WAIT_S),
)
"""Who rests would keep its place for longer than anybody waits for one (``crowded_s``)."""


@pytest.mark.slow
def test_more_holders_than_connections_take_the_places_of_those_that_rest(
    world: PeerServers,
) -> None:
    server = world.serve(limits=TWO)
    stores = [world.store(server, limits=PeerClientLimits(crowded_s=WAIT_S)) for _ in range(5)]
    for turn in range(20):
        for number, store in enumerate(stores):
            store.put(f"a/{number}", [bytes([turn])])
            assert read(store, f"a/{number}") == bytes([turn])
            assert server.stats().connections <= 2 + 2


class Slow:
    """A source whose object is read while a test lets it."""

    prefix = "slow/"

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Semaphore(0), threading.Event()

    @contextlib.contextmanager
    def reading(self, key: str) -> Iterator[ServedObject]:
        """See Source."""
        self.begun.release()
        assert self.go_on.wait(WAIT_S)
        yield ServedObject(
            view=memoryview(b"x"), fd=None, offset_bytes=0, version=1, modified_unix_s=0.0
        )

    def stat(self, key: str) -> Stat | None:
        """See Source."""
        return Stat(key, 1, 0.0)

    def list(self) -> list[Stat]:
        """See Source."""
        return []


def test_where_all_places_have_a_request_under_way_others_come_again_until_one_is_over(
    world: PeerServers,
) -> None:
    slow = Slow()
    server = world.serve(limits=TWO, sources=[slow])
    world.store(server).put("a", [b"x"])
    with ThreadPoolExecutor(3) as pool:
        busy = [pool.submit(read, world.store(server), f"slow/{number}") for number in range(2)]
        for _ in busy:
            assert slow.begun.acquire(timeout=WAIT_S)
        with pytest.raises(CrowdedError, match="no free place"):
            world.store(server, limits=PeerClientLimits(crowded_s=0.1)).stat("a")
        waiting = pool.submit(
            world.store(server, limits=PeerClientLimits(crowded_s=WAIT_S)).stat, "a"
        )
        refused = server.stats().refused["crowded"]
        until(lambda: server.stats().refused["crowded"] > refused)
        assert not waiting.done()
        slow.go_on.set()
        assert [one.result(WAIT_S) for one in busy] == [b"x", b"x"]
        found = waiting.result(WAIT_S)
    assert found is not None and found.size_bytes == 1


def test_many_times_more_holders_than_places_at_the_same_moment_are_all_served(
    world: PeerServers,
) -> None:
    limits = PeerServerLimits(connections_max=4, strangers_max=4, stranger_s=WAIT_S, idle_s=WAIT_S)
    server = world.serve(limits=limits)
    world.store(server).put("a", [b"x"])
    stores = [world.store(server, limits=PeerClientLimits(crowded_s=WAIT_S)) for _ in range(40)]
    start = threading.Barrier(len(stores), timeout=WAIT_S)

    def ask(store: PeerStore) -> list[bytes]:
        start.wait()
        return [read(store, "a") for _ in range(3)]

    with ThreadPoolExecutor(len(stores)) as pool:
        assert list(pool.map(ask, stores)) == [[b"x"] * 3] * len(stores)
    assert server.stats().connections <= 8


@pytest.mark.slow
def test_strangers_are_ended_after_their_time_however_busy_they_look(world: PeerServers) -> None:
    limits = PeerServerLimits(stranger_s=2.0, timeouts=PeerTimeouts(grace_s=WAIT_S))
    server = world.serve(limits=limits)
    with RawPeer(server) as peer:  # a hello alone proves little: it may be a recorded one
        assert peer.hear() is None
    until(lambda: deserted(server))


def test_many_clients_at_once_get_what_they_put(world: PeerServers) -> None:
    server = world.serve()
    store = world.store(server, limits=PeerClientLimits(connections_max=4))

    def work(me: int) -> None:
        mine = store if me % 2 else world.store(server)
        for turn in range(6):
            body = bytes([me * 16 + turn]) * (1 + 40_000 * turn)
            mine.put(f"n{me}/{turn}", [body[:7], body[7:]])
            assert read(mine, f"n{me}/{turn}") == body
        mine.delete(f"n{me}/0")

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(work, range(12)))
    assert len(list(store.list(""))) == 12 * 5
    counts = {"PUT": 72, "GET": 72, "DELETE": 12}
    until(
        lambda: (
            {"LIST", *counts} <= (served := server.stats().served).keys()
            and counts.items() <= served.items()
        )
    )
    stats = server.stats()
    assert not stats.refused
    assert stats.received_bytes == 12 * sum(1 + 40_000 * turn for turn in range(6))
    assert stats.sent_bytes > stats.received_bytes


def test_stop_ends_whatever_is_under_way_and_repeats_harmlessly(world: PeerServers) -> None:
    server = world.serve()
    put(server, "a", bytes(LARGE_BYTES))
    threads, address = threading.active_count(), server.address
    with (
        RawPeer(server) as idle,
        RawPeer(server) as writer,
        RawPeer(server) as reader,
        RawPeer(server, meet=False),
    ):
        writer.send(
            writer.put_bytes(writer.request(verb="PUT", key="b", body_bytes=5000), bytes(5000))[:-1]
        )
        reader.send(
            reader.sign(reader.request(verb="GET", key="a", span=(0, LARGE_BYTES)).encode("t"))
        )
        until(lambda: server.memory.stats().incoming_bytes)
        began_s = time.monotonic()
        server.stop()
        server.stop()
        assert time.monotonic() - began_s < WAIT_S / 3
        assert deserted(server)
        assert idle.hear() is None
        assert server.memory.stats().incoming_bytes == 0
        assert held(server, "b") is None
    assert threading.active_count() < threads
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)


def test_a_server_that_never_started_stops(world: PeerServers) -> None:
    server = PeerServer(PeerMemory(BUDGET_BYTES), SECRET, emit=world.told.append)
    server.stop()


def test_a_restart_in_the_middle_of_a_put_loses_that_put_alone(world: PeerServers) -> None:
    vault = PeerMemory(BUDGET_BYTES)
    server = world.serve(vault=vault, limits=PATIENT)
    store = world.store(server)
    store.put("a", [b"before"])
    first = store.boot
    gate, sent = threading.Event(), threading.Event()

    def still_lent() -> None:
        sent.set()
        assert gate.wait(WAIT_S)

    with ThreadPoolExecutor(1) as pool:
        putting = pool.submit(store.put_lent, "b", [bytes(LARGE_BYTES)], still_lent)
        assert sent.wait(WAIT_S)
        port = server.address[1]
        server.stop()
        again = world.serve(port=port)
        gate.set()
        with pytest.raises(UnavailableError):
            putting.result(WAIT_S)
    assert vault.stats().incoming_bytes == 0
    assert read(store, "a") is None, "memory is gone with its server"
    assert store.boot == again.boot != first
    store.put("b", [b"after"])
    assert read(store, "b") == b"after"


def test_an_address_that_is_taken_is_said(world: PeerServers) -> None:
    server = world.serve()
    with pytest.raises(UsageError, match="can't be listened on"):
        world.serve(port=server.address[1])


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "10.1.2.3", "::", "example.org", "127.0.0.1.example.org"]
)
def test_beyond_loopback_it_takes_tls_or_a_word(host: str) -> None:
    with pytest.raises(UsageError, match="plaintext=True"):
        Endpoint(host, 1)
    assert Endpoint(host, 1, plaintext=True).host == host


@pytest.mark.parametrize("text", ["", "a", ":1", "a:", "a:b", "a:-1", "a:65536", "::1:5", "a:٣"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not an address"):
        Endpoint.parse(text)


def test_addresses_are_read_as_they_are_shown() -> None:
    for text in ("127.0.0.1:80", "[::1]:8080", "localhost:0"):
        assert str(Endpoint.parse(text)) == text


def test_a_full_vault_is_told_apart_from_one_that_is_gone(world: PeerServers) -> None:
    server = world.serve(vault=PeerMemory(1 << 20))
    store = world.store(server)
    with pytest.raises(StoreFullError):
        store.put("a", [bytes(2 << 20)])
    server.stop()
    with pytest.raises(UnavailableError) as found:
        store.put("a", [b"x"])
    assert not isinstance(found.value, StoreFullError)
