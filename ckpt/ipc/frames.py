"""Message frames over a unix socket, with the file descriptors that travel beside them.

A frame is a little-endian 32-bit length and that many bytes of msgpack: one message of
``messages``. A frame's descriptors are sent with its first byte, in a system call that carries no
byte of another frame. The kernel ends a read after the piece that descriptors were attached to,
so they belong to the last frame that begins within one read.

``Inbox`` and ``Outbox`` never block: they are for a process that serves many sockets.
``MessageSocket`` blocks.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence

import msgspec

from ckpt.errors import IntegrityError, UnavailableError, UsageError
from ckpt.ipc.messages import AnyMessage, Message

FRAME_BYTES_MAX = 64 << 20
"""The longest body; a reader rejects a longer one before it buffers anything."""
FDS_MAX = 64
"""Descriptors beside one frame."""
READ_BYTES = 64 << 10
READS_MAX = 16
"""Reads in one ``Inbox.read``, so that one busy peer does not starve the others."""
JOINED_MAX = 64
"""Frames in one system call."""
OUTBOX_BYTES_MAX = 256 << 20
"""The most unsent bytes for one peer; a peer that reads nothing is given up."""
SEND_WAIT_S = 60.0
"""How long a blocking send waits for a peer that reads nothing."""

Received = tuple[Message, list[int]]
"""A message and the descriptors beside it, which the receiver must close."""

_LENGTH = struct.Struct("<I")
_FD = struct.Struct("i")
_ANCILLARY_BYTES = socket.CMSG_SPACE(FDS_MAX * _FD.size)
_CLOSED_ON_EXEC: int = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_READ_FLAGS = socket.MSG_DONTWAIT | _CLOSED_ON_EXEC
_WRITE_FLAGS: int = socket.MSG_DONTWAIT | getattr(socket, "MSG_NOSIGNAL", 0)
_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: Message) -> bytes:
    """The frame of ``message``. Raises UsageError if it is too long."""
    body = _ENCODER.encode(message)
    if len(body) > FRAME_BYTES_MAX:
        raise UsageError(
            f"too long for one message. type={type(message).__name__} size_bytes={len(body)} "
            f"limit_bytes={FRAME_BYTES_MAX}"
        )
    return _LENGTH.pack(len(body)) + body


def close_fds(fds: Iterable[int]) -> None:
    """Close all descriptors."""
    for fd in fds:
        os.close(fd)


class Inbox:
    """The bytes from one peer that are not a whole frame yet. Not thread-safe.

    Owns the descriptors of the incomplete frame; ``close`` closes them.
    """

    __slots__ = ("_begun", "_chunk", "_data", "_ended", "_fresh", "frame_bytes_max")

    def __init__(
        self, *, read_bytes: int = READ_BYTES, frame_bytes_max: int = FRAME_BYTES_MAX
    ) -> None:
        self.frame_bytes_max = frame_bytes_max
        """No longer body is accepted. The inbox buffers at most that many bytes and one read."""
        self._chunk = memoryview(bytearray(read_bytes))
        self._data = bytearray()
        self._begun: list[int] = []  # descriptors of the frame that the data end with
        self._fresh: list[int] = []  # descriptors of the newest read
        self._ended = False

    def read(self, sock: socket.socket) -> tuple[list[Received], bool]:
        """Read what has arrived, without blocking: whole messages, and whether the stream has
        ended.

        A frame that is cut off by the end of the stream is dropped. Raises IntegrityError if the
        bytes are not a frame: the connection is then unusable, and all descriptors of this call
        are closed. May leave bytes unread: call it again when the socket is readable.
        """
        received: list[Received] = []
        try:
            for _ in range(READS_MAX):
                count = self._read_once(sock)
                if count is None:
                    break
                if count == 0:
                    self.close()
                    return received, True
                self._parse(count, received)
                if count < len(self._chunk):
                    break
        except BaseException:
            for _, fds in received:
                close_fds(fds)
            self.close()
            raise
        return received, False

    def close(self) -> None:
        """Drop the incomplete frame; further reads report the end. Idempotent."""
        self._ended = True
        self._data.clear()
        close_fds(self._begun)
        close_fds(self._fresh)
        self._begun, self._fresh = [], []

    def _read_once(self, sock: socket.socket) -> int | None:
        """Read into the chunk.

        The number of bytes; None: nothing has arrived, 0: the end of the stream.
        """
        if self._ended:
            return 0
        try:
            count, ancillary, flags, _ = sock.recvmsg_into(
                [self._chunk], _ANCILLARY_BYTES, _READ_FLAGS
            )
        except BlockingIOError:
            return None
        except ConnectionResetError:  # the peer closed its end with unread messages
            return 0
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._fresh += (
                    fd for (fd,) in _FD.iter_unpack(data[: len(data) - len(data) % _FD.size])
                )
        if flags & socket.MSG_CTRUNC:
            raise IntegrityError(
                f"descriptors were lost on their way. received={len(self._fresh)} limit={FDS_MAX}; "
                "raise this process's limit of open files (ulimit -n)"
            )
        if not _CLOSED_ON_EXEC:
            for fd in self._fresh:
                os.set_inheritable(fd, False)
        return count

    def _parse(self, count: int, received: list[Received]) -> None:
        """Add the chunk's first ``count`` bytes and cut off whole frames."""
        before = len(self._data)
        self._data += self._chunk[:count]
        frames, rest = _split(self._data, self.frame_bytes_max)
        # Descriptors belong to the last frame that begins in this read, whole or not. If none
        # begins in it, they were attached within a frame, which no sender of ours does.
        last = rest if rest < len(self._data) else frames[-1][0]
        if self._fresh and last < before:
            raise IntegrityError(f"descriptors in the middle of a frame. count={len(self._fresh)}")
        for start, stop in frames:
            if start == last:
                self._begun, self._fresh = self._begun + self._fresh, []
            with memoryview(self._data)[start + _LENGTH.size : stop] as body:
                message = _decode(body)
            received.append((message, self._begun))
            self._begun = []
        if self._fresh:
            self._begun, self._fresh = self._fresh, []
        del self._data[:rest]


