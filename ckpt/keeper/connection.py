"""The keeper's connections: one socket each, read and written without ever waiting."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Sequence

from ckpt.errors import CkptError, UnavailableError
from ckpt.ipc.frames import FRAME_BYTES_MAX, Inbox, Outbox
from ckpt.ipc.messages import Done, Hello, Message, Reply, from_error

UNADMITTED_BYTES_MAX = 64 << 10
"""No longer frame is taken of who has not been admitted to the job: of tools, and before a
hello."""

TOOL_WAITING_BYTES_MAX = 4 << 20
"""What waits for a tool at most; one that asks on and reads nothing is hung up on."""


class ClientConnection:
    """One connection. ``hello`` is None until the first message; ``planned`` after a ``Bye``.

    Memory: a read's chunk, a frame that is not whole (STRANGER_BYTES_MAX until it is admitted), and
    what it does not read.
    """

    def __init__(
        self, number: int, sock: socket.socket, *, on_blocked: Callable[[ClientConnection], None]
    ) -> None:
        self._on_blocked = on_blocked
        self.number = number
        self.sock = sock
        self.hello: Hello | None = None
        self.planned = False
        self.lost = False
        """Whether it was hung up on, for it reads nothing: what it still says counts for
        nothing."""
        self.since_s = time.monotonic()
        self._inbox = Inbox(frame_bytes_max=UNADMITTED_BYTES_MAX)
        self._outbox = Outbox()

    def fileno(self) -> int:
        """For a selector."""
        return self.sock.fileno()

    @property
    def role(self) -> str:
        """What it said it is; "" before its hello."""
        return self.hello.role if self.hello is not None else ""

    @property
    def rank(self) -> int:
        """The rank that it said; -1 before its hello."""
        return self.hello.rank if self.hello is not None else -1

    @property
    def attempt(self) -> int:
        """The attempt that it said it belongs to; 0 for none."""
        return self.hello.attempt if self.hello is not None else 0

    def admit(self, hello: Hello) -> None:
        """It is what it says."""
        self.hello = hello
        if hello.role != "tool":
            self._inbox.frame_bytes_max = FRAME_BYTES_MAX

    def read(self) -> tuple[list[tuple[Message, list[int]]], bool]:
        """Whole messages that have come, with their descriptors, and whether the connection
        ended."""
        return self._inbox.read(self.sock)

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Queue a message and send what goes at once; the rest when there is room. ``fds`` stay the
        caller's."""
        if self.lost:
            return
        try:
            if self.role in ("", "tool") and self._outbox.size_bytes > TOOL_WAITING_BYTES_MAX:
                raise UnavailableError(
                    f"a tool doesn't read what it is sent. waiting_bytes={self._outbox.size_bytes}"
                )
            self._outbox.push(message, [os.dup(fd) for fd in fds])
        except (
            UnavailableError
        ):  # it has left too much unread: as good as gone, and its end is read soon
            self.lost = True
            with contextlib.suppress(OSError):  # it has hung up
                self.sock.shutdown(socket.SHUT_RDWR)
            return
        if not self.flush():
            self._on_blocked(self)

    def flush(self) -> bool:
        """Send what goes; True where nothing is left. A peer that is gone takes everything."""
        try:
            return self._outbox.flush(self.sock)
        except OSError:  # its end is read, and told, where it is read
            return True

    def close(self) -> None:
        """Hang up."""
        self._inbox.close()
        self._outbox.close()
        self.sock.close()


def error_reply(call_id: int, error: CkptError, *, rank: int = -1) -> Reply:
    """The answer to a call that failed."""
    return Done(id=call_id, error=from_error(error, rank=rank))
