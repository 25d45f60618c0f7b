"""Lends a vault, and sources beside it, to the peers of one job over HTTP. A thread for each connection, all of them bounded.

What it takes at most: the vault's budget, and CONNECTION_BYTES_MAX for each of ``connections_max + strangers_max``
connections, whatever anybody sends.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ckpt.cluster.endpoint import Endpoint
from ckpt.cluster.peermem.auth import NONCE_BYTES, Secret
from ckpt.cluster.peermem.body_mac import known_macs
from ckpt.cluster.peermem.channel import Channel, EndedError, shut
from ckpt.cluster.peermem.fence import Fence
from ckpt.cluster.peermem.patience import Patience
from ckpt.cluster.peermem.server import Desk, Serving
from ckpt.cluster.peermem.shelf import Shelf
from ckpt.cluster.peermem.sources import Source
from ckpt.cluster.peermem.tally import ServerStats, Tally
from ckpt.cluster.peermem.vault import Vault
from ckpt.errors import UsageError
from ckpt.events import Event, Tell

CONNECTION_BYTES_MAX = 4 << 20
"""What one connection takes: head buffer, a page of a listing, TLS, the thread's touched stack."""

LOOPBACK = Endpoint()

BACKLOG = 64
TICK_S = 0.5
PUSH_OUT_S = 1.0
"""How long a newcomer waits for the thread of the stranger whose place it gets; its connection has been ended."""

STOP_S = 10.0
"""How long ``stop`` waits for threads whose connections it has ended."""

_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a server bears. A *stranger* is a connection whose first request hasn't proven that it knows the secret: one more
    than ``strangers_max`` pushes out the oldest, and ``stranger_s`` is all that each has. ``idle_s``: between two requests.

    A holder of the secret beyond ``connections_max`` takes the place of the one that has asked nothing for longest; where all
    have a request under way it is told to come again.
    """

    connections_max: int = 64
    strangers_max: int = 16
    stranger_s: float = 10.0
    idle_s: float = 60.0
    patience: Patience = field(default_factory=Patience)


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
            shut(self.sock)

    def wrap(self, tls: ssl.SSLContext) -> ssl.SSLSocket:
        """Put TLS over its socket, with no word said yet. Raises EndedError where its connection has been ended."""
        with self._swap:  # who ends it must find the object that the thread waits on
            if self.ended:
                raise EndedError("the connection was ended before TLS began.")
            self.sock = wrapped = tls.wrap_socket(self.sock, server_side=True, do_handshake_on_connect=False)
        return wrapped


class PeerServer:
    """Serves ``vault`` and ``sources`` at ``endpoint``, from ``start`` to ``stop``; port 0 takes a free one.

    ``epoch`` is the highest that this node has seen; requests of an older one are refused. Raises UsageError where the address
    can't be had.
    """

    def __init__(
        self, vault: Vault, secret: Secret, *, endpoint: Endpoint = LOOPBACK, sources: Sequence[Source] = (),
        epoch: int = 0, limits: Limits | None = None, tell: Tell,
    ) -> None:  # fmt: skip
        self.vault = vault
        self.boot = os.urandom(NONCE_BYTES).hex()
        """Drawn for this start of the server: what it holds is gone with it."""
        self._limits = limits or Limits()
        self._tls = endpoint.tls
        self._tell = tell
        self._fence = Fence(epoch)
        self._tally = Tally()
        self._desk = Desk(
            shelf=Shelf(vault, sources), secret=secret, fence=self._fence, tally=self._tally, boot=self.boot,
            macs=known_macs(), idle_s=self._limits.idle_s,
        )  # fmt: skip
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
        """End all connections and wait for their threads. What was half put is gone; the vault keeps the rest. Idempotent."""
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
            out = min(strangers, key=lambda one: not one.ended)  # the oldest, if none is about to leave anyway
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
        guest.thread = threading.Thread(target=self._serve, args=(guest,), name="ckpt-peer", daemon=True)
        guest.thread.start()

    def _take_in(self, guest: _Guest) -> bool:
        """Whether there is a place for one more holder of the secret: perhaps that of who rests."""
        with self._lock:
            holders = [one for one in self._guests if one.proven]
            if len(holders) < self._limits.connections_max:
                guest.proven = True
                return True
            resting = [(one.rests_s, at, one) for at, one in enumerate(holders) if one.rests_s is not None]
            if not resting:
                return False
            out = min(resting)[2]
            out.proven, guest.proven = False, True
        # Whoever had it asks again over a new connection: what it may have asked at this moment was not heard.
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
            Serving(self._desk, Channel(guest.sock, self._limits.patience), proven=proven, rests=rests).run()
        except (OSError, EndedError):
            return  # the connection broke: what it was about to do didn't happen
        except Exception as error:  # noqa: BLE001 the border of a thread
            self._tell(Event("peer-server-defect", f"a connection of a peer ended by a defect: {error!r}", alarm=True))
        finally:
            with self._lock:
                self._guests.pop(guest, None)
            guest.sock.close()


def _listen(endpoint: Endpoint) -> socket.socket:
    family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
    try:
        listener = socket.create_server((endpoint.host, endpoint.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise UsageError(
            f"an address can't be listened on. address={endpoint} cause={error.strerror or error}"
        ) from error
    listener.setblocking(False)
    return listener
