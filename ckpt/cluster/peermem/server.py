"""One connection of a server: the hello, then requests in order. Runs in a thread of its own and
ends with the connection."""

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

# The highest epoch that this node has seen. What an older one asks for changes nothing, at
# whatever moment it gets there.


class EpochFence:
    """Thread-safe. The epoch only grows."""

    def __init__(self, epoch: int = 0) -> None:
        self._lock = threading.Lock()
        self._epoch = epoch

    @property
    def epoch(self) -> int:
        """The highest epoch seen."""
        return self._epoch

    def see(self, epoch: int) -> None:
        """An epoch that exists."""
        with self._lock:
            self._epoch = max(self._epoch, epoch)

    @contextlib.contextmanager
    def hold(self, epoch: int) -> Iterator[None]:
        """For a short block that changes something in the name of ``epoch``: none newer is seen
        meanwhile.

        Raises FencedError where one was seen before.
        """
        with self._lock:
            if epoch < self._epoch:
                raise FencedError(f"a newer epoch is open. epoch={epoch} known={self._epoch}")
            yield


# What a server counts.


@dataclass(frozen=True, slots=True)
class ServerStats:
    """Since the start: requests served by verb, bytes of bodies, what was turned away by kind; and
    connections now."""

    served: Mapping[str, int]
    refused: Mapping[str, int]
    received_bytes: int
    sent_bytes: int
    connections: int
    strangers: int


class ServerCounters:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._served: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._received_bytes = self._sent_bytes = 0

    def serve(self, verb: Verb, *, received_bytes: int = 0, sent_bytes: int = 0) -> None:
        """A request was answered as it was meant."""
        with self._lock:
            self._served[verb] += 1
            self._received_bytes += received_bytes
            self._sent_bytes += sent_bytes

    def refuse(self, kind: RefusalKind) -> None:
        """A request or a connection was turned away."""
        with self._lock:
            self._refused[kind] += 1

    def stats(self, *, connections: int, strangers: int) -> ServerStats:
        """All counts at this moment."""
        with self._lock:
            return ServerStats(
                dict(self._served),
                dict(self._refused),
                self._received_bytes,
                self._sent_bytes,
                connections,
                strangers,
            )


