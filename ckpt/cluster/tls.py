"""TLS between the nodes of a job: contexts from the launcher's files, and when plaintext is
allowed.

The job has a CA of its own, and each node a certificate. All nodes have certificates, or none has.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass

from ckpt.cluster.endpoint import Endpoint, is_loopback
from ckpt.errors import UsageError
from ckpt.ipc.cluster_spec import NodesSpec

Path = str | os.PathLike[str]

FLIGHTS_MAX = 16
"""Flights of one handshake; TLS 1.3 takes three."""


def server_context(*, certificate: Path, key: Path, ca: Path) -> ssl.SSLContext:
    """A context that shows ``certificate``, and demands of clients one that ``ca`` signed.

    Raises UsageError for unusable files.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0  # no session is resumed; and idle connections stay silent
    return _load(context, certificate, key, ca)


def client_context(*, certificate: Path, key: Path, ca: Path) -> ssl.SSLContext:
    """A context that trusts ``ca`` alone; the server's certificate must name the host dialled.

    Raises UsageError for unusable files.
    """
    return _load(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), certificate, key, ca)


def check_handshake(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> float:
    """Make a handshake of this node with itself in memory, as another node would with it at
    ``host``.

    Returns until when its certificate is valid, in seconds of the Unix epoch. Raises UsageError if
    another node would refuse the certificate: it has expired, another CA signed it, it names
    another host, or may not be used on one of the sides.
    """
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        client_side = client.wrap_bio(to_client, to_server, server_hostname=host)
        server_side = server.wrap_bio(to_server, to_client, server_side=True)
        for _ in range(FLIGHTS_MAX):
            done = [_advanced(client_side.do_handshake), _advanced(server_side.do_handshake)]
            if all(done):
                return _valid_until_s(client_side)
    except (ssl.SSLError, ValueError) as error:  # ValueError: a host that no certificate can name
        reason = (
            error.verify_message if isinstance(error, ssl.SSLCertVerificationError) else str(error)
        )
        raise UsageError(
            f"others would refuse this node's certificate: {reason}. host={host}; it must be valid "
            "now, signed by the given CA, and name this host (subjectAltName), for server and "
            "client"
        ) from error
    raise UsageError(f"a TLS handshake with this node does not end. host={host}")


def _advanced(handshake: Callable[[], None]) -> bool:
    try:
        handshake()
    except ssl.SSLWantReadError:
        return False
    return True


def _valid_until_s(client_side: ssl.SSLObject) -> float:
    not_after = (client_side.getpeercert() or {}).get("notAfter")
    assert isinstance(not_after, str), "a certificate that was verified"
    return float(ssl.cert_time_to_seconds(not_after))


def _load(context: ssl.SSLContext, certificate: Path, key: Path, ca: Path) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    for role, path in (("certificate", certificate), ("key", key), ("CA", ca)):
        _check_readable(role, path)  # OpenSSL's error would not name the file
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
        context.load_verify_locations(cafile=os.fspath(ca))
    except OSError as error:  # ssl.SSLError among them
        raise UsageError(
            f"TLS files can't be used. certificate={certificate} key={key} ca={ca} cause={error}; "
            "they are PEM, and the key belongs to the certificate"
        ) from error
    return context


def _check_readable(role: str, path: Path) -> None:
    try:
        with open(path, "rb") as file:  # noqa: PTH123  a path of any kind
            file.read(1)
    except OSError as error:
        raise UsageError(
            f"TLS files can't be used: the {role} can't be read. path={path} "
            f"reason={error.strerror}"
        ) from error


def _no_password() -> str:
    """Refuse an encrypted key: OpenSSL would ask on the terminal, which a daemon has not."""
    raise UsageError(
        "TLS files can't be used: the key is encrypted; give one without a password that only you "
        "can read"
    )


# ---- TLS of one job, as its launcher specifies it


@dataclass(frozen=True, slots=True)
class TlsContexts:
    """This node's contexts: ``server`` for connections it accepts, ``client`` for those it
    makes."""

    server: ssl.SSLContext
    client: ssl.SSLContext


def job_tls(nodes: NodesSpec) -> TlsContexts | None:
    """The contexts made of the launcher's files; None if it names none.

    Raises UsageError for missing or unusable files.
    """
    if not (nodes.tls_cert or nodes.tls_key or nodes.tls_ca):
        return None
    if not (nodes.tls_cert and nodes.tls_key and nodes.tls_ca):
        raise UsageError(
            "TLS between nodes takes three files: this node's certificate, its key, and the CA. "
            f"tls_cert={nodes.tls_cert!r} tls_key={nodes.tls_key!r} tls_ca={nodes.tls_ca!r}"
        )
    files = {"certificate": nodes.tls_cert, "key": nodes.tls_key, "ca": nodes.tls_ca}
    return TlsContexts(server_context(**files), client_context(**files))


def check_tls(nodes: NodesSpec, host: str) -> float | None:
    """Check, before anything starts, that other nodes could connect to this one at ``host``.

    Returns until when its certificate is valid, in seconds of the Unix epoch; None without TLS.
    Raises UsageError.
    """
    tls = job_tls(nodes)
    if tls is None:
        return None
    if nodes.plaintext:
        raise UsageError("TLS files and plaintext exclude each other. give one of them")
    return check_handshake(tls.server, tls.client, host)


def check_network(nodes: NodesSpec, host: str) -> None:
    """Raises UsageError if ``host`` is reached over a network in plaintext that was not allowed."""
    if not (nodes.plaintext or nodes.tls_cert or is_loopback(host)):
        raise UsageError(
            "nodes serve their memory to each other, and others on the network could read the "
            f"weights. host={host}; give this node a certificate (--tls-cert, --tls-key, "
            "--tls-ca), or say --plaintext if the network is yours alone"
        )


def serving_endpoint(nodes: NodesSpec, host: str) -> Endpoint:
    """The endpoint at which this node serves memory: a free port of ``host``. Raises UsageError."""
    tls = job_tls(nodes)
    return Endpoint(host, 0, None if tls is None else tls.server, nodes.plaintext)


def peer_endpoint(nodes: NodesSpec, address: str) -> Endpoint:
    """The endpoint of a peer that serves memory at ``address``. Raises UsageError."""
    tls = job_tls(nodes)
    return Endpoint.parse(
        address, tls=None if tls is None else tls.client, plaintext=nodes.plaintext
    )
