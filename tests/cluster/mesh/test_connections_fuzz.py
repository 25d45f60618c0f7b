"""Whatever comes to the port of a keeper's lines, from strangers or over a network that spoils
bytes, real lines go on.

What strangers may cost: STRANGERS_MAX connections at a time, each with a greeting's bytes (over TLS
what OpenSSL keeps of a handshake), and one read of READ_BYTES for all. ``GROWTH_BYTES_MAX`` has
what Python's allocator keeps in it too.
"""

from __future__ import annotations

import os
import random
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from kit.mesh_nodes import SECRET, WAIT_S, Node, acquaint
from kit.servers.certificates import Authority
from msgspec.msgpack import encode

from ckpt.cluster.mesh.connections import UNAUTHENTICATED_MAX
from ckpt.cluster.mesh.messages import MeshPost, NodeProgress
from ckpt.cluster.mesh.protocol import GREETING_BYTES_MAX, MeshProtocol, frame_mac
from ckpt.cluster.tls import TlsContexts, job_tls
from ckpt.ipc.cluster_spec import NodesSpec

SOAK = os.environ.get("CKPT_SOAK") == "1"
FIRST = int(os.environ.get("CKPT_SEED", "1"))
SEEDS = range(FIRST, FIRST + (40 if SOAK else 2))
TURNS = 2000 if SOAK else 200
GROWTH_BYTES_MAX = UNAUTHENTICATED_MAX * (2 * GREETING_BYTES_MAX + (256 << 10)) + (16 << 20)


@pytest.fixture(params=["clear", "TLS"])
def tls(request: pytest.FixtureRequest, authority: Authority) -> TlsContexts | None:
    if request.param == "clear":
        return None
    files = authority.sign("fuzzed").spec()
    return job_tls(NodesSpec(where="/f", job="job", nodes_min=1, nodes_max=2, **files))


