"""The one copy of a put's bytes that several stores share."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from ckpt.backends.base import Buffer
from ckpt.backends.replicated.buffers import Memory, PooledBuffer


class Copied:
    """One copy of the caller's bytes, for all stores that need one. The last of them to let go gives it back."""

    def __init__(self, memory: Memory, data: Sequence[Buffer], size_bytes: int) -> None:
        self._memory = memory
        self._data = data
        self._size_bytes = size_bytes
        self._region: PooledBuffer | None = None
        self._holders = 0
        self._lock = threading.Lock()

    def hold(self) -> list[memoryview]:
        """The copy, made now where it is the first. Only while the caller's put has not returned."""
        with self._lock:
            if self._region is None:
                self._region = self._memory.buffer(self._size_bytes)
                _gather(self._data, self._region.view)
            self._holders += 1
            return [self._region.view]

    def over(self) -> None:
        """The caller's memory may not be read any more."""
        self._data = ()

    def let_go(self) -> None:
        """One of its holders is through with it."""
        with self._lock:
            self._holders -= 1
            region = None if self._holders else self._region
            if region is not None:
                self._region = None
        if region is not None:
            self._memory.reuse(region)


def _gather(data: Sequence[Buffer], out: memoryview) -> None:
    at = 0
    for buffer in data:
        piece = np.frombuffer(memoryview(buffer).cast("B"), np.uint8) if len(buffer) else None
        if piece is not None:
            np.copyto(np.frombuffer(out, np.uint8)[at : at + piece.size], piece)
            at += piece.size
