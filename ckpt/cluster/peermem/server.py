"""The server of a node's peer memory: HTTP, a thread for each connection, all of them bounded.

A connection begins with a hello; requests follow in order. Whatever clients send, the server takes
at most the budget of its memory, and CONNECTION_BYTES_MAX for each of ``connections_max +
strangers_max`` connections.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import select
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from ckpt.cluster.endpoint import Endpoint
from ckpt.cluster.peermem.auth import NONCE_BYTES, PeerSecret, SessionKeys, mac, macs_equal
from ckpt.cluster.peermem.body_mac import BodyMac, body_mac, known_macs
from ckpt.cluster.peermem.channel import EndedError, PeerChannel, PeerTimeouts, shut_down
from ckpt.cluster.peermem.http import (
    CONTINUE,
    TAG_BYTES,
    BaseGoneError,
    MalformedError,
    PeerAnswer,
    PeerHello,
    PeerRequest,
    PeerWelcome,
    Refusal,
    RefusalKind,
    Verb,
    authorize,
    epoch_refusal,
    kept_and_sent,
    parse_head,
    parse_ranges,
    split_mac,
    to_micros,
    unsigned,
    unsigned_refusal,
    with_mac,
)
from ckpt.cluster.peermem.memory import (
    PeerCatalog,
    PeerMemory,
    ServedObject,
    ServedSource,
    TooLargeError,
    copy_bytes,
    never_changes,
)
from ckpt.errors import FencedError, KeyExistsError, NotFoundError, StoreFullError, UsageError
from ckpt.events import Emit, Event

# ---- the epoch fence


class EpochFence:
    """The highest epoch that this node has seen; it only grows. Thread-safe.

    Requests of an older epoch change nothing, whenever their bytes arrive.
    """

    def __init__(self, epoch: int = 0) -> None:
        self._lock = threading.Lock()
        self._epoch = epoch

    @property
    def epoch(self) -> int:
        """The highest epoch seen."""
        return self._epoch

    def see(self, epoch: int) -> None:
        """Record that ``epoch`` exists."""
        with self._lock:
            self._epoch = max(self._epoch, epoch)

    @contextlib.contextmanager
    def hold(self, epoch: int) -> Iterator[None]:
        """Hold the fence for a short block that changes something on behalf of ``epoch``.

        No newer epoch is recorded meanwhile. Raises FencedError if one was before.
        """
        with self._lock:
            if epoch < self._epoch:
                raise FencedError(f"a newer epoch is open. epoch={epoch} known={self._epoch}")
            yield


# ---- counters


@dataclass(frozen=True, slots=True)
class ServerStats:
    """Counts since the start: requests served by verb, bytes of bodies, refusals by kind. And the
    connections now: all, and those not authenticated yet (``strangers``).
    """

    served: Mapping[str, int]
    refused: Mapping[str, int]
    received_bytes: int
    sent_bytes: int
    connections: int
    strangers: int


class ServerCounters:
    """Counts requests and refusals. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._served: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._received_bytes = self._sent_bytes = 0

    def serve(self, verb: Verb, *, received_bytes: int = 0, sent_bytes: int = 0) -> None:
        """Count a request that was answered successfully."""
        with self._lock:
            self._served[verb] += 1
            self._received_bytes += received_bytes
            self._sent_bytes += sent_bytes

    def refuse(self, kind: RefusalKind) -> None:
        """Count a refused request or connection."""
        with self._lock:
            self._refused[kind] += 1

    def stats(self, *, connections: int, strangers: int) -> ServerStats:
        """All counts now."""
        with self._lock:
            return ServerStats(
                dict(self._served),
                dict(self._refused),
                self._received_bytes,
                self._sent_bytes,
                connections,
                strangers,
            )


# ---- one connection

