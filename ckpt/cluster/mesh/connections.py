"""The mesh: one keeper's connections to the keepers of other nodes, kept by one thread.

Of two nodes the one with the smaller id dials. If a connection breaks, that node dials again at
once and then less and less often, as long as the other node is a target. The node that does not
dial probes instead: it only connects to learn whether a process still listens there. A refused
connection means that the machine answers and the keeper is gone. Messages lost with a connection
are not sent again: a sender that depends on them reacts to ``on_disconnected``.
"""

from __future__ import annotations

import contextlib
import errno
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
from ckpt.cluster.mesh.protocol import NONCE_BYTES, MeshProtocol, MessageEncoder
from ckpt.cluster.tls import TlsContexts
from ckpt.errors import CkptError, StoreDeniedError, UnavailableError
from ckpt.events import Emit, Event

# ---- TLS around one protocol, without its socket

TLS_READ_BYTES = 64 << 10
"""Most plaintext of one call to OpenSSL."""


class TlsStream:
    """One end of a TLS connection in memory: bytes of the network in, plaintext out, and back.

    All connections share one thread that never waits, so the handshake advances as bytes arrive,
    and plaintext to send is kept until it is done. Memory: some 100 KiB that OpenSSL keeps for a
    handshake or a record, and one read. ``server_hostname``: the host that is dialled; None at the
    listener's end.
    """

    def __init__(self, tls: TlsContexts, *, server_hostname: str | None) -> None:
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        if server_hostname is None:
            self._tls = tls.server.wrap_bio(self._in, self._out, server_side=True)
        else:
            self._tls = tls.client.wrap_bio(self._in, self._out, server_hostname=server_hostname)
        self._plaintext = bytearray()
        """Not encrypted yet."""
        self._handshake_done = False

    def receive_data(self, data: bytes) -> bytes:
        """The plaintext in ``data``.

        Raises StoreDeniedError if the other end's certificate is not of this job's CA or names
        another host; ``final_data`` is then to be sent, and tells it why.
        """
        self._in.write(data)
        plaintext = bytearray()
        try:
            if not self._handshake_done:
                self._tls.do_handshake()
                self._handshake_done = True
            while piece := self._tls.read(TLS_READ_BYTES):
                plaintext += piece
        except ssl.SSLWantReadError:
            pass  # OpenSSL needs more bytes
        except ssl.SSLError as error:
            reason = (
                error.verify_message
                if isinstance(error, ssl.SSLCertVerificationError)
                else error.reason or str(error)
            )
            raise StoreDeniedError(
                f"TLS failed: {reason}; compare the certificates, their CA and their hosts; all "
                "nodes have some or none"
            ) from error
        return bytes(plaintext)

    def data_to_send(self, plaintext: bytes) -> bytes:
        """The bytes to send now, once, after ``plaintext`` was added. Raises StoreDeniedError."""
        self._plaintext += plaintext
        try:
            if not self._handshake_done:
                self._tls.do_handshake()
                self._handshake_done = True
            while self._plaintext:
                count = self._tls.write(memoryview(self._plaintext)[:TLS_READ_BYTES].tobytes())
                del self._plaintext[:count]
        except ssl.SSLWantReadError:
            pass  # the handshake waits for the other end
        except ssl.SSLError as error:
            raise StoreDeniedError(f"TLS failed: {error.reason or error}") from error
        return self._out.read()

    @property
    def established(self) -> bool:
        """Whether the handshake is done."""
        return self._handshake_done

    def final_data(self) -> bytes:
        """The TLS alert that tells the other end why it was refused."""
        return self._out.read()


# ---- dial targets

RETRY_FIRST_S = 0.05
RETRY_LAST_S = 2.0
"""Pauses between two dials of one target: doubled from the first to the last."""


@dataclass(slots=True)
class DialTarget:
    """A node to keep a connection to. Owned by the mesh."""

    address: str
    unconfirmed: bool = True
    """No connection to it was up yet, or the last one broke."""
    reached: bool = False
    """A dial to its address led to a connection that was up."""
    next_dial_s: float = 0.0
    pause_s: float = RETRY_FIRST_S

    def back_off(self, now_s: float) -> None:
        """A dial was tried: set the time of the next one, and double the pause after it."""
        self.next_dial_s, self.pause_s = now_s + self.pause_s, min(2 * self.pause_s, RETRY_LAST_S)