def framed(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


def greeting(rng: random.Random) -> bytes:
    """One that is right but for the secret, or is not quite right."""
    right = {"version": 1, "job": "job", "node": "b", "nonce": rng.randbytes(16), "to": "a"}
    wrong = rng.choice(
        (
            {},
            {},
            {"version": 9},
            {"job": "another"},
            {"node": "a"},
            {"to": "c"},
            {"nonce": b"short"},
            {"node": "n" * 3000},
            {"version": "1"},
            {"nonce": None},
        )
    )
    return framed(encode({**right, **wrong}))


def frame(rng: random.Random) -> bytes:
    """One whose MAC nobody made who knows the secret."""
    word = rng.choice(
        (
            MeshPost(room="1", key="k", value=b"forged"),
            NodeProgress(attempt=1, sealed=(), completed=10**6),
        )
    )
    return framed(encode(word)) + rng.randbytes(16)


def speech(rng: random.Random) -> bytes:
    match rng.randrange(7):
        case 0:
            return rng.randbytes(rng.choice((1, 3, 40, 3000, 300_000)))
        case 1:
            return struct.pack(
                "<I", rng.choice((2**32 - 1, 64 << 20, GREETING_BYTES_MAX + 1, GREETING_BYTES_MAX))
            ) + rng.randbytes(99)
        case 2:
            return greeting(rng)
        case 3:
            return greeting(rng) + b"".join(frame(rng) for _ in range(rng.randrange(1, 6)))
        case 4:
            whole = greeting(rng) + frame(rng)
            return whole[: rng.randrange(len(whole))]
        case 5:
            return (
                b"\x16\x03\x01"
                + struct.pack(">H", rng.choice((5, 500, 16_384)))
                + rng.randbytes(rng.choice((5, 500)))
            )
        case _:
            return rng.choice((b"GET / HTTP/1.1\r\n\r\n", b"", b"SSH-2.0-x\r\n"))


class Witness:
    """A line between two real nodes, over which words go on being said; none may be lost, doubled,
    changed or late for ever."""

    def __init__(self, one: Node, other: Node) -> None:
        self.one, self.other = one, other
        self.said = 0
        acquaint(one, other)

    def check(self, *, calm: bool = True) -> None:
        """``calm``: nor may the line have been down."""
        word = MeshPost(room="1", key=str(self.said), value=os.urandom(2000))
        assert self.one.lines.send(self.other.name, word)
        self.said += 1
        self.other.wait(lambda: len(self.other.words) >= self.said, "a word")
        assert self.other.words[-1] == (self.one.name, word)
        assert len(self.other.words) == self.said
        assert not calm or self.one.downs == self.other.downs == []


@pytest.mark.parametrize("seed", SEEDS)
def test_strangers_say_nothing_that_counts(
    node: Callable[..., Node], tls: TlsContexts | None, seed: int
) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    one, other = node("a", tls=tls), node("z", tls=tls)
    witness = Witness(one, other)
    witness.check()
    fds, memory = descriptors(), resident_bytes()
    open_: list[socket.socket] = []
    for turn in range(TURNS):
        sock = socket.create_connection(("127.0.0.1", one.lines.port), WAIT_S)
        with suppress(ConnectionError):
            sock.sendall(speech(rng))
        open_.append(sock)
        while len(open_) > rng.choice((0, 10, UNAUTHENTICATED_MAX + 20)):
            open_.pop(rng.randrange(len(open_))).close()
        if turn % 20 == 0:
            witness.check()
            assert len(one.lines._connections) <= UNAUTHENTICATED_MAX + 2
    witness.check()
    grown = resident_bytes() - memory
    print(
        f"grew by {grown >> 10} KiB, of {GROWTH_BYTES_MAX >> 10} KiB; {one.lines.refused} refused"
    )
    assert grown <= GROWTH_BYTES_MAX
    assert one.lines.refused > 0
    assert one.ups == ["z"]
    assert {event.kind for event in one.events} == {"line-refused"}
    assert len(one.events) <= UNAUTHENTICATED_MAX
    for sock in open_:
        sock.close()
    wait(lambda: descriptors() <= fds, "the end of strangers' connections")
    witness.check()


@pytest.mark.slow
def test_node_gets_in_though_strangers_hold_all_places(node: Callable[..., Node]) -> None:
    """They greet half, and come again whenever they are pushed out."""
    one = node("a")
    over = threading.Event()

    def crowd() -> None:
        mine: list[socket.socket] = []
        while not over.is_set():
            sock = socket.create_connection(("127.0.0.1", one.lines.port), WAIT_S)
            with suppress(ConnectionError):
                sock.sendall(b"\x40\x00\x00\x00half")
            mine.append(sock)
            if len(mine) > 2 * UNAUTHENTICATED_MAX:
                mine.pop(0).close()
        for sock in mine:
            sock.close()

    thread = threading.Thread(target=crowd, daemon=True)
    thread.start()
    try:
        wait(lambda: one.lines.refused > UNAUTHENTICATED_MAX, "a crowd")
        Witness(one, node("z")).check()
        Witness(one, node("0")).check(
            calm=False
        )  # it is the one that calls: a crowd may push it out before it is heard
    finally:
        over.set()
        thread.join(WAIT_S)


class Recorder:
    """Carries one node's calls to another and keeps what the caller sent; may flip a bit of it,
    once, at ``spoil_at``."""

    def __init__(self, port: int) -> None:
        self.sent: list[bytes] = []
        self.spoil_at: int | None = None
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._socks = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for sock in self._socks:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                there = socket.create_connection(("127.0.0.1", self._to))
                self._socks += [sock, there]
                self.sent.append(b"")
                threading.Thread(
                    target=self._carry, args=(sock, there, len(self.sent) - 1), daemon=True
                ).start()
                threading.Thread(target=self._carry, args=(there, sock, None), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, number: int | None) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if number is not None:
                    self.sent[number] += data
                    if self.spoil_at is not None:
                        at, self.spoil_at = self.spoil_at % len(data), None
                        data = data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
                target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)