EAGER_BYTES_MAX = 64 << 10
"""Bodies up to this may be sent unannounced; they are received and dropped if the request is
refused.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerContext:
    """What all connections of one server share."""

    catalog: PeerCatalog
    secret: PeerSecret
    fence: EpochFence
    counters: ServerCounters
    boot: str
    macs: tuple[str, ...]
    idle_s: float


@dataclass(frozen=True, slots=True)
class _PeerSession:
    keys: SessionKeys
    mac: str


class PeerServerConnection:
    """Serves one channel until it ends.

    ``on_authenticated`` is called at the first authentic request, and returns whether there is a
    place for this connection. ``on_idle`` is called with True when the connection begins to wait
    for a request, and with False when one has arrived.
    """

    def __init__(
        self,
        context: ServerContext,
        channel: PeerChannel,
        *,
        on_authenticated: Callable[[], bool],
        on_idle: Callable[[bool], object],
    ) -> None:
        self._context = context
        self._channel = channel
        self._on_authenticated = on_authenticated
        self._on_idle = on_idle
        self._last_counter = 0
        self._owed_bytes = 0
        """Bytes of an unannounced body that were not received yet."""
        self._authenticated = False

    def run(self) -> None:
        """Serve until the connection is over; raises OSError and EndedError if it broke."""
        try:
            session = self._receive_hello()
            while session is not None and self._serve_next(session):
                continue
        except TimeoutError:
            self._context.counters.refuse("slow")

    def _receive_hello(self) -> _PeerSession | None:
        """Receive the hello and answer it; None if there was no valid one."""
        context = self._context
        raw = self._head(None)
        if raw is None:
            return None
        split = split_mac(raw)
        if split is None or not macs_equal(split[1], context.secret.hello_mac(split[0])):
            self._turn_away(401, "mac", "the hello does not prove this job's secret")
            return None
        try:
            hello = PeerHello.parse(parse_head(split[0]))
        except MalformedError as error:
            self._turn_away(400, "malformed", str(error))
            return None
        name = next((known for known in context.macs if known in hello.macs), None)
        if name is None:
            self._turn_away(
                400, "malformed", f"no body MAC in common. known={','.join(context.macs)}"
            )
            return None
        head = PeerWelcome(
            os.urandom(NONCE_BYTES).hex(), context.boot, context.fence.epoch, name
        ).encode()
        proof = context.secret.welcome_mac(split[1], head)
        self._channel.write(with_mac(head, proof))
        return _PeerSession(context.secret.session(split[1], proof), name)

    def _serve_next(self, session: _PeerSession) -> bool:
        """Answer one request; whether another may follow."""
        self._on_idle(True)
        raw = self._head(self._context.idle_s if self._authenticated else None)
        self._on_idle(False)
        if raw is None:
            return False
        # The MAC is compared before anything is parsed.
        split = split_mac(raw)
        if split is None or not macs_equal(split[1], mac(session.keys.request_head, split[0])):
            self._turn_away(
                401, "mac", "the request is not from the client that began this connection"
            )
            return False
        has_place = self._authenticated or self._on_authenticated()
        self._authenticated = True
        try:
            request = PeerRequest.parse(parse_head(split[0]))
        except MalformedError as error:
            return self._refuse(session, 0, Refusal(400, "malformed", str(error)), over=True)
        if not has_place:
            return self._refuse(
                session, request.counter, Refusal(503, "crowded", "all places are taken"), over=True
            )
        self._owed_bytes = (
            0 if request.body_bytes is None or request.waits else request.body_bytes + TAG_BYTES
        )
        refusal = authorize(
            request,
            boot=self._context.boot,
            epoch=self._context.fence.epoch,
            last_counter=self._last_counter,
        )
        # A replay does not count as a request: its counter must not become the last one.
        if refusal is not None and refusal.kind == "replay":
            return self._refuse(session, 0, refusal, over=True)
        self._last_counter = request.counter
        if refusal is None:
            # The request is authentic, so its epoch exists.
            self._context.fence.see(request.epoch)
            refusal = self._early_refusal(request)
        return (
            self._perform(session, request, split[1])
            if refusal is None
            else self._refuse(session, self._last_counter, refusal)
        )

    def _early_refusal(self, request: PeerRequest) -> Refusal | None:
        """Why the request is refused before any byte of its body is received, or None."""
        catalog = self._context.catalog
        if request.verb in ("PUT", "DELETE") and catalog.read_only(request.key):
            return Refusal(403, "read-only", "objects below this prefix are read-only")
        if request.create_only and catalog.memory.stat(request.key) is not None:
            return Refusal(412, "taken", "the key is taken")
        if self._owed_bytes > EAGER_BYTES_MAX + TAG_BYTES:
            return Refusal(
                400,
                "malformed",
                f"a body of this length must be announced. limit_bytes={EAGER_BYTES_MAX}",
            )
        return None

    def _perform(self, session: _PeerSession, request: PeerRequest, head_mac: bytes) -> bool:
        """Perform the operation and answer; whether another request may follow."""
        context = self._context
        try:
            match request.verb:
                case "PUT":
                    return self._put(session, request, head_mac)
                case "GET":
                    with context.catalog.reading(request.key) as served:
                        return self._get(session, request, served)
                case "LIST":
                    return self._list(session, request)
                case "DELETE":
                    with context.fence.hold(request.epoch):
                        context.catalog.memory.delete(request.key)
                    self._answer(session, self._answer_with(204))
                case "HEAD":
                    with context.catalog.reading(request.key) as served:
                        answer = self._answer_with(200, served)
                    self._answer(session, answer)
        except BaseGoneError as error:
            return self._refuse(session, self._last_counter, Refusal(424, "base", str(error)))
        except NotFoundError:
            return self._refuse(
                session, self._last_counter, Refusal(404, "missing", "no such object")
            )
        except UsageError as error:
            return self._refuse(session, self._last_counter, Refusal(400, "malformed", str(error)))
        except TooLargeError as error:
            return self._refuse(session, self._last_counter, Refusal(413, "too-large", str(error)))
        except StoreFullError as error:
            return self._refuse(session, self._last_counter, Refusal(507, "full", str(error)))
        except KeyExistsError as error:
            return self._refuse(session, self._last_counter, Refusal(412, "taken", str(error)))
        except FencedError:
            return self._refuse(
                session, self._last_counter, epoch_refusal(request.epoch, context.fence.epoch)
            )
        context.counters.serve(request.verb)
        return True

    def _put(self, session: _PeerSession, request: PeerRequest, head_mac: bytes) -> bool:
        refusal = Refusal(401, "body", "the body does not match its tag")
        proven = False
        with (
            self._base(request) as base,
            self._context.catalog.memory.incoming(request.key, request.object_bytes) as incoming,
        ):
            if request.waits:
                self._channel.write(CONTINUE)
            self._owed_bytes = 0
            proof = body_mac(
                session.mac, session.keys.request_body, counter=request.counter, head_mac=head_mac
            )
            try:
                proven = self._take_in(request, incoming.view, base, proof)
            except MalformedError as error:
                refusal = Refusal(400, "malformed", str(error))
            if proven:
                # A newer epoch may have opened while the bytes arrived. Checked under the fence's
                # lock together with publishing, so that no zombie's object appears after that.
                with self._context.fence.hold(request.epoch):
                    version = incoming.publish(create_only=request.create_only)
        if not proven:
            return self._refuse(session, request.counter, refusal, over=True)
        self._answer(
            session,
            dataclasses.replace(
                self._answer_with(201), size_bytes=request.object_bytes, version=version
            ),
        )
        self._context.counters.serve("PUT", received_bytes=request.body_bytes or 0)
        return True

    @contextlib.contextmanager
    def _base(self, request: PeerRequest) -> Iterator[memoryview | None]:
        """The base that a PUT refers to, pinned until the end. Raises BaseGoneError if its content
        is another one now.
        """
        base = request.base
        if base is None:
            yield None
            return
        with contextlib.ExitStack() as pinned:
            try:
                served = pinned.enter_context(self._context.catalog.memory.reading(base.key))
            except NotFoundError:
                raise BaseGoneError(f"the base is gone. key={base.key}") from None
            if (served.version, len(served.view)) != (base.version, base.size_bytes):
                raise BaseGoneError(
                    f"the base has other content. key={base.key} version={served.version} "
                    f"size_bytes={len(served.view)}"
                )
            yield served.view

    def _take_in(
        self, request: PeerRequest, out: memoryview, base: memoryview | None, proof: BodyMac
    ) -> bool:
        """Fill an object's memory from a body and its base; whether the body's tag matches.

        Every byte is written, since the memory is reused. Raises MalformedError for an invalid
        table, before anything is copied.
        """
        if base is None or request.base is None:
            return self._channel.read_body(out, proof)
        table = bytearray(request.base.table_bytes)
        self._channel.read_part(memoryview(table), proof)
        sent_bytes = (request.body_bytes or 0) - len(table)
        ranges = parse_ranges(table, size_bytes=len(out), sent_bytes=sent_bytes)
        for (kept, kept_bytes), (offset, length) in kept_and_sent(ranges, size_bytes=len(out)):
            # The client waits for this copy, and must not be blamed for it.
            began_s = time.monotonic()
            copy_bytes(out[kept : kept + kept_bytes], base[kept : kept + kept_bytes])
            self._channel.extend_timeout(time.monotonic() - began_s)
            self._channel.read_part(out[offset : offset + length], proof)
        return self._channel.verify_tag(proof)

    def _get(self, session: _PeerSession, request: PeerRequest, served: ServedObject) -> bool:
        offset, size = request.span or (0, len(served.view))
        if offset + size > len(served.view):
            refusal = Refusal(
                416, "range", f"the object ends before the range. size_bytes={len(served.view)}"
            )
            return self._refuse(session, request.counter, refusal)
        answer = dataclasses.replace(self._answer_with(206, served), body_bytes=size)
        part = served.view[offset : offset + size]
        extent = None if served.fd is None else (served.fd, served.offset_bytes + offset)
        if not self._answer(session, answer, part, extent, served.unchanged):
            return False
        self._context.counters.serve("GET", sent_bytes=size)
        return True

    def _list(self, session: _PeerSession, request: PeerRequest) -> bool:
        entries, more = self._context.catalog.page(request.key, request.after)
        body = msgspec.json.encode(
            [(entry.key, entry.size_bytes, to_micros(entry.modified_unix_s)) for entry in entries]
        )
        answer = dataclasses.replace(self._answer_with(200), body_bytes=len(body), more=more)
        self._answer(session, answer, memoryview(body))
        self._context.counters.serve("LIST", sent_bytes=len(body))
        return True

    # ---- heads and answers

    def _head(self, idle_s: float | None) -> bytes | None:
        try:
            return self._channel.read_head(idle_s=idle_s)
        except MalformedError as error:
            self._turn_away(400, "malformed", str(error))
            return None

    def _answer_with(self, status: int, served: ServedObject | None = None) -> PeerAnswer:
        context = self._context
        if served is None:
            return PeerAnswer(
                status=status,
                boot=context.boot,
                epoch=context.fence.epoch,
                counter=self._last_counter,
            )
        return PeerAnswer(
            status=status,
            boot=context.boot,
            epoch=context.fence.epoch,
            counter=self._last_counter,
            size_bytes=len(served.view),
            version=served.version,
            modified_us=to_micros(served.modified_unix_s),
        )

    def _answer(
        self,
        session: _PeerSession,
        answer: PeerAnswer,
        body: memoryview | None = None,
        extent: tuple[int, int] | None = None,
        unchanged: Callable[[], bool] = never_changes,
    ) -> bool:
        """Send an answer; False if the body changed meanwhile, so that its tag was not sent."""
        head = answer.encode()
        head_mac = mac(session.keys.answer_head, head)
        if body is None:
            self._channel.write(with_mac(head, head_mac))
            return True
        proof = body_mac(
            session.mac, session.keys.answer_body, counter=answer.counter, head_mac=head_mac
        )
        # A small body goes in one call with its head and tag.
        if len(body) <= EAGER_BYTES_MAX:
            proof.update(body)
            if not unchanged():
                return False
            self._channel.write(with_mac(head, head_mac), body, proof.tag())
            return True
        self._channel.write(with_mac(head, head_mac))
        if extent is None:
            self._channel.write_body([body], proof)
        else:
            self._channel.write_extent(body, *extent, proof)
        # Without its tag the client drops what it has received.
        if not unchanged():
            return False
        self._channel.write(proof.tag())
        return True

    def _refuse(
        self, session: _PeerSession, counter: int, refusal: Refusal, *, over: bool = False
    ) -> bool:
        """Send a refusal; whether another request may follow. A small body that was sent along is
        received and dropped.
        """
        self._context.counters.refuse(refusal.kind)
        if not over and 0 < self._owed_bytes <= EAGER_BYTES_MAX + TAG_BYTES:
            self._channel.skip(self._owed_bytes)
            self._owed_bytes = 0
        over = over or self._owed_bytes > 0
        self._answer(
            session,
            dataclasses.replace(
                self._answer_with(refusal.status), counter=counter, why=refusal.why
            ),
        )
        # An unread large body is still on its way: only closing ends it.
        if over:
            self._channel.linger()
        return not over

    def _turn_away(self, status: int, kind: RefusalKind, reason: str) -> None:
        """Refuse a connection that has not proven anything, and end it."""
        self._context.counters.refuse(kind)
        self._channel.write(unsigned(unsigned_refusal(status, reason)))
        self._channel.linger()


# ---- the server

CONNECTION_BYTES_MAX = 4 << 20
"""Memory of one connection: head buffer, a page of a listing, TLS, the thread's used stack."""

