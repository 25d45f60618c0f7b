"""Whatever comes, from strangers or from holders of the secret, a server lives, takes no more than
it says, and serves on."""

from __future__ import annotations

import random
import socket
import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kit.peers.raw import RawPeer
from kit.peers.servers import SECRET, PeerServers, read, until

from ckpt.cluster.endpoint import Endpoint
from ckpt.cluster.peermem.channel import PeerChannel, PeerTimeouts
from ckpt.cluster.peermem.client import PeerConnection
from ckpt.cluster.peermem.http import (
    CONTINUE,
    END,
    HEAD_BYTES_MAX,
    RANGES_MAX,
    DeltaBase,
    PeerRequest,
    with_mac,
)
from ckpt.cluster.peermem.memory import PeerMemory
from ckpt.cluster.peermem.server import CONNECTION_BYTES_MAX, PeerServer, PeerServerLimits
from ckpt.errors import CkptError

BUDGET_BYTES = 2 << 20
QUICK = PeerServerLimits(
    stranger_s=5.0, idle_s=5.0, timeouts=PeerTimeouts(grace_s=5.0, bytes_per_s_min=1 << 20)
)
KEPT = b"what was here before"
SEEDS = range(6)
TURNS = 60


def prepared(world: PeerServers) -> PeerServer:
    server = world.serve(vault=PeerMemory(BUDGET_BYTES), limits=QUICK)
    with server.memory.incoming("kept", len(KEPT)) as incoming:
        incoming.view[:] = KEPT
        incoming.publish()
    return server


def serves_on(world: PeerServers, server: PeerServer) -> None:
    """Nothing changed, nothing is held, and a client is served."""
    until(lambda: server.stats().connections == 0)
    store = world.store(server)
    assert read(store, "kept") == KEPT
    assert [one.key for one in store.list("")] == ["kept"]
    store.put("new", [bytes(100_000)])
    store.delete("new")
    stats = server.memory.stats()
    assert (stats.incoming_bytes, stats.removed_bytes) == (0, 0)
    assert stats.total_bytes <= BUDGET_BYTES
    store.close()


def exchange(server: PeerServer, *pieces: bytes) -> bytes:
    """Send bytes as a stranger, and take all that comes back."""
    answer = b""
    with socket.create_connection(server.address, 10) as sock:
        try:
            for piece in pieces:
                sock.sendall(piece)
            sock.shutdown(socket.SHUT_WR)
            while data := sock.recv(1 << 16):
                answer += data
        except (ConnectionResetError, BrokenPipeError):
            return answer
    return answer


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\r\n\r\n",
        b"\0" * 50_000,
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET /hello HTTP/1.1\r\nhost: h\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 50_000 + b"\r\n",
        b"GET /" + b"a" * 100_000,
        b"PUT /o/kept HTTP/1.1\r\nContent-Length: 9999999999\r\n\r\n" + bytes(100_000),
        b"PUT /o/kept HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"DELETE /o/kept HTTP/1.1\r\nHost: h\r\n\r\n" * 500,
        b"ckpt-mac: " + b"0" * 64 + END,
        b"POST /o/kept HTTP/1.1\r\nckpt-mac: " + b"f" * 64 + END,
    ],
    ids=range(14),
)
def test_what_strangers_say_is_refused_and_changes_nothing(world: PeerServers, raw: bytes) -> None:
    server = prepared(world)
    answer = exchange(server, raw)
    assert not answer or answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 401 "))
    serves_on(world, server)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.binary(max_size=2000), max_size=4))
def test_any_bytes_of_strangers_are_refused(world: PeerServers, pieces: list[bytes]) -> None:
    server = _one_server(world)
    answer = exchange(server, *pieces)
    assert not answer or answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 401 "))


def _one_server(world: PeerServers) -> PeerServer:
    """One for all examples of a test."""
    return world._servers[0] if world._servers else prepared(world)


