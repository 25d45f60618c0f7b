"""The endpoint of a peer: its address, and whether plaintext is allowed there. Pure."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckpt.errors import UsageError

if TYPE_CHECKING:
    import ssl

PORT_MAX = 65_535


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address, with TLS if ``tls`` is given, else in the clear.

    Raises UsageError for an address other than loopback with neither ``tls`` nor ``plaintext``.
    """

    host: str = "127.0.0.1"
    port: int = 0
    tls: ssl.SSLContext | None = None
    plaintext: bool = False

    def __post_init__(self) -> None:
        if self.tls is None and not self.plaintext and not is_loopback(self.host):
            raise UsageError(
                "this address is not loopback, and others on the network could read. "
                f"host={self.host}; give a TLS context, or plaintext=True if the network is yours "
                "alone"
            )

    @classmethod
    def parse(
        cls, text: str, *, tls: ssl.SSLContext | None = None, plaintext: bool = False
    ) -> Endpoint:
        """The endpoint at ``host:port``, or ``[host]:port`` for IPv6. Raises UsageError."""
        host, colon, port = text.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            host = ""
        if (
            not colon
            or not host
            or not port.isascii()
            or not port.isdecimal()
            or int(port) > PORT_MAX
        ):
            raise UsageError(
                f"not an address. address={text!r}; write host:port, or [host]:port for IPv6"
            )
        return cls(host, int(port), tls, plaintext)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine alone. A name other than ``localhost`` counts as no: it may
    point anywhere."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