def _split(data: bytearray, limit_bytes: int) -> tuple[list[tuple[int, int]], int]:
    """The bounds of whole frames, with their lengths, and the start of the incomplete one."""
    frames: list[tuple[int, int]] = []
    at = 0
    while at + _LENGTH.size <= len(data):
        (length,) = _LENGTH.unpack_from(data, at)
        if length > limit_bytes:
            raise IntegrityError(f"not a frame. length={length} limit_bytes={limit_bytes}")
        stop = at + _LENGTH.size + length
        if stop > len(data):
            break
        frames.append((at, stop))
        at = stop
    return frames, at


def _decode(body: memoryview) -> Message:
    try:
        return _DECODER.decode(body)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise IntegrityError(
            f"not a message of this version. size_bytes={len(body)} why={error}"
        ) from error


class Outbox:
    """The messages that wait to be sent to one peer.

    Not thread-safe. Owns their descriptors; ``close`` closes them.
    """

    __slots__ = ("_frames", "_sent", "size_bytes")

    def __init__(self) -> None:
        self._frames: deque[tuple[bytes, list[int]]] = deque()
        self._sent = 0
        self.size_bytes = 0
        """Unsent bytes."""

    def __bool__(self) -> bool:
        return bool(self._frames)

    def push(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Append a message.

        Takes ``fds`` over, even if it raises, and closes them once they are sent.

        Raises UsageError for a message that is too long or has too many descriptors,
        UnavailableError if the peer does not read.
        """
        try:
            if len(fds) > FDS_MAX:
                raise UsageError(
                    f"too many descriptors for one message. count={len(fds)} limit={FDS_MAX}"
                )
            frame = encode(message)
            if self.size_bytes + len(frame) > OUTBOX_BYTES_MAX:
                raise UnavailableError(
                    f"the peer doesn't read its messages. waiting_bytes={self.size_bytes}"
                )
        except BaseException:
            close_fds(fds)
            raise
        self._frames.append((frame, list(fds)))
        self.size_bytes += len(frame)

    def flush(self, sock: socket.socket) -> bool:
        """Send what the socket accepts now; true if nothing is left.

        Raises OSError if the connection is lost.
        """
        while self._frames:
            pieces, fds = self._next()
            ancillary = (
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, b"".join(map(_FD.pack, fds)))]
                if fds
                else []
            )
            try:
                count = sock.sendmsg(pieces, ancillary, _WRITE_FLAGS)
            except BlockingIOError:
                return False
            self._mark_sent(count)
        return True

    def close(self) -> None:
        """Drop all unsent messages. Idempotent."""
        for _, fds in self._frames:
            close_fds(fds)
        self._frames.clear()
        self._sent = self.size_bytes = 0

    def _next(self) -> tuple[list[bytes | memoryview], list[int]]:
        """What one system call may carry: a frame with descriptors, or several without."""
        first, fds = self._frames[0]
        pieces: list[bytes | memoryview] = [
            memoryview(first)[self._sent :] if self._sent else first
        ]
        if fds:
            return pieces, fds
        for at in range(1, min(len(self._frames), JOINED_MAX)):
            frame, frame_fds = self._frames[at]
            if frame_fds:
                break
            pieces.append(frame)
        return pieces, fds

    def _mark_sent(self, count: int) -> None:
        """``count`` bytes were sent, and with the first of them the descriptors of the first
        frame.
        """
        self.size_bytes -= count
        self._sent += count
        close_fds(self._frames[0][1])
        self._frames[0][1].clear()
        while self._frames and self._sent >= len(self._frames[0][0]):
            self._sent -= len(self._frames.popleft()[0])


class MessageSocket:
    """A connected unix stream socket that sends and receives whole messages, blocking.

    Owns the socket. Thread-safe.

    A connection whose stream was cut within a frame, by an error or a signal, is shut down.
    """

    __slots__ = ("_inbox", "_outbox", "_ready", "_receiving", "_sending", "_socket")

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(None)  # with a timeout, Python would block in calls with MSG_DONTWAIT
        self._socket = sock
        self._inbox = Inbox()
        self._outbox = Outbox()
        self._ready: deque[Received] = deque()
        self._sending = threading.Lock()
        self._receiving = threading.Lock()

    def fileno(self) -> int:
        """The socket's descriptor, for ``select``; -1 once closed.

        Call ``receive_available`` when it is readable.
        """
        return self._socket.fileno()

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send one message; returns when the kernel has it. The caller keeps ``fds``.

        Raises UnavailableError if the connection is lost or the peer reads nothing for
        SEND_WAIT_S, UsageError if the message is too long.
        """
        with self._sending:
            own = _duplicates(fds)
            try:
                self._outbox.push(message, own)
                while not self._outbox.flush(self._socket):
                    if not _wait(self._socket, select.POLLOUT, SEND_WAIT_S):
                        raise UnavailableError(
                            f"the peer doesn't read its messages. waited_s={SEND_WAIT_S:g}"
                        )
            except UsageError:  # nothing was sent
                raise
            except BaseException as error:
                self._outbox.close()
                self._shut()
                if isinstance(error, OSError):
                    raise UnavailableError(
                        f"the connection is lost. why={error.strerror or error}"
                    ) from error
                raise

    def receive(self, timeout_s: float | None = None) -> Received | None:
        """The next message and its descriptors, which the caller owns; None at the connection's
        end.

        Raises UnavailableError after ``timeout_s`` seconds, IntegrityError if the bytes are not a
        frame.
        """
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        with self._receiving:
            while not self._ready:
                left_s = None if until_s is None else until_s - time.monotonic()
                if not _wait(self._socket, select.POLLIN, left_s):
                    raise UnavailableError(
                        f"no message within the time limit. timeout_s={timeout_s}"
                    )
                if self._read():
                    break
            return self._ready.popleft() if self._ready else None

    def receive_available(self) -> tuple[list[Received], bool]:
        """All messages that have arrived, without blocking, and whether the connection has ended.

        For ``select`` loops.

        Call it before the first ``select`` too: ``receive`` may have read more than it returned.
        """
        with self._receiving:
            ended = self._read()
            received = list(self._ready)
            self._ready.clear()
            return received, ended

    def close(self) -> None:
        """End the connection; a blocked ``receive`` returns None.

        Unread messages are dropped. Idempotent.
        """
        self._shut()
        with self._receiving, self._sending:
            self._drop()

    def forget_after_fork(self) -> None:
        """In a forked child: close this copy; the connection stays the parent's."""
        # Threads of the parent may have held the locks at the fork.
        self._sending = threading.Lock()
        self._receiving = threading.Lock()
        self._drop()

    def _read(self) -> bool:
        if self._socket.fileno() < 0:
            return True
        received, ended = self._inbox.read(self._socket)
        self._ready += received
        return ended

    def _shut(self) -> None:
        with contextlib.suppress(OSError):  # the peer closed it first, or it is closed already
            self._socket.shutdown(socket.SHUT_RDWR)

    def _drop(self) -> None:
        for _, fds in self._ready:
            close_fds(fds)
        self._ready.clear()
        self._inbox.close()
        self._outbox.close()
        self._socket.close()


def peer_uid(sock: socket.socket) -> int | None:
    """The user at the other end of a unix socket, as the kernel noted it when that end connected.

    None if the system does not say.
    """
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return None
    credentials = struct.Struct("3i")
    _, uid, _ = credentials.unpack(sock.getsockopt(socket.SOL_SOCKET, option, credentials.size))
    return int(uid)


def _wait(sock: socket.socket, event: int, timeout_s: float | None) -> bool:
    """Whether the socket became ready, or ended, in time."""
    fd = sock.fileno()
    if fd < 0:
        return True
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(None if timeout_s is None else max(0, math.ceil(timeout_s * 1000))))


def _duplicates(fds: Sequence[int]) -> list[int]:
    copies: list[int] = []
    try:
        for fd in fds:
            copies.append(os.dup(fd))
    except BaseException:
        close_fds(copies)
        raise
    return copies
