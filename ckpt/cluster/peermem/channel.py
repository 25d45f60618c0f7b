"""One connection's bytes: heads through a small buffer, bodies between memory and the kernel.

Keeps HEAD_BYTES_MAX in memory, and no body.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ckpt.backends.base import Buffer
from ckpt.cluster.peermem.auth import macs_equal
from ckpt.cluster.peermem.body_mac import BodyMac
from ckpt.cluster.peermem.http import END, HEAD_BYTES_MAX, TAG_BYTES, MalformedError
from ckpt.errors import UnavailableError
from ckpt.rate_limit import RateLimit


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerTimeouts:
    """How slow a peer may be: it moves ``bytes_per_s_min``, and may be late by ``grace_s`` in all.

    Lateness is a leaky bucket: speed makes up for it, and never earns more, or a gigabyte sent
    quickly would buy hours of silence.
    """

    grace_s: float = 10.0
    bytes_per_s_min: int = 64 << 10

    def late_s(self, late_s: float, *, took_s: float, moved_bytes: int) -> float:
        """The lateness of a peer after it took ``took_s`` to move ``moved_bytes``; ``late_s``:
        before.
        """
        return max(0.0, late_s + took_s - moved_bytes / self.bytes_per_s_min)


BLOCK_BYTES = 1 << 20
"""Bytes digested and sent at once, and received at most. Smaller blocks wake the other side more
often, which costs more than the cache gains.
"""

DIGEST_BYTES = 256 << 10
"""Small pieces are gathered to so much before they are digested: TLS gives 16 KiB at a time."""

PIECES_MAX = 64
"""Buffers of one call to the kernel."""

LINGER_BYTES_MAX = 1 << 20
LINGER_S = 1.0
"""How much, and how long, a connection that is given up still receives, so that the other side
reads the reason: closing with unread bytes would reset the connection.
"""


class EndedError(UnavailableError):
    """The other side closed the connection."""

    code = "ended"


class PeerChannel:
    """A connected socket, plain or TLS, with its timeouts. Owns the socket. For one thread."""

    __slots__ = (
        "_buffer",
        "_late_s",
        "_mark_s",
        "_socket",
        "_start",
        "_stop",
        "_timeouts",
        "_work_s",
        "plain",
    )

    def __init__(self, sock: socket.socket, timeouts: PeerTimeouts) -> None:
        self._socket = sock
        self._timeouts = timeouts
        self._buffer = bytearray(HEAD_BYTES_MAX)
        self._start = self._stop = 0
        self.plain = type(sock) is socket.socket
        """Whether the kernel can send pages of a file by itself."""
        self.restart_timeout()

    def restart_timeout(self, *, work_s: float = 0.0) -> None:
        """Begin a new budget of time. ``work_s``: time for the other side's own work, beyond the
        timeouts.
        """
        self._mark_s = time.monotonic()
        self._late_s = 0.0
        self._work_s = work_s

    def extend_timeout(self, seconds: float) -> None:
        """Don't count these seconds against the other side."""
        self._mark_s += seconds

    def abort(self) -> None:
        """Break all calls that wait here, from any thread."""
        shut_down(self._socket)

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()

    def is_idle(self) -> bool:
        """Whether nothing arrived since the last answer. A connection with unexpected bytes, or
        that was closed, can't be used.
        """
        return self._start == self._stop and not _ready(self._socket, select.POLLIN, 0.0)

    def linger(self) -> None:
        """Shut down sending, and receive a little more, so that what was sent last is not lost."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_WR)
            until_s, taken = time.monotonic() + LINGER_S, 0
            while taken < LINGER_BYTES_MAX and (left_s := until_s - time.monotonic()) > 0:
                self._socket.settimeout(left_s)
                count = socket.socket.recv_into(self._socket, self._buffer)
                if not count:
                    return
                taken += count

    # ---- receiving

    def read_head(self, *, idle_s: float | None = None) -> bytes | None:
        """The next head, its empty line included; None if the other side closed before it.

        ``idle_s``: how long its first byte may take; after it the timeouts count. Raises
        TimeoutError, EndedError in the middle of a head, MalformedError if no head ends within
        HEAD_BYTES_MAX.
        """
        if self._start == self._stop and not self._more(idle_s):
            return None
        if idle_s is not None:
            self.restart_timeout()
        seen_bytes = 0
        while (
            at := self._buffer.find(END, self._start + max(0, seen_bytes - len(END)), self._stop)
        ) < 0:
            seen_bytes = self._stop - self._start
            if seen_bytes == HEAD_BYTES_MAX:
                raise MalformedError(f"a head is too long. limit_bytes={HEAD_BYTES_MAX}")
            if not self._more(None):
                raise EndedError("the connection ended in the middle of a head.")
        head = bytes(memoryview(self._buffer)[self._start : at + len(END)])
        self._start = at + len(END)
        return head

    def read_body(self, out: memoryview, mac: BodyMac) -> bool:
        """Fill ``out`` and read the tag behind it; whether the tag matches.

        ``out`` is garbage if not.

        Raises TimeoutError, and EndedError if the connection ends before.
        """
        self.read_part(out, mac)
        return self.verify_tag(mac)

    def read_part(self, out: memoryview, mac: BodyMac) -> None:
        """Fill ``out`` with the next bytes of a body and digest them. Raises as ``read_body``."""
        at = min(len(out), self._stop - self._start)
        out[:at] = memoryview(self._buffer)[self._start : self._start + at]
        self._start += at
        digested = 0
        while True:
            if at - digested >= DIGEST_BYTES or (at == len(out) and at > digested):
                mac.update(out[digested:at])
                digested = at
            if at == len(out):
                break
            count = self._receive(out[at : at + BLOCK_BYTES], None)
            if not count:
                raise EndedError("the connection ended in the middle of a body.")
            at += count

    def verify_tag(self, mac: BodyMac) -> bool:
        """Read a body's tag; whether it matches all that ``mac`` has digested. Raises as
        ``read_body``.
        """
        return macs_equal(self._read_tag(), mac.tag())

    def skip(self, size_bytes: int) -> None:
        """Receive and drop bytes, through the head's buffer. Raises as ``read_body``."""
        while size_bytes:
            if self._start == self._stop and not self._more(None):
                raise EndedError("the connection ended in the middle of a body.")
            count = min(size_bytes, self._stop - self._start)
            self._start += count
            size_bytes -= count

    def _read_tag(self) -> bytes:
        while self._stop - self._start < TAG_BYTES:
            if not self._more(None):
                raise EndedError("the connection ended before a body's tag.")
        tag = bytes(memoryview(self._buffer)[self._start : self._start + TAG_BYTES])
        self._start += TAG_BYTES
        return tag

    def _more(self, idle_s: float | None) -> bool:
        """Receive into the buffer behind what it holds; False at the end of the connection."""
        if self._start:
            unread = self._buffer[self._start : self._stop]
            self._buffer[: len(unread)] = unread
            self._start, self._stop = 0, len(unread)
        count = self._receive(memoryview(self._buffer)[self._stop :], idle_s)
        self._stop += count
        return count > 0

    def _receive(self, out: memoryview, idle_s: float | None) -> int:
        self._socket.settimeout(self._left_s() if idle_s is None else idle_s)
        count = self._socket.recv_into(out)
        self._moved(count)
        return count

    # ---- sending

    def write(self, *pieces: Buffer) -> None:
        """Send small pieces, in one call if the kernel can. Raises TimeoutError, OSError."""
        self._send([memoryview(piece) for piece in pieces])

    def write_body(
        self, data: Sequence[memoryview], mac: BodyMac, rate_limit: RateLimit | None = None
    ) -> None:
        """Send ``data`` in order and digest it on the way; the caller sends the tag.

        No copy is made but the kernel's.
        """
        block_bytes = BLOCK_BYTES if rate_limit is None else rate_limit.block_bytes(BLOCK_BYTES)
        for block in _blocks(data, block_bytes):
            if rate_limit is not None:
                # Waiting for the rate limit is no slowness of the other side.
                self.extend_timeout(rate_limit.take(sum(len(piece) for piece in block)))
            for piece in block:
                mac.update(piece)
            self._send(block)

    def write_extent(self, view: memoryview, fd: int, offset_bytes: int, mac: BodyMac) -> None:
        """As ``write_body`` of ``view``, a mapping of ``fd`` at ``offset_bytes``; the kernel sends
        the file's pages themselves.

        They must not be overwritten before the other side has answered.
        """
        if not self.plain:
            self.write_body([view], mac)
            return
        for start in range(0, len(view), BLOCK_BYTES):
            block = view[start : start + BLOCK_BYTES]
            mac.update(block)
            self._send_file(fd, offset_bytes + start, len(block))

    def _send(self, pieces: list[memoryview]) -> None:
        if not self.plain and len(pieces) > 1:
            pieces = [memoryview(b"".join(pieces))]  # TLS copies what it encrypts anyway
        while pieces:
            self._socket.settimeout(self._left_s())
            count = self._socket.sendmsg(pieces) if self.plain else self._socket.send(pieces[0])
            self._moved(count)
            while pieces and count >= len(pieces[0]):
                count -= len(pieces.pop(0))
            if pieces:
                pieces[0] = pieces[0][count:]

    def _send_file(self, fd: int, offset_bytes: int, size_bytes: int) -> None:
        while size_bytes:
            left_s = self._left_s()
            self._socket.settimeout(
                left_s
            )  # makes the socket non-blocking: ``sendfile`` never waits
            try:
                count = os.sendfile(self._socket.fileno(), fd, offset_bytes, size_bytes)
            except BlockingIOError:
                if not _ready(self._socket, select.POLLOUT, left_s):
                    raise TimeoutError("the other side does not read.") from None
                continue
            if not count:
                raise EndedError("a file ended before its extent.")
            self._moved(count)
            offset_bytes += count
            size_bytes -= count

    def _left_s(self) -> float:
        left_s = (
            self._timeouts.grace_s + self._work_s - self._late_s - (time.monotonic() - self._mark_s)
        )
        if left_s <= 0:
            raise TimeoutError(f"the other side is too slow. grace_s={self._timeouts.grace_s:g}")
        return left_s

    def _moved(self, count: int) -> None:
        now_s = time.monotonic()
        self._late_s = self._timeouts.late_s(
            self._late_s, took_s=now_s - self._mark_s, moved_bytes=count
        )
        self._mark_s = now_s


