"""An HTTP proxy on loopback that stands before one server and spoils what a rule says.

    with FaultProxy(server.endpoint, first(1, ResetAfter(), when=lambda r: r.method == "PUT")) as proxy:
        store = open_backend(bucket.url, {**bucket.options, "endpoint_url": proxy.endpoint})
        ...
        proxy.rule = let_through          # may be changed at any time
        assert proxy.count(ResetAfter) == 1

Faults and rules are in ``kit.servers.rules``. Every request is recorded in ``proxy.seen`` with the
fault that met it, so tests also use it to look at headers. Bodies stream through in pieces, so
memory stays small. With ``tls`` the client's side speaks TLS. It also works as a forward proxy
(``http_proxy``) before that same server.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import BinaryIO
from urllib.parse import urlsplit

from kit.servers.messages import (
    PIECE_BYTES,
    BrokenError,
    Head,
    Pieces,
    body_of,
    cut,
    error_answer,
    flipped,
    lasts_to_end,
    read_head,
)
from kit.servers.rules import (
    Answer,
    Delay,
    Fault,
    Flip,
    Request,
    ResetAfter,
    ResetBefore,
    Rule,
    Truncate,
    let_through,
)

_NO_BODY_STATUSES = frozenset({204, 304})
_HOP_BY_HOP = frozenset({"expect", "proxy-connection"})
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER on, zero seconds: closing sends RST."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A request that arrived, and what the rule did to it."""

    request: Request
    fault: Fault | None


class FaultProxy:
    """Listens from construction on until ``close``. Thread-safe; one thread a connection."""

    def __init__(
        self, upstream: str, rule: Rule = let_through, *, tls: ssl.SSLContext | None = None
    ) -> None:
        """Stand before the server at ``upstream`` (``http://127.0.0.1:port``)."""
        parts = urlsplit(upstream)
        assert parts.hostname and parts.port, "an upstream is a host and a port"
        self._upstream = (parts.hostname, parts.port)
        self._tls = tls
        self._lock = threading.Lock()
        self._rule: Rule = rule
        self._seen: list[Seen] = []
        self._number = 0
        self._closing = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._start(self._accept)

    @property
    def endpoint(self) -> str:
        """Where clients connect to."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    @property
    def rule(self) -> Rule:
        """What chooses the faults; requests that arrive from now on meet a new one."""
        return self._rule

    @rule.setter
    def rule(self, rule: Rule) -> None:
        with self._lock:
            self._rule = rule

    @property
    def seen(self) -> list[Seen]:
        """All requests so far, in order of arrival."""
        with self._lock:
            return list(self._seen)

    def count(self, kind: type[Fault]) -> int:
        """How many requests met a fault of that kind."""
        return sum(isinstance(seen.fault, kind) for seen in self.seen)

    def forget(self) -> None:
        """Empty ``seen``."""
        with self._lock:
            self._seen.clear()

    def close(self) -> None:
        """End every connection and all threads; idempotent."""
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            open_sockets, threads = list(self._sockets), list(self._threads)
        for one in open_sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, name="fault-proxy", daemon=True)  # type: ignore[arg-type]
        with self._lock:
            self._threads = [
                other for other in self._threads if other.is_alive() or other.ident is None
            ]
            self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with contextlib.ExitStack() as ending, contextlib.suppress(OSError, BrokenError):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._keep(client, ending)
            if self._tls is not None:
                client = self._tls.wrap_socket(client, server_side=True)
                self._keep(client, ending)
            near = _Side(client, ending.enter_context(client.makefile("rb", PIECE_BYTES)))
            far: _Side | None = None
            while (head := read_head(near.reader)) is not None:
                seen = self._record(head)
                far = far or self._connect(ending)
                if not self._exchange(seen, head, near, far):
                    return

    def _connect(self, ending: contextlib.ExitStack) -> _Side:
        server = socket.create_connection(self._upstream)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._keep(server, ending)
        return _Side(server, ending.enter_context(server.makefile("rb", PIECE_BYTES)))

    def _keep(self, one: socket.socket, ending: contextlib.ExitStack) -> None:
        with self._lock:
            self._sockets.add(one)

        def let_go() -> None:
            one.close()
            with self._lock:
                self._sockets.discard(one)

        ending.callback(let_go)

    def _record(self, head: Head) -> Seen:
        method, target, _ = head.start.split(" ", 2)
        parts = urlsplit(target)
        if parts.scheme:  # asked as a forward proxy
            target = parts.path + (f"?{parts.query}" if parts.query else "")
        with self._lock:
            request = Request(self._number, method, target, dict(head.headers))
            seen = Seen(request, self._rule(request))
            self._number += 1
            self._seen.append(seen)
            return seen

    def _exchange(self, seen: Seen, head: Head, client: _Side, server: _Side) -> bool:
        """Bring one request over and its answer back, with its fault; whether the connection may
        serve another."""
        fault = seen.fault
        while isinstance(fault, Delay):
            if self._closing.wait(fault.seconds):
                return False
            fault = fault.then
        if isinstance(fault, ResetBefore):
            return client.reset()
        if head.headers.get("expect", "").lower() == "100-continue":
            client.socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = body_of(client.reader, head)
        if isinstance(fault, Answer):
            _drain(body)
            client.socket.sendall(error_answer(fault, seen.request))
            return True
        start = f"{seen.request.method} {seen.request.target} HTTP/1.1"
        server.socket.sendall(head.encode(start, without=_HOP_BY_HOP))
        for piece in flipped(
            body, fault if isinstance(fault, Flip) and fault.where == "request" else None
        ):
            server.socket.sendall(piece)
        return _bring_back(seen.request, fault, client, server)


def _bring_back(request: Request, fault: Fault | None, client: _Side, server: _Side) -> bool:
    answer = read_head(server.reader)
    while answer is not None and answer.status == 100:
        answer = read_head(server.reader)
    if answer is None:
        raise BrokenError
    empty = request.method == "HEAD" or answer.status in _NO_BODY_STATUSES
    body = iter(()) if empty else body_of(server.reader, answer, to_end=True)
    if isinstance(fault, ResetAfter):
        _drain(body)
        return client.reset()
    client.socket.sendall(answer.encode(answer.start))
    keep_bytes = fault.keep_bytes if isinstance(fault, Truncate) else None
    flip = fault if isinstance(fault, Flip) and fault.where == "response" else None
    for piece in cut(flipped(body, flip), keep_bytes):
        client.socket.sendall(piece)
    ends = keep_bytes is not None or answer.headers.get("connection", "").lower() == "close"
    return not ends and not lasts_to_end(answer)


def _drain(body: Pieces) -> None:
    for _ in body:
        pass


@dataclass(frozen=True, slots=True)
class _Side:
    """One of the two connections."""

    socket: socket.socket
    reader: BinaryIO

    def reset(self) -> bool:
        """Let closing send RST. Returns that the connection serves no other request."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        return False
