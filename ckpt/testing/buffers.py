"""Memory to put: on page boundaries or just behind them, random or of one byte."""

from __future__ import annotations

import mmap
import random


def aligned_memory(size_bytes: int) -> memoryview:
    """Writable zeroed memory that starts on a page boundary."""
    return memoryview(mmap.mmap(-1, max(1, size_bytes)))[:size_bytes]


def buffer(size_bytes: int, *, aligned: bool, seed: int = 0, fill: int | None = None) -> memoryview:
    """A buffer of bytes made from ``seed``, or of the byte ``fill``, that starts on a page boundary or one byte behind."""
    memory = aligned_memory(size_bytes + 1)
    out = memory[:size_bytes] if aligned else memory[1:]
    out[:] = random.Random(seed).randbytes(size_bytes) if fill is None else bytes([fill]) * size_bytes
    return out
