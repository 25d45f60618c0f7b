"""Lines to the keepers of the other nodes: dialled, answered, kept, made anew. One thread; nobody
waits for it.

Of two nodes the one with the smaller name dials. A line that breaks is dialled again at once and
then less and less often, as long as the other node is wanted; the other end only tries whether
anybody still listens there. Nothing that was said on a broken line is said again: whoever needs
that hears ``down``.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ckpt.cluster.mesh.addresses import (
    DIAL_TIMEOUT_S,
    NameResolver,
    address_family,
    disable_nagle,
    peer_name,
    socket_error_reason,
    split_address,
)
from ckpt.cluster.mesh.messages import MeshMessage, NodeHeartbeat
from ckpt.cluster.mesh.protocol import MeshProtocol, MessageEncoder
from ckpt.cluster.secret import NONCE_BYTES
from ckpt.cluster.tls import TlsContexts
from ckpt.errors import CkptError, StoreDeniedError, UnavailableError
from ckpt.events import Emit, Event

# TLS around one cable, without its socket: bytes of the network in, bytes of the cable out, and
# back. Pure but for OpenSSL.
#
# A line is one of many in one thread that never waits, so the handshake goes on as bytes come.
# What the cable says meanwhile is kept until it is over. Memory: what OpenSSL keeps of a
# handshake or a record, some 100 KiB, and what one read gave.

TLS_READ_BYTES = 64 << 10


class TlsStream:
    """One end. ``calls``: the host that is called, None at the end that was called."""

    def __init__(self, tls: TlsContexts, *, server_hostname: str | None) -> None:
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        if server_hostname is None:
            self._tls = tls.server.wrap_bio(self._in, self._out, server_side=True)
        else:
            self._tls = tls.client.wrap_bio(self._in, self._out, server_hostname=server_hostname)
        self._kept = bytearray()
        """What the cable said, and TLS has not taken."""
        self._met = False

    def receive_data(self, data: bytes) -> bytes:
        """What the other end's cable said, of what came.

        Raises StoreDeniedError for one that is not of this job's CA, or not where it says;
        ``last_words`` then tells it why.
        """
        self._in.write(data)
        said = bytearray()
        try:
            if not self._met:
                self._tls.do_handshake()
                self._met = True
            while piece := self._tls.read(TLS_READ_BYTES):
                said += piece
        except ssl.SSLWantReadError:
            pass  # more has to come
        except ssl.SSLError as error:
            why = (
                error.verify_message
                if isinstance(error, ssl.SSLCertVerificationError)
                else error.reason or str(error)
            )
            raise StoreDeniedError(
                f"TLS failed: {why}; compare the certificates, their CA and their hosts; all nodes "
                "have some or none"
            ) from error
        return bytes(said)

    def data_to_send(self, said: bytes) -> bytes:
        """The bytes that are to go out now, once; ``said``: what the cable says now. Raises
        StoreDeniedError."""
        self._kept += said
        try:
            if not self._met:
                self._tls.do_handshake()
                self._met = True
            while self._kept:
                count = self._tls.write(memoryview(self._kept)[:TLS_READ_BYTES].tobytes())
                del self._kept[:count]
        except ssl.SSLWantReadError:
            pass  # the other end's turn
        except ssl.SSLError as error:
            raise StoreDeniedError(f"TLS failed: {error.reason or error}") from error
        return self._out.read()

    def final_data(self) -> bytes:
        """What tells the other end why it was refused."""
        return self._out.read()


# A node to which a line is wanted: where it is called, and when next.

RETRY_FIRST_S = 0.05
RETRY_LAST_S = 2.0


@dataclass(slots=True)
class DialTarget:
    """See the module. Owned by the lines."""

    address: str
    unconfirmed: bool = True
    """Nobody has answered at its address yet, or since its line broke."""
    reached: bool = False
    """It was called there, and answered."""
    next_dial_s: float = 0.0
    pause_s: float = RETRY_FIRST_S

    def back_off(self, now_s: float) -> None:
        """A call was tried: the next comes later and later."""
        self.next_dial_s, self.pause_s = now_s + self.pause_s, min(2 * self.pause_s, RETRY_LAST_S)


HEARTBEAT_S = 1.0
"""How often a line on which nothing is said says that it is there."""
SILENCE_S_MAX = 4.0
"""A line on which nothing came for so long is given up, and dialled again."""
HANDSHAKE_S = 5.0
"""How long the other end may take to say who it is."""
PROBE_S = 1.0
UNAUTHENTICATED_MAX = 64
"""Connections that came and have not proved yet who they are; one more pushes out the oldest."""
SEND_BACKLOG_BYTES_MAX = 256 << 20
"""What waits for one node at most; one that reads nothing is given up."""
READ_BYTES = 256 << 10
BACKLOG = 256

_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


@dataclass(frozen=True, slots=True)
class MeshObserver:
    """Who is told what, all in the lines' thread: quick, and never raising."""

    on_message: Callable[[str, MeshMessage], object]
    on_connected: Callable[[str], object]
    on_disconnected: Callable[[str, str], object]
    """A line that was up broke, or a call failed; with why, which begins with ``refused`` where
    nobody listens."""


