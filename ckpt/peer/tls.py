"""TLS contexts for both sides: a CA of the job's own, and a certificate for each node."""

from __future__ import annotations

import os
import ssl

from ckpt.errors import UsageError

Path = str | os.PathLike[str]


def server_context(*, certificate: Path, key: Path, ca: Path) -> ssl.SSLContext:
    """For a server: shows ``certificate``, and asks clients for one that ``ca`` signed. Raises UsageError for bad files."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0  # nobody resumes, and an idle connection stays silent
    return _filled(context, certificate, key, ca)


def client_context(*, certificate: Path, key: Path, ca: Path) -> ssl.SSLContext:
    """For a client: trusts ``ca`` alone, and the server's certificate must name the host it is reached by."""
    return _filled(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), certificate, key, ca)


def _filled(context: ssl.SSLContext, certificate: Path, key: Path, ca: Path) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(certificate, key)
        context.load_verify_locations(cafile=os.fspath(ca))
    except OSError as error:  # ssl.SSLError among them
        raise UsageError(
            f"TLS files can't be used. certificate={certificate} key={key} ca={ca} cause={error}; check paths, and that "
            "the key belongs to the certificate"
        ) from error
    return context