HEARTBEAT_S = 1.0
"""How often an otherwise silent end of a connection sends a heartbeat."""
SILENCE_S_MAX = 4.0
"""A connection on which nothing arrived for so long is dropped, and dialled again; at a longer TTL,
one on which nothing arrived for that. Before it a machine that stands still has lost nothing."""
HANDSHAKE_S = 5.0
"""How long the other end may take to prove its identity."""
PROBE_S = 1.0
"""How long a node that does not dial waits for the other end's dial before it probes."""
UNAUTHENTICATED_MAX = 64
"""Accepted connections without a proof yet; one more drops the oldest, so that an attacker that
holds them all keeps no node out for long."""
SEND_BACKLOG_BYTES_MAX = 256 << 20
"""Unsent bytes for one node; a node that does not read is dropped."""
READ_BYTES = 256 << 10
BACKLOG = 256

ACCEPT_PAUSE_S = 0.5
"""How long no connection is accepted after the system had no descriptor or memory for one."""
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


@dataclass(frozen=True, slots=True)
class MeshObserver:
    """Callbacks of the mesh, called in its thread: they must be quick and never raise."""

    on_message: Callable[[str, MeshMessage], object]
    on_connected: Callable[[str], object]
    on_disconnected: Callable[[str, str], object]
    """A connection broke, or dialling failed: node and reason. The reason begins with ``refused``
    if no process listens at the node's address."""


@dataclass(slots=True, eq=False)
class _MeshConnection:
    sock: socket.socket
    protocol: MeshProtocol
    dialled: bool
    since_s: float
    tls: TlsStream | None = None
    probes: bool = False
    """Closed as soon as it is known whether a process listens there."""
    connecting: bool = False
    out: bytearray = field(default_factory=bytearray)
    received_s: float = 0.0
    sent_s: float = 0.0
    announced: bool = False