LOOPBACK = Endpoint()

BACKLOG = 64
TICK_S = 0.5
PUSH_OUT_S = 1.0
"""How long a new connection waits for the thread of the one whose place it gets, which has been
aborted.
"""

STOP_S = 10.0
"""How long ``stop`` waits for the threads of connections that it has aborted."""

_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerServerLimits:
    """Limits of a server; times in seconds.

    A *stranger* is a connection without an authentic request yet: one more than ``strangers_max``
    aborts the oldest, and each lasts ``stranger_s`` at most. ``idle_s``: between two requests. An
    authenticated connection beyond ``connections_max`` takes the place of the one that has been
    idle for longest; if all have a request under way, it is refused as crowded.
    """

    connections_max: int = 64
    strangers_max: int = 16
    stranger_s: float = 10.0
    idle_s: float = 60.0
    timeouts: PeerTimeouts = field(default_factory=PeerTimeouts)


@dataclass(slots=True, eq=False)
class _Client:
    """One accepted connection, as the accepting thread and its own thread share it."""

    sock: socket.socket
    since_s: float
    thread: threading.Thread | None = None
    proven: bool = False
    idle_since_s: float | None = None
    """Since when it is idle; None while a request is under way."""
    ended: bool = False
    """Aborted: its thread is about to end."""
    _sock_lock: threading.Lock = field(default_factory=threading.Lock)

    def end(self) -> None:
        """Abort the connection, from any thread."""
        with self._sock_lock:
            self.ended = True
            shut_down(self.sock)

    def wrap(self, tls: ssl.SSLContext) -> ssl.SSLSocket:
        """Put TLS over the socket, before any byte is read. Raises EndedError if it was aborted."""
        # ``end`` must find the socket object on which the thread waits.
        with self._sock_lock:
            if self.ended:
                raise EndedError("the connection was ended before TLS began.")
            self.sock = wrapped = tls.wrap_socket(
                self.sock, server_side=True, do_handshake_on_connect=False
            )
        return wrapped