EAGER_BYTES_MAX = 64 << 10
"""Bodies up to this may come without being asked for; they are taken in and dropped where the
request is refused."""


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
    """Serves one channel until it ends. ``proven`` is asked at the first request of a holder of the
    secret whether there is a place for it; ``rests`` is told when one begins to ask nothing, and
    when that is over.
    """

    def __init__(
        self,
        desk: ServerContext,
        channel: PeerChannel,
        *,
        on_authenticated: Callable[[], bool],
        on_idle: Callable[[bool], object],
    ) -> None:
        self._desk = desk
        self._channel = channel
        self._proven = on_authenticated
        self._rests = on_idle
        self._last = 0
        self._owed_bytes = 0  # of a body that comes unasked and was not taken in
        self._met = False

    def run(self) -> None:
        """Serve. Returns when the connection is over, whoever ended it; raises OSError and
        EndedError where it broke."""
        try:
            session = self._meet()
            while session is not None and self._serve_next(session):
                continue
        except TimeoutError:
            self._desk.counters.refuse("slow")

    def _meet(self) -> _PeerSession | None:
        """Hear the hello and answer it; None where there was none that is right."""
        desk = self._desk
        raw = self._head(None)
        if raw is None:
            return None
        split = split_mac(raw)
        if split is None or not macs_equal(split[1], desk.secret.hello_mac(split[0])):
            self._turn_away(401, "mac", "no hello of a holder of this job's secret")
            return None
        try:
            hello = PeerHello.parse(parse_head(split[0]))
        except MalformedError as error:
            self._turn_away(400, "malformed", str(error))
            return None
        name = next((one for one in desk.macs if one in hello.macs), None)
        if name is None:
            self._turn_away(400, "malformed", f"no body MAC in common. known={','.join(desk.macs)}")
            return None
        head = PeerWelcome(
            os.urandom(NONCE_BYTES).hex(), desk.boot, desk.fence.epoch, name
        ).encode()
        proof = desk.secret.welcome_mac(split[1], head)
        self._channel.write(with_mac(head, proof))
        return _PeerSession(desk.secret.session(split[1], proof), name)

    def _serve_next(self, session: _PeerSession) -> bool:
        """Answer one request; whether another may follow."""
        self._rests(True)
        raw = self._head(self._desk.idle_s if self._met else None)
        self._rests(False)
        if raw is None:
            return False
        split = split_mac(raw)
        if split is None or not macs_equal(split[1], mac(session.keys.request_head, split[0])):
            self._turn_away(401, "mac", "not from who began this connection")
            return False
        place = self._met or self._proven()
        self._met = True
        try:
            request = PeerRequest.parse(parse_head(split[0]))
        except MalformedError as error:
            return self._refuse(session, 0, Refusal(400, "malformed", str(error)), over=True)
        if not place:
            return self._refuse(
                session, request.counter, Refusal(503, "crowded", "all places are taken"), over=True
            )
        self._owed_bytes = (
            0 if request.body_bytes is None or request.waits else request.body_bytes + TAG_BYTES
        )
        refusal = authorize(
            request, boot=self._desk.boot, epoch=self._desk.fence.epoch, last_counter=self._last
        )
        if refusal is not None and refusal.kind == "replay":
            return self._refuse(session, 0, refusal, over=True)
        self._last = request.counter
        if refusal is None:
            self._desk.fence.see(request.epoch)
            refusal = self._why_not(request)
        return (
            self._act(session, request, split[1])
            if refusal is None
            else self._refuse(session, self._last, refusal)
        )

    def _why_not(self, request: PeerRequest) -> Refusal | None:
        """What can be refused before any byte of a body is taken in."""
        shelf = self._desk.catalog
        if request.verb in ("PUT", "DELETE") and shelf.read_only(request.key):
            return Refusal(403, "read-only", "objects below this prefix are only read")
        if request.create_only and shelf.memory.stat(request.key) is not None:
            return Refusal(412, "taken", "the key is taken")
        if self._owed_bytes > EAGER_BYTES_MAX + TAG_BYTES:
            return Refusal(
                400,
                "malformed",
                f"so long a body is announced first. limit_bytes={EAGER_BYTES_MAX}",
            )
        return None

    def _act(self, session: _PeerSession, request: PeerRequest, head_mac: bytes) -> bool:
        """Do what is asked, answer, and say whether another request may follow."""
        desk, facts = self._desk, None
        try:
            match request.verb:
                case "PUT":
                    return self._put(session, request, head_mac)
                case "GET":
                    with desk.catalog.reading(request.key) as held:
                        return self._get(session, request, held)
                case "LIST":
                    return self._list(session, request)
                case "DELETE":
                    with desk.fence.hold(request.epoch):
                        desk.catalog.memory.delete(request.key)
                    self._answer(session, self._facts(204))
                case "HEAD":
                    with desk.catalog.reading(request.key) as held:
                        facts = self._facts(200, held)
                    self._answer(session, facts)
        except BaseGoneError as error:
            return self._refuse(session, self._last, Refusal(424, "base", str(error)))
        except NotFoundError:
            return self._refuse(session, self._last, Refusal(404, "missing", "no such object"))
        except UsageError as error:
            return self._refuse(session, self._last, Refusal(400, "malformed", str(error)))
        except TooLargeError as error:
            return self._refuse(session, self._last, Refusal(413, "too-large", str(error)))
        except StoreFullError as error:
            return self._refuse(session, self._last, Refusal(507, "full", str(error)))
        except KeyExistsError as error:
            return self._refuse(session, self._last, Refusal(412, "taken", str(error)))
        except FencedError:
            return self._refuse(session, self._last, epoch_refusal(request.epoch, desk.fence.epoch))
        desk.counters.serve(request.verb)
        return True

    def _put(self, session: _PeerSession, request: PeerRequest, head_mac: bytes) -> bool:
        vault, refusal = (
            self._desk.catalog.memory,
            Refusal(401, "body", "the body is not what its tag proves"),
        )
        proven = False
        with (
            self._base(request) as base,
            vault.incoming(request.key, request.object_bytes) as incoming,
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
                with self._desk.fence.hold(
                    request.epoch
                ):  # one may have opened while the bytes came
                    version = incoming.publish(create_only=request.create_only)
        if not proven:
            return self._refuse(session, request.counter, refusal, over=True)
        self._answer(
            session,
            dataclasses.replace(self._facts(201), size_bytes=request.object_bytes, version=version),
        )
        self._desk.counters.serve("PUT", received_bytes=request.body_bytes or 0)
        return True

    @contextlib.contextmanager
    def _base(self, request: PeerRequest) -> Iterator[memoryview | None]:
        """The base that a PUT refers to, pinned until the end. Raises BaseGoneError where it is not
        that one any more."""
        base = request.base
        if base is None:
            yield None
            return
        with contextlib.ExitStack() as pinned:
            try:
                held = pinned.enter_context(self._desk.catalog.memory.reading(base.key))
            except NotFoundError:
                raise BaseGoneError(f"the base is gone. key={base.key}") from None
            found = held.version, len(held.view)
            if found != (base.version, base.size_bytes):
                raise BaseGoneError(
                    f"the base is another one. key={base.key} version={found[0]} "
                    f"size_bytes={found[1]}"
                )
            yield held.view

    def _take_in(
        self, request: PeerRequest, out: memoryview, base: memoryview | None, proof: BodyMac
    ) -> bool:
        """Fill an object's memory with a body, and with what it leaves to the base; whether its tag
        proves it.

        Raises MalformedError for a table that is none, before anything is copied.
        """
        if base is None or request.base is None:
            return self._channel.read_body(out, proof)
        table = bytearray(request.base.table_bytes)
        self._channel.read_part(memoryview(table), proof)
        sent_bytes = (request.body_bytes or 0) - len(table)
        ranges = parse_ranges(table, size_bytes=len(out), sent_bytes=sent_bytes)
        for (kept, kept_bytes), (offset, length) in kept_and_sent(ranges, size_bytes=len(out)):
            began_s = time.monotonic()
            copy_bytes(out[kept : kept + kept_bytes], base[kept : kept + kept_bytes])
            self._channel.extend_timeout(time.monotonic() - began_s)
            self._channel.read_part(out[offset : offset + length], proof)
        return self._channel.verify_tag(proof)

    def _get(self, session: _PeerSession, request: PeerRequest, held: ServedObject) -> bool:
        offset, size = request.span or (0, len(held.view))
        if offset + size > len(held.view):
            refusal = Refusal(416, "range", f"the object ends before. size_bytes={len(held.view)}")
            return self._refuse(session, request.counter, refusal)
        answer = dataclasses.replace(self._facts(206, held), body_bytes=size)
        part = held.view[offset : offset + size]
        extent = None if held.fd is None else (held.fd, held.offset_bytes + offset)
        if not self._answer(session, answer, part, extent, held.unchanged):
            return False
        self._desk.counters.serve("GET", sent_bytes=size)
        return True

    def _list(self, session: _PeerSession, request: PeerRequest) -> bool:
        entries, more = self._desk.catalog.page(request.key, request.after)
        body = msgspec.json.encode(
            [(one.key, one.size_bytes, to_micros(one.modified_unix_s)) for one in entries]
        )
        answer = dataclasses.replace(self._facts(200), body_bytes=len(body), more=more)
        self._answer(session, answer, memoryview(body))
        self._desk.counters.serve("LIST", sent_bytes=len(body))
        return True

    # Words.

    def _head(self, idle_s: float | None) -> bytes | None:
        try:
            return self._channel.read_head(idle_s=idle_s)
        except MalformedError as error:
            self._turn_away(400, "malformed", str(error))
            return None

    def _facts(self, status: int, held: ServedObject | None = None) -> PeerAnswer:
        desk = self._desk
        if held is None:
            return PeerAnswer(
                status=status, boot=desk.boot, epoch=desk.fence.epoch, counter=self._last
            )
        return PeerAnswer(
            status=status,
            boot=desk.boot,
            epoch=desk.fence.epoch,
            counter=self._last,
            size_bytes=len(held.view),
            version=held.version,
            modified_us=to_micros(held.modified_unix_s),
        )

    def _answer(
        self,
        session: _PeerSession,
        answer: PeerAnswer,
        body: memoryview | None = None,
        extent: tuple[int, int] | None = None,
        unchanged: Callable[[], bool] = never_changes,
    ) -> bool:
        """Send an answer; False where the body changed meanwhile, so that its tag was not sent."""
        head = answer.encode()
        head_mac = mac(session.keys.answer_head, head)
        if body is None:
            self._channel.write(with_mac(head, head_mac))
            return True
        proof = body_mac(
            session.mac, session.keys.answer_body, counter=answer.counter, head_mac=head_mac
        )
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
        if not unchanged():
            return False
        self._channel.write(proof.tag())
        return True

    def _refuse(
        self, session: _PeerSession, counter: int, refusal: Refusal, *, over: bool = False
    ) -> bool:
        """Say no; whether another request may follow. A small body that came along is taken in and
        dropped."""
        self._desk.counters.refuse(refusal.kind)
        if not over and 0 < self._owed_bytes <= EAGER_BYTES_MAX + TAG_BYTES:
            self._channel.skip(self._owed_bytes)
            self._owed_bytes = 0
        over = over or self._owed_bytes > 0
        self._answer(
            session,
            dataclasses.replace(self._facts(refusal.status), counter=counter, why=refusal.why),
        )
        if over:
            self._channel.linger()
        return not over

    def _turn_away(self, status: int, kind: RefusalKind, why: str) -> None:
        """End a connection with somebody who has shown nothing."""
        self._desk.counters.refuse(kind)
        self._channel.write(unsigned(unsigned_refusal(status, why)))
        self._channel.linger()


# Lends a vault, and sources beside it, to the peers of one job over HTTP. A thread for each
# connection, all of them bounded.
#
# What it takes at most: the vault's budget, and CONNECTION_BYTES_MAX for each of
# ``connections_max + strangers_max`` connections, whatever anybody sends.

CONNECTION_BYTES_MAX = 4 << 20
"""What one connection takes: head buffer, a page of a listing, TLS, the thread's touched stack."""

LOOPBACK = Endpoint()

BACKLOG = 64
TICK_S = 0.5
PUSH_OUT_S = 1.0
"""How long a newcomer waits for the thread of the stranger whose place it gets; its connection has
been ended."""

STOP_S = 10.0
"""How long ``stop`` waits for threads whose connections it has ended."""

_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerServerLimits:
    """What a server bears. A *stranger* is a connection whose first request hasn't proven that it
    knows the secret: one more than ``strangers_max`` pushes out the oldest, and ``stranger_s`` is
    all that each has. ``idle_s``: between two requests.

    A holder of the secret beyond ``connections_max`` takes the place of the one that has asked
    nothing for longest; where all have a request under way it is told to come again.
    """

    connections_max: int = 64
    strangers_max: int = 16
    stranger_s: float = 10.0
    idle_s: float = 60.0
    timeouts: PeerTimeouts = field(default_factory=PeerTimeouts)


@dataclass(slots=True, eq=False)
class _Guest:
    sock: socket.socket
    since_s: float
    thread: threading.Thread | None = None
    proven: bool = False
    rests_s: float | None = None
    """Since when it asks nothing; None while a request of it is under way."""
    ended: bool = False
    """Its thread is about to end."""
    _swap: threading.Lock = field(default_factory=threading.Lock)

    def end(self) -> None:
        """End its connection, from any thread."""
        with self._swap:
            self.ended = True
            shut_down(self.sock)

    def wrap(self, tls: ssl.SSLContext) -> ssl.SSLSocket:
        """Put TLS over its socket, with no word said yet. Raises EndedError where its connection
        has been ended."""
        with self._swap:  # who ends it must find the object that the thread waits on
            if self.ended:
                raise EndedError("the connection was ended before TLS began.")
            self.sock = wrapped = tls.wrap_socket(
                self.sock, server_side=True, do_handshake_on_connect=False
            )
        return wrapped


class PeerServer:
    """Serves ``vault`` and ``sources`` at ``endpoint``, from ``start`` to ``stop``; port 0 takes a
    free one.

    ``epoch`` is the highest that this node has seen; requests of an older one are refused. Raises
    UsageError where the address can't be had.
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
        self.boot = os.urandom(NONCE_BYTES).hex()
        """Drawn for this start of the server: what it holds is gone with it."""
        self._limits = limits or PeerServerLimits()
        self._tls = endpoint.tls
        self._tell = emit
        self._fence = EpochFence(epoch)
        self._tally = ServerCounters()
        self._desk = ServerContext(
            catalog=PeerCatalog(memory, sources),
            secret=secret,
            fence=self._fence,
            counters=self._tally,
            boot=self.boot,
            macs=known_macs(),
            idle_s=self._limits.idle_s,
        )
        self._lock = threading.Lock()
        self._guests: dict[_Guest, None] = {}  # in the order in which they came
        self._stopping = threading.Event()
        self._listener = _listen(endpoint)
        self._wake_read, self._wake_write = socket.socketpair()
        self._thread = threading.Thread(target=self._accept, name="ckpt-peer-accept", daemon=True)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that are listened on."""
        host, port = self._listener.getsockname()[:2]
        return str(host), int(port)

    @property
    def epoch(self) -> int:
        """The highest epoch seen."""
        return self._fence.epoch

    def see_epoch(self, epoch: int) -> None:
        """Refuse from now on what comes in the name of an older one."""
        self._fence.see(epoch)

    def stats(self) -> ServerStats:
        """What was served and refused since the start."""
        with self._lock:
            strangers = sum(not guest.proven for guest in self._guests)
            return self._tally.stats(connections=len(self._guests), strangers=strangers)

    def start(self) -> None:
        """Begin to serve; once."""
        self._thread.start()

    def stop(self) -> None:
        """End all connections and wait for their threads. What was half put is gone; the vault
        keeps the rest. Idempotent."""
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
            guests = list(self._guests)
        for guest in guests:
            guest.end()
        for guest in guests:
            if guest.thread is not None:
                guest.thread.join(max(0.0, until_s - time.monotonic()))
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
                    self._tally.refuse("crowded")
                    select.select([self._wake_read], [], [], TICK_S)
                continue  # else the guest left before it was let in
            self._let_in(_Guest(sock, time.monotonic()))

    def _let_in(self, guest: _Guest) -> None:
        limits = self._limits
        with self._lock:
            strangers = [one for one in self._guests if not one.proven]
        if len(strangers) >= limits.strangers_max:
            out = min(
                strangers, key=lambda one: not one.ended
            )  # the oldest, if none is about to leave anyway
            if not out.ended:
                self._tally.refuse("crowded")
                out.end()
            if out.thread is not None:
                out.thread.join(PUSH_OUT_S)
        with self._lock:
            crowded = sum(not one.proven for one in self._guests) >= limits.strangers_max
            if not crowded:
                self._guests[guest] = None
        if crowded:
            self._tally.refuse("crowded")
            guest.sock.close()
            return
        guest.thread = threading.Thread(
            target=self._serve, args=(guest,), name="ckpt-peer", daemon=True
        )
        guest.thread.start()

    def _take_in(self, guest: _Guest) -> bool:
        """Whether there is a place for one more holder of the secret: perhaps that of who rests."""
        with self._lock:
            holders = [one for one in self._guests if one.proven]
            if len(holders) < self._limits.connections_max:
                guest.proven = True
                return True
            resting = [
                (one.rests_s, at, one) for at, one in enumerate(holders) if one.rests_s is not None
            ]
            if not resting:
                return False
            out = min(resting)[2]
            out.proven, guest.proven = False, True
        # Whoever had it asks again over a new connection: what it may have asked at this moment was
        # not heard.
        out.end()
        return True

    def _end_slow_strangers(self) -> None:
        """Time-outs alone would let a trickle of a TLS handshake go on for ever."""
        old_s = time.monotonic() - self._limits.stranger_s
        with self._lock:
            slow = [guest for guest in self._guests if not guest.proven and guest.since_s < old_s]
        for guest in slow:
            guest.end()

    def _serve(self, guest: _Guest) -> None:
        def proven() -> bool:
            return self._take_in(guest)

        def rests(resting: bool) -> None:
            guest.rests_s = time.monotonic() if resting else None

        try:
            guest.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            guest.sock.settimeout(self._limits.stranger_s)
            if self._tls is not None:
                try:
                    guest.wrap(self._tls).do_handshake()
                except ssl.SSLError:
                    self._tally.refuse("tls")
                    raise
            PeerServerConnection(
                self._desk,
                PeerChannel(guest.sock, self._limits.timeouts),
                on_authenticated=proven,
                on_idle=rests,
            ).run()
        except (OSError, EndedError):
            return  # the connection broke: what it was about to do didn't happen
        except Exception as error:  # noqa: BLE001 the border of a thread
            self._tell(
                Event(
                    "peer-server-defect",
                    f"a connection of a peer ended by a defect: {error!r}",
                    alarm=True,
                )
            )
        finally:
            with self._lock:
                self._guests.pop(guest, None)
            guest.sock.close()


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
