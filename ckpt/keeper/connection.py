"""The keeper's connections to the clients on its node: one socket each, read and written without
blocking."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

from ckpt.errors import CkptError, UnavailableError
from ckpt.events import Emit, Event, Fact
from ckpt.ipc.frames import FRAME_BYTES_MAX, Inbox, Outbox
from ckpt.ipc.messages import (
    Done,
    Hello,
    Message,
    OtherSettings,
    PrintLine,
    Reply,
    from_error,
)
from ckpt.rate_limit import AlarmLimiter

UNADMITTED_BYTES_MAX = 64 << 10
"""The largest frame that is accepted from a tool, or from a client before its hello."""

TOOL_WAITING_BYTES_MAX = 4 << 20
"""The most that waits for a tool. One that keeps asking and reads nothing is disconnected."""


class ClientConnection:
    """One connection. ``hello`` is None until the first message; ``planned`` is set by a ``Bye``.

    Memory: a read's chunk, an incomplete frame (UNADMITTED_BYTES_MAX until it is admitted), and
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
        self.other: Hello | None = None
        """Its hello, if it was told that this keeper has other settings than it."""
        self.lost = False
        """Whether the keeper hung up: messages that still arrive from it are ignored."""
        self.since_s = time.monotonic()
        self._inbox = Inbox(frame_bytes_max=UNADMITTED_BYTES_MAX)
        self._outbox = Outbox()

    def fileno(self) -> int:
        """For a selector."""
        return self.sock.fileno()

    @property
    def role(self) -> str:
        """The role of its hello; "" before."""
        return self.hello.role if self.hello is not None else ""

    @property
    def rank(self) -> int:
        """The rank of its hello; -1 before."""
        return self.hello.rank if self.hello is not None else -1

    @property
    def attempt(self) -> int:
        """The attempt of its hello; 0 for none."""
        return self.hello.attempt if self.hello is not None else 0

    def facts(self) -> Mapping[str, Fact]:
        """Which client this is, for events."""
        return {"role": self.role, "rank": self.rank}

    def admit(self, hello: Hello) -> None:
        """Accept its hello; all but tools may send large frames from now on."""
        self.hello = hello
        if hello.role != "tool":
            self._inbox.frame_bytes_max = FRAME_BYTES_MAX

    def ask_settings(self, hello: Hello) -> None:
        """Answer its hello: it has other settings than this keeper, and is to send them."""
        self.other = hello
        self._inbox.frame_bytes_max = FRAME_BYTES_MAX
        self.send(OtherSettings(id=hello.id))

    def hang_up(self) -> None:
        """End the connection. Not closed here: the loop reads its end next, and removes it in one
        place."""
        self.lost = True
        with contextlib.suppress(OSError):  # already disconnected by the client
            self.sock.shutdown(socket.SHUT_RDWR)

    def read(self) -> tuple[list[tuple[Message, list[int]]], bool]:
        """The complete messages that have arrived, with their descriptors, and whether the
        connection ended."""
        return self._inbox.read(self.sock)

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Queue a message and send as much as the socket takes now. ``fds`` stay the caller's."""
        if self.lost:
            return
        try:
            if self.role in ("", "tool") and self._outbox.size_bytes > TOOL_WAITING_BYTES_MAX:
                raise UnavailableError(
                    f"a tool does not read its answers. waiting_bytes={self._outbox.size_bytes}"
                )
            # Duplicates: the caller may close its own before the socket takes the message.
            self._outbox.push(message, [os.dup(fd) for fd in fds])
        except UnavailableError:
            self.hang_up()
            return
        if not self.flush():
            self._on_blocked(self)

    def send_error(self, call_id: int, error: CkptError) -> None:
        """Answer a call with an error."""
        self.send(error_reply(call_id, error))

    def flush(self) -> bool:
        """Send as much as the socket takes; True if nothing is left. A broken connection counts as
        having taken all."""
        try:
            return self._outbox.flush(self.sock)
        except OSError:  # the loop sees and reports its end when it reads
            return True

    def close(self) -> None:
        """Close the socket and all descriptors that were not delivered."""
        self._inbox.close()
        self._outbox.close()
        self.sock.close()


