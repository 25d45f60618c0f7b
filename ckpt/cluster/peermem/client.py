"""A client's side of one connection: it proves itself, and believes only who does."""

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
from ckpt.cluster.peermem.channel import PIECES_MAX, EndedError, PeerBody, PeerChannel, PeerTimeouts
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
"""Larger bodies are sent when the server says that it takes them. It refuses more that comes
unasked."""

LISTING_BYTES_MAX = 4 << 20
"""Longest page of a listing that is believed: 1,000 keys of 512 bytes, each spelled in six."""


COPY_BYTES_PER_S_MIN = 128 << 20
"""What a server copies of a base in a second at least, into fresh memory too: it is waited for so
much longer."""


class CrowdedError(UnavailableError):
    """The peer serves others, or ended a connection that had hardly begun to make room for one:
    asking a little later helps."""


def no_check() -> None:
    """For memory that nobody takes back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerCall:
    """One operation. A GET fills ``out``; ``still_lent`` is asked when all of ``body`` was read,
    before its tag goes.

    ``base``: of a PUT whose body is a table of ``ranges`` ranges and their bytes.
    """

    verb: Verb
    key: str
    after: str = ""
    span: tuple[int, int] | None = None
    create_only: bool = False
    body: PeerBody | None = None
    check_unchanged: Callable[[], None] = no_check
    out: memoryview | None = None
    base: StoredContent | None = None
    ranges: int = 0


@dataclass(frozen=True, slots=True)
class PeerReply:
    """A proven answer, and its body where the call gave no place for it."""

    answer: PeerAnswer
    body: bytes = b""


class PeerConnection:
    """A connection whose server has proven itself. For one thread at a time.

    ``usable``: another call may follow. ``heard``: the server has said something about the last
    one.
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
        cls, endpoint: Endpoint, secret: PeerSecret, *, connect_s: float, patience: PeerTimeouts
    ) -> PeerConnection:
        """Connect and say hello.

        Raises UnavailableError where nobody answers, StoreDeniedError where somebody does who
        doesn't know the secret or shows another certificate, or to whom we don't.
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
            return cls._meet(PeerChannel(sock, patience), endpoint, secret)
        except BaseException as error:
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
    def _meet(cls, channel: PeerChannel, endpoint: Endpoint, secret: PeerSecret) -> PeerConnection:
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
                f"who answers doesn't know this job's secret. peer={endpoint}; compare the secret "
                "files"
            )
        welcome = PeerWelcome.parse(parse_head(split[0]))
        if welcome.mac not in known_macs():
            raise MalformedError(f"a body MAC that wasn't offered. mac={welcome.mac}")
        return cls(channel, endpoint, secret.session(hello_mac, split[1]), welcome)

    def request(self, call: PeerCall, *, epoch: int, cap: RateLimit | None = None) -> PeerReply:
        """Make one call. Whatever is raised once something was said, the connection is of no use
        afterwards.

        Raises OSError and EndedError where it broke, IntegrityError where the answer isn't the
        peer's, StoreDeniedError or UnavailableError for a refusal that nobody vouches for, what
        ``still_lent`` raises, and BaseGoneError, with nothing said, for a base of another start of
        the server.
        """
        base, body = self._base(call), call.body
        self.usable, self.answered = False, False
        self._counter += 1
        kept_bytes = (
            0
            if base is None or body is None
            else base.size_bytes + base.table_bytes - body.size_bytes
        )
        self._channel.restart_timeout(work_s=kept_bytes / COPY_BYTES_PER_S_MIN)
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
                self._send_at_once(with_mac(head, head_mac), body, proof, cap)
            else:
                self._channel.write(with_mac(head, head_mac))
                raw = self._read_head()
                if raw != CONTINUE:
                    return self._reply(raw, request, call)
                body.send(self._channel, proof, cap)
            call.check_unchanged()
            self._channel.write(proof.tag())
        return self._reply(self._read_head(), request, call)

    def mark_idle(self) -> None:
        """Note that nobody uses it for now."""
        self.idle_since_s = time.monotonic()

    def is_idle(self) -> bool:
        """Whether the server has neither ended it nor said anything unasked."""
        return self._channel.is_idle()

    def abort(self) -> None:
        """Break what is under way, from any thread; whoever uses it closes it."""
        self._channel.abort()

    def close(self) -> None:
        """Idempotent."""
        self._channel.close()

    def _base(self, call: PeerCall) -> DeltaBase | None:
        base = call.base
        if base is None:
            return None
        if (
            base.boot != self.boot
        ):  # this start of the server may have given the same version to other bytes
            raise BaseGoneError(
                f"the peer was started anew, and the base is gone. peer={self._host} key={base.key}"
            )
        return DeltaBase(
            key=base.key, version=base.version, size_bytes=base.size_bytes, ranges=call.ranges
        )

    def _send_at_once(
        self, head: bytes, body: PeerBody, proof: BodyMac, cap: RateLimit | None
    ) -> None:
        if cap is not None:
            self._channel.extend_timeout(cap.take(body.size_bytes))
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
        if answer.counter != request.counter and not (
            answer.counter == 0 and answer.status in (400, 401)
        ):
            raise IntegrityError(
                f"an answer to another request. peer={self._host} key={request.key}"
            )
        if answer.status < 300 and answer.epoch < request.epoch:
            raise IntegrityError(
                f"an answer of an older epoch than was asked. peer={self._host} key={request.key}"
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
                "bytes are not what the peer's tag proves: changed on the way, or while they were "
                f"sent. peer={self._host} "
                f"key={call.key}; read again, or another copy"
            )
        return b"" if call.out is not None else bytes(out)


def _eager(body: PeerBody) -> bool:
    return body.size_bytes <= EAGER_BYTES_MAX and (
        not body.size_bytes or 0 < len(body.pieces) < PIECES_MAX
    )


def _unproven(raw: bytes, peer: Endpoint | str) -> CkptError:
    """The error for an answer without a MAC: a hint, no more."""
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


# A client's connections to one peer: used again, bounded in number, and never shared with a
# fork's child.


class _Own:
    """What one process has."""

    def __init__(self, connections_max: int) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.idle: list[PeerConnection] = []
        self.lent: set[PeerConnection] = set()
        self.free = threading.BoundedSemaphore(connections_max)


class PeerConnectionPool:
    """Lends connections that ``opener`` makes, ``connections_max`` at a time. Thread-safe.

    A fork's child starts with none: numbers and keys of a connection are for one process, or a
    MAC's nonce would come twice.
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
        self._lend_s = wait_s
        self._idle_s = idle_s
        self._closed = False
        self._own = _Own(connections_max)

    @contextlib.contextmanager
    def connection(self, *, fresh: bool = False) -> Iterator[tuple[PeerConnection, bool]]:
        """A connection for one call, and whether it was used before; ``fresh`` ones never were.
        Kept afterwards while usable.

        Raises UnavailableError where none becomes free in time, and as ``opener``.
        """
        own = self._mine()
        if self._closed:
            raise UnavailableError("the store was closed; open it again")
        if not own.free.acquire(timeout=self._lend_s):
            raise UnavailableError(
                f"all connections to this peer are busy. waited_s={self._lend_s:g}"
            )
        try:
            found = None if fresh else self._idle(own)
            connection = found or self._opener()
            try:
                self._note_lent(own, connection)
                yield connection, found is not None
            finally:
                self._give_back(own, connection)
        finally:
            own.free.release()

    def close(self) -> None:
        """End all connections: calls that are under way break. Idempotent."""
        self._closed = True
        own = self._mine()
        with own.lock:
            idle, own.idle = own.idle, []
            for connection in own.lent:
                connection.abort()
        for connection in idle:
            connection.close()

    def _mine(self) -> _Own:
        own = self._own
        if own.pid != os.getpid():
            for connection in own.idle:
                connection.close()  # this process's copy of the descriptor
            self._own = own = _Own(self._connections_max)
        return own

    def _idle(self, own: _Own) -> PeerConnection | None:
        old_s = time.monotonic() - self._idle_s
        while True:
            with own.lock:
                connection = own.idle.pop() if own.idle else None
            if connection is None or (connection.idle_since_s > old_s and connection.is_idle()):
                return connection
            connection.close()

    def _note_lent(self, own: _Own, connection: PeerConnection) -> None:
        with own.lock:
            own.lent.add(connection)
            if self._closed:  # since it was asked for
                connection.abort()

    def _give_back(self, own: _Own, connection: PeerConnection) -> None:
        connection.mark_idle()
        with own.lock:
            own.lent.discard(connection)
            if connection.usable and not self._closed:
                own.idle.append(connection)
                return
        connection.close()
