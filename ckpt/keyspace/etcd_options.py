"""Where etcd is and how it is spoken to; known without the packages that speak to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ckpt.errors import UsageError

PORT = 2379


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdOptions:
    """Where etcd is and how it is spoken to. ``endpoints``: ``host:port`` each; files are paths of PEM files.

    With ``ca`` all calls go over TLS; ``cert`` and ``key`` are this client's own. ``call_s``: how long one endpoint may take.
    """

    endpoints: tuple[str, ...]
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    call_s: float = 0.8

    def __post_init__(self) -> None:
        if not self.endpoints:
            raise UsageError("etcd needs an endpoint. endpoints=() name host:port")
        if (self.cert is None) != (self.key is None) or (self.cert is not None and self.ca is None):
            raise UsageError(
                "a client certificate needs its key, and the authority's certificate. name ca, cert and key"
            )
        if (self.user is None) != (self.password is None):
            raise UsageError("a user needs a password. name both or none")
        for endpoint in self.endpoints:
            split_endpoint(endpoint)


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Host and port of ``host:port``, ``[v6]:port`` or ``host``. Raises UsageError."""
    host, colon, port = endpoint.rpartition(":")
    if not colon or endpoint.endswith("]"):
        host, port = endpoint, str(PORT)
    if not host or "/" in host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"not an etcd endpoint. endpoint={endpoint!r} name host:port")
    return host, int(port)
