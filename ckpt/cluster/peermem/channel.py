"""One connection's bytes: heads through a small buffer, bodies straight between memory and the
kernel.

Holds HEAD_BYTES_MAX of memory of its own, and no body.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ckpt.backends.base import Buffer
from ckpt.cluster.peermem.auth import macs_equal
from ckpt.cluster.peermem.body_mac import BodyMac
from ckpt.cluster.peermem.http import END, HEAD_BYTES_MAX, TAG_BYTES, MalformedError
from ckpt.errors import UnavailableError, UsageError
from ckpt.rate_limit import RateLimit

# How long a peer is waited for. Pure.


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerTimeouts:
    """A peer moves ``bytes_per_s_min`` and may be late by ``grace_s``, as a leaky bucket: speed
    makes up for lateness and never earns more. So neither silence nor a trickle holds anybody up,
    whatever went before.
    """

    grace_s: float = 10.0
    bytes_per_s_min: int = 64 << 10

    def late_s(self, late_s: float, *, took_s: float, moved_bytes: int) -> float:
        """How late a peer is that was ``late_s``, and then took ``took_s`` to move
        ``moved_bytes``."""
        return max(0.0, late_s + took_s - moved_bytes / self.bytes_per_s_min)


BLOCK_BYTES = 1 << 20
"""What is digested and sent at once, and received at most: smaller blocks wake the other side more
often, which costs more than a cache gains.
"""

DIGEST_BYTES = 256 << 10
"""What is gathered of small pieces that came before they are digested: TLS gives 16 KiB at a
time."""

PIECES_MAX = 64
"""Buffers that go in one call."""

LINGER_BYTES_MAX = 1 << 20
LINGER_S = 1.0
"""What a connection that is given up still takes in, so that the other side gets to read why."""


class EndedError(UnavailableError):
    """The other side ended the connection."""

    code = "ended"


class PeerChannel:
    """A connected socket, plain or TLS, and its owner's patience. Owns the socket. For one
    thread."""

    __slots__ = (
        "_buffer",
        "_late_s",
        "_mark_s",
        "_patience",
        "_socket",
        "_start",
        "_stop",
        "_work_s",
        "plain",
    )

    def __init__(self, sock: socket.socket, patience: PeerTimeouts) -> None:
        self._socket = sock
        self._patience = patience
        self._buffer = bytearray(HEAD_BYTES_MAX)
        self._start = self._stop = 0
        self.plain = type(sock) is socket.socket
        """Whether the kernel may move bytes by itself."""
        self.restart_timeout()

    def restart_timeout(self, *, work_s: float = 0.0) -> None:
        """The other side's time begins anew. ``work_s``: what it may take beyond its owner's
        patience, for work of its own."""
        self._mark_s = time.monotonic()
        self._late_s = 0.0
        self._work_s = work_s

    def extend_timeout(self, seconds: float) -> None:
        """Time that the other side isn't to blame for."""
        self._mark_s += seconds

    def abort(self) -> None:
        """Break what waits here, from any thread."""
        shut_down(self._socket)

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()

    def is_idle(self) -> bool:
        """Whether nothing has come since the last answer; a connection that says more, or has
        ended, is of no use."""
        return self._start == self._stop and not _ready(self._socket, select.POLLIN, 0.0)

    def linger(self) -> None:
        """Say that no more comes, and take in a little of what does, lest the last words are lost
        with it."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_WR)
            until_s, taken = time.monotonic() + LINGER_S, 0
            while taken < LINGER_BYTES_MAX and (left_s := until_s - time.monotonic()) > 0:
                self._socket.settimeout(left_s)
                count = socket.socket.recv_into(self._socket, self._buffer)
                if not count:
                    return
                taken += count

    # Receiving.

    def read_head(self, *, idle_s: float | None = None) -> bytes | None:
        """The next head, its empty line included; None where the other side ended the connection
        before it.

        ``idle_s``: how long its first byte may take; from there on its owner's patience counts.
        Raises TimeoutError, EndedError in the middle of a head, MalformedError where none ends
        within HEAD_BYTES_MAX.
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
        """Fill ``out`` and read the tag behind it; whether that proves it. ``out`` holds anything
        where it doesn't.

        Raises TimeoutError, and EndedError where the connection ends before.
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
        """Read a body's tag; whether it proves all that ``mac`` took in. Raises as
        ``read_body``."""
        return macs_equal(self._read_tag(), mac.tag())

    def skip(self, size_bytes: int) -> None:
        """Take in and forget bytes, through the head's buffer. Raises as ``read_body``."""
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
        """Receive into the buffer behind what it holds; False at the end."""
        if self._start:
            held = self._buffer[self._start : self._stop]
            self._buffer[: len(held)] = held
            self._start, self._stop = 0, len(held)
        count = self._receive(memoryview(self._buffer)[self._stop :], idle_s)
        self._stop += count
        return count > 0

    def _receive(self, out: memoryview, idle_s: float | None) -> int:
        self._socket.settimeout(self._left_s() if idle_s is None else idle_s)
        count = self._socket.recv_into(out)
        self._moved(count)
        return count

    # Sending.

    def write(self, *pieces: Buffer) -> None:
        """Send small pieces, in one call where the kernel can. Raises TimeoutError, OSError."""
        self._send([memoryview(piece) for piece in pieces])

    def write_body(
        self, data: Sequence[memoryview], mac: BodyMac, cap: RateLimit | None = None
    ) -> None:
        """Send ``data`` in order, no copy made but the kernel's, and digest it on the way. The tag
        is the caller's to send."""
        for block in _blocks(data, BLOCK_BYTES if cap is None else cap.block_bytes(BLOCK_BYTES)):
            if cap is not None:
                self.extend_timeout(cap.take(sum(len(piece) for piece in block)))
            for piece in block:
                mac.update(piece)
            self._send(block)

    def write_extent(
        self,
        view: memoryview,
        fd: int,
        offset_bytes: int,
        mac: BodyMac,
        cap: RateLimit | None = None,
    ) -> None:
        """As ``write_body`` of ``view``, a mapping of ``fd`` at ``offset_bytes``; the kernel sends
        the pages themselves.

        They must not be overwritten before the other side has answered.
        """
        if not self.plain:
            self.write_body([view], mac, cap)
            return
        block_bytes = BLOCK_BYTES if cap is None else cap.block_bytes(BLOCK_BYTES)
        for at in range(0, len(view), block_bytes):
            block = view[at : at + block_bytes]
            if cap is not None:
                self.extend_timeout(cap.take(len(block)))
            mac.update(block)
            self._send_file(fd, offset_bytes + at, len(block))

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
            self._socket.settimeout(left_s)  # so that the kernel's call never waits
            try:
                count = os.sendfile(self._socket.fileno(), fd, offset_bytes, size_bytes)
            except BlockingIOError:
                if not _ready(self._socket, select.POLLOUT, left_s):
                    raise TimeoutError("the other side takes nothing.") from None
                continue
            if not count:
                raise EndedError("a file ended before its extent.")
            self._moved(count)
            offset_bytes += count
            size_bytes -= count

    def _left_s(self) -> float:
        left_s = (
            self._patience.grace_s + self._work_s - self._late_s - (time.monotonic() - self._mark_s)
        )
        if left_s <= 0:
            raise TimeoutError(f"the other side is too slow. grace_s={self._patience.grace_s:g}")
        return left_s

    def _moved(self, count: int) -> None:
        now_s = time.monotonic()
        self._late_s = self._patience.late_s(
            self._late_s, took_s=now_s - self._mark_s, moved_bytes=count
        )
        self._mark_s = now_s


