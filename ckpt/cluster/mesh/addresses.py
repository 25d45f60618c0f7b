"""Where names are: asked in threads, so that a name server that does not answer holds up no
line."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass

# Addresses of lines, and what becomes of calls to them.

DIAL_TIMEOUT_S = 2.0
"""How long a call may take."""


def probe(address: str, timeout_s: float = DIAL_TIMEOUT_S) -> str:
    """Whether somebody listens there: "" where a connection can be made, else why not (``refused:
    ...`` where nobody does)."""
    host, port = split_address(address)
    try:
        with socket.create_connection((host, int(port)), timeout=timeout_s):
            return ""
    except (OSError, ValueError) as error:
        return socket_error_reason(error)


def socket_error_reason(error: OSError | ValueError) -> str:
    """An error of a socket in words; ``refused: ...`` where the machine answers and nobody listens
    there."""
    if isinstance(error, ConnectionRefusedError) or getattr(error, "errno", None) == 111:
        return f"refused: {error}"
    return f"{type(error).__name__}: {error}"


def split_address(address: str) -> tuple[str, str]:
    """Host and port of ``host:port`` or ``[host]:port``."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), port


def address_family(host: str) -> socket.AddressFamily:
    """Of an address; names are taken for IPv4's."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def disable_nagle(sock: socket.socket) -> None:
    """Send small words at once."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def peer_name(sock: socket.socket) -> str:
    """Who is at the other end, for people."""
    try:
        return ":".join(map(str, sock.getpeername()[:2]))
    except OSError:
        return "somebody who is gone"


@dataclass(frozen=True, slots=True)
class SocketAddress:
    """What a socket connects to."""

    family: socket.AddressFamily
    sockaddr: tuple[str, int]


ResolveName = Callable[[str, int], SocketAddress]


def resolve_name(host: str, port: int) -> SocketAddress:
    """Where a name is: IPv4, where nodes with names listen. Waits for name servers. Raises
    OSError."""
    wanted = address_family(host)
    _, _, _, _, at = socket.getaddrinfo(host, port, family=wanted, type=socket.SOCK_STREAM)[0]
    return SocketAddress(wanted, (str(at[0]), int(at[1])))


class NameResolver:
    """Of ``host:port`` addresses, as long as they are wanted. ``found`` is called, in a thread,
    when an answer has come.

    What was found is kept until it is forgotten: a node whose processes have died is called where
    it was, not where its name leads by now. Thread-safe.
    """

    def __init__(
        self, on_resolved: Callable[[], object], resolve: ResolveName = resolve_name
    ) -> None:
        self._found = on_resolved
        self._ask = resolve
        self._lock = threading.Lock()
        self._known: dict[
            str, SocketAddress | OSError | ValueError | None
        ] = {}  # None: it is asked for

    def keep_only(self, addresses: Collection[str]) -> None:
        """Only these matter from here on, and where they are is asked already."""
        with self._lock:
            self._known = {
                address: known for address, known in self._known.items() if address in addresses
            }
        for address in addresses:
            with contextlib.suppress(OSError, ValueError):  # told to whoever dials there
                self._look(address)

    def resolve(self, address: str) -> SocketAddress | None:
        """Where it is; None while that is asked. Raises what it could not be found for, once: then
        it is asked again.

        OSError, or ValueError for what is no address.
        """
        found = self._look(address)
        if isinstance(found, OSError | ValueError):
            self.forget(address)
            raise found
        return found

    def forget(self, address: str) -> None:
        """Ask again next time."""
        with self._lock:
            if self._known.get(address) is not None:
                del self._known[address]

    def _look(self, address: str) -> SocketAddress | OSError | ValueError | None:
        host, port = split_address(address)
        if (literal := _literal(host, int(port))) is not None:
            return literal
        with self._lock:
            if address in self._known:
                return self._known[address]
            self._known[address] = None
        thread = threading.Thread(
            target=self._resolve, args=(address, host, int(port)), name="ckpt-name", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:  # the system gives no thread now
            self._note(address, OSError(f"no thread to ask in: {error}"))
        return None

    def _resolve(self, address: str, host: str, port: int) -> None:
        try:
            self._note(address, self._ask(host, port))
        except (
            OSError,
            ValueError,
        ) as error:  # UnicodeError, for what can be no name, is a ValueError
            self._note(address, error)

    def _note(self, address: str, found: SocketAddress | OSError | ValueError) -> None:
        with self._lock:
            if address in self._known:  # nobody wants it any more otherwise
                self._known[address] = found
        self._found()


def _literal(host: str, port: int) -> SocketAddress | None:
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        return None
    return SocketAddress(socket.AF_INET6 if version == 6 else socket.AF_INET, (host, port))
