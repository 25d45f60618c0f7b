"""A client that says exactly what a test tells it to: right heads, wrong heads, or bytes that are
neither."""

from __future__ import annotations

import dataclasses
import socket
from dataclasses import dataclass
from types import TracebackType

from ckpt.cluster.peermem.auth import PeerSecret, SessionKeys, mac
from ckpt.cluster.peermem.body_mac import body_mac
from ckpt.cluster.peermem.channel import PeerChannel, PeerTimeouts
from ckpt.cluster.peermem.http import (
    PeerAnswer,
    PeerHello,
    PeerRequest,
    PeerWelcome,
    parse_head,
    parse_status,
    split_mac,
    with_mac,
)
from ckpt.cluster.peermem.server import PeerServer
from kit.peers.servers import SECRET, WAIT_S


@dataclass(frozen=True)
class Said:
    """An answer: its status, whether its MAC was right, and what it says in full where it was."""

    status: int
    proven: bool
    answer: PeerAnswer | None


class RawPeer:
    """A connection to ``server`` whose every byte the test decides. ``meet`` makes the keys."""

    def __init__(
        self, server: PeerServer, *, secret: PeerSecret = SECRET, meet: bool = True
    ) -> None:
        self.socket = socket.create_connection(server.address, WAIT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.channel = PeerChannel(self.socket, PeerTimeouts(grace_s=WAIT_S))
        self.secret = secret
        self.boot = server.boot
        self.counter = 0
        self.keys: SessionKeys | None = None
        self.mac_name = ""
        if meet:
            self.meet()

    def __enter__(self) -> RawPeer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.socket.close()

    def meet(self, nonce: str = "ab" * 16) -> bytes:
        """Say hello; returns the hello's bytes."""
        head = PeerHello(nonce, ("gmac", "hmac-sha256")).encode("test")
        proof = self.secret.hello_mac(head)
        raw = with_mac(head, proof)
        self.socket.sendall(raw)
        answer = self.channel.read_head()
        assert answer is not None
        split = split_mac(answer)
        assert split is not None, answer
        assert split[1] == self.secret.welcome_mac(proof, split[0])
        self.mac_name = PeerWelcome.parse(parse_head(split[0])).mac
        self.keys = self.secret.session(proof, split[1])
        return raw

    def request(self, **facts: object) -> PeerRequest:
        """A right request with the next number, except for ``facts``."""
        self.counter += 1
        base = PeerRequest(verb="HEAD", key="a", boot=self.boot, epoch=1, counter=self.counter)
        return dataclasses.replace(base, **facts)  # type: ignore[arg-type]

    def sign(self, head: bytes) -> bytes:
        """``head`` with this connection's MAC."""
        assert self.keys is not None
        return with_mac(head, mac(self.keys.request_head, head))

    def put_bytes(self, request: PeerRequest, body: bytes) -> bytes:
        """A whole PUT: head, body and tag."""
        assert self.keys is not None
        head = request.encode("test")
        proof = mac(self.keys.request_head, head)
        tag = body_mac(
            self.mac_name, self.keys.request_body, counter=request.counter, head_mac=proof
        )
        tag.update(body)
        return with_mac(head, proof) + body + tag.tag()

    def send(self, raw: bytes) -> None:
        """Send bytes; a server that has hung up already is no error here."""
        try:
            self.socket.sendall(raw)
        except (BrokenPipeError, ConnectionResetError):
            return

    def hear(self) -> Said | None:
        """The next answer's head; None where the server ended the connection."""
        try:
            raw = self.channel.read_head()
        except ConnectionResetError:
            return None
        if raw is None:
            return None
        split = split_mac(raw)
        if split is None:
            return Said(parse_status(parse_head(raw[:-2])), False, None)
        assert self.keys is not None
        assert split[1] == mac(self.keys.answer_head, split[0])
        answer = PeerAnswer.parse(parse_head(split[0]))
        return Said(answer.status, True, answer)

    def ask(self, raw: bytes) -> Said | None:
        """Send bytes and hear the answer."""
        self.send(raw)
        return self.hear()

    def body(self, answer: PeerAnswer) -> bytes:
        """The body behind ``answer``, its tag not looked at."""
        out = bytearray(answer.body_bytes)
        self.channel.read_body(
            memoryview(out), body_mac("hmac-sha256", b"", counter=0, head_mac=b"")
        )
        return bytes(out)
