"""Connections of a client to one peer, and the pool that shares them.

The client proves itself first, and believes only answers with the peer's MAC.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ckpt.cluster.endpoint import Endpoint
from ckpt.cluster.peermem.auth import NONCE_BYTES, PeerSecret, SessionKeys, mac, macs_equal
from ckpt.cluster.peermem.body_mac import BodyMac, body_mac, known_macs
from ckpt.cluster.peermem.channel import (
    PIECES_MAX,
    BufferBody,
    EndedError,
    PeerChannel,
    PeerTimeouts,
)
from ckpt.cluster.peermem.http import (
    CONTINUE,
    BaseGoneError,
    DeltaBase,
    MalformedError,
    PeerAnswer,
    PeerHello,
    PeerRequest,
    PeerWelcome,
    StoredContent,
    Verb,
    parse_head,
    parse_status,
    split_mac,
    with_mac,
)
from ckpt.errors import CkptError, IntegrityError, StoreDeniedError, UnavailableError
from ckpt.rate_limit import RateLimit

EAGER_BYTES_MAX = 64 << 10
"""Larger bodies are announced, and sent after the server's go-ahead. It refuses larger ones that
arrive unannounced.
"""

LISTING_BYTES_MAX = 4 << 20
"""Longest page of a listing that is accepted: 1,000 keys of 512 bytes, each quoted to six."""


COPY_BYTES_PER_S_MIN = 128 << 20
"""Rate at which a server copies a base, into fresh memory too. The client waits that much longer
for its answer.
"""


class CrowdedError(UnavailableError):
    """The peer has no place for this request now. Repeating it a little later helps.

    Either it said so, or it closed a connection that had hardly begun, to make room for another.
    """


def no_check() -> None:
    """For memory that does not change while it is sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerCall:
    """One operation. A GET fills ``out``.

    ``check_unchanged`` is called when all of ``body`` was read, before its tag is sent; it raises
    if the memory changed. ``base``: of a PUT whose body is a table of ``ranges`` ranges and their
    bytes.
    """

    verb: Verb
    key: str
    after: str = ""
    span: tuple[int, int] | None = None
    create_only: bool = False
    body: BufferBody | None = None
    check_unchanged: Callable[[], None] = no_check
    out: memoryview | None = None
    base: StoredContent | None = None
    ranges: int = 0


@dataclass(frozen=True, slots=True)
class PeerReply:
    """A verified answer, and its body if the call had no buffer for it."""

    answer: PeerAnswer
    body: bytes = b""


