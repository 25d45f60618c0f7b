"""TLS contexts for both sides: a CA of the job's own, and a certificate for each node."""

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
    """For a server: shows ``certificate``, and asks clients for one that ``ca`` signed. Raises
    UsageError for bad files."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0  # nobody resumes, and an idle connection stays silent
    return _filled(context, certificate, key, ca)


def client_context(*, certificate: Path, key: Path, ca: Path) -> ssl.SSLContext:
    """For a client: trusts ``ca`` alone, and the server's certificate must name the host it is
    reached by."""
    return _filled(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), certificate, key, ca)


def check_handshake(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> float:
    """A handshake of a node with itself, in memory, as another node of its CA would have with it at
    ``host``.

    Returns until when its certificate is valid, in seconds of the Unix epoch. Raises UsageError
    where that node would refuse it, or be refused with one like it: it has expired, another CA
    signed it, it names another host, or may not be used on that side.
    """
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        asking = client.wrap_bio(to_client, to_server, server_hostname=host)
        asked = server.wrap_bio(to_server, to_client, server_side=True)
        for _ in range(FLIGHTS_MAX):
            done = [_went_on(asking.do_handshake), _went_on(asked.do_handshake)]
            if all(done):
                return _ends_s(asking)
    except (ssl.SSLError, ValueError) as error:  # ValueError: a host that no certificate can name
        why = (
            error.verify_message if isinstance(error, ssl.SSLCertVerificationError) else str(error)
        )
        raise UsageError(
            f"others would refuse this node's certificate: {why}. host={host}; it must be valid "
            "now, signed by the CA that is "
            "given, and name this host (subjectAltName), for server and client"
        ) from error
    raise UsageError(f"no TLS handshake with this node comes to an end. host={host}")


def _went_on(handshake: Callable[[], None]) -> bool:
    try:
        handshake()
    except ssl.SSLWantReadError:
        return False
    return True


def _ends_s(asking: ssl.SSLObject) -> float:
    shown = (asking.getpeercert() or {}).get("notAfter")
    assert isinstance(shown, str), "a certificate that was verified"
    return float(ssl.cert_time_to_seconds(shown))


def _filled(context: ssl.SSLContext, certificate: Path, key: Path, ca: Path) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    for what, path in (("certificate", certificate), ("key", key), ("CA", ca)):
        _check_readable(what, path)  # OpenSSL would not say which one it is
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
        context.load_verify_locations(cafile=os.fspath(ca))
    except OSError as error:  # ssl.SSLError among them
        raise UsageError(
            f"TLS files can't be used. certificate={certificate} key={key} ca={ca} cause={error}; "
            "they are PEM, and the key "
            "belongs to the certificate"
        ) from error
    return context


def _check_readable(what: str, path: Path) -> None:
    try:
        with open(path, "rb") as file:  # noqa: PTH123  a path of any kind
            file.read(1)
    except OSError as error:
        raise UsageError(
            f"TLS files can't be used: the {what} can't be read. path={path} why={error.strerror}"
        ) from error


def _no_password() -> str:
    """A daemon can't ask for one, as OpenSSL would on the terminal."""
    raise UsageError(
        "TLS files can't be used: the key is encrypted; give one without a password that only you "
        "can read"
    )


# TLS between the nodes of a job, where their launcher names certificates; and when there may be
# none. Reads files.


@dataclass(frozen=True, slots=True)
class TlsContexts:
    """What this node shows and believes: ``server`` to who calls it, ``client`` to whom it
    calls."""

    server: ssl.SSLContext
    client: ssl.SSLContext


def job_tls(nodes: NodesSpec) -> TlsContexts | None:
    """The contexts that a launcher's files make; None where it names none. Raises UsageError for
    files that don't do."""
    if not (nodes.tls_cert or nodes.tls_key or nodes.tls_ca):
        return None
    if not (nodes.tls_cert and nodes.tls_key and nodes.tls_ca):
        raise UsageError(
            "TLS between nodes takes three files: this node's certificate, its key, and the CA of "
            "all. "
            f"tls_cert={nodes.tls_cert!r} tls_key={nodes.tls_key!r} tls_ca={nodes.tls_ca!r}"
        )
    files = {"certificate": nodes.tls_cert, "key": nodes.tls_key, "ca": nodes.tls_ca}
    return TlsContexts(server_context(**files), client_context(**files))


def check_tls(nodes: NodesSpec, host: str) -> float | None:
    """Look, before anything starts, whether others could speak with this node at ``host``.

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
    """Raises UsageError where ``host`` is reached over a network, and what is lent there would be
    read on the way."""
    if not (nodes.plaintext or nodes.tls_cert or is_loopback(host)):
        raise UsageError(
            "nodes lend each other their memory, and whoever is on the way could read the "
            f"weights. host={host}; give this "
            "node a certificate (--tls-cert, --tls-key, --tls-ca), or say --plaintext where the "
            "network is yours alone"
        )


def serving_endpoint(nodes: NodesSpec, host: str) -> Endpoint:
    """Where this node lends its memory: at a free port of ``host``. Raises UsageError."""
    tls = job_tls(nodes)
    return Endpoint(host, 0, None if tls is None else tls.server, nodes.plaintext)


def peer_endpoint(nodes: NodesSpec, address: str) -> Endpoint:
    """The node that lends its memory at ``address``, as this one speaks to it. Raises
    UsageError."""
    tls = job_tls(nodes)
    return Endpoint.parse(
        address, tls=None if tls is None else tls.client, plaintext=nodes.plaintext
    )