def test_recorded_line_is_no_line_when_it_is_played_again(
    node: Callable[..., Node], tls: TlsContexts | None
) -> None:
    one, other = node("a", tls=tls), node("b", tls=tls)
    recorder = Recorder(other.lines.port)
    try:
        one.lines.set_targets({"b": f"127.0.0.1:{recorder.port}"})
        other.lines.set_targets({"a": one.address})
        one.wait(lambda: one.ups, "the line")
        for number in range(5):
            assert one.lines.send("b", MeshPost(room="1", key=str(number), value=b"v"))
        other.wait(lambda: len(other.words) == 5, "the words")
        recorded = recorder.sent[0]
        before = other.lines.refused
        for piece in (len(recorded), 100, 7):
            with (
                socket.create_connection(("127.0.0.1", other.lines.port), WAIT_S) as sock,
                suppress(ConnectionError),
            ):
                for at in range(0, len(recorded), piece):
                    sock.sendall(recorded[at : at + piece])
                while sock.recv(65536):
                    continue
        wait(lambda: other.lines.refused == before + 3, "that all three were refused")
        assert len(other.words) == 5
        assert other.ups == ["a"] and other.downs == []
    finally:
        recorder.close()


@pytest.mark.parametrize("seed", SEEDS)
def test_spoiled_bytes_end_a_line_and_are_never_heard(
    node: Callable[..., Node], tls: TlsContexts | None, seed: int
) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    one, other = node("a", tls=tls), node("b", tls=tls)
    recorder = Recorder(other.lines.port)
    said: set[tuple[str, MeshPost]] = set()
    try:
        one.lines.set_targets({"b": f"127.0.0.1:{recorder.port}"})
        other.lines.set_targets({"a": one.address})
        for turn in range(3):
            one.wait(
                lambda turn=turn: len(one.ups) > turn and one.lines.connected_nodes(), "the line"
            )
            recorder.spoil_at = rng.randrange(5000)
            until_s = time.monotonic() + WAIT_S
            while len(one.downs) <= turn:
                assert time.monotonic() < until_s, "what was spoiled was believed"
                # Long: where a length was spoiled, the line ends once so many bytes have come.
                word = MeshPost(room=str(turn), key=str(len(said)), value=rng.randbytes(20_000))
                if one.lines.send("b", word):
                    said.add(("a", word))
                with one.changed:
                    one.changed.wait_for(lambda turn=turn: len(one.downs) > turn, 0.02)
        one.wait(lambda: len(one.ups) > 3, "the line again")
        assert set(other.words) <= said
        assert len(set(other.words)) == len(other.words)
    finally:
        recorder.close()


def test_word_that_is_too_long_ends_the_line_and_not_the_keeper(
    node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = node("a"), node("b")
    acquaint(one, other)
    monkeypatch.setattr("ckpt.cluster.mesh.protocol.FRAME_BYTES_MAX", 10_000)
    assert one.lines.send("b", MeshPost(room="1", key="k", value=bytes(20_000)))
    one.wait(lambda: one.downs, "that the line is down")
    assert "too long" in one.downs[0][1]
    one.wait(lambda: len(one.ups) == 2, "the line again")
    assert one.lines.send("b", MeshPost(room="1", key="k", value=b"short"))
    other.wait(lambda: other.words, "a word")


@pytest.mark.slow
def test_holder_of_the_secret_that_says_what_no_release_says_is_refused(
    node: Callable[..., Node],
) -> None:
    """Right MACs around wrong words: of a defect, or of another release."""
    one = node("b")
    rng = random.Random(3)
    for body in (
        b"",
        b"\xc1",
        encode({"type": "Nonsense"}),
        encode([1] * 500),
        encode({"type": "Post", "room": 5}),
        rng.randbytes(900),
    ):
        cable = MeshProtocol(SECRET, job="job", node="a", nonce=rng.randbytes(16), dials="b")
        with socket.create_connection(("127.0.0.1", one.lines.port), WAIT_S) as sock:
            while not cable.up:
                sock.sendall(cable.data_to_send())
                cable.receive_data(sock.recv(65536))
            sock.sendall(cable.data_to_send())
            sock.sendall(signed(cable, body))
            with suppress(ConnectionError):
                while sock.recv(65536):
                    continue
    one.wait(lambda: len(one.downs) == 6, "that each was hung up on")
    assert one.words == []
    assert one.lines.refused == 6


def signed(cable: MeshProtocol, body: bytes) -> bytes:
    return framed(body) + frame_mac(cable._send_key, cable._sent, body)


def wait(until: Callable[[], object], what: str) -> None:
    until_s = time.monotonic() + WAIT_S
    while not until():
        assert time.monotonic() < until_s, f"not in time: {what}"
        time.sleep(0.01)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
