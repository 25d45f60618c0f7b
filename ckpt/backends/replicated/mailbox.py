"""Where answers of stores arrive, until nobody waits for them any more."""

from __future__ import annotations

import queue
import threading
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Filled by the threads of stores, emptied by the one thread that asked them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._items: queue.SimpleQueue[T] = queue.SimpleQueue()
        self._closed = False

    def closed(self) -> bool:
        """Whether nobody waits any more; what has not begun need not begin."""
        return self._closed

    def put(self, item: T) -> bool:
        """Deliver; False where nobody waits any more, and whatever comes with ``item`` stays the sender's."""
        with self._lock:
            if not self._closed:
                self._items.put(item)
            return not self._closed

    def get(self, timeout_s: float) -> T | None:
        """The next item, or None after ``timeout_s``."""
        try:
            return self._items.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            return None

    def close(self) -> list[T]:
        """Wait no longer; returns what was delivered and not taken. Idempotent."""
        with self._lock:
            self._closed = True
        items = []
        while not self._items.empty():
            items.append(self._items.get_nowait())
        return items
