"""Addresses of lines, and what becomes of calls to them."""

from __future__ import annotations

import socket

DIAL_S = 2.0
"""How long a call may take."""


def probe(address: str, timeout_s: float = DIAL_S) -> str:
    """Whether somebody listens there: "" where a connection can be made, else why not (``refused: ...`` where nobody does)."""
    host, port = split(address)
    try:
        with socket.create_connection((host, int(port)), timeout=timeout_s):
            return ""
    except (OSError, ValueError) as error:
        return why_of(error)


def why_of(error: OSError | ValueError) -> str:
    """An error of a socket in words; ``refused: ...`` where the machine answers and nobody listens there."""
    if isinstance(error, ConnectionRefusedError) or getattr(error, "errno", None) == 111:
        return f"refused: {error}"
    return f"{type(error).__name__}: {error}"


def split(address: str) -> tuple[str, str]:
    """Host and port of ``host:port`` or ``[host]:port``."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), port


def family(host: str) -> socket.AddressFamily:
    """Of an address; names are taken for IPv4's."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def quick(sock: socket.socket) -> None:
    """Send small words at once."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def name_of(sock: socket.socket) -> str:
    """Who is at the other end, for people."""
    try:
        return ":".join(map(str, sock.getpeername()[:2]))
    except OSError:
        return "somebody who is gone"