@dataclass(slots=True, eq=False)
class _MeshConnection:
    sock: socket.socket
    cable: MeshProtocol
    dialled: bool
    since_s: float
    sheath: TlsStream | None = None  # TLS around the cable
    probes: bool = False
    """Only to learn whether anybody listens there: hung up as soon as it is known."""
    connecting: bool = False
    out: bytearray = field(default_factory=bytearray)
    heard_s: float = 0.0
    said_s: float = 0.0
    told: bool = False


class Mesh:
    """The lines of one keeper. ``listen`` is ``host:port`` (port 0: any). Over TLS with ``tls``.
    Thread-safe."""

    def __init__(
        self,
        secret: bytes,
        *,
        job: str,
        node: str,
        listen: str,
        observer: MeshObserver,
        emit: Emit,
        tls: TlsContexts | None = None,
    ) -> None:
        self._secret = secret
        self._tls = tls
        self._job = job
        self._node = node
        self._heard = observer
        self._tell = emit
        self._told: set[str] = set()
        self.refused = 0
        """How many connections were ended because of what came on them, or because there were too
        many strangers."""
        host, port = split_address(listen)
        try:
            self._listener = socket.create_server(
                (host, int(port)), family=address_family(host), backlog=BACKLOG, reuse_port=False
            )
        except OSError as error:
            raise UnavailableError(
                f"other nodes can't be listened to. address={listen} why={error}"
            ) from error
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        """Where this keeper listens."""
        self._lock = threading.Lock()
        self._wanted: dict[str, DialTarget] = {}
        self._up: dict[str, _MeshConnection] = {}
        self._lines: set[_MeshConnection] = set()
        self._posted: list[tuple[str, MeshMessage]] = []
        self._places = NameResolver(self._wake)
        self._spell = MessageEncoder()
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_out.setblocking(False)
        self._wake_in.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="ckpt-lines", daemon=True)
        self._thread.start()

    def set_targets(self, nodes: Mapping[str, str]) -> None:
        """Keep a line to each of these nodes (addresses by name) and to no other."""
        with self._lock:
            mine = {node: address for node, address in nodes.items() if node != self._node}
            self._wanted = {
                node: known
                if (known := self._wanted.get(node)) and known.address == address
                else self._new(node, address)
                for node, address in mine.items()
            }
        self._places.keep_only(set(mine.values()))
        self._wake()

    def _new(self, node: str, address: str) -> DialTarget:
        """Who is to be dialled is so at once; who is to dial is looked for where no line came in
        time."""
        return DialTarget(
            address, next_dial_s=0.0 if node > self._node else time.monotonic() + PROBE_S
        )

    def send(self, node: str, word: MeshMessage) -> bool:
        """Say something to a node; False where no line to it is up now. What is said in order is
        heard in order."""
        with self._lock:
            if node not in self._up:
                return False
            self._posted.append((node, word))
        self._wake()
        return True

    def connected_nodes(self) -> frozenset[str]:
        """The nodes to which a line is up."""
        with self._lock:
            return frozenset(self._up)

    def close(self) -> None:
        """Hang up everywhere. Idempotent; not for the lines' own thread."""
        self._closing = True
        self._wake()
        self._thread.join()

    # ---- the thread

    def _run(self) -> None:
        self._selector.register(self._listener, _READ, None)
        self._selector.register(self._wake_out, _READ, None)
        try:
            while not self._closing:
                for key, mask in self._selector.select(self._tick()):
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.fileobj is self._wake_out:
                        self._drain_wake()
                    elif key.data in self._lines:
                        self._serve(key.data, mask)
                self._say_posted()
        finally:
            for line in list(self._lines):
                self._drop(line, "this keeper ends", quiet=True)
            self._selector.close()
            for sock in (self._listener, self._wake_in, self._wake_out):
                sock.close()

    def _tick(self) -> float:
        """Dial, beat, give up; returns seconds until the next look."""
        now_s = time.monotonic()
        with self._lock:
            wanted = dict(self._wanted)
        dialled = {line.cable.peer for line in self._lines if line.dialled}
        wait_s = HEARTBEAT_S
        for node, one in wanted.items():
            if node in dialled or node in self._up or (node < self._node and not one.unconfirmed):
                continue
            if now_s >= one.next_dial_s:
                self._dial(node, one, now_s)
            else:
                wait_s = min(wait_s, one.next_dial_s - now_s)
        for line in list(self._lines):
            if line.cable.up:
                if line.cable.peer not in wanted and line.dialled:
                    self._drop(line, "not wanted any more", quiet=True)
                elif now_s - line.heard_s > SILENCE_S_MAX:
                    self._drop(line, f"silent for {SILENCE_S_MAX:g} s")
                elif now_s - line.said_s >= HEARTBEAT_S:
                    self._send(line, NodeHeartbeat(), now_s)
            elif now_s - line.since_s > (DIAL_TIMEOUT_S if line.connecting else HANDSHAKE_S):
                self._drop(line, "no answer")
        return max(0.0, wait_s)

    def _dial(self, node: str, one: DialTarget, now_s: float) -> None:
        try:
            place = self._places.resolve(one.address)
        except (OSError, ValueError) as error:
            one.back_off(now_s)
            self._heard.on_disconnected(node, socket_error_reason(error))
            return
        if place is None:
            return  # the thread is woken when its name is found
        one.back_off(now_s)
        host, _ = split_address(one.address)
        try:
            sock = socket.socket(place.family, socket.SOCK_STREAM)
        except OSError as error:  # no descriptor is left, or the system has no such addresses
            self._heard.on_disconnected(node, socket_error_reason(error))
            return
        sock.setblocking(False)
        line = _MeshConnection(
            sock,
            self._cable(node),
            dialled=True,
            since_s=now_s,
            probes=node < self._node,
            connecting=True,
        )
        self._lines.add(line)
        self._selector.register(sock, _WRITE, line)
        try:
            line.sheath = (
                None
                if self._tls is None or line.probes
                else TlsStream(self._tls, server_hostname=host)
            )
            sock.connect(place.sockaddr)
        except BlockingIOError:
            return
        except (OSError, ValueError) as error:
            self._drop(line, socket_error_reason(error))

    def _cable(self, dials: str | None) -> MeshProtocol:
        nonce = os.urandom(NONCE_BYTES)
        return MeshProtocol(
            self._secret,
            job=self._job,
            node=self._node,
            nonce=nonce,
            dials=dials,
            encode=self._spell,
        )

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except (
            OSError
        ):  # it hung up before we looked, or there is no descriptor left: it comes again
            return
        strangers = [line for line in self._lines if not line.dialled and not line.cable.up]
        if len(strangers) >= UNAUTHENTICATED_MAX:
            self.refused += 1
            self._drop(
                min(strangers, key=lambda line: line.since_s), "too many strangers", quiet=True
            )
        sock.setblocking(False)
        line = _MeshConnection(sock, self._cable(None), dialled=False, since_s=time.monotonic())
        line.sheath = None if self._tls is None else TlsStream(self._tls, server_hostname=None)
        disable_nagle(sock)
        self._lines.add(line)
        self._selector.register(sock, _READ, line)

    def _serve(self, line: _MeshConnection, mask: int) -> None:
        if line.connecting:
            code = line.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                self._drop(line, socket_error_reason(OSError(code, os.strerror(code))))
                return
            line.connecting = False
            if line.probes:
                # It is for the other end to dial. Until it has, this end looks again: of a process
                # that is being killed the line may close a moment before the port.
                self._drop(line, "somebody listens there", quiet=True)
                return
            disable_nagle(line.sock)
        if mask & _READ:
            self._read(line)
        if line in self._lines:
            self._flush(line)

    def _read(self, line: _MeshConnection) -> None:
        try:
            data = line.sock.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._drop(line, socket_error_reason(error))
            return
        if not data:
            self._drop(line, "the other end closed it")
            return
        line.heard_s = time.monotonic()
        try:
            words = line.cable.receive_data(
                data if line.sheath is None else line.sheath.receive_data(data)
            )
        except CkptError as error:
            self._refuse(line, error)
            return
        if line.cable.up and not line.told:
            line.told = True
            self._come_up(line)
        for word in words:
            if not isinstance(word, NodeHeartbeat):
                self._heard.on_message(line.cable.peer, word)

    def _come_up(self, line: _MeshConnection) -> None:
        peer = line.cable.peer
        with self._lock:
            old = self._up.get(peer)
            self._up[peer] = line
        self._settle(peer, called=line.dialled)
        if old is not None:  # the other end lost it, and we have not noticed
            self._drop(old, "the node called again")
        line.said_s = line.heard_s
        self._heard.on_connected(peer)

    def _settle(self, peer: str, *, called: bool) -> None:
        """That node is there."""
        with self._lock:
            if peer in self._wanted:
                one = self._wanted[peer]
                one.reached |= called
                one.unconfirmed, one.pause_s, one.next_dial_s = False, RETRY_FIRST_S, 0.0

    def _refuse(self, line: _MeshConnection, error: CkptError) -> None:
        self.refused += 1
        text = f"{'the node at' if line.dialled else 'a connection from'} {peer_name(line.sock)}: {error}"
        if text not in self._told and len(self._told) < UNAUTHENTICATED_MAX:
            self._told.add(text)
            self._tell(Event("line-refused", text, {"code": error.code}, alarm=True))
        with contextlib.suppress(OSError):  # it may have hung up, or take nothing
            line.sock.send(b"" if line.sheath is None else line.sheath.final_data())
        self._drop(line, str(error))

    def _say_posted(self) -> None:
        with self._lock:
            posted, self._posted = self._posted, []
            lines = dict(self._up)
        now_s = time.monotonic()
        for node, word in posted:
            if (line := lines.get(node)) is not None and line in self._lines:
                self._send(line, word, now_s)

    def _send(self, line: _MeshConnection, word: MeshMessage, now_s: float) -> None:
        try:
            line.cable.send(word)
        except CkptError as error:  # too long: who said it hears that nothing goes on here
            self._drop(line, str(error))
            return
        line.said_s = now_s
        self._flush(line)

    def _flush(self, line: _MeshConnection) -> None:
        said = line.cable.data_to_send()
        try:
            line.out += said if line.sheath is None else line.sheath.data_to_send(said)
        except CkptError as error:
            self._refuse(line, error)
            return
        if len(line.out) > SEND_BACKLOG_BYTES_MAX:
            self._drop(line, f"it does not read what it is sent. waiting_bytes={len(line.out)}")
            return
        try:
            while line.out:
                sent = line.sock.send(line.out)
                del line.out[:sent]
        except BlockingIOError:
            pass
        except OSError as error:
            self._drop(line, socket_error_reason(error))
            return
        self._selector.modify(line.sock, _READ | _WRITE if line.out else _READ, line)

    def _drop(self, line: _MeshConnection, why: str, *, quiet: bool = False) -> None:
        if line not in self._lines:
            return
        self._lines.discard(line)
        self._selector.unregister(line.sock)
        line.sock.close()
        peer = line.cable.peer
        self._doubt_place(line)
        with self._lock:
            current = self._up.get(peer) is line
            if current:
                del self._up[peer]
                if (
                    peer in self._wanted
                ):  # at once, to learn whether it is only the line that is gone
                    self._wanted[peer].unconfirmed, self._wanted[peer].next_dial_s = True, 0.0
        if not quiet and (current or (line.dialled and not line.cable.up)):
            self._heard.on_disconnected(peer, why)

    def _doubt_place(self, line: _MeshConnection) -> None:
        """After a call that failed, its node's name is resolved anew, unless the node is known to
        have been there."""
        with self._lock:
            one = self._wanted.get(line.cable.peer)
        if one is not None and line.dialled and not line.cable.up and not one.reached:
            self._places.forget(one.address)

    def _drain_wake(self) -> None:
        try:
            while self._wake_out.recv(4096):
                continue
        except BlockingIOError:
            return

    def _wake(self) -> None:
        try:
            self._wake_in.send(b"\0")
        except OSError:  # it is awake already, or it has ended
            return