def shut_down(sock: socket.socket) -> None:
    """End all calls that wait on a socket, from any thread.

    ``SSLSocket.shutdown`` would also drop the TLS layer, so this calls the plain socket's method.
    """
    with contextlib.suppress(OSError):  # closed already
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _ready(sock: socket.socket, event: int, wait_s: float) -> bool:
    poll = select.poll()
    poll.register(sock, event)
    return bool(poll.poll(wait_s * 1000))


def _blocks(data: Sequence[memoryview], block_bytes: int) -> Iterator[list[memoryview]]:
    """``data``, cut and gathered to blocks of at most ``block_bytes`` and PIECES_MAX buffers."""
    block: list[memoryview] = []
    room = block_bytes
    for view in data:
        at = 0
        while at < len(view):
            piece = view[at : at + room]
            block.append(piece)
            at += len(piece)
            room -= len(piece)
            if not room or len(block) == PIECES_MAX:
                yield block
                block, room = [], block_bytes
    if block:
        yield block


# ---- the body of a put


class BufferBody:
    """Buffers in a row, sent without a copy. May be sent more than once."""

    __slots__ = ("_views", "size_bytes")

    def __init__(self, data: Sequence[Buffer]) -> None:
        self._views = [memoryview(buffer).cast("B") for buffer in data]
        self.size_bytes = sum(len(view) for view in self._views)

    @property
    def pieces(self) -> Sequence[memoryview]:
        """All buffers in order, if they are few enough for one call; else empty."""
        return self._views if len(self._views) < PIECES_MAX else ()

    def send(self, channel: PeerChannel, mac: BodyMac, rate_limit: RateLimit | None) -> None:
        """Send and digest the bytes."""
        channel.write_body(self._views, mac, rate_limit)
