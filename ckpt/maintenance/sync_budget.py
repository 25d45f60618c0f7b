"""How much memory copies in flight may take together."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Budget:
    """Lets in what fits below ``limit_bytes``, and what is larger alone. Thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._used_bytes = 0
        self._changed = threading.Condition()

    @contextmanager
    def holding(self, size_bytes: int) -> Iterator[None]:
        """Wait until ``size_bytes`` fit, and hold them. Never hold two at once: both would wait for each other."""
        with self._changed:
            self._changed.wait_for(lambda: not self._used_bytes or self._used_bytes + size_bytes <= self._limit_bytes)
            self._used_bytes += size_bytes
        try:
            yield
        finally:
            with self._changed:
                self._used_bytes -= size_bytes
                self._changed.notify_all()
