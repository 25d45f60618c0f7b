"""One line between two keepers without its socket: bytes in, words out, words in, bytes out. Pure.

Both ends first send a greeting: who speaks, of which job, and a fresh nonce. The keys of both
directions come from the shared secret and both nonces, and every frame after the greetings carries
its number's authentication; so a stranger can say nothing, nothing can be said twice or left out,
and a recorded line can't be played to anybody else. The first such frame of each end is ``Proof``:
only then is the line up.

    greeting   4 bytes length, msgpack ``Greeting``
    frame      4 bytes length of the body, body, 16 bytes MAC
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Iterator

import msgspec

from ckpt.cluster.mesh.messages import AnyMeshMessage, MeshMessage, NodeProof
from ckpt.cluster.secret import MAC_BYTES, NONCE_BYTES, connection_keys, frame_mac
from ckpt.errors import FormatVersionError, StoreDeniedError, UsageError
from ckpt.format.canonical import prepare_decoders

PROTOCOL_VERSION = 2
GREETING_BYTES_MAX = 2048
"""All that is kept of what somebody says who has not proved yet who it is: twice this."""
FRAME_BYTES_MAX = 64 << 20
TLS_RECORD_STARTS = (b"\x16\x03", b"\x15\x03")
"""How whoever speaks TLS begins, or refuses; a greeting is shorter than these are as a length."""

_LENGTH = struct.Struct("<I")
_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[MeshMessage] = msgspec.msgpack.Decoder(AnyMeshMessage)


class Greeting(msgspec.Struct, frozen=True):
    """First on a line, in the clear. ``to``: the node that the dialler means, "" from the
    listener."""

    version: int
    job: str
    node: str
    nonce: bytes
    to: str = ""


_GREETING = msgspec.msgpack.Decoder(Greeting)
prepare_decoders(Greeting)


class MessageEncoder:
    """Makes the bytes of words. What is said to all is spelled once: the last word is remembered
    with its bytes."""

    def __init__(self) -> None:
        self._last: tuple[MeshMessage, bytes] | None = None

    def __call__(self, word: MeshMessage) -> bytes:
        """Raises UsageError for a word that is too long."""
        if self._last is not None and self._last[0] is word:
            return self._last[1]
        body = _ENCODER.encode(word)
        if len(body) > FRAME_BYTES_MAX:
            raise UsageError(
                f"too long for one word. type={type(word).__name__} size_bytes={len(body)}"
            )
        self._last = (word, body)
        return body


class MeshProtocol:
    """One end of one line. ``peer`` is the other end's node, known for certain once ``up``."""

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
        """``dials``: the node that is called; None at the end that was called. ``nonce``:
        NONCE_BYTES, never used before.

        ``spell``: that of all lines of one thread.
        """
        assert len(nonce) == NONCE_BYTES, "a fresh nonce"
        self._secret = secret
        self._job = job
        self._node = node
        self._nonce = nonce
        self._dials = dials
        self._spell = encode or MessageEncoder()
        self._in = bytearray()
        self._out: list[bytes] = []
        self._send_key = self._receive_key = b""
        self._sent = self._received = 0
        self.peer = dials or ""
        self.up = False
        if dials is not None:
            self._greet(dials)

    def data_to_send(self) -> bytes:
        """The bytes that are to go out now, once."""
        data = b"".join(self._out)
        self._out.clear()
        return data

    def send(self, word: MeshMessage) -> None:
        """Queue a word. Only on a line that is up. Raises UsageError for one that is too long."""
        assert self.up, "nothing is said before both ends are known"
        self._frame(word)

    def receive_data(self, data: bytes | memoryview) -> list[MeshMessage]:
        """The words in what came. Raises StoreDeniedError for a stranger, FormatVersionError for
        another release.

        After an error the line is of no use. Memory: one frame at most, a greeting's before the
        other end is known.
        """
        self._in += data
        words: list[MeshMessage] = []
        for body in self._bodies():
            if not self._receive_key:
                self._met(body)
                continue
            word = self._decoded(body)
            if not self.up:
                if not isinstance(word, NodeProof) or word.node != self.peer:
                    raise StoreDeniedError(
                        f"a node that does not prove who it is. node={self.peer!r}"
                    )
                self.up = True
                continue
            words.append(word)
        return words

    def _bodies(self) -> Iterator[bytes]:
        while len(self._in) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._in)
            known = bool(self._receive_key)
            limit = FRAME_BYTES_MAX if self.up else GREETING_BYTES_MAX
            if not known and self._in.startswith(TLS_RECORD_STARTS):
                raise StoreDeniedError(
                    "the other end speaks TLS, and this node has no certificate; give all nodes "
                    "one or none"
                )
            if length > limit:
                raise StoreDeniedError(
                    f"not a line of this job's nodes. length={length} limit_bytes={limit}"
                )
            stop = _LENGTH.size + length + (MAC_BYTES if known else 0)
            if len(self._in) < stop:
                return
            body = bytes(self._in[_LENGTH.size : _LENGTH.size + length])
            if known:
                told = bytes(self._in[_LENGTH.size + length : stop])
                if not hmac.compare_digest(
                    told, frame_mac(self._receive_key, self._received, body)
                ):
                    raise StoreDeniedError(
                        f"a word that none of this job's nodes said. node={self.peer!r}"
                    )
                self._received += 1
            del self._in[:stop]
            yield body

    def _met(self, body: bytes) -> None:
        try:
            greeting = _GREETING.decode(body)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise StoreDeniedError(f"not a line of this job's nodes. why={error}") from error
        if greeting.version != PROTOCOL_VERSION:
            raise FormatVersionError(
                f"a node runs another release of torch-ckpt. node={greeting.node!r} "
                f"theirs={greeting.version} ours={PROTOCOL_VERSION}; "
                "run the same one on all nodes"
            )
        meant = greeting.to if self._dials is None else greeting.node
        wanted = self._node if self._dials is None else self._dials
        if greeting.job != self._job or meant != wanted or len(greeting.nonce) != NONCE_BYTES:
            raise StoreDeniedError(
                f"somebody else answers there, or means somebody else. job={greeting.job!r} "
                f"node={greeting.node!r} "
                f"meant={meant!r} wanted={wanted!r}"
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
        self._frame(NodeProof(node=self._node))

    def _decoded(self, body: bytes) -> MeshMessage:
        try:
            return _DECODER.decode(body)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise FormatVersionError(
                f"a word that this release does not know. node={self.peer!r} why={error}; run the "
                "same one on all nodes"
            ) from error

    def _greet(self, to: str) -> None:
        body = _ENCODER.encode(Greeting(PROTOCOL_VERSION, self._job, self._node, self._nonce, to))
        self._out.append(_LENGTH.pack(len(body)) + body)

    def _frame(self, word: MeshMessage) -> None:
        body = self._spell(word)
        self._out.append(
            _LENGTH.pack(len(body)) + body + frame_mac(self._send_key, self._sent, body)
        )
        self._sent += 1
