"""TLS between the nodes of a job, where their launcher names certificates; and when there may be none. Reads files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckpt.cluster.endpoint import Endpoint, is_loopback
from ckpt.cluster.tls import client_context, rehearse, server_context
from ckpt.errors import UsageError
from ckpt.ipc.cluster_spec import NodesSpec

if TYPE_CHECKING:
    import ssl


@dataclass(frozen=True, slots=True)
class Tls:
    """What this node shows and believes: ``server`` to who calls it, ``client`` to whom it calls."""

    server: ssl.SSLContext
    client: ssl.SSLContext


def tls_of(nodes: NodesSpec) -> Tls | None:
    """The contexts that a launcher's files make; None where it names none. Raises UsageError for files that don't do."""
    if not (nodes.tls_cert or nodes.tls_key or nodes.tls_ca):
        return None
    if not (nodes.tls_cert and nodes.tls_key and nodes.tls_ca):
        raise UsageError(
            "TLS between nodes takes three files: this node's certificate, its key, and the CA of all. "
            f"tls_cert={nodes.tls_cert!r} tls_key={nodes.tls_key!r} tls_ca={nodes.tls_ca!r}"
        )
    files = {"certificate": nodes.tls_cert, "key": nodes.tls_key, "ca": nodes.tls_ca}
    return Tls(server_context(**files), client_context(**files))


def check_tls(nodes: NodesSpec, host: str) -> float | None:
    """Look, before anything starts, whether others could speak with this node at ``host``.

    Returns until when its certificate is valid, in seconds of the Unix epoch; None without TLS. Raises UsageError.
    """
    tls = tls_of(nodes)
    if tls is None:
        return None
    if nodes.plaintext:
        raise UsageError("TLS files and plaintext exclude each other. give one of them")
    return rehearse(tls.server, tls.client, host)


def check_path(nodes: NodesSpec, host: str) -> None:
    """Raises UsageError where ``host`` is reached over a network, and what is lent there would be read on the way."""
    if not (nodes.plaintext or nodes.tls_cert or is_loopback(host)):
        raise UsageError(
            f"nodes lend each other their memory, and whoever is on the way could read the weights. host={host}; give this "
            "node a certificate (--tls-cert, --tls-key, --tls-ca), or say --plaintext where the network is yours alone"
        )


def lending_at(nodes: NodesSpec, host: str) -> Endpoint:
    """Where this node lends its memory: at a free port of ``host``. Raises UsageError."""
    tls = tls_of(nodes)
    return Endpoint(host, 0, None if tls is None else tls.server, nodes.plaintext)


def lender_at(nodes: NodesSpec, address: str) -> Endpoint:
    """The node that lends its memory at ``address``, as this one speaks to it. Raises UsageError."""
    tls = tls_of(nodes)
    return Endpoint.parse(address, tls=None if tls is None else tls.client, plaintext=nodes.plaintext)