class PeerServer:
    """Serves ``memory`` and ``sources`` at ``endpoint``, from ``start`` to ``stop``; port 0 takes a
    free one.

    ``epoch`` is the highest that this node has seen; requests of an older one are refused. Raises
    UsageError if the address can't be listened on.
    """

    def __init__(
        self,
        memory: PeerMemory,
        secret: PeerSecret,
        *,
        endpoint: Endpoint = LOOPBACK,
        sources: Sequence[ServedSource] = (),
        epoch: int = 0,
        limits: PeerServerLimits | None = None,
        emit: Emit,
    ) -> None:
        self.memory = memory
        self._limits = limits or PeerServerLimits()
        self._tls = endpoint.tls
        self._emit = emit
        self._context = ServerContext(
            catalog=PeerCatalog(memory, sources),
            secret=secret,
            fence=EpochFence(epoch),
            counters=ServerCounters(),
            boot=os.urandom(NONCE_BYTES).hex(),
            macs=known_macs(),
            idle_s=self._limits.idle_s,
        )
        self._lock = threading.Lock()
        self._clients: dict[_Client, None] = {}  # in the order of their arrival
        self._stopping = threading.Event()
        self._listener = _listen(endpoint)
        self._wake_read, self._wake_write = socket.socketpair()
        self._thread = threading.Thread(target=self._accept, name="ckpt-peer-accept", daemon=True)

    @property
    def boot(self) -> str:
        """The incarnation of the server, drawn at its start: its objects are gone with it."""
        return self._context.boot

    @property
    def address(self) -> tuple[str, int]:
        """Host and port on which the server listens."""
        host, port = self._listener.getsockname()[:2]
        return str(host), int(port)

    @property
    def epoch(self) -> int:
        """The highest epoch seen."""
        return self._context.fence.epoch

    def see_epoch(self, epoch: int) -> None:
        """Refuse requests of an older epoch from now on."""
        self._context.fence.see(epoch)

    def stats(self) -> ServerStats:
        """Counts of requests and refusals since the start."""
        with self._lock:
            strangers = sum(not client.proven for client in self._clients)
            return self._context.counters.stats(connections=len(self._clients), strangers=strangers)

    def start(self) -> None:
        """Begin to serve. To be called once."""
        self._thread.start()

    def stop(self) -> None:
        """End all connections and wait for their threads. Idempotent.

        Objects that were not received whole are gone; ``memory`` keeps the others.
        """
        with self._lock:
            if self._stopping.is_set():
                return
            self._stopping.set()
        self._wake_write.send(b"\0")
        until_s = time.monotonic() + STOP_S
        if self._thread.ident is not None:
            self._thread.join(STOP_S)
        self._listener.close()
        with self._lock:
            clients = list(self._clients)
        for client in clients:
            client.end()
        for client in clients:
            if client.thread is not None:
                client.thread.join(max(0.0, until_s - time.monotonic()))
        self._wake_read.close()
        self._wake_write.close()

    def _accept(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._wake_read, select.POLLIN)
        while not self._stopping.is_set():
            poll.poll(TICK_S * 1000)
            if self._stopping.is_set():
                return
            self._end_slow_strangers()
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                continue
            except OSError as error:
                if error.errno in _FULL:
                    self._context.counters.refuse("crowded")
                    select.select([self._wake_read], [], [], TICK_S)
                continue  # else the client closed before it was accepted
            self._start_client(_Client(sock, time.monotonic()))

    def _start_client(self, client: _Client) -> None:
        limits = self._limits
        with self._lock:
            strangers = [client for client in self._clients if not client.proven]
        if len(strangers) >= limits.strangers_max:
            # One that ends anyway, else the oldest: the clients are in the order of their arrival.
            aborted = min(strangers, key=lambda stranger: not stranger.ended)
            if not aborted.ended:
                self._context.counters.refuse("crowded")
                aborted.end()
            if aborted.thread is not None:
                aborted.thread.join(PUSH_OUT_S)
        with self._lock:
            crowded = sum(not client.proven for client in self._clients) >= limits.strangers_max
            if not crowded:
                self._clients[client] = None
        if crowded:
            self._context.counters.refuse("crowded")
            client.sock.close()
            return
        client.thread = threading.Thread(
            target=self._serve, args=(client,), name="ckpt-peer", daemon=True
        )
        client.thread.start()

    def _admit(self, client: _Client) -> bool:
        """Whether there is a place for one more authenticated client: perhaps an idle one's."""
        with self._lock:
            holders = [client for client in self._clients if client.proven]
            if len(holders) < self._limits.connections_max:
                client.proven = True
                return True
            idle = [
                (client.idle_since_s, number, client)
                for number, client in enumerate(holders)
                if client.idle_since_s is not None
            ]
            if not idle:
                return False
            evicted = min(idle)[2]
            evicted.proven, client.proven = False, True
        # The evicted client repeats over a new connection: a request that it may have sent at this
        # moment got no answer.
        evicted.end()
        return True

    def _end_slow_strangers(self) -> None:
        """Abort old strangers: timeouts alone never end a TLS handshake that trickles."""
        old_s = time.monotonic() - self._limits.stranger_s
        with self._lock:
            slow = [
                client for client in self._clients if not client.proven and client.since_s < old_s
            ]
        for client in slow:
            client.end()

    def _serve(self, client: _Client) -> None:
        def on_authenticated() -> bool:
            return self._admit(client)

        def on_idle(idle: bool) -> None:
            client.idle_since_s = time.monotonic() if idle else None

        try:
            client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.sock.settimeout(self._limits.stranger_s)
            if self._tls is not None:
                try:
                    client.wrap(self._tls).do_handshake()
                except ssl.SSLError:
                    self._context.counters.refuse("tls")
                    raise
            PeerServerConnection(
                self._context,
                PeerChannel(client.sock, self._limits.timeouts),
                on_authenticated=on_authenticated,
                on_idle=on_idle,
            ).run()
        except (OSError, EndedError):
            return  # the connection broke before its request took effect
        except Exception as error:  # noqa: BLE001 the border of a thread
            self._emit(
                Event(
                    "peer-server-defect",
                    f"unexpected error on a connection of a peer: {error!r}",
                    alarm=True,
                )
            )
        finally:
            with self._lock:
                self._clients.pop(client, None)
            client.sock.close()


def _listen(endpoint: Endpoint) -> socket.socket:
    family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
    try:
        listener = socket.create_server(
            (endpoint.host, endpoint.port), family=family, backlog=BACKLOG
        )
    except OSError as error:
        raise UsageError(
            f"an address can't be listened on. address={endpoint} cause={error.strerror or error}"
        ) from error
    listener.setblocking(False)
    return listener
