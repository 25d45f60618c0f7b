"""Memory that stores read from and write to, bounded for each store, and the caller's lent memory.

A hung call keeps the memory that it has, and only its own store is limited by that.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from ckpt.backends.base import Backend, Buffer
from ckpt.errors import UnavailableError

BUDGET_BYTES = 512 << 20
"""Memory for all stores together."""

REUSED_BYTES_MIN = 64 << 10
"""Smaller buffers are cheaper to make than to keep."""

_POLL_S = 0.5
"""How often a waiting claim checks ``given_up``."""


class ReplicaMemory:
    """A budget of memory in which each store may hold an equal share, or one buffer of any size.

    Shares are separate, so that a hung store's buffers never delay a healthy one; the exception for
    one buffer lets a store take a pack that is larger than its share. Buffers are page-aligned, for
    direct I/O. A quarter of the budget is kept for reuse: fresh memory costs more than the copy
    into it. Thread-safe.
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
        """Memory held now, in total."""
        return sum(self._used)

    def claim(
        self,
        index: int,
        size_bytes: int,
        *,
        until_s: float = 0.0,
        given_up: Callable[[], bool] = bool,
    ) -> bool:
        """Charge ``size_bytes`` to store ``index``; returns whether there was room.

        Waits for room until ``until_s`` (monotonic) or until ``given_up``.
        """
        with self._change:
            # The first buffer is always granted, or an object larger than the share could never be
            # moved.
            while self._used[index] and self._used[index] + size_bytes > self._share_bytes:
                left_s = until_s - time.monotonic()
                if left_s <= 0 or given_up():
                    return False
                self._change.wait(min(left_s, _POLL_S))
            self._used[index] += size_bytes
            return True

    def charge(self, index: int, size_bytes: int) -> None:
        """Charge memory that is already held to the store that keeps it from being freed."""
        with self._change:
            self._used[index] += size_bytes

    def free(self, index: int, size_bytes: int) -> None:
        """Return what was claimed or charged."""
        with self._change:
            self._used[index] -= size_bytes
            self._change.notify_all()

    def buffer(self, size_bytes: int) -> PooledBuffer:
        """Memory of that size with arbitrary content. Claim it first."""
        if size_bytes < REUSED_BYTES_MIN:
            return PooledBuffer(memoryview(bytearray(size_bytes)), None)
        with self._change:
            # At most twice the size, so that a small buffer does not occupy a large region.
            fits = [kept for kept in self._kept if size_bytes <= len(kept) <= 2 * size_bytes]
            if fits:
                smallest = min(fits, key=len)
                self._kept.remove(smallest)
                self._kept_bytes -= len(smallest)
                return PooledBuffer(memoryview(smallest)[:size_bytes], smallest)
        fresh = mmap.mmap(-1, size_bytes + -size_bytes % mmap.PAGESIZE)
        return PooledBuffer(memoryview(fresh)[:size_bytes], fresh)

    def recycle(self, buffer: PooledBuffer) -> None:
        """Keep ``buffer`` for reuse. No thread may use it any more."""
        region = buffer.region
        if region is None:
            return
        with self._change:
            if self._kept_bytes + len(region) <= self._kept_bytes_max:
                self._kept.append(region)
                self._kept_bytes += len(region)


class PooledBuffer:
    """``view`` is the start of ``region``, which is None for small buffers."""

    __slots__ = ("region", "view")

    def __init__(self, view: memoryview, region: mmap.mmap | None) -> None:
        self.view = view
        self.region = region


# ---- Shared copy: one copy of a put's bytes for several stores.


class SharedCopy:
    """One copy of the caller's bytes, for all stores that need one. The last holder frees it."""

    def __init__(self, memory: ReplicaMemory, data: Sequence[Buffer], size_bytes: int) -> None:
        self._memory = memory
        self._data = data
        self._size_bytes = size_bytes
        self._region: PooledBuffer | None = None
        self._holders = 0
        self._lock = threading.Lock()

    def acquire(self) -> list[memoryview]:
        """The copy, made on first use. Only until the caller's put has returned."""
        with self._lock:
            if self._region is None:
                self._region = self._memory.buffer(self._size_bytes)
                _gather(self._data, self._region.view)
            self._holders += 1
            return [self._region.view]

    def forget_source(self) -> None:
        """The caller's memory must not be read any more."""
        self._data = ()

    def release(self) -> None:
        """One holder no longer needs it."""
        with self._lock:
            self._holders -= 1
            region = None if self._holders else self._region
            if region is not None:
                self._region = None
        if region is not None:
            self._memory.recycle(region)


def _gather(data: Sequence[Buffer], out: memoryview) -> None:
    at = 0
    for buffer in data:
        piece = np.frombuffer(memoryview(buffer).cast("B"), np.uint8) if len(buffer) else None
        if piece is not None:
            np.copyto(np.frombuffer(out, np.uint8)[at : at + piece.size], piece)
            at += piece.size


# ---- Loan: the caller's memory, lent to stores as long as its put lasts.
#
# A hung call in a store cannot be ended, and after the caller took its memory back the call reads
# arbitrary bytes. Such bytes may reach a temporary file, but must not get the object's name. A
# store that can check the loan just before naming the object takes the memory itself, without a
# copy.


@runtime_checkable
class Borrower(Protocol):
    """A store that can be lent memory.

    A wrapper around one does not count unless it implements ``put_lent`` itself: it may have copied
    the memory too late.
    """

    def put_lent(
        self,
        key: str,
        data: Sequence[Buffer],
        still_lent: Callable[[], None],
        *,
        create_only: bool = False,
    ) -> None:
        """As ``put``, with buffers whose owner may take them back and change them at any moment.

        The store calls ``still_lent`` once all bytes are read or copied, and before the object is
        visible under its key. If that raises, the store keeps nothing and ``put_lent`` raises the
        same error.
        """
        ...


def borrower_of(store: Backend) -> Borrower | None:
    """``store`` as a Borrower, or None.

    A class that overrides only ``put`` does not count: it means to see every put.
    """
    if not isinstance(store, Borrower):
        return None
    owners = [cls for cls in type(store).__mro__ if "put" in vars(cls) or "put_lent" in vars(cls)]
    return store if owners and "put_lent" in vars(owners[0]) else None


class TakenBackError(UnavailableError):
    """The memory was taken back before the store had read all of it; nothing was stored."""

    code = "taken-back"


class Loan:
    """The memory of one put. Its owner takes it back before anyone may write to it again."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._over = False

    @property
    def over(self) -> bool:
        """Whether it was taken back."""
        return self._over

    def take_back(self) -> None:
        """From now on no store may use what it reads."""
        self._over = True

    def still_lent(self) -> None:
        """Raise TakenBackError if the memory was taken back: then the bytes read may be wrong.

        If it returns, all bytes read before the call were right, because the owner takes the memory
        back before writing to it.
        """
        if self._over:
            raise TakenBackError(
                f"the put is over and its memory may be reused. key={self._key}; nothing was stored"
            )


def is_immutable(data: Sequence[Buffer]) -> bool:
    """Whether the contents of ``data`` can never change."""
    return all(
        isinstance(buffer.obj if isinstance(buffer, memoryview) else buffer, bytes)
        for buffer in data
    )
