"""Memory that stores read from and write to, of bounded size: a hung call keeps what it has, and
only its store feels it."""

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

_LOOK_S = 0.5


class ReplicaMemory:
    """Each store may hold an equal share of ``budget_bytes``, or one buffer of any size.
    Thread-safe.

    Shares are apart, so that a hung store's buffers never keep a well one waiting. Buffers are
    page-aligned, for direct I/O, and a quarter of the budget is kept for reuse: fresh memory costs
    more than the copy into it.
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

    def claim(
        self,
        place: int,
        size_bytes: int,
        *,
        until_s: float = 0.0,
        given_up: Callable[[], bool] = bool,
    ) -> bool:
        """Charge ``size_bytes`` to the store at ``place``; waits till ``until_s`` (monotonic) or
        until ``given_up``.

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

    def recycle(self, buffer: PooledBuffer) -> None:
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


# The one copy of a put's bytes that several stores share.


class SharedCopy:
    """One copy of the caller's bytes, for all stores that need one. The last of them to let go
    gives it back."""

    def __init__(self, memory: ReplicaMemory, data: Sequence[Buffer], size_bytes: int) -> None:
        self._memory = memory
        self._data = data
        self._size_bytes = size_bytes
        self._region: PooledBuffer | None = None
        self._holders = 0
        self._lock = threading.Lock()

    def acquire(self) -> list[memoryview]:
        """The copy, made now where it is the first. Only while the caller's put has not
        returned."""
        with self._lock:
            if self._region is None:
                self._region = self._memory.buffer(self._size_bytes)
                _gather(self._data, self._region.view)
            self._holders += 1
            return [self._region.view]

    def forget_source(self) -> None:
        """The caller's memory may not be read any more."""
        self._data = ()

    def release(self) -> None:
        """One of its holders is through with it."""
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


# The caller's memory, lent to stores for as long as its put lasts.
#
# A call that hangs in a store cannot be ended, and what it reads after the caller took its memory
# back is anything. Such bytes may reach a temporary file; they must not get the object's name. A
# store that can look just before that takes the memory itself, without a copy.


@runtime_checkable
class Borrower(Protocol):
    """A store that can be lent memory. A wrapper around one is none unless it says so: it may have
    copied too late."""

    def put_lent(
        self,
        key: str,
        data: Sequence[Buffer],
        still_lent: Callable[[], None],
        *,
        create_only: bool = False,
    ) -> None:
        """As ``put``, of buffers whose owner may take them back and change them at any moment.

        ``still_lent`` is called once all bytes are read (or copied) and before the object can be
        seen under its key. Where it raises, nothing is stored and ``put_lent`` raises the same.
        """
        ...


def borrower_of(store: Backend) -> Borrower | None:
    """``store`` as one that can be lent memory. One whose class overrides ``put`` alone is none: it
    means to see every put."""
    if not isinstance(store, Borrower):
        return None
    owners = [cls for cls in type(store).__mro__ if "put" in vars(cls) or "put_lent" in vars(cls)]
    return store if owners and "put_lent" in vars(owners[0]) else None


class TakenBackError(UnavailableError):
    """The memory was taken back before the store had read it all; nothing was stored."""

    code = "taken-back"


class Loan:
    """One put's memory. The owner takes it back before anybody may write to it again."""

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
        """Raise TakenBackError where the memory was taken back: then what was read is not what was
        meant.

        All that was read before a call that returns was right: the owner takes back first and
        writes afterwards.
        """
        if self._over:
            raise TakenBackError(
                f"the put is over, and its memory is used anew. key={self._key}; nothing was stored"
            )


def is_immutable(data: Sequence[Buffer]) -> bool:
    """Whether nobody can change what ``data`` holds."""
    return all(isinstance(one.obj if isinstance(one, memoryview) else one, bytes) for one in data)
