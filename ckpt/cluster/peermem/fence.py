"""The highest epoch that this node has seen. What an older one asks for changes nothing, at whatever moment it gets there."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from ckpt.errors import FencedError


class Fence:
    """Thread-safe. The epoch only grows."""

    def __init__(self, epoch: int = 0) -> None:
        self._lock = threading.Lock()
        self._epoch = epoch

    @property
    def epoch(self) -> int:
        """The highest epoch seen."""
        return self._epoch

    def see(self, epoch: int) -> None:
        """An epoch that exists."""
        with self._lock:
            self._epoch = max(self._epoch, epoch)

    @contextlib.contextmanager
    def holding(self, epoch: int) -> Iterator[None]:
        """For a short block that changes something in the name of ``epoch``: none newer is seen meanwhile.

        Raises FencedError where one was seen before.
        """
        with self._lock:
            if epoch < self._epoch:
                raise FencedError(f"a newer epoch is open. epoch={epoch} known={self._epoch}")
            yield
