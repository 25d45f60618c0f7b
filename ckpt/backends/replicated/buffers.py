"""Memory that stores read from and write to, of bounded size: a hung call keeps what it has, and only its store feels it."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable

BUDGET_BYTES = 512 << 20
"""Memory for all stores together."""

REUSED_BYTES_MIN = 64 << 10
"""Smaller buffers are cheaper to make than to keep."""

_LOOK_S = 0.5


class Memory:
    """Each store may hold an equal share of ``budget_bytes``, or one buffer of any size. Thread-safe.

    Shares are apart, so that a hung store's buffers never keep a well one waiting. Buffers are page-aligned, for direct I/O,
    and a quarter of the budget is kept for reuse: fresh memory costs more than the copy into it.
    """

    def __init__(self, stores: int, *, budget_bytes: int = BUDGET_BYTES) -> None:
        self._share_bytes = budget_bytes // stores
        self._kept_bytes_max = budget_bytes // 4
        self._change = threading.Condition()
        self._used = [0] * stores
        self._kept: list[mmap.mmap] = []
        self._kept_bytes = 0

    @property
    def used_bytes(self) -> int:
        """What is held now, in all."""
        return sum(self._used)

    def claim(self, place: int, size_bytes: int, *, until_s: float = 0.0, given_up: Callable[[], bool] = bool) -> bool:
        """Charge ``size_bytes`` to the store at ``place``; waits till ``until_s`` (monotonic) or until ``given_up``.

        Returns whether there was room.
        """
        with self._change:
            while self._used[place] and self._used[place] + size_bytes > self._share_bytes:
                left_s = until_s - time.monotonic()
                if left_s <= 0 or given_up():
                    return False
                self._change.wait(min(left_s, _LOOK_S))
            self._used[place] += size_bytes
            return True

    def charge(self, place: int, size_bytes: int) -> None:
        """Charge what is held already to the store that keeps it from being freed."""
        with self._change:
            self._used[place] += size_bytes

    def free(self, place: int, size_bytes: int) -> None:
        """Give back what was claimed."""
        with self._change:
            self._used[place] -= size_bytes
            self._change.notify_all()

    def buffer(self, size_bytes: int) -> PooledBuffer:
        """Memory of that size, holding anything. Claim it first."""
        if size_bytes < REUSED_BYTES_MIN:
            return PooledBuffer(memoryview(bytearray(size_bytes)), None)
        with self._change:
            fits = [kept for kept in self._kept if size_bytes <= len(kept) <= 2 * size_bytes]
            if fits:
                found = min(fits, key=len)
                self._kept.remove(found)
                self._kept_bytes -= len(found)
                return PooledBuffer(memoryview(found)[:size_bytes], found)
        fresh = mmap.mmap(-1, size_bytes + -size_bytes % mmap.PAGESIZE)
        return PooledBuffer(memoryview(fresh)[:size_bytes], fresh)

    def reuse(self, buffer: PooledBuffer) -> None:
        """Keep ``buffer`` for later; nobody may touch it any more."""
        region = buffer.region
        if region is None:
            return
        with self._change:
            if self._kept_bytes + len(region) <= self._kept_bytes_max:
                self._kept.append(region)
                self._kept_bytes += len(region)


class PooledBuffer:
    """``view`` of ``region``, which is None for small ones."""

    __slots__ = ("region", "view")

    def __init__(self, view: memoryview, region: mmap.mmap | None) -> None:
        self.view = view
        self.region = region
