"""The memory that a vault's objects lie in: where it comes from, and what is kept of it for the next object."""

from __future__ import annotations

import mmap
import resource

import numpy as np

from ckpt.errors import StoreFullError
from ckpt.staging.memory import Region, pages

SMALL_BYTES = 64 << 10
"""Smaller objects are plain memory: a memfd each would cost a descriptor for little."""

DESCRIPTORS_SHARE = 4
"""One in so many of the descriptors that this process may have is spent on objects; what lies beyond is memory without one."""

OVERSIZE = 1.25
"""Spare memory is used for objects down to this many times smaller."""


class Block:
    """Memory of one object: ``view`` is as long as the object, ``room_bytes`` what it costs."""

    __slots__ = ("_region", "room_bytes", "view")

    def __init__(self, size_bytes: int, region: Region | None) -> None:
        self._region = region
        self.room_bytes = region.size_bytes if region is not None else room_bytes(size_bytes)
        if region is not None:
            self.view = region.view[:size_bytes]
        elif size_bytes < SMALL_BYTES:
            self.view = memoryview(bytearray(size_bytes))
        else:
            self.view = memoryview(mmap.mmap(-1, size_bytes))

    def free(self) -> None:
        """Give the memory back; views of it that are still held stay readable."""
        self.view = memoryview(b"")
        if self._region is not None:
            self._region.close()

    def take(self) -> Region | None:
        """The region, for another object; this one must not be used any more."""
        self.view = memoryview(b"")
        region, self._region = self._region, None
        return region


class Blocks:
    """Makes blocks, and keeps up to ``spare_bytes_max`` of freed ones: fresh pages cost several times a copy into old ones.

    Not thread-safe: the vault's lock is over it.
    """

    def __init__(self, spare_bytes_max: int) -> None:
        self._spare_bytes_max = spare_bytes_max
        self._spare: list[Region] = []
        self._descriptors_max = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // DESCRIPTORS_SHARE
        self._descriptors = 0
        self.spare_bytes = 0
        """What is kept at the moment."""

    def make(self, size_bytes: int) -> Block:
        """A block, of spare memory where that fits. Raises StoreFullError where the system gives none."""
        if size_bytes < SMALL_BYTES:
            return Block(size_bytes, None)
        fitting = [one for one in self._spare if size_bytes <= one.size_bytes <= size_bytes * OVERSIZE]
        if fitting:
            region = min(fitting, key=lambda one: one.size_bytes)
            self._spare.remove(region)
            self.spare_bytes -= region.size_bytes
            return Block(size_bytes, region)
        try:
            if self._descriptors >= self._descriptors_max:
                return Block(size_bytes, None)
            region = Region(pages(size_bytes), name="ckpt-peer")
        except (OSError, MemoryError) as error:
            raise StoreFullError(f"the system gives no memory for an object. size_bytes={size_bytes}") from error
        self._descriptors += 1
        return Block(size_bytes, region)

    def spare_for(self, size_bytes: int) -> int:
        """The room of the spare memory that ``make`` would take, or 0."""
        fitting = (one.size_bytes for one in self._spare if size_bytes <= one.size_bytes <= size_bytes * OVERSIZE)
        return min(fitting, default=0) if size_bytes >= SMALL_BYTES else 0

    def free(self, block: Block) -> None:
        """Take a block back, whose bytes nobody reads any more: not the kernel either, which was given copies to send."""
        region = block.take()
        if region is None:
            block.free()
        elif self.spare_bytes + region.size_bytes > self._spare_bytes_max:
            self._drop(region)
        else:
            self._spare.append(region)
            self.spare_bytes += region.size_bytes

    def shrink(self, size_bytes: int) -> None:
        """Give at least ``size_bytes`` of what is spare back to the system, or all."""
        while self._spare and size_bytes > 0:
            region = self._spare.pop(0)
            self.spare_bytes -= region.size_bytes
            size_bytes -= region.size_bytes
            self._drop(region)

    def _drop(self, region: Region) -> None:
        self._descriptors -= 1
        region.close()


def copy_bytes(out: memoryview, data: memoryview) -> None:
    """Copy ``data`` into ``out``, which is as long; without the interpreter's lock, for numpy does it."""
    if data.nbytes:
        np.copyto(np.frombuffer(out, np.uint8), np.frombuffer(data, np.uint8))


def room_bytes(size_bytes: int) -> int:
    """What an object of this size is charged: whole pages, and one at least, for names and tables cost memory too."""
    return pages(max(1, size_bytes))