class Clients:
    """The open connections of one keeper, by number. Only the keeper's loop adds and removes
    them."""

    def __init__(self) -> None:
        self._connections: dict[int, ClientConnection] = {}

    def __iter__(self) -> Iterator[ClientConnection]:
        """A copy: connections may be added and removed meanwhile."""
        return iter(list(self._connections.values()))

    def __contains__(self, client: ClientConnection) -> bool:
        return client.number in self._connections

    @property
    def members(self) -> list[ClientConnection]:
        """All admitted clients but tools."""
        return [client for client in self if client.role not in ("", "tool")]

    def add(self, client: ClientConnection) -> None:
        """A connection was accepted."""
        self._connections[client.number] = client

    def remove(self, client: ClientConnection) -> None:
        """A connection has ended."""
        self._connections.pop(client.number, None)

    def broadcast(self, role: str, message: Message, *, rank: int | None = None) -> None:
        """Send a message to all clients of a role, or to those of one rank."""
        for client in self:
            if client.role == role and rank in (None, client.rank):
                client.send(message)


TOLD_OTHERWISE = frozenset(
    {"missing", "stacks", "slow-start", "recovered", "ended"}
    | {"line-refused", "node-refused", "nodes-awaited"}
)
"""Kinds of alarms of which supervisors get a line of their own where they arise."""

OUTCOMES = frozenset({"save-failed", "tag-failed"})
"""Kinds of alarms that a trainer raises itself from the outcome that it is sent."""

OF_STRANGERS = frozenset({"stranger-refused"})
"""Kinds of alarms that other users can raise without limit: the log has no more of them than the
program is told."""

UNTOLD_MAX = 20
"""Alarms that wait for a program to tell them to; older ones are only in the log."""


class AlarmRelay:
    """An ``Emit`` of a keeper: everything goes into its log, and alarms to the program too, once:
    the log of a process that nobody started by hand is read by nobody.

    A node's first supervisor prints them; without supervisors the first trainer raises them. What
    comes while there is neither waits for the next program. Alarms may come from any thread;
    ``post`` brings a call into the keeper's loop.
    """

    def __init__(
        self, log: Emit, clients: Clients, post: Callable[[Callable[[], object]], None]
    ) -> None:
        self._log = log
        self._clients = clients
        self._post = post
        self._limited = AlarmLimiter(lambda event: post(lambda: self._tell(event)))
        self._of_strangers = AlarmLimiter(self._pass)
        self._untold: deque[Event] = deque(maxlen=UNTOLD_MAX)

    def __call__(self, event: Event) -> None:
        if event.kind in OF_STRANGERS:
            self._of_strangers(event)
        else:
            self._pass(event)

    def _pass(self, event: Event) -> None:
        self._log(event)
        if event.alarm and event.kind not in TOLD_OTHERWISE:
            self._limited(event)

    def joined(self) -> None:
        """A client was admitted: tell it what waited for it."""
        untold, self._untold = list(self._untold), deque(maxlen=UNTOLD_MAX)
        for event in untold:
            self._tell(event)

    def _tell(self, event: Event) -> None:
        members = self._clients.members
        trainers = [one for one in members if one.role == "events"]
        if event.kind in OUTCOMES and trainers:
            return
        readers = [one for one in members if one.role == "supervisor"] or trainers
        if not readers:
            self._untold.append(event)
            return
        first = min(readers, key=lambda one: one.rank)
        first.send(PrintLine(text=event.text, alarm=True))


def error_reply(call_id: int, error: CkptError, *, rank: int = -1) -> Reply:
    """The answer to a call that failed."""
    return Done(id=call_id, error=from_error(error, rank=rank))