STARTS = (
    "PUT /o/kept HTTP/1.1",
    "GET /o/kept HTTP/1.1",
    "GET /l?prefix=&after= HTTP/1.1",
    "BREW /o/kept HTTP/1.1",
    "",
    "PUT",
)
LINES = (
    "host: t",
    "ckpt-epoch: 1",
    "ckpt-counter: 1",
    "content-length: 99999999999999999",
    "transfer-encoding: chunked",
    "range: bytes=0-5",
    "range: bytes=0-999999999999999",
    "expect: 100-continue",
    "ckpt-boot: " + "0" * 32,
    "ckpt-base: /o/kept",
    "ckpt-base-version: 1",
    "ckpt-size: 20",
    "ckpt-ranges: 1",
    "ckpt-ranges: 99999999999999999",
)
HEADS = st.builds(
    lambda start, lines: "\r\n".join([start, *lines, ""]).encode("utf-8", "replace"),
    st.sampled_from(STARTS) | st.text(max_size=50),
    st.lists(
        st.sampled_from(LINES) | st.text(max_size=60),
        max_size=20,
    ),
)


@pytest.mark.slow
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(HEADS)
def test_any_head_that_a_holder_of_the_secret_signs_is_answered(
    world: PeerServers, head: bytes
) -> None:
    server = _one_server(world)
    with RawPeer(server) as peer:
        peer.send(peer.sign(head))
        peer.socket.shutdown(socket.SHUT_WR)
        said = peer.hear()
        assert said is not None
        assert said.status in (400, 401, 413, 421)
    assert server.memory.stat("kept") is not None


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=300))
def test_any_hello_that_a_holder_of_the_secret_signs_is_answered(
    world: PeerServers, head: bytes
) -> None:
    server = _one_server(world)
    with RawPeer(server, meet=False) as peer:
        said = peer.ask(with_mac(head, SECRET.hello_mac(head)))
        assert said is not None
        assert said.status in (400, 401)


def mutated(rng: random.Random, raw: bytes) -> bytes:
    """``raw`` with a few changes of any kind."""
    data = bytearray(raw)
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0:
                data[at : at + 1] = rng.randbytes(1)
            case 1:
                del data[at : at + rng.randrange(1, 40)]
            case 2:
                data[at:at] = rng.randbytes(rng.randrange(1, 40))
            case 3:
                data[at:at] = data[: rng.randrange(len(data) + 1)]
            case 4:
                data[at:at] = rng.choice(
                    (
                        b"\r\n",
                        b"\r\n\r\n",
                        b"\0",
                        b": ",
                        b"content-length: 5\r\n",
                        b"HTTP/1.1",
                        b"%",
                        b"\xff",
                    )
                )
            case _:
                data = data[:at]
    return bytes(data)


def valid(rng: random.Random, peer: RawPeer) -> tuple[bytes, bytes]:
    """A right request's head without its MAC, and what follows."""
    size = rng.choice((0, 1, 1000, 60_000))
    request: PeerRequest = rng.choice(
        (
            lambda: peer.request(verb="PUT", key="kept", body_bytes=size),
            lambda: peer.request(
                verb="PUT", key="kept", body_bytes=10 ** rng.randrange(1, 17), waits=True
            ),
            lambda: peer.request(verb="GET", key="kept", span=(0, rng.choice((1, 10**9)))),
            lambda: peer.request(verb="LIST", key="", after=""),
            lambda: peer.request(verb="DELETE", key="other"),
            lambda: peer.request(
                verb="PUT",
                key="kept",
                body_bytes=size,
                waits=rng.random() < 0.3,
                base=DeltaBase(
                    key="kept",
                    version=rng.choice((1, 2)),
                    size_bytes=rng.choice((len(KEPT), 10**6)),
                    ranges=rng.choice((0, 1, 60)),
                ),
            ),
        )
    )()
    return request.encode("t"), rng.randbytes(
        size + 16
    ) if request.verb == "PUT" and not request.waits else b""


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_mutated_requests_change_nothing(world: PeerServers, seed: int) -> None:
    """Spoiled before signing and after it, with bodies that are no bodies, many in a row, cut off
    anywhere."""
    rng = random.Random(seed)
    server = prepared(world)
    for _ in range(TURNS):
        with RawPeer(server) as peer:
            raw = b""
            for _ in range(rng.randrange(1, 4)):
                head, rest = valid(rng, peer)
                match rng.randrange(4):
                    case 0:
                        raw += peer.sign(mutated(rng, head)) + rest
                    case 1:
                        raw += mutated(rng, peer.sign(head) + rest)
                    case 2:
                        raw += peer.sign(head) + rng.randbytes(rng.randrange(20_000))
                    case _:
                        raw += peer.sign(head) + rest
            if rng.random() < 0.3:
                raw = raw[: rng.randrange(len(raw) + 1)]
            peer.send(raw)
            if rng.random() < 0.95:
                peer.socket.shutdown(socket.SHUT_WR)
            if rng.random() < 0.7:
                peer.hear()
    serves_on(world, server)


