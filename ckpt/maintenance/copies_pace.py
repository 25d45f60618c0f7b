"""How fast upkeep may read and write, and that it can be told to stop: a token bucket that everything passes through."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

BURST_S = 0.25
"""What was not used may be made up for this long; more would be felt by whoever shares the link."""


class Stopped(Exception):  # noqa: N818  a word to the caller, not a fault
    """Upkeep was told to stop. Never leaves the room."""


class Pace:
    """Lets ``bytes_per_s`` through in the long run (None: all), and raises Stopped once ``stop`` is set. Thread-safe.

    ``wait`` is given seconds and returns early, True, where ``stop`` is set meanwhile.
    """

    def __init__(
        self,
        bytes_per_s: float | None = None,
        *,
        stop: threading.Event | None = None,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], bool] | None = None,
    ) -> None:
        self._bytes_per_s = bytes_per_s
        self._stop = stop or threading.Event()
        self._clock = clock
        self._wait = wait or self._stop.wait
        self._lock = threading.Lock()
        self._free_s = clock()
        """When all that was let through so far has been paid for."""
        self.moved_bytes = 0

    def take(self, size_bytes: int) -> None:
        """Wait until ``size_bytes`` may move. Raises Stopped."""
        self.check()
        with self._lock:
            self.moved_bytes += size_bytes
            if self._bytes_per_s is None:
                return
            now = self._clock()
            start = max(self._free_s, now - BURST_S)
            self._free_s = start + size_bytes / self._bytes_per_s
        if start > now and self._wait(start - now):
            raise Stopped

    def check(self) -> None:
        """Raises Stopped where ``stop`` is set."""
        if self._stop.is_set():
            raise Stopped