def shut_down(sock: socket.socket) -> None:
    """End all calls that wait on a socket, from any thread. The socket's own method would also take
    TLS off it."""
    with contextlib.suppress(OSError):  # the other side was faster
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _ready(sock: socket.socket, event: int, wait_s: float) -> bool:
    poll = select.poll()
    poll.register(sock, event)
    return bool(poll.poll(wait_s * 1000))


def _blocks(data: Sequence[memoryview], block_bytes: int) -> Iterator[list[memoryview]]:
    """``data`` cut and gathered to blocks of ``block_bytes`` and PIECES_MAX at most."""
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


# What a put sends: buffers in a row, or a stretch of a file that the kernel sends by itself.


@dataclass(frozen=True, slots=True)
class PeerExtent:
    """``size_bytes`` of a file or memfd from ``offset_bytes`` on. The descriptor stays the
    caller's."""

    fd: int
    offset_bytes: int
    size_bytes: int


class PeerBody(Protocol):
    """The bytes of one put. May be sent more than once."""

    @property
    def size_bytes(self) -> int:
        """How many."""
        ...

    @property
    def pieces(self) -> Sequence[memoryview]:
        """All of them in order, where they are few pieces; else empty."""
        ...

    def send(self, channel: PeerChannel, mac: BodyMac, cap: RateLimit | None) -> None:
        """Send and digest them."""
        ...


class BufferBody:
    """Buffers in a row; none is copied."""

    __slots__ = ("_views", "size_bytes")

    def __init__(self, data: Sequence[Buffer]) -> None:
        self._views = [memoryview(one).cast("B") for one in data]
        self.size_bytes = sum(len(view) for view in self._views)

    @property
    def pieces(self) -> Sequence[memoryview]:
        """See Body."""
        return self._views if len(self._views) < PIECES_MAX else ()

    def send(self, channel: PeerChannel, mac: BodyMac, cap: RateLimit | None) -> None:
        """See Body."""
        channel.write_body(self._views, mac, cap)


class MappedExtent:
    """An extent, mapped to be digested."""

    __slots__ = ("_extent", "_view", "pieces", "size_bytes")

    def __init__(self, extent: PeerExtent, view: memoryview) -> None:
        self._extent = extent
        self._view = view
        self.size_bytes = extent.size_bytes
        self.pieces: Sequence[memoryview] = ()

    def send(self, channel: PeerChannel, mac: BodyMac, cap: RateLimit | None) -> None:
        """See Body."""
        channel.write_extent(self._view, self._extent.fd, self._extent.offset_bytes, mac, cap)


@contextlib.contextmanager
def mapped(extent: PeerExtent) -> Iterator[PeerBody]:
    """``extent`` as a body. Raises UsageError where the file doesn't reach so far or can't be
    mapped."""
    if extent.size_bytes == 0:
        yield BufferBody([])
        return
    start = extent.offset_bytes - extent.offset_bytes % mmap.ALLOCATIONGRANULARITY
    length = extent.offset_bytes + extent.size_bytes - start
    try:
        memory = mmap.mmap(extent.fd, length, prot=mmap.PROT_READ, offset=start)
    except (ValueError, OSError, OverflowError) as error:
        raise UsageError(
            f"an extent can't be mapped. offset_bytes={extent.offset_bytes} "
            f"size_bytes={extent.size_bytes} cause={error}"
        ) from error
    with memory, memoryview(memory) as whole, whole[extent.offset_bytes - start :] as view:
        yield MappedExtent(extent, view)