NUMBERS = st.integers(0, len(KEPT) + 3) | st.sampled_from((1 << 32, (1 << 63) - 1, (1 << 64) - 1))


@st.composite
def tables(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Ranges that are right or nearly so, or any numbers."""
    cuts = sorted(draw(st.sets(st.integers(0, len(KEPT)), max_size=8)))
    ranges = [(low, high - low) for low, high in zip(cuts[::2], cuts[1::2], strict=False)]
    for _ in range(draw(st.sampled_from((0, 0, 1, 3)))):
        at = draw(st.integers(0, len(ranges)))
        ranges[at : at + draw(st.integers(0, 1))] = [(draw(NUMBERS), draw(NUMBERS))]
    return ranges


def meant(ranges: list[tuple[int, int]], sent: bytes) -> bytes | None:
    """What a put of these ranges makes of KEPT, byte by byte; None where they make nothing."""
    places = [
        at
        for offset, length in ranges
        if length <= len(KEPT)
        for at in range(offset, offset + length)
    ]
    right = all(0 < length <= len(KEPT) for _, length in ranges) and places == sorted(set(places))
    if not right or len(places) != len(sent) or any(at >= len(KEPT) for at in places):
        return None
    made = bytearray(KEPT)
    for at, byte in zip(places, sent, strict=True):
        made[at] = byte
    return bytes(made)


@pytest.mark.slow
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(tables(), st.integers(-1, 1), st.booleans())
def test_any_table_that_a_holder_of_the_secret_signs_is_followed_or_refused(
    world: PeerServers, ranges: list[tuple[int, int]], off: int, waits: bool
) -> None:
    server = _one_server(world)
    size = min(len(KEPT), max(0, sum(length for _, length in ranges if length <= len(KEPT)) + off))
    sent = bytes(range(200, 200 + size))
    wanted = meant(ranges, sent)
    base = DeltaBase(key="kept", version=1, size_bytes=len(KEPT), ranges=len(ranges))
    with RawPeer(server) as peer:
        table = struct.pack(f">{2 * len(ranges)}Q", *(number for one in ranges for number in one))
        request = peer.request(
            verb="PUT", key="made", body_bytes=len(table + sent), waits=waits, base=base
        )
        peer.send(peer.put_bytes(request, table + sent))
        if waits:
            assert peer.channel.read_head() == CONTINUE
        said = peer.hear()
        assert said is not None
        assert said.status == (400 if wanted is None else 201)
        if wanted is not None:
            with server.memory.reading("made") as held:
                assert held.view == wanted
        server.memory.delete("made")
    with server.memory.reading("kept") as held:
        assert held.view == KEPT
    until(lambda: server.memory.stats().incoming_bytes == 0)


def test_requests_in_one_packet_are_answered_in_order(world: PeerServers) -> None:
    server = prepared(world)
    with RawPeer(server) as peer:
        raw = b""
        for number in range(20):
            if number % 2:
                raw += peer.sign(peer.request(verb="GET", key="kept", span=(0, 4)).encode("t"))
            else:
                raw += peer.put_bytes(
                    peer.request(verb="PUT", key=f"p/{number}", body_bytes=number), bytes(number)
                )
        peer.send(raw)
        for number in range(20):
            said = peer.hear()
            assert said is not None
            assert said.answer is not None
            assert (said.status, said.answer.counter) == (206 if number % 2 else 201, number + 1)
            if number % 2:
                assert peer.body(said.answer) == KEPT[:4]


@pytest.mark.parametrize("step", [1, 700, 8191])
def test_requests_cut_anywhere_into_packets_are_read_alike(world: PeerServers, step: int) -> None:
    server = prepared(world)
    with RawPeer(server) as peer:
        heads = [
            peer.sign(peer.request(key="kept").encode("t" * 900))
            for _ in range(2 if step == 1 else 30)
        ]
        raw = b"".join(heads)
        for at in range(0, len(raw), step):
            peer.send(raw[at : at + step])
        for _ in heads:
            said = peer.hear()
            assert said is not None
            assert said.status == 200


def test_a_lying_length_takes_no_more_than_the_budget_and_stores_nothing(
    world: PeerServers,
) -> None:
    server = prepared(world)
    for announced, sent in ((1000, 999), (1000, 5), (60_000, 0), (1 << 20, 100)):
        with RawPeer(server) as peer:
            request = peer.request(
                verb="PUT", key="lie", body_bytes=announced, waits=announced > 60_000
            )
            peer.send(peer.sign(request.encode("t")) + bytes(sent))
    with RawPeer(server) as peer:  # more than announced: the rest is no request
        raw = peer.put_bytes(peer.request(verb="PUT", key="short", body_bytes=3), b"abc")
        peer.send(raw + b"and so on\r\n\r\n")
        said = peer.hear()
        assert said is not None
        assert said.status == 201
        said = peer.hear()
        assert said is not None
        assert said.status == 401
    until(lambda: server.stats().connections == 0)
    assert server.memory.stat("lie") is None
    server.memory.delete("short")
    serves_on(world, server)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_crowds_of_liars_take_no_more_memory_than_is_stated(world: PeerServers) -> None:
    """Each holds its connection open: half a head, an endless head, a body announced and not sent,
    a listing not read."""
    server = prepared(world)
    guests = 48
    before = resident_bytes()
    tracemalloc.start()
    peers = [RawPeer(server) for _ in range(guests)]
    for number, peer in enumerate(peers):
        match number % 5:
            case 0:
                peer.send(b"GET /o/a HTTP/1.1\r\n" + b"a" * (HEAD_BYTES_MAX - 100))
            case 1:
                peer.send(b"GET /o/a HTTP/1.1\r\n" + b"a: b\r\n" * 100_000)
            case 2:
                peer.send(
                    peer.sign(
                        peer.request(
                            verb="PUT", key=f"x/{number}", body_bytes=1 << 20, waits=True
                        ).encode("t")
                    )
                )
            case 3:  # a table that never ends, of a body that would fit
                base = DeltaBase(key="kept", version=1, size_bytes=len(KEPT), ranges=RANGES_MAX)
                size = base.table_bytes + len(KEPT)
                head = peer.request(
                    verb="PUT", key=f"x/{number}", body_bytes=size, waits=True, base=base
                ).encode("t")
                peer.send(peer.sign(head) + bytes(base.table_bytes - 1))
            case _:
                peer.send(peer.sign(peer.request(verb="LIST", key="").encode("t")) * 3)
        assert server.memory.stats().total_bytes <= BUDGET_BYTES
    until(lambda: server.memory.stats().incoming_bytes <= BUDGET_BYTES)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    mine = sum(len(bytes(HEAD_BYTES_MAX)) for _ in peers)
    assert peak < BUDGET_BYTES + guests * CONNECTION_BYTES_MAX / 8 + mine
    assert resident_bytes() - before < BUDGET_BYTES + guests * CONNECTION_BYTES_MAX
    for peer in peers:
        peer.socket.close()
    serves_on(world, server)


def test_a_client_believes_no_server_that_talks_nonsense() -> None:
    """The same from the other side: any answer is an error that says so, in time, and takes no
    memory."""
    rng = random.Random(5)
    answers = [
        b"",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 999999999999\r\n" * 900,
        b"\0" * 20_000,
    ]
    answers += [
        mutated(rng, b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\nckpt-why: no\r\n\r\n")
        for _ in range(60)
    ]
    answers += [b"HTTP/1.1 200 OK\r\nckpt-mac: " + b"0" * 64 + END]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for answer in answers:
            client = PeerChannel(
                socket.create_connection(listener.getsockname()), PeerTimeouts(grace_s=5.0)
            )
            sock, _ = listener.accept()
            sock.sendall(answer)
            sock.shutdown(socket.SHUT_WR)
            with pytest.raises((CkptError, OSError)):
                PeerConnection._exchange_hellos(client, Endpoint(port=1), SECRET)
            client.close()
            sock.close()