class Mesh:
    """The connections of one keeper, over TLS if ``tls`` is given. Thread-safe.

    ``listen`` is ``host:port``; port 0 takes a free one. ``ttl_s``: how long a silent node keeps
    its ranks; its connection is kept so long as well. Connections, selector and resolver belong
    to the thread; targets, the queue and the connected nodes are shared under ``_lock``. It has
    more attributes than our limit: they are the state of this one event loop.
    """

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
        ttl_s: float = 0.0,
    ) -> None:
        self._secret = secret
        self._ttl_s = ttl_s
        self._tls = tls
        self._job = job
        self._node = node
        self._observer = observer
        self._emit = emit
        self._reported: set[str] = set()
        self.refused = 0
        """How many connections were dropped because of what arrived on them, or because too many
        were unauthenticated."""
        host, port = split_address(listen)
        try:
            self._listener = socket.create_server(
                (host, int(port)), family=address_family(host), backlog=BACKLOG, reuse_port=False
            )
        except OSError as error:
            raise UnavailableError(
                f"can't listen for other nodes. address={listen} reason={error}"
            ) from error
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        """The port on which this keeper listens."""
        self._lock = threading.Lock()
        self._targets: dict[str, DialTarget] = {}
        self._connected: dict[str, _MeshConnection] = {}
        self._connections: set[_MeshConnection] = set()
        self._queue: list[tuple[str, MeshMessage]] = []
        self._resolver = NameResolver(self._wake)
        self._encode = MessageEncoder()
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_out.setblocking(False)
        self._wake_in.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._listen_again_s = 0.0
        """When the listener is looked at again; 0: it is."""
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="ckpt-lines", daemon=True)
        self._thread.start()

    def set_targets(self, nodes: Mapping[str, str]) -> None:
        """Keep a connection to each of these nodes (addresses by node) and to no other."""
        with self._lock:
            others = {node: address for node, address in nodes.items() if node != self._node}
            self._targets = {
                node: known
                if (known := self._targets.get(node)) and known.address == address
                else self._new_target(node, address)
                for node, address in others.items()
            }
        self._resolver.keep_only(set(others.values()))
        self._wake()

    def _new_target(self, node: str, address: str) -> DialTarget:
        """Dial nodes with a greater id at once; probe the others if they have not connected within
        PROBE_S."""
        return DialTarget(
            address, next_dial_s=0.0 if node > self._node else time.monotonic() + PROBE_S
        )

    def send(self, node: str, message: MeshMessage) -> bool:
        """Queue a message to a node; False if no connection to it is up now.

        Messages on one connection arrive in order, or not at all.
        """
        with self._lock:
            if node not in self._connected:
                return False
            self._queue.append((node, message))
        self._wake()
        return True

    def connected_nodes(self) -> frozenset[str]:
        """The nodes to which a connection is up now."""
        with self._lock:
            return frozenset(self._connected)

    def close(self) -> None:
        """Close all connections and wait for the thread. Idempotent; not to be called from it."""
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
                    elif key.data in self._connections:
                        self._serve(key.data, mask)
                self._send_queued()
        finally:
            for connection in list(self._connections):
                self._drop(connection, "this keeper ends", quiet=True)
            self._selector.close()
            for sock in (self._listener, self._wake_in, self._wake_out):
                sock.close()

    def _tick(self) -> float:
        """Dial, send heartbeats, drop silent connections; returns seconds until the next tick."""
        now_s = time.monotonic()
        with self._lock:
            targets = dict(self._targets)
        dialled = {
            connection.protocol.peer for connection in self._connections if connection.dialled
        }
        wait_s, silence_s = HEARTBEAT_S, max(SILENCE_S_MAX, self._ttl_s)
        if self._listen_again_s:
            wait_s = min(wait_s, self._listen_again_s - now_s)
            if now_s >= self._listen_again_s:
                self._listen_again_s = 0.0
                self._selector.register(self._listener, _READ, None)
        for node, target in targets.items():
            # A node with a smaller id dials this one; it is probed only while its state is unknown.
            if (
                node in dialled
                or node in self._connected
                or (node < self._node and not target.unconfirmed)
            ):
                continue
            if now_s >= target.next_dial_s:
                self._dial(node, target, now_s)
            else:
                wait_s = min(wait_s, target.next_dial_s - now_s)
        for connection in list(self._connections):
            if connection.protocol.up:
                if connection.protocol.peer not in targets and connection.dialled:
                    self._drop(connection, "no target any more", quiet=True)
                # Heartbeats of the other end are missing: a machine that is gone, or cut off, sends
                # no reset, and an idle TCP connection to it would stay open for hours.
                elif now_s - connection.received_s > silence_s:
                    self._drop(connection, f"silent for {silence_s:g} s")
                elif now_s - connection.sent_s >= HEARTBEAT_S:
                    self._send(connection, NodeHeartbeat(), now_s)
            elif now_s - connection.since_s > (
                DIAL_TIMEOUT_S if connection.connecting else HANDSHAKE_S
            ):
                self._drop(connection, "no answer")
        return max(0.0, wait_s)

    def _dial(self, node: str, target: DialTarget, now_s: float) -> None:
        try:
            address = self._resolver.resolve(target.address)
        except (OSError, ValueError) as error:
            target.back_off(now_s)
            self._observer.on_disconnected(node, socket_error_reason(error))
            return
        if address is None:
            return  # the resolver wakes the thread
        # Before the attempt, so that no way of failing makes the next tick dial again at once.
        target.back_off(now_s)
        host, _ = split_address(target.address)
        try:
            sock = socket.socket(address.family, socket.SOCK_STREAM)
        except OSError as error:  # no descriptor is left, or no such address family
            self._observer.on_disconnected(node, socket_error_reason(error))
            return
        sock.setblocking(False)
        connection = _MeshConnection(
            sock,
            self._new_protocol(node),
            dialled=True,
            since_s=now_s,
            probes=node < self._node,
            connecting=True,
        )
        self._connections.add(connection)
        self._selector.register(sock, _WRITE, connection)
        try:
            connection.tls = (
                None
                if self._tls is None or connection.probes
                else TlsStream(self._tls, server_hostname=host)
            )
            sock.connect(address.sockaddr)
        except BlockingIOError:
            return
        except (OSError, ValueError) as error:
            self._drop(connection, socket_error_reason(error))

    def _new_protocol(self, dials: str | None) -> MeshProtocol:
        nonce = os.urandom(NONCE_BYTES)
        return MeshProtocol(
            self._secret,
            job=self._job,
            node=self._node,
            nonce=nonce,
            dials=dials,
            encode=self._encode,
        )

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            # Closed meanwhile: the other end dials again. But if no descriptor is left, it waits on
            # at the listener, which would be ready again at once.
            if error.errno in _EXHAUSTED:
                self._pause_listening(error)
            return
        strangers = [
            connection
            for connection in self._connections
            if not connection.dialled and not connection.protocol.up
        ]
        if len(strangers) >= UNAUTHENTICATED_MAX:
            self.refused += 1
            self._drop(
                min(strangers, key=lambda connection: connection.since_s),
                "too many strangers",
                quiet=True,
            )
        sock.setblocking(False)
        connection = _MeshConnection(
            sock, self._new_protocol(None), dialled=False, since_s=time.monotonic()
        )
        connection.tls = None if self._tls is None else TlsStream(self._tls, server_hostname=None)
        disable_nagle(sock)
        self._connections.add(connection)
        self._selector.register(sock, _READ, connection)

    def _pause_listening(self, error: OSError) -> None:
        self._selector.unregister(self._listener)
        self._listen_again_s = time.monotonic() + ACCEPT_PAUSE_S
        text = f"no connection of another node can be accepted now: {error}"
        if text not in self._reported:
            self._reported.add(text)
            self._emit(Event("line-refused", text, alarm=True))

    def _serve(self, connection: _MeshConnection, mask: int) -> None:
        if connection.connecting:
            code = connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                self._drop(connection, socket_error_reason(OSError(code, os.strerror(code))))
                return
            connection.connecting = False
            if connection.probes:
                # The other end is to dial. Until it has, this end probes again: while a process is
                # killed, its connections may close a moment before its port does.
                self._drop(connection, "a process listens there", quiet=True)
                return
            disable_nagle(connection.sock)
        if mask & _READ:
            self._read(connection)
        if connection in self._connections:
            self._flush(connection)

    def _read(self, connection: _MeshConnection) -> None:
        try:
            data = connection.sock.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._drop(connection, socket_error_reason(error))
            return
        if not data:
            self._drop(connection, "the other end closed it")
            return
        connection.received_s = time.monotonic()
        try:
            messages = connection.protocol.receive_data(
                data if connection.tls is None else connection.tls.receive_data(data)
            )
        except CkptError as error:
            self._refuse(connection, error)
            return
        # The proof and first messages may arrive in one read: report the connection before them.
        if connection.protocol.up and not connection.announced:
            connection.announced = True
            self._set_connected(connection)
        for message in messages:
            if not isinstance(message, NodeHeartbeat):
                self._observer.on_message(connection.protocol.peer, message)

    def _set_connected(self, connection: _MeshConnection) -> None:
        peer = connection.protocol.peer
        with self._lock:
            old = self._connected.get(peer)
            self._connected[peer] = connection
        self._confirm_target(peer, called=connection.dialled)
        # The other end lost the old connection, and this end has not noticed. It is dropped after
        # the new one took its place, so that the node is not reported as disconnected.
        if old is not None:
            self._drop(old, "the node connected again")
        connection.sent_s = connection.received_s
        self._observer.on_connected(peer)

    def _confirm_target(self, peer: str, *, called: bool) -> None:
        """Record that the node is there, so that it is not dialled or probed."""
        with self._lock:
            if peer in self._targets:
                target = self._targets[peer]
                target.reached |= called
                target.unconfirmed, target.pause_s, target.next_dial_s = False, RETRY_FIRST_S, 0.0

    def _refuse(self, connection: _MeshConnection, error: CkptError) -> None:
        self.refused += 1
        name = peer_name(connection.sock)
        # A caller has another port each time, but one event is enough.
        origin = (
            f"the node at {name}"
            if connection.dialled
            else f"a connection from {name.rpartition(':')[0] or name}"
        )
        text = f"{origin}: {error}"
        # Each text once, and a bounded number of them: strangers must not fill the log.
        if text not in self._reported and len(self._reported) < UNAUTHENTICATED_MAX:
            self._reported.add(text)
            self._emit(Event("line-refused", text, {"code": error.code}, alarm=True))
        self._send_last(connection)
        self._drop(connection, str(error))

    def _send_last(self, connection: _MeshConnection) -> None:
        """Send what the other end needs to learn why it is refused: this end's proof, which shows
        it that the secrets differ, or the alert of TLS."""
        last = connection.protocol.data_to_send()
        if connection.tls is not None:
            with contextlib.suppress(CkptError):  # the handshake failed: there is an alert to send
                last = connection.tls.data_to_send(last)
            last = last if connection.tls.established else connection.tls.final_data()
        with contextlib.suppress(OSError):  # it may have closed, or its buffer may be full
            connection.sock.send(last)

    def _send_queued(self) -> None:
        with self._lock:
            queued, self._queue = self._queue, []
            connections = dict(self._connected)
        now_s = time.monotonic()
        for node, message in queued:
            if (
                connection := connections.get(node)
            ) is not None and connection in self._connections:
                self._send(connection, message, now_s)

    def _send(self, connection: _MeshConnection, message: MeshMessage, now_s: float) -> None:
        try:
            connection.protocol.send(message)
        except CkptError as error:  # too long: the sender learns of it by ``on_disconnected``
            self._drop(connection, str(error))
            return
        connection.sent_s = now_s
        self._flush(connection)

    def _flush(self, connection: _MeshConnection) -> None:
        data = connection.protocol.data_to_send()
        try:
            connection.out += data if connection.tls is None else connection.tls.data_to_send(data)
        except CkptError as error:
            self._refuse(connection, error)
            return
        # The thread never waits for a slow reader; what it does not read is bounded here.
        if len(connection.out) > SEND_BACKLOG_BYTES_MAX:
            self._drop(connection, f"the node does not read. waiting_bytes={len(connection.out)}")
            return
        try:
            while connection.out:
                sent = connection.sock.send(connection.out)
                del connection.out[:sent]
        except BlockingIOError:
            pass
        except OSError as error:
            self._drop(connection, socket_error_reason(error))
            return
        self._selector.modify(
            connection.sock, _READ | _WRITE if connection.out else _READ, connection
        )

    def _drop(self, connection: _MeshConnection, reason: str, *, quiet: bool = False) -> None:
        if connection not in self._connections:
            return
        self._connections.discard(connection)
        self._selector.unregister(connection.sock)
        connection.sock.close()
        peer = connection.protocol.peer
        self._forget_address(connection)
        with self._lock:
            current = self._connected.get(peer) is connection
            if current:
                del self._connected[peer]
                if peer in self._targets:
                    # Dial or probe at once: refused, the node is dead; else only its connection is.
                    self._targets[peer].unconfirmed, self._targets[peer].next_dial_s = True, 0.0
        # An accepted connection that was never up says nothing about any node.
        if not quiet and (current or (connection.dialled and not connection.protocol.up)):
            self._observer.on_disconnected(peer, reason)

    def _forget_address(self, connection: _MeshConnection) -> None:
        """Resolve a node's name anew after a failed dial, unless it was ever reached at the
        address.

        A name that now points to another machine must not make a dead node look alive.
        """
        with self._lock:
            target = self._targets.get(connection.protocol.peer)
        if (
            target is not None
            and connection.dialled
            and not connection.protocol.up
            and not target.reached
        ):
            self._resolver.forget(target.address)

    def _drain_wake(self) -> None:
        try:
            while self._wake_out.recv(4096):
                continue
        except BlockingIOError:
            return

    def _wake(self) -> None:
        try:
            self._wake_in.send(b"\0")
        except OSError:  # the pipe is full, so the thread wakes anyway; or it has ended
            return
