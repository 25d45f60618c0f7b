"""The protocol of one connection between two keepers: bytes in, messages out, and back. Pure.

Both ends first send a greeting: the sender's node, its job, and a fresh nonce. The keys of both
directions are derived from the job's secret and both nonces. Every frame after the greetings has a
MAC over its number and its body. So a stranger can't send a message, no frame can be repeated,
dropped or reordered, and a recorded connection can't be replayed. The first frame of each end is a
``NodeProof``; the connection is ``up`` once the other end's has been verified.

    greeting   4 bytes length, msgpack ``Greeting``
    frame      4 bytes length of the body, body, 16 bytes MAC

Lengths are little-endian.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Iterator

import msgspec

from ckpt.cluster.mesh.messages import AnyMeshMessage, MeshMessage, NodeProof
from ckpt.errors import FormatVersionError, StoreDeniedError, UsageError
from ckpt.format.canonical import prepare_decoders

PROTOCOL_VERSION = 3
NONCE_BYTES = 16
MAC_BYTES = 16
GREETING_BYTES_MAX = 2048
"""Limit of a greeting and of the proof: with both, a stranger costs twice this."""
FRAME_BYTES_MAX = 64 << 20
TLS_RECORD_STARTS = (b"\x16\x03", b"\x15\x03")
"""First bytes of a TLS handshake and of an alert. Read as a length prefix they exceed any greeting.
"""

_LENGTH = struct.Struct("<I")
_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[MeshMessage] = msgspec.msgpack.Decoder(AnyMeshMessage)


class Greeting(msgspec.Struct, frozen=True):
    """First on a connection, in the clear. ``to``: the node that the dialler means to reach; ""
    from the listener."""

    version: int
    job: str
    node: str
    nonce: bytes
    to: str = ""


_GREETING = msgspec.msgpack.Decoder(Greeting)
prepare_decoders(Greeting)


def connection_keys(
    secret: bytes, *, job: str, dialler: bytes, listener: bytes
) -> tuple[bytes, bytes]:
    """The keys of one connection: of the dialler's frames, and of the listener's.

    ``dialler`` and ``listener`` are the nonces of the two ends, so no two connections share a key.
    HKDF (RFC 5869) with SHA-256.
    """
    root = hmac.digest(dialler + listener, secret, hashlib.sha256)
    info = b"ckpt line 1\0" + job.encode()
    to_listener = hmac.digest(root, info + b"\0to listener\1", hashlib.sha256)
    to_dialler = hmac.digest(root, info + b"\0to dialler\1", hashlib.sha256)
    return to_listener, to_dialler


def frame_mac(key: bytes, number: int, body: bytes | memoryview) -> bytes:
    """The MAC of the frame ``number`` (from 0) of one direction: 128 bits of HMAC-SHA256."""
    digest = hmac.new(key, number.to_bytes(8, "little"), hashlib.sha256)
    digest.update(body)
    return digest.digest()[:MAC_BYTES]


class MessageEncoder:
    """Encodes messages. It keeps the last one, so that a message to all nodes is encoded once.

    For the connections of one thread.
    """

    def __init__(self) -> None:
        self._last: tuple[MeshMessage, bytes] | None = None

    def __call__(self, message: MeshMessage) -> bytes:
        """The encoded body. Raises UsageError for a message that is too long."""
        if self._last is not None and self._last[0] is message:
            return self._last[1]
        body = _ENCODER.encode(message)
        if len(body) > FRAME_BYTES_MAX:
            raise UsageError(
                f"a message is too long. type={type(message).__name__} size_bytes={len(body)}"
            )
        self._last = (message, body)
        return body


class MeshProtocol:
    """One end of a connection. ``peer`` is the node at the other end, proven once ``up``.

    Its attributes are the state of the handshake and of both directions; none of them is shared.
    """

    def __init__(
        self,
        secret: bytes,
        *,
        job: str,
        node: str,
        nonce: bytes,
        dials: str | None = None,
        encode: MessageEncoder | None = None,
    ) -> None:
        """``dials``: the node that is dialled; None at the listener's end.

        ``nonce``: NONCE_BYTES that were never used before.
        """
        assert len(nonce) == NONCE_BYTES, "a fresh nonce"
        self._secret = secret
        self._job = job
        self._node = node
        self._nonce = nonce
        self._dials = dials
        self._encode = encode or MessageEncoder()
        self._in = bytearray()
        self._out: list[bytes] = []
        # Both keys are set together; an empty one means that no greeting has arrived yet.
        self._send_key = self._receive_key = b""
        self._sent = self._received = 0
        self.peer = dials or ""
        self.up = False
        if dials is not None:
            self._greet(dials)

    def data_to_send(self) -> bytes:
        """The bytes to send now; returned once."""
        data = b"".join(self._out)
        self._out.clear()
        return data

    def send(self, message: MeshMessage) -> None:
        """Queue a message. Only if ``up``. Raises UsageError for a message that is too long."""
        assert self.up, "no message is sent before both ends are proven"
        self._send_frame(message)

    def receive_data(self, data: bytes | memoryview) -> list[MeshMessage]:
        """The messages completed by ``data``.

        Raises StoreDeniedError for a stranger, FormatVersionError for another release. After an
        error the connection can't be used. Keeps at most one frame in memory; before the other end
        is proven, one greeting.
        """
        self._in += data
        messages: list[MeshMessage] = []
        for body in self._bodies():
            if not self._receive_key:
                self._receive_greeting(body)
                continue
            message = self._decode(body)
            if not self.up:
                if not isinstance(message, NodeProof) or message.node != self.peer:
                    raise StoreDeniedError(f"a node without a proof. node={self.peer!r}")
                self.up = True
                continue
            messages.append(message)
        return messages

    def _bodies(self) -> Iterator[bytes]:
        """The bodies that are complete and, after the greeting, authentic.

        A generator: what the caller does with one body, such as to derive the keys from a greeting,
        decides how the next one is read.
        """
        while len(self._in) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._in)
            has_keys = bool(self._receive_key)
            # A stranger can't make this end keep more than a greeting.
            limit = FRAME_BYTES_MAX if self.up else GREETING_BYTES_MAX
            if not has_keys and self._in.startswith(TLS_RECORD_STARTS):
                raise StoreDeniedError(
                    "the other end speaks TLS, and this node has no certificate; give all nodes "
                    "one or none"
                )
            if length > limit:
                raise StoreDeniedError(
                    f"not a connection of this job's nodes. length={length} limit_bytes={limit}"
                )
            stop = _LENGTH.size + length + (MAC_BYTES if has_keys else 0)
            if len(self._in) < stop:
                return  # the rest has yet to arrive
            body = bytes(self._in[_LENGTH.size : _LENGTH.size + length])
            if has_keys:
                # Before the body is decoded: no stranger's bytes reach a decoder.
                mac = bytes(self._in[_LENGTH.size + length : stop])
                expected = frame_mac(self._receive_key, self._received, body)
                if not hmac.compare_digest(mac, expected):
                    raise StoreDeniedError(
                        f"message authentication failed. node={self.peer!r}; this node has another "
                        "secret: give all nodes of the job the same file"
                    )
                self._received += 1
            del self._in[:stop]
            yield body

    def _receive_greeting(self, body: bytes) -> None:
        try:
            greeting = _GREETING.decode(body)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise StoreDeniedError(
                f"not a connection of this job's nodes. reason={error}"
            ) from error
        if greeting.version != PROTOCOL_VERSION:
            if self._dials is None:
                self._greet(
                    ""
                )  # sent before this end hangs up, so that the other one learns it too
            raise FormatVersionError(
                f"a node runs another release of torch-ckpt. node={greeting.node!r} "
                f"theirs={greeting.version} ours={PROTOCOL_VERSION}; "
                "run the same one on all nodes"
            )
        # The listener checks that it is the node meant, the dialler that it has reached that node.
        # An address may belong to a later join of the same machine by now.
        meant = greeting.to if self._dials is None else greeting.node
        expected = self._node if self._dials is None else self._dials
        if greeting.job != self._job or meant != expected or len(greeting.nonce) != NONCE_BYTES:
            raise StoreDeniedError(
                f"peer identity mismatch. job={greeting.job!r} node={greeting.node!r} "
                f"meant={meant!r} expected={expected!r}"
            )
        self.peer = greeting.node
        if self._dials is None:
            self._greet("")
            keys = connection_keys(
                self._secret, job=self._job, dialler=greeting.nonce, listener=self._nonce
            )
            self._receive_key, self._send_key = keys
        else:
            keys = connection_keys(
                self._secret, job=self._job, dialler=self._nonce, listener=greeting.nonce
            )
            self._send_key, self._receive_key = keys
        self._send_frame(NodeProof(node=self._node))

    def _decode(self, body: bytes) -> MeshMessage:
        try:
            return _DECODER.decode(body)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise FormatVersionError(
                f"a message that this release does not know. node={self.peer!r} reason={error}; "
                "run the same one on all nodes"
            ) from error

    def _greet(self, to: str) -> None:
        body = _ENCODER.encode(Greeting(PROTOCOL_VERSION, self._job, self._node, self._nonce, to))
        self._out.append(_LENGTH.pack(len(body)) + body)

    def _send_frame(self, message: MeshMessage) -> None:
        body = self._encode(message)
        mac = frame_mac(self._send_key, self._sent, body)
        self._out.append(_LENGTH.pack(len(body)) + body + mac)
        self._sent += 1
