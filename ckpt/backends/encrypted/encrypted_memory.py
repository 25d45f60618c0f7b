"""Memory for stored bytes on their way, used again and again: new pages cost more time than the cipher does."""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Iterator

KEPT_BYTES_MAX = 256 << 20
"""Most memory kept for the next use: four packs. The kernel may take idle pieces of packs back when it is short."""

_KEPT_BYTES_MIN = 1 << 20
"""Smaller pieces come from the allocator, which keeps its own."""

_FREE_BYTES_MIN = 16 << 20
"""Idle pieces of this size are offered to the kernel: a millisecond of work. Smaller ones come back within moments."""

_HUGE_BYTES = 2 << 20
"""Pieces are multiples of a huge page, which takes one page fault instead of 512."""

_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
"""Private memory: the shared kind can neither be huge nor be offered to the kernel."""


class SpareMemory:
    """Hands out page-aligned memory and keeps what comes back, the last used longest. Thread-safe."""

    def __init__(self, kept_bytes_max: int = KEPT_BYTES_MAX) -> None:
        self._kept_bytes_max = kept_bytes_max
        self._idle: list[mmap.mmap] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def borrow(self, size_bytes: int) -> Iterator[memoryview]:
        """Memory that holds anything, until the end of the block: others write into it afterwards."""
        if size_bytes < _KEPT_BYTES_MIN:
            yield memoryview(bytearray(size_bytes))
            return
        piece = self._take(size_bytes) or _new(size_bytes)
        try:
            yield memoryview(piece)[:size_bytes]
        finally:
            self._give_back(piece)

    @property
    def kept_bytes(self) -> int:
        """Memory that is kept now."""
        with self._lock:
            return sum(len(piece) for piece in self._idle)

    def _take(self, size_bytes: int) -> mmap.mmap | None:
        with self._lock:
            fitting = [piece for piece in self._idle if len(piece) >= size_bytes]
            if not fitting:
                return None
            found = min(fitting, key=len)
            self._idle = [piece for piece in self._idle if piece is not found]
            return found

    def _give_back(self, piece: mmap.mmap) -> None:
        if len(piece) >= _FREE_BYTES_MIN and hasattr(mmap, "MADV_FREE"):
            _advise(piece, mmap.MADV_FREE)
        with self._lock:
            self._idle.append(piece)
            kept = sum(len(one) for one in self._idle)
            while kept > self._kept_bytes_max:
                kept -= len(self._idle.pop(0))  # its memory goes with its last view


def _new(size_bytes: int) -> mmap.mmap:
    piece = mmap.mmap(-1, -(-size_bytes // _HUGE_BYTES) * _HUGE_BYTES, **_PRIVATE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        _advise(piece, mmap.MADV_HUGEPAGE)
    return piece


def _advise(piece: mmap.mmap, advice: int) -> None:
    with contextlib.suppress(OSError):  # a kernel that does not know it; the memory is as good without
        piece.madvise(advice)
