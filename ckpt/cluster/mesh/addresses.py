"""Addresses of nodes: parsing, socket helpers, and a name resolver that never blocks.

Names are resolved in threads: a name server that does not answer delays no connection.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass

DIAL_TIMEOUT_S = 2.0
"""How long connecting may take."""


def socket_error_reason(error: OSError | ValueError) -> str:
    """The error as text: ``refused: ...`` if the machine answers, but no process listens there.

    The prefix decides: a refused connection becomes a suspicion that the node is dead.
    """
    code = getattr(error, "errno", None)
    if isinstance(error, ConnectionRefusedError) or code == errno.ECONNREFUSED:
        return f"refused: {error}"
    return f"{type(error).__name__}: {error}"


def split_address(address: str) -> tuple[str, str]:
    """Host and port of ``host:port`` or ``[host]:port``."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), port


def address_family(host: str) -> socket.AddressFamily:
    """The family of an IP address; of a name, IPv4: nodes with names listen there."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def disable_nagle(sock: socket.socket) -> None:
    """Send small messages at once, not after the last one was acknowledged."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def peer_name(sock: socket.socket) -> str:
    """The other end's address as text for messages."""
    try:
        return ":".join(map(str, sock.getpeername()[:2]))
    except OSError:
        return "a closed connection"


@dataclass(frozen=True, slots=True)
class SocketAddress:
    """An address that a socket connects to."""

    family: socket.AddressFamily
    sockaddr: tuple[str, int]


ResolveName = Callable[[str, int], SocketAddress]


def resolve_name(host: str, port: int) -> SocketAddress:
    """The IPv4 address of a name. Waits for name servers. Raises OSError."""
    family = address_family(host)
    entries = socket.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
    _, _, _, _, sockaddr = entries[0]
    return SocketAddress(family, (str(sockaddr[0]), int(sockaddr[1])))


class NameResolver:
    """Resolves ``host:port`` addresses in threads, and keeps the results. Thread-safe.

    ``on_resolved`` is called, in such a thread, when a result has arrived. A result is kept until
    it is forgotten: a node whose processes have died is dialled where it was, not where its name
    points by now. So *refused* is said of the machine that it ran on.
    """

    def __init__(
        self, on_resolved: Callable[[], object], resolve: ResolveName = resolve_name
    ) -> None:
        self._on_resolved = on_resolved
        self._resolve_name = resolve
        self._lock = threading.Lock()
        self._results: dict[str, SocketAddress | OSError | ValueError | None] = {}
        """None: being resolved."""

    def keep_only(self, addresses: Collection[str]) -> None:
        """Forget all other addresses, and begin to resolve these."""
        with self._lock:
            self._results = {
                address: result for address, result in self._results.items() if address in addresses
            }
        for address in addresses:
            with contextlib.suppress(OSError, ValueError):  # ``resolve`` raises it
                self._look_up(address)

    def resolve(self, address: str) -> SocketAddress | None:
        """The result for ``address``; None while it is being resolved.

        Raises the OSError of a failed resolution once, and resolves again at the next call;
        ValueError for an invalid address.
        """
        result = self._look_up(address)
        if isinstance(result, OSError | ValueError):
            self.forget(address)
            raise result
        return result

    def forget(self, address: str) -> None:
        """Resolve again at the next call, unless it is being resolved now."""
        with self._lock:
            if self._results.get(address) is not None:
                del self._results[address]

    def _look_up(self, address: str) -> SocketAddress | OSError | ValueError | None:
        host, port = split_address(address)
        if (literal := _literal(host, int(port))) is not None:
            return literal
        with self._lock:
            if address in self._results:
                return self._results[address]
            self._results[address] = None
        thread = threading.Thread(
            target=self._resolve, args=(address, host, int(port)), name="ckpt-name", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:  # the system has no more threads
            self._store(address, OSError(f"no thread to resolve in: {error}"))
        return None

    def _resolve(self, address: str, host: str, port: int) -> None:
        try:
            self._store(address, self._resolve_name(host, port))
        except (
            OSError,
            ValueError,
        ) as error:  # a UnicodeError, of an invalid name, is a ValueError
            self._store(address, error)

    def _store(self, address: str, result: SocketAddress | OSError | ValueError) -> None:
        with self._lock:
            if address in self._results:  # else it was dropped by ``keep_only`` meanwhile
                self._results[address] = result
        self._on_resolved()


def _literal(host: str, port: int) -> SocketAddress | None:
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        return None
    return SocketAddress(socket.AF_INET6 if version == 6 else socket.AF_INET, (host, port))
