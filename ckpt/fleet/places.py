"""Where names are: asked in threads, so that a name server that does not answer holds up no line."""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

from ckpt.fleet.sockets import split


@dataclass(frozen=True, slots=True)
class Place:
    """What a socket connects to."""

    family: socket.AddressFamily
    at: tuple[str, int]


Ask = Callable[[str, int], Place]


def asked(host: str, port: int) -> Place:
    """The first place of a name, as this machine resolves it. Waits for name servers. Raises OSError."""
    family, _, _, _, at = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return Place(socket.AddressFamily(family), (str(at[0]), int(at[1])))


class Places:
    """Of ``host:port`` addresses. ``found`` is called, in a thread, when an answer has come. For one thread besides.

    What was found is kept until it is forgotten: a node whose processes have died is called where it was, not where its name
    leads by now.
    """

    def __init__(self, found: Callable[[], object], ask: Ask = asked) -> None:
        self._found = found
        self._ask = ask
        self._lock = threading.Lock()
        self._known: dict[str, Place | OSError | ValueError | None] = {}  # None: it is asked for

    def of(self, address: str) -> Place | None:
        """Where it is; None while that is asked. Raises what it could not be found for, once: then it is asked again.

        OSError, or ValueError for what is no address.
        """
        host, port = split(address)
        if (literal := _literal(host, int(port))) is not None:
            return literal
        with self._lock:
            known = self._known.get(address)
            if isinstance(known, OSError | ValueError):
                del self._known[address]
                raise known
            if known is not None or address in self._known:
                return known
            self._known[address] = None
        threading.Thread(target=self._resolve, args=(address, host, int(port)), name="ckpt-name", daemon=True).start()
        return None

    def forget(self, address: str) -> None:
        """Ask again next time."""
        with self._lock:
            if self._known.get(address) is not None:
                del self._known[address]

    def _resolve(self, address: str, host: str, port: int) -> None:
        found: Place | OSError | ValueError
        try:
            found = self._ask(host, port)
        except (OSError, ValueError) as error:  # UnicodeError for what can be no name is a ValueError
            found = error
        with self._lock:
            self._known[address] = found
        self._found()


def _literal(host: str, port: int) -> Place | None:
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        return None
    return Place(socket.AF_INET6 if version == 6 else socket.AF_INET, (host, port))
