"""A peer's memory as its clients see it: refusals as errors, connections that end, lent memory,
bytes that nobody proves."""

from __future__ import annotations

import mmap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from kit.peers.proxy import Proxy
from kit.peers.raw import RawPeer
from kit.peers.servers import OTHER_SECRET, SECRET, WAIT_S, Epoch, PeerServers, read, until

from ckpt.backends.replicated.buffers import Loan, TakenBackError
from ckpt.cluster.endpoint import Endpoint
from ckpt.cluster.peermem.channel import PeerTimeouts
from ckpt.cluster.peermem.memory import PeerMemory
from ckpt.cluster.peermem.server import EpochFence, PeerServer
from ckpt.cluster.peermem.store import PeerClientLimits, PeerStore
from ckpt.errors import (
    CkptError,
    FencedError,
    IntegrityError,
    KeyExistsError,
    NotFoundError,
    StoreDeniedError,
    StoreFullError,
    UnavailableError,
)

MIB = 1 << 20


def body(size: int, seed: int = 1) -> bytes:
    return bytes((seed + i * 7) & 255 for i in range(251)) * (size // 251) + bytes(size % 251)


def test_an_older_epoch_is_fenced_in_every_operation(world: PeerServers) -> None:
    server = world.serve()
    old, new = Epoch(3), Epoch(4)
    zombie, store = world.store(server, epoch=old), world.store(server, epoch=new)
    zombie.put("a", [b"old"])
    store.put("b", [b"new"])
    for act in (
        lambda: zombie.put("a", [b"zombie"]),
        lambda: zombie.put("c", [bytes(MIB)], create_only=True),
        lambda: zombie.delete("b"),
        lambda: zombie.stat("a"),
        lambda: list(zombie.list("")),
        lambda: zombie.read_into("b", memoryview(bytearray(3))),
    ):
        with pytest.raises(FencedError):
            act()
    assert (read(store, "a"), read(store, "b"), store.stat("c")) == (b"old", b"new", None)
    old.now = 5
    zombie.put("a", [b"revived"])
    with pytest.raises(FencedError):
        store.stat("a")


def test_a_refusal_is_the_error_that_its_handler_needs(world: PeerServers) -> None:
    server = world.serve(vault=PeerMemory(MIB))
    store = world.store(server)
    store.put("full", [bytes(600_000)])
    cases: list[tuple[type[CkptError], object]] = [
        (StoreFullError, lambda: store.put("a", [bytes(2 * MIB)])),
        (StoreFullError, lambda: store.put("a", [bytes(500_000)])),
        (KeyExistsError, lambda: store.put("full", [b""], create_only=True)),
        (NotFoundError, lambda: store.read_into("none", memoryview(bytearray(1)))),
        (IntegrityError, lambda: store.read_into("full", memoryview(bytearray(600_001)))),
        (StoreDeniedError, lambda: world.store(server, secret=OTHER_SECRET).stat("full")),
    ]
    for kind, act in cases:
        with pytest.raises(kind) as found:
            act()  # type: ignore[operator]
        assert type(found.value) is kind
        assert "127.0.0.1" in str(found.value)


@pytest.mark.slow
@pytest.mark.parametrize("large", [False, True])
def test_bytes_changed_on_the_way_are_never_believed(world: PeerServers, large: bool) -> None:
    server = world.serve()
    whole = body(3 * MIB if large else 500)
    world.store(server).put("a", [whole])
    proxy = Proxy(server)
    store = PeerStore(Endpoint(*proxy.address), SECRET, epoch=Epoch())
    seen = [0]

    def count(offset: int, data: bytes) -> bytes | None:
        seen[0] = max(seen[0], offset + len(data))
        return data

    proxy.down = count
    assert read(store, "a") == whole
    places = (
        range(0, seen[0], 7)
        if not large
        else (seen[0] - 1, seen[0] - 17, seen[0] // 2, seen[0] - len(whole) - 20)
    )
    for place in places:

        def flip(offset: int, data: bytes, place: int = place) -> bytes | None:
            if not offset <= place < offset + len(data):
                return data
            at = place - offset
            return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

        store.close()
        store = PeerStore(
            Endpoint(*proxy.address),
            SECRET,
            epoch=Epoch(),
            limits=PeerClientLimits(timeouts=PeerTimeouts(grace_s=0.5)),
        )
        proxy.down = flip
        with pytest.raises((IntegrityError, UnavailableError)):
            read(store, "a")
    proxy.down = lambda offset, data: data
    store.close()
    proxy.close()


@pytest.mark.parametrize("size", [10, 300_000])
def test_bytes_put_and_changed_on_the_way_are_never_stored(world: PeerServers, size: int) -> None:
    server = world.serve()
    proxy = Proxy(server)

    def flip(offset: int, data: bytes) -> bytes | None:
        return (
            data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]
            if offset > 200 and len(data) >= 26
            else data
        )

    store = PeerStore(Endpoint(*proxy.address), SECRET, epoch=Epoch())
    store.put("first", [b"x"])
    proxy.up = flip
    with pytest.raises(UnavailableError):
        store.put("a", [bytes(size)])
    assert server.memory.stat("a") is None
    store.close()
    proxy.close()


def test_a_stranger_in_the_peers_place_is_found_out(world: PeerServers) -> None:
    theirs = PeerServer(PeerMemory(MIB), OTHER_SECRET, emit=world.told.append)
    theirs.start()
    store = PeerStore(Endpoint(*theirs.address), SECRET, epoch=Epoch())
    with pytest.raises(StoreDeniedError):
        store.stat("a")
    theirs.stop()
    assert theirs.stats().refused["mac"] == 1


def test_a_peer_that_does_not_take_the_epoch_in_is_not_believed(
    world: PeerServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = world.serve()
    store = world.store(server)
    store.put("a", [b"x"])
    monkeypatch.setattr(EpochFence, "see", lambda fence, epoch: None)
    with pytest.raises(IntegrityError, match="older epoch"):
        world.store(server, epoch=Epoch(5)).stat("a")
    assert store.stat("a") is not None


def test_an_answer_is_taken_for_its_own_request_only(world: PeerServers) -> None:
    """Kept back and played later, to the same client on the same connection, a genuine answer is
    none."""
    server = world.serve()
    proxy = Proxy(server)
    store = PeerStore(Endpoint(*proxy.address), SECRET, epoch=Epoch())
    store.put("a", [b"x"])
    kept: list[bytes] = []

    def replay(offset: int, data: bytes) -> bytes | None:
        kept.append(data)
        return kept[0]

    proxy.down = replay
    assert store.stat("a") is not None
    server.memory.delete("a")
    with pytest.raises(IntegrityError, match="another request"):
        store.stat("a")
    store.close()
    proxy.close()


def test_lent_memory_that_is_taken_back_is_never_stored(world: PeerServers) -> None:
    server = world.serve()
    store = world.store(server)
    for size in (10, 3 * MIB):
        store.put("a", [b"before"])
        loan = Loan("a")
        loan.take_back()
        with pytest.raises(TakenBackError):
            store.put_lent("a", [bytes(size)], loan.still_lent)
        assert read(store, "a") == b"before"
        until(lambda: server.memory.stats().incoming_bytes == 0)


def test_still_lent_is_asked_when_all_is_sent_and_before_it_can_be_seen(world: PeerServers) -> None:
    server = world.serve()
    store, other = world.store(server), world.store(server)
    for size in (0, 10, MIB):
        asked: list[object] = []
        key = f"a/{size}"
        store.put_lent(
            key, [bytes(size)], lambda asked=asked, key=key: asked.append(other.stat(key))
        )  # type: ignore[misc]
        assert asked == [None]
        assert read(store, f"a/{size}") == bytes(size)


def test_memory_that_changes_while_it_is_sent_is_refused_by_its_tag(world: PeerServers) -> None:
    server = world.serve()
    store = world.store(server)
    memory = bytearray(8 * MIB)
    over = threading.Event()

    def scribble() -> None:
        turn = 0
        while not over.is_set():
            turn += 1
            memory[:: 64 << 10] = bytes([turn & 255]) * (len(memory) // (64 << 10))

    with ThreadPoolExecutor(1) as pool:
        pool.submit(scribble)
        torn = 0
        try:
            for _ in range(20):
                store.put("a", [memory])
        except StoreDeniedError:
            torn = 1
        finally:
            over.set()
    assert server.stats().refused.get("body", 0) == torn
    if not torn:
        pytest.skip("no scribble met a block between digest and sending")


def test_a_large_read_goes_in_streams_and_is_of_one_content(world: PeerServers) -> None:
    server = world.serve()
    store = world.store(server, limits=PeerClientLimits(stream_bytes_min=MIB))
    contents = [body(5 * MIB + 3, seed) for seed in (1, 2)]
    store.put("a", [contents[0]])
    out = bytearray(len(contents[0]) - 10)
    store.read_into("a", memoryview(out), offset_bytes=7)
    assert out == contents[0][7:-3]
    until(lambda: server.stats().served.get("GET") == 4)  # counted behind the answer
    over = threading.Event()

    def replace() -> None:
        turn = 0
        while not over.is_set():
            turn += 1
            store.put("a", [contents[turn % 2]])

    with ThreadPoolExecutor(1) as pool:
        replacing = pool.submit(replace)
        try:
            for _ in range(15):
                assert read(store, "a") in contents
        finally:
            over.set()
        replacing.result(WAIT_S)


def test_a_failed_stream_fails_the_read(world: PeerServers) -> None:
    store = world.store(world.serve(), limits=PeerClientLimits(stream_bytes_min=1000))
    store.put("a", [bytes(3500)])
    with pytest.raises(IntegrityError):
        store.read_into("a", memoryview(bytearray(4000)))
    with pytest.raises(NotFoundError):
        store.read_into("b", memoryview(bytearray(4000)))


def test_a_listing_comes_in_pages(world: PeerServers) -> None:
    server = world.serve()
    store = world.store(server)
    for number in range(2500):
        with server.memory.incoming(f"log/{number:05d}", 0) as incoming:
            incoming.publish()
    assert [one.key for one in store.list("log/")] == [
        f"log/{number:05d}" for number in range(2500)
    ]
    until(lambda: server.stats().served["LIST"] == 3)


def test_an_empty_mapping_and_odd_buffers_are_put_without_being_joined(world: PeerServers) -> None:
    store = world.store(world.serve())
    pieces = [bytes([i & 255]) * (i % 5) for i in range(3000)]
    store.put("many", pieces)
    assert read(store, "many") == b"".join(pieces)
    memory = mmap.mmap(-1, 100_000)
    store.put("mapped", [memoryview(memory)[:50_000], b"", memoryview(memory)[50_000:]])
    assert read(store, "mapped") == bytes(100_000)


def test_a_peer_of_another_version_is_said_to_be_one(world: PeerServers) -> None:
    server = world.serve()
    with RawPeer(server) as peer:
        said = peer.ask(peer.sign(b"GET /o/a HTTP/1.1\r\nhost: t\r\nfuture: yes\r\n"))
        assert said is not None
        assert (said.status, said.proven) == (400, True)