class PeerConnection:
    """A connection to a server that has proven itself. For one thread at a time.

    ``usable``: another call may follow. ``answered``: the server has sent something after the last
    request.
    """

    def __init__(
        self, channel: PeerChannel, endpoint: Endpoint, keys: SessionKeys, welcome: PeerWelcome
    ) -> None:
        self._channel = channel
        self._host = str(endpoint)
        self._keys = keys
        self._mac = welcome.mac
        self._counter = 0
        self.boot = welcome.boot
        self.usable = True
        self.answered = False
        self.idle_since_s = time.monotonic()
        """When it was last used."""

    @classmethod
    def open(
        cls, endpoint: Endpoint, secret: PeerSecret, *, connect_s: float, timeouts: PeerTimeouts
    ) -> PeerConnection:
        """Connect and exchange hellos.

        Raises UnavailableError if the peer does not answer, CrowdedError if it closes at once,
        StoreDeniedError if it does not know the secret, or one side refuses the other's
        certificate.
        """
        try:
            sock = socket.create_connection((endpoint.host, endpoint.port), connect_s)
        except OSError as error:
            raise UnavailableError(
                f"a peer can't be reached. peer={endpoint} cause={error.strerror or error}"
            ) from error
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if endpoint.tls is not None:
                sock = endpoint.tls.wrap_socket(sock, server_hostname=endpoint.host)
            return cls._exchange_hellos(PeerChannel(sock, timeouts), endpoint, secret)
        except BaseException as error:  # also of a signal: the socket must not leak
            sock.close()
            match error:
                case ssl.SSLEOFError() | ConnectionError() | EndedError():
                    raise CrowdedError(
                        f"a peer broke off at the start. peer={endpoint} cause={error}"
                    ) from error
                case TimeoutError():
                    raise UnavailableError(
                        f"a peer is silent at the start. peer={endpoint} cause={error}"
                    ) from error
                case ssl.SSLError():
                    raise StoreDeniedError(
                        f"TLS failed. peer={endpoint} cause={error}; check certificates"
                    ) from error
                case OSError():
                    raise UnavailableError(
                        f"the connection failed. peer={endpoint} cause={error}"
                    ) from error
            raise

    @classmethod
    def _exchange_hellos(
        cls, channel: PeerChannel, endpoint: Endpoint, secret: PeerSecret
    ) -> PeerConnection:
        head = PeerHello(os.urandom(NONCE_BYTES).hex(), known_macs()).encode(str(endpoint))
        hello_mac = secret.hello_mac(head)
        channel.write(with_mac(head, hello_mac))
        raw = channel.read_head()
        if raw is None:
            raise EndedError("the connection ended before an answer.")
        split = split_mac(raw)
        if split is None:
            raise _unproven(raw, endpoint)
        if not macs_equal(split[1], secret.welcome_mac(hello_mac, split[0])):
            raise StoreDeniedError(
                f"the peer does not know this job's secret. peer={endpoint}; compare the secret "
                "files"
            )
        welcome = PeerWelcome.parse(parse_head(split[0]))
        if welcome.mac not in known_macs():
            raise MalformedError(
                f"the server chose a body MAC that was not offered. mac={welcome.mac}"
            )
        return cls(channel, endpoint, secret.session(hello_mac, split[1]), welcome)

    def request(
        self, call: PeerCall, *, epoch: int, rate_limit: RateLimit | None = None
    ) -> PeerReply:
        """Make one call. After an error that was raised once bytes were sent, the connection can't
        be used.

        Raises OSError and EndedError if the connection broke, IntegrityError if the answer is not
        the peer's, StoreDeniedError or UnavailableError for an unsigned refusal, what
        ``check_unchanged`` raises, and BaseGoneError, before anything is sent, for a base of
        another incarnation.
        """
        base, body = self._base(call), call.body
        self.usable, self.answered = False, False  # until the answer was read whole
        self._counter += 1
        kept_bytes = (
            0
            if base is None or body is None
            else base.size_bytes + base.table_bytes - body.size_bytes
        )
        self._channel.restart_timeout(work_s=kept_bytes / COPY_BYTES_PER_S_MIN)
        # A put with ``create_only`` is announced even if it is small. So a request that got no
        # answer at all can be repeated: it has created nothing.
        waits = body is not None and (call.create_only or not _eager(body))
        request = PeerRequest(
            verb=call.verb,
            key=call.key,
            after=call.after,
            boot=self.boot,
            epoch=epoch,
            counter=self._counter,
            body_bytes=None if body is None else body.size_bytes,
            span=call.span,
            create_only=call.create_only,
            waits=waits,
            base=base,
        )
        head = request.encode(self._host)
        head_mac = mac(self._keys.request_head, head)
        if body is None:
            self._channel.write(with_mac(head, head_mac))
        else:
            proof = body_mac(
                self._mac, self._keys.request_body, counter=self._counter, head_mac=head_mac
            )
            if not waits:
                self._send_at_once(with_mac(head, head_mac), body, proof, rate_limit)
            else:
                self._channel.write(with_mac(head, head_mac))
                raw = self._read_head()
                if raw != CONTINUE:
                    return self._reply(raw, request, call)
                body.send(self._channel, proof, rate_limit)
            # The tag commits the put: the memory must be unchanged until here.
            call.check_unchanged()
            self._channel.write(proof.tag())
        return self._reply(self._read_head(), request, call)

    def mark_idle(self) -> None:
        """Record that it is unused from now on."""
        self.idle_since_s = time.monotonic()

    def is_idle(self) -> bool:
        """Whether the server has neither closed it nor sent anything unasked."""
        return self._channel.is_idle()

    def abort(self) -> None:
        """Break a call that is under way, from any thread; the caller of that call closes it."""
        self._channel.abort()

    def close(self) -> None:
        """Idempotent."""
        self._channel.close()

    def _base(self, call: PeerCall) -> DeltaBase | None:
        base = call.base
        if base is None:
            return None
        if base.boot != self.boot:
            # Another incarnation of the server may have given the same version to other bytes.
            raise BaseGoneError(
                f"the peer was restarted, and the base is gone. peer={self._host} key={base.key}"
            )
        return DeltaBase(
            key=base.key, version=base.version, size_bytes=base.size_bytes, ranges=call.ranges
        )

    def _send_at_once(
        self, head: bytes, body: BufferBody, proof: BodyMac, rate_limit: RateLimit | None
    ) -> None:
        if rate_limit is not None:
            self._channel.extend_timeout(rate_limit.take(body.size_bytes))
        for piece in body.pieces:
            proof.update(piece)
        self._channel.write(head, *body.pieces)

    def _read_head(self) -> bytes:
        raw = self._channel.read_head()
        if raw is None:
            raise EndedError("the connection ended before an answer.")
        self.answered = True
        return raw

    def _reply(self, raw: bytes, request: PeerRequest, call: PeerCall) -> PeerReply:
        split = split_mac(raw)
        if split is None:
            raise _unproven(raw, self._host)
        if not macs_equal(split[1], mac(self._keys.answer_head, split[0])):
            raise IntegrityError(
                f"an answer is not the peer's. peer={self._host} key={request.key}"
            )
        answer = PeerAnswer.parse(parse_head(split[0]))
        # 0: the server could not read the request's counter, or refuses it as a replay.
        if answer.counter != request.counter and not (
            answer.counter == 0 and answer.status in (400, 401)
        ):
            raise IntegrityError(
                f"an answer to another request. peer={self._host} key={request.key}"
            )
        # A server that does not know the client's epoch may serve state of an older one.
        if answer.status < 300 and answer.epoch < request.epoch:
            raise IntegrityError(
                f"an answer of an older epoch than the request. peer={self._host} key={request.key}"
            )
        body = b""
        if answer.body_bytes:
            proof = body_mac(
                self._mac, self._keys.answer_body, counter=answer.counter, head_mac=split[1]
            )
            body = self._take_body(answer, call, proof)
        elif call.out is not None and answer.status < 300:
            raise IntegrityError(
                f"an answer without its bytes. peer={self._host} key={request.key}"
            )
        self.usable = answer.counter == request.counter
        return PeerReply(answer, body)

    def _take_body(self, answer: PeerAnswer, call: PeerCall, proof: BodyMac) -> bytes:
        room = len(call.out) if call.out is not None else LISTING_BYTES_MAX
        if answer.body_bytes > room or (call.out is not None and answer.body_bytes != room):
            raise IntegrityError(
                f"an answer of another length. size_bytes={answer.body_bytes} room_bytes={room}"
            )
        out = bytearray(answer.body_bytes) if call.out is None else call.out
        if not self._channel.read_body(memoryview(out), proof):
            raise IntegrityError(
                "bytes do not match the peer's tag: they changed on the way, or while being sent. "
                f"peer={self._host} key={call.key}; read again, or another copy"
            )
        return b"" if call.out is not None else bytes(out)


