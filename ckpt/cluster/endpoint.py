"""Where a peer is, and whether it may be spoken to in the clear. Pure."""

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
    """An address, and how it is spoken to: over TLS with ``tls``, else in the clear.

    Raises UsageError for an address beyond loopback with neither ``tls`` nor ``plaintext``.
    """

    host: str = "127.0.0.1"
    port: int = 0
    tls: ssl.SSLContext | None = None
    plaintext: bool = False

    def __post_init__(self) -> None:
        if self.tls is None and not self.plaintext and not is_loopback(self.host):
            raise UsageError(
                "this address is not loopback, and anybody on the way could read. "
                f"host={self.host}; give a TLS context, or "
                "plaintext=True where the network is yours alone"
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
    """Whether nobody outside this machine is reached; a name other than ``localhost`` may mean
    anybody."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
