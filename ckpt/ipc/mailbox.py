"""Mailboxes: the ranks of one attempt exchange small values under unique keys, no collectives."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from ckpt.errors import UnavailableError

POLL_FIRST_S = 0.001
POLL_LAST_S = 0.05
STOP_LOOK_S = 0.25
"""How often a blocking wait checks ``stop()``."""


class RankMailbox(Protocol):
    """Values that the ranks of one attempt exchange. Thread-safe. A key is written once."""

    @property
    def rank(self) -> int:
        """This process's rank."""
        ...

    @property
    def size(self) -> int:
        """The number of ranks."""
        ...

    def post(self, key: str, value: bytes) -> None:
        """Publish ``value`` under ``key`` for all ranks."""
        ...

    def peek(self, key: str) -> bytes | None:
        """The value, or None if it is not posted yet. One round trip."""
        ...

    def forget(self, key: str) -> None:
        """Free a value that no rank will read again; a missing key is no error."""
        ...


class CountingMailbox(RankMailbox, Protocol):
    """A mailbox with counters that all ranks share."""

    def count(self, key: str, amount: int = 0) -> int:
        """Add to a shared counter and return the sum."""
        ...


@runtime_checkable
class WaitingMailbox(Protocol):
    """A mailbox that can block until a key is posted."""

    def wait(self, key: str, timeout_s: float) -> bytes | None:
        """The value as soon as it is posted, or None after ``timeout_s`` seconds."""
        ...


@runtime_checkable
class StayingMailbox(Protocol):
    """A mailbox whose ranks may leave only together.

    If ``stays`` is true, no rank has to watch for others that left.
    """

    stays: bool


def wait_for_message(
    channel: RankMailbox,
    key: str,
    *,
    timeout_s: float | None,
    awaited: str,
    stop: Callable[[], bool] | None = None,
) -> bytes:
    """Wait until ``key`` is posted and return its value. ``awaited`` names it in errors.

    Polls unless the mailbox is a ``WaitingMailbox``: torch's store serves one call at a time on a
    connection, so a blocking wait would lock out the other threads. Raises UnavailableError after
    ``timeout_s`` seconds, or as soon as ``stop()`` is true.
    """
    began = time.monotonic()
    pause_s = POLL_FIRST_S
    while True:
        value = (
            channel.wait(key, STOP_LOOK_S)
            if isinstance(channel, WaitingMailbox)
            else channel.peek(key)
        )
        if value is not None:
            return value
        if stop is not None and stop():
            raise UnavailableError(f"stopped while waiting for {awaited}. rank={channel.rank}")
        if timeout_s is not None and time.monotonic() - began > timeout_s:
            raise UnavailableError(
                f"no message within the time limit while waiting for {awaited}. "
                f"rank={channel.rank} timeout_s={timeout_s:g}; "
                "a rank is dead or far behind: look at its log"
            )
        if not isinstance(channel, WaitingMailbox):
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, POLL_LAST_S)


class SoloMailbox:
    """The mailbox of a world of one rank."""

    rank = 0
    size = 1

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._counts: dict[str, int] = {}

    def post(self, key: str, value: bytes) -> None:
        self._values[key] = value

    def peek(self, key: str) -> bytes | None:
        return self._values.get(key)

    def count(self, key: str, amount: int = 0) -> int:
        self._counts[key] = self._counts.get(key, 0) + amount
        return self._counts[key]

    def forget(self, key: str) -> None:
        self._values.pop(key, None)


class InProcessRoom:
    """The shared state of ``InProcessMailbox``: values and counters.

    Thread-safe under ``changed``.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.values: dict[str, bytes] = {}
        self.counts: dict[str, int] = {}


class InProcessMailbox:
    """One rank's mailbox if all ranks are threads of one process. Waits without polling."""

    def __init__(self, room: InProcessRoom, *, rank: int, size: int) -> None:
        self._room = room
        self.rank = rank
        self.size = size

    def post(self, key: str, value: bytes) -> None:
        with self._room.changed:
            self._room.values[key] = value
            self._room.changed.notify_all()

    def peek(self, key: str) -> bytes | None:
        with self._room.changed:
            return self._room.values.get(key)

    def wait(self, key: str, timeout_s: float) -> bytes | None:
        with self._room.changed:
            self._room.changed.wait_for(lambda: key in self._room.values, timeout_s)
            return self._room.values.get(key)

    def count(self, key: str, amount: int = 0) -> int:
        with self._room.changed:
            self._room.counts[key] = self._room.counts.get(key, 0) + amount
            return self._room.counts[key]

    def forget(self, key: str) -> None:
        with self._room.changed:
            self._room.values.pop(key, None)