def _eager(body: BufferBody) -> bool:
    return body.size_bytes <= EAGER_BYTES_MAX and (
        not body.size_bytes or 0 < len(body.pieces) < PIECES_MAX
    )


def _unproven(raw: bytes, peer: Endpoint | str) -> CkptError:
    """The error for an unsigned answer, which is only a hint: anybody may have sent it."""
    try:
        head = parse_head(raw[:-2])
        status, why = parse_status(head), head.fields.get("ckpt-why", "-")
    except MalformedError as error:
        return UnavailableError(f"no ckpt peer answers here. peer={peer} cause={error}")
    kind = StoreDeniedError if status == 401 else UnavailableError
    return kind(
        f"the peer refuses, and proves nothing. peer={peer} status={status} why={why!r}; compare "
        "the secret files"
    )


# ---- the pool


class _ProcessConnections:
    """The connections of one process."""

    def __init__(self, connections_max: int) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.idle: list[PeerConnection] = []
        self.in_use: set[PeerConnection] = set()
        self.free = threading.BoundedSemaphore(connections_max)


class PeerConnectionPool:
    """Shares up to ``connections_max`` connections that ``opener`` opens. Thread-safe.

    ``wait_s``: how long a call waits for one; ``idle_s``: how long one is kept unused. A fork's
    child starts with none: keys and counters of a connection are for one process, or two MACs would
    have the same nonce.
    """

    def __init__(
        self,
        opener: Callable[[], PeerConnection],
        *,
        connections_max: int,
        wait_s: float,
        idle_s: float,
    ) -> None:
        self._opener = opener
        self._connections_max = connections_max
        self._wait_s = wait_s
        self._idle_s = idle_s
        self._closed = False
        self._connections = _ProcessConnections(connections_max)

    @contextlib.contextmanager
    def connection(self, *, fresh: bool = False) -> Iterator[tuple[PeerConnection, bool]]:
        """A connection for one call, and whether it was used before (never if ``fresh``). It is
        kept afterwards while it is usable.

        Raises UnavailableError if none becomes free in time, and as ``opener``.
        """
        connections = self._process_connections()
        if self._closed:
            raise UnavailableError("the store was closed; open it again")
        if not connections.free.acquire(timeout=self._wait_s):
            raise UnavailableError(
                f"all connections to this peer are busy. waited_s={self._wait_s:g}"
            )
        try:
            idle = None if fresh else self._idle(connections)
            connection = idle or self._opener()
            try:
                self._lend(connections, connection)
                yield connection, idle is not None
            finally:
                self._give_back(connections, connection)
        finally:
            connections.free.release()

    def close(self) -> None:
        """End all connections: calls under way break. Idempotent."""
        self._closed = True
        connections = self._process_connections()
        with connections.lock:
            idle, connections.idle = connections.idle, []
            for connection in connections.in_use:
                connection.abort()
        for connection in idle:
            connection.close()

    def _process_connections(self) -> _ProcessConnections:
        connections = self._connections
        if connections.pid != os.getpid():
            for connection in connections.idle:
                connection.close()  # this process's copy of the descriptor
            self._connections = connections = _ProcessConnections(self._connections_max)
        return connections

    def _idle(self, connections: _ProcessConnections) -> PeerConnection | None:
        old_s = time.monotonic() - self._idle_s
        while True:
            with connections.lock:
                connection = connections.idle.pop() if connections.idle else None
            if connection is None or (connection.idle_since_s > old_s and connection.is_idle()):
                return connection
            connection.close()

    def _lend(self, connections: _ProcessConnections, connection: PeerConnection) -> None:
        with connections.lock:
            connections.in_use.add(connection)
            if self._closed:  # closed while this connection was opened
                connection.abort()

    def _give_back(self, connections: _ProcessConnections, connection: PeerConnection) -> None:
        connection.mark_idle()
        with connections.lock:
            connections.in_use.discard(connection)
            if connection.usable and not self._closed:
                connections.idle.append(connection)
                return
        connection.close()
