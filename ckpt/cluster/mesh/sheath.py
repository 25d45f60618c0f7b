"""TLS around one cable, without its socket: bytes of the network in, bytes of the cable out, and back. Pure but for OpenSSL.

A line is one of many in one thread that never waits, so the handshake goes on as bytes come. What the cable says meanwhile is
kept until it is over. Memory: what OpenSSL keeps of a handshake or a record, some 100 KiB, and what one read gave.
"""

from __future__ import annotations

import ssl

from ckpt.cluster.fleet_tls import Tls
from ckpt.errors import StoreDeniedError

TLS_READ_BYTES = 64 << 10


class Sheath:
    """One end. ``calls``: the host that is called, None at the end that was called."""

    def __init__(self, tls: Tls, *, calls: str | None) -> None:
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        if calls is None:
            self._tls = tls.server.wrap_bio(self._in, self._out, server_side=True)
        else:
            self._tls = tls.client.wrap_bio(self._in, self._out, server_hostname=calls)
        self._kept = bytearray()
        """What the cable said, and TLS has not taken."""
        self._met = False

    def received(self, data: bytes) -> bytes:
        """What the other end's cable said, of what came.

        Raises StoreDeniedError for one that is not of this job's CA, or not where it says; ``last_words`` then tells it why.
        """
        self._in.write(data)
        said = bytearray()
        try:
            if not self._met:
                self._tls.do_handshake()
                self._met = True
            while piece := self._tls.read(TLS_READ_BYTES):
                said += piece
        except ssl.SSLWantReadError:
            pass  # more has to come
        except ssl.SSLError as error:
            why = (
                error.verify_message if isinstance(error, ssl.SSLCertVerificationError) else error.reason or str(error)
            )
            raise StoreDeniedError(
                f"TLS failed: {why}; compare the certificates, their CA and their hosts; all nodes have some or none"
            ) from error
        return bytes(said)

    def to_send(self, said: bytes) -> bytes:
        """The bytes that are to go out now, once; ``said``: what the cable says now. Raises StoreDeniedError."""
        self._kept += said
        try:
            if not self._met:
                self._tls.do_handshake()
                self._met = True
            while self._kept:
                count = self._tls.write(memoryview(self._kept)[:TLS_READ_BYTES].tobytes())
                del self._kept[:count]
        except ssl.SSLWantReadError:
            pass  # the other end's turn
        except ssl.SSLError as error:
            raise StoreDeniedError(f"TLS failed: {error.reason or error}") from error
        return self._out.read()

    def last_words(self) -> bytes:
        """What tells the other end why it was refused."""
        return self._out.read()
