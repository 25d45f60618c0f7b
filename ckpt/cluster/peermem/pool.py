"""A client's connections to one peer: used again, bounded in number, and never shared with a fork's child."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator

from ckpt.cluster.peermem.client import Connection
from ckpt.errors import UnavailableError


class _Own:
    """What one process has."""

    def __init__(self, connections_max: int) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.idle: list[Connection] = []
        self.lent: set[Connection] = set()
        self.free = threading.BoundedSemaphore(connections_max)


class Pool:
    """Lends connections that ``opener`` makes, ``connections_max`` at a time. Thread-safe.

    A fork's child starts with none: numbers and keys of a connection are for one process, or a MAC's nonce would come twice.
    """

    def __init__(self, opener: Callable[[], Connection], *, connections_max: int, lend_s: float, idle_s: float) -> None:
        self._opener = opener
        self._connections_max = connections_max
        self._lend_s = lend_s
        self._idle_s = idle_s
        self._closed = False
        self._own = _Own(connections_max)

    @contextlib.contextmanager
    def lend(self, *, fresh: bool = False) -> Iterator[tuple[Connection, bool]]:
        """A connection for one call, and whether it was used before; ``fresh`` ones never were. Kept afterwards while usable.

        Raises UnavailableError where none becomes free in time, and as ``opener``.
        """
        own = self._mine()
        if self._closed:
            raise UnavailableError("the store was closed; open it again")
        if not own.free.acquire(timeout=self._lend_s):
            raise UnavailableError(f"all connections to this peer are busy. waited_s={self._lend_s:g}")
        try:
            found = None if fresh else self._idle(own)
            connection = found or self._opener()
            try:
                self._note_lent(own, connection)
                yield connection, found is not None
            finally:
                self._give_back(own, connection)
        finally:
            own.free.release()

    def close(self) -> None:
        """End all connections: calls that are under way break. Idempotent."""
        self._closed = True
        own = self._mine()
        with own.lock:
            idle, own.idle = own.idle, []
            for connection in own.lent:
                connection.end()
        for connection in idle:
            connection.close()

    def _mine(self) -> _Own:
        own = self._own
        if own.pid != os.getpid():
            for connection in own.idle:
                connection.close()  # this process's copy of the descriptor
            self._own = own = _Own(self._connections_max)
        return own

    def _idle(self, own: _Own) -> Connection | None:
        old_s = time.monotonic() - self._idle_s
        while True:
            with own.lock:
                connection = own.idle.pop() if own.idle else None
            if connection is None or (connection.rested_s > old_s and connection.quiet()):
                return connection
            connection.close()

    def _note_lent(self, own: _Own, connection: Connection) -> None:
        with own.lock:
            own.lent.add(connection)
            if self._closed:  # since it was asked for
                connection.end()

    def _give_back(self, own: _Own, connection: Connection) -> None:
        connection.rest()
        with own.lock:
            own.lent.discard(connection)
            if connection.usable and not self._closed:
                own.idle.append(connection)
                return
        connection.close()
