"""Memory that a node keeps for its peers: whole objects within a budget, gone with the process.

Beside it, a node's server can show read-only sources of its own, such as its slots.
"""

from __future__ import annotations

import contextlib
import mmap
import resource
import threading
import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

import numpy as np

from ckpt.backends.base import Stat, check_key, check_prefix
from ckpt.errors import InternalError, KeyExistsError, NotFoundError, StoreFullError, UsageError
from ckpt.staging.memory import Region, available_bytes, round_to_pages

# ---- blocks: the memory of objects

SMALL_BYTES = 64 << 10
"""Smaller objects are plain memory: a memfd for each would cost a descriptor for little."""

DESCRIPTORS_SHARE = 4
"""One in so many of this process's descriptors may be used for objects; others have memory without
one.
"""

OVERSIZE = 1.25
"""Spare memory is used for objects down to this many times smaller."""


class MemoryBlock:
    """Memory of one object. ``view`` is as long as the object; ``room_bytes`` are charged."""

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
        """Give the memory back; views that readers still hold stay valid."""
        self.view = memoryview(b"")
        if self._region is not None:
            self._region.close()

    def take(self) -> Region | None:
        """Take the region out, for another object. This block must not be used any more."""
        self.view = memoryview(b"")
        region, self._region = self._region, None
        return region


class BlockPool:
    """Makes blocks, and keeps up to ``spare_bytes_max`` of freed ones for reuse.

    Fresh pages cost several times a copy into used ones. Not thread-safe: PeerMemory holds its
    lock.
    """

    def __init__(self, spare_bytes_max: int) -> None:
        self._spare_bytes_max = spare_bytes_max
        self._spare: list[Region] = []
        self._descriptors_max = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // DESCRIPTORS_SHARE
        self._descriptors = 0
        self.spare_bytes = 0
        """Memory kept at the moment."""

    def make(self, size_bytes: int) -> MemoryBlock:
        """A block, of spare memory if some fits. Raises StoreFullError if the system has none."""
        if size_bytes < SMALL_BYTES:
            return MemoryBlock(size_bytes, None)
        fitting = [
            region
            for region in self._spare
            if size_bytes <= region.size_bytes <= size_bytes * OVERSIZE
        ]
        if fitting:
            region = min(fitting, key=lambda entry: entry.size_bytes)
            self._spare.remove(region)
            self.spare_bytes -= region.size_bytes
            return MemoryBlock(size_bytes, region)
        try:
            # Beyond its share of descriptors it takes memory without one, rather than refuse.
            if self._descriptors >= self._descriptors_max:
                return MemoryBlock(size_bytes, None)
            region = Region(round_to_pages(size_bytes), name="ckpt-peer")
        except (OSError, MemoryError) as error:
            raise StoreFullError(
                f"the system gives no memory for an object. size_bytes={size_bytes}"
            ) from error
        self._descriptors += 1
        return MemoryBlock(size_bytes, region)

    def spare_for(self, size_bytes: int) -> int:
        """The size of the spare memory that ``make`` would use, or 0."""
        fitting = (
            region.size_bytes
            for region in self._spare
            if size_bytes <= region.size_bytes <= size_bytes * OVERSIZE
        )
        return min(fitting, default=0) if size_bytes >= SMALL_BYTES else 0

    def free(self, block: MemoryBlock) -> None:
        """Take back a block that no reader holds; the kernel has copied what it sends."""
        region = block.take()
        if region is None:
            block.free()
        elif self.spare_bytes + region.size_bytes > self._spare_bytes_max:
            self._drop(region)
        else:
            self._spare.append(region)
            self.spare_bytes += region.size_bytes

    def shrink(self, size_bytes: int) -> None:
        """Return at least ``size_bytes`` of spare memory to the system, or all of it."""
        while self._spare and size_bytes > 0:
            region = self._spare.pop(0)
            self.spare_bytes -= region.size_bytes
            size_bytes -= region.size_bytes
            self._drop(region)

    def _drop(self, region: Region) -> None:
        self._descriptors -= 1
        region.close()


def copy_bytes(out: memoryview, data: memoryview) -> None:
    """Copy ``data`` into ``out``, which is as long. Releases the GIL, since numpy does it."""
    if data.nbytes:
        np.copyto(np.frombuffer(out, np.uint8), np.frombuffer(data, np.uint8))


def room_bytes(size_bytes: int) -> int:
    """What an object is charged: whole pages, and at least one, since its name costs memory too."""
    return round_to_pages(max(1, size_bytes))


# ---- served objects, and read-only sources


def never_changes() -> bool:
    """For bytes that do not change while they are sent."""
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedObject:
    """An object's bytes while they are sent.

    If ``fd`` is given, ``view`` is a mapping of it at ``offset_bytes`` and the kernel sends its
    pages; they must not be reused soon. ``unchanged`` is called when all bytes were sent; if it
    returns False, the reader gets an error. ``version`` tells one content of a key from the next,
    within one incarnation of the server.
    """

    view: memoryview
    fd: int | None
    offset_bytes: int
    version: int
    modified_unix_s: float
    unchanged: Callable[[], bool] = field(default=never_changes)


class ServedSource(Protocol):
    """Read-only objects below one prefix, such as a node's slots. Thread-safe."""

    @property
    def prefix(self) -> str:
        """The prefix of all its keys; no other source or object has keys with it."""
        ...

    def reading(self, key: str) -> AbstractContextManager[ServedObject]:
        """The object, pinned meanwhile if the source can. Raises NotFoundError."""
        ...

    def stat(self, key: str) -> Stat | None:
        """Size and time of the object, or None."""
        ...

    def list(self) -> list[Stat]:
        """All objects in key order; there are few."""
        ...


OBJECTS_MAX = 65_536
"""Objects of one node's peer memory, including those being received."""

ASKED_BYTES_MIN = 1 << 20
"""For smaller objects the system is not asked how much memory is left."""


class TooLargeError(StoreFullError):
    """The object can never fit, however much is deleted."""

    code = "too-large"


@dataclass(frozen=True, slots=True)
class PeerMemoryStats:
    """Memory charged, in bytes; the sum never exceeds the budget.

    ``objects_bytes``: of objects that can be read; ``removed_bytes``: of deleted or replaced
    objects that are still being read; ``incoming_bytes``: of puts under way; ``spare_bytes``: kept
    for reuse.
    """

    objects: int
    objects_bytes: int
    removed_bytes: int
    incoming_bytes: int
    spare_bytes: int
    budget_bytes: int

    @property
    def total_bytes(self) -> int:
        """All memory in use."""
        return self.objects_bytes + self.removed_bytes + self.incoming_bytes + self.spare_bytes


@dataclass(slots=True, eq=False)
class _Object:
    key: str
    size_bytes: int
    block: MemoryBlock
    version: int = 0
    modified_unix_s: float = 0.0
    pins: int = 0
    listed: bool = field(default=False)


class IncomingObject:
    """Memory for an object that is being received. It is not visible before ``publish``."""

    __slots__ = ("_memory", "_object", "key", "view")

    def __init__(self, memory: PeerMemory, entry: _Object) -> None:
        self._memory = memory
        self._object: _Object | None = entry
        self.key = entry.key
        self.view = entry.block.view
        """Every byte must be written: memory is reused."""

    def publish(self, *, create_only: bool = False) -> int:
        """Make it the object at its key, at once and whole; returns its version.

        Raises KeyExistsError.
        """
        entry = self._object
        if entry is None:
            raise InternalError(f"an object is published twice. key={self.key}")
        self._memory._publish(entry, create_only=create_only)
        self._object = None
        return entry.version

    def abandon(self) -> None:
        """Give the memory back, unless it was published. Idempotent."""
        entry, self._object = self._object, None
        self.view = memoryview(b"")
        if entry is not None:
            self._memory._abandon(entry)


class PeerMemory:
    """Objects by key, whole or not at all, within ``budget_bytes`` of memory. Thread-safe.

    Nothing is evicted: an object goes by ``delete``, ``retain`` or another put of its key; a mirror
    that disappeared silently would be worse than a put that is refused. A replaced or deleted
    object stays for its current readers. ``spare_bytes_max`` (default: half of the budget) of freed
    memory is kept for reuse. ``available`` returns how much memory the machine has left.

    Over the limit of attributes: budget, objects and spare memory change together under one lock.
    """

    def __init__(
        self,
        budget_bytes: int,
        *,
        object_bytes_max: int | None = None,
        spare_bytes_max: int | None = None,
        objects_max: int = OBJECTS_MAX,
        available: Callable[[], int | None] = available_bytes,
    ) -> None:
        if budget_bytes <= 0:
            raise UsageError(f"peer memory without a budget. budget_bytes={budget_bytes}")
        self.budget_bytes = budget_bytes
        self.object_bytes_max = (
            budget_bytes if object_bytes_max is None else min(object_bytes_max, budget_bytes)
        )
        self._objects_max = objects_max
        self._available = available
        self._blocks = BlockPool(budget_bytes // 2 if spare_bytes_max is None else spare_bytes_max)
        self._lock = threading.Lock()
        self._objects: dict[str, _Object] = {}
        self._keys: list[str] = []
        self._versions = 0
        self._incoming_count = 0
        self._objects_bytes = self._removed_bytes = self._incoming_bytes = 0

    @contextlib.contextmanager
    def incoming(self, key: str, size_bytes: int) -> Iterator[IncomingObject]:
        """Memory for an object of ``size_bytes``, freed at the end unless it was published.

        Raises TooLargeError and StoreFullError before any memory is taken.
        """
        check_key(key)
        incoming = IncomingObject(self, self._reserve(key, size_bytes))
        try:
            yield incoming
        finally:
            incoming.abandon()

    @contextlib.contextmanager
    def reading(self, key: str) -> Iterator[ServedObject]:
        """The object at ``key``; its bytes stay unchanged until the end. Raises NotFoundError."""
        check_key(key)
        with self._lock:
            entry = self._objects.get(key)
            if entry is None:
                raise NotFoundError(f"no such object. key={key}")
            entry.pins += 1
            served = ServedObject(
                view=entry.block.view,
                fd=None,
                offset_bytes=0,
                version=entry.version,
                modified_unix_s=entry.modified_unix_s,
            )
        try:
            yield served
        finally:
            with self._lock:
                entry.pins -= 1
                self._free_unused(entry)

    def stat(self, key: str) -> Stat | None:
        """Size and time of the object, or None."""
        check_key(key)
        with self._lock:
            entry = self._objects.get(key)
            return None if entry is None else _stat(entry)

    def list(
        self, prefix: str = "", *, after: str = "", entries_max: int | None = None
    ) -> list[Stat]:
        """Objects whose key starts with ``prefix`` and is greater than ``after``, in key order; at
        most ``entries_max``.
        """
        check_prefix(prefix)
        entries: list[Stat] = []
        with self._lock:
            at = max(bisect_left(self._keys, prefix), bisect_right(self._keys, after))
            while at < len(self._keys) and (entries_max is None or len(entries) < entries_max):
                if not self._keys[at].startswith(prefix):
                    break
                entries.append(_stat(self._objects[self._keys[at]]))
                at += 1
        return entries

    def delete(self, key: str) -> bool:
        """Remove the object; says whether there was one."""
        check_key(key)
        with self._lock:
            return self._remove(key)

    def retain(self, prefixes: Collection[str]) -> int:
        """Remove every object whose key has none of ``prefixes``; says how many."""
        starts = tuple(check_prefix(prefix) for prefix in prefixes)
        with self._lock:
            removed = [key for key in self._keys if not key.startswith(starts)]
            for key in removed:
                self._remove(key)
        return len(removed)

    def stats(self) -> PeerMemoryStats:
        """The memory in use now."""
        with self._lock:
            return PeerMemoryStats(
                len(self._objects),
                self._objects_bytes,
                self._removed_bytes,
                self._incoming_bytes,
                self._blocks.spare_bytes,
                self.budget_bytes,
            )

    def _reserve(self, key: str, size_bytes: int) -> _Object:
        room = room_bytes(size_bytes)
        if size_bytes > self.object_bytes_max or room > self.budget_bytes:
            raise TooLargeError(
                f"larger than any object may be. size_bytes={size_bytes} "
                f"limit={self.object_bytes_max}"
            )
        with self._lock:
            # Checked and taken under one lock, so that concurrent puts can't exceed the budget
            # together.
            spare = self._blocks.spare_for(size_bytes)
            used = self._objects_bytes + self._removed_bytes + self._incoming_bytes
            if len(self._objects) + self._incoming_count >= self._objects_max:
                raise StoreFullError(
                    f"too many objects. count={len(self._objects)} limit={self._objects_max}"
                )
            if used + (spare or room) > self.budget_bytes:
                raise StoreFullError(
                    f"the budget is used up. size_bytes={size_bytes} used_bytes={used} "
                    f"budget_bytes={self.budget_bytes}"
                )
            if not spare:
                # Spare memory counts within the budget, so it makes room for the new object.
                self._blocks.shrink(used + room + self._blocks.spare_bytes - self.budget_bytes)
                self._check_system(size_bytes)
            block = self._blocks.make(size_bytes)
            self._incoming_count += 1
            self._incoming_bytes += block.room_bytes
            return _Object(key, size_bytes, block)

    def _check_system(self, size_bytes: int) -> None:
        if (
            size_bytes >= ASKED_BYTES_MIN
            and (left := self._available()) is not None
            and size_bytes > left
        ):
            raise StoreFullError(
                f"the machine is short of memory. size_bytes={size_bytes} available_bytes={left}"
            )

    def _publish(self, entry: _Object, *, create_only: bool) -> None:
        with self._lock:
            if create_only and entry.key in self._objects:
                raise KeyExistsError(f"the key is taken. key={entry.key}")
            # Under one lock: a reader finds the old object or the new one, and never none.
            self._remove(entry.key)
            self._incoming_count -= 1
            self._incoming_bytes -= entry.block.room_bytes
            self._objects_bytes += entry.block.room_bytes
            self._versions += 1
            entry.version, entry.modified_unix_s, entry.listed = self._versions, time.time(), True
            self._objects[entry.key] = entry
            insort(self._keys, entry.key)

    def _abandon(self, entry: _Object) -> None:
        with self._lock:
            self._incoming_count -= 1
            self._incoming_bytes -= entry.block.room_bytes
            self._blocks.free(entry.block)

    def _remove(self, key: str) -> bool:
        """Make an object invisible, and free its memory once it has no readers."""
        entry = self._objects.pop(key, None)
        if entry is None:
            return False
        del self._keys[bisect_left(self._keys, key)]
        entry.listed = False
        self._objects_bytes -= entry.block.room_bytes
        self._removed_bytes += entry.block.room_bytes
        self._free_unused(entry)
        return True

    def _free_unused(self, entry: _Object) -> None:
        # Its memory is charged until the last reader is done.
        if not entry.listed and not entry.pins:
            self._removed_bytes -= entry.block.room_bytes
            self._blocks.free(entry.block)


def _stat(entry: _Object) -> Stat:
    return Stat(entry.key, entry.size_bytes, entry.modified_unix_s)


# ---- the catalog: peer memory and sources as one map of keys

PAGE_ENTRIES_MAX = 1000
"""Entries of one page of a listing."""


class PeerCatalog:
    """One map of keys over peer memory and sources. Thread-safe.

    Reads go to the source whose prefix the key has, or to peer memory; writes to peer memory alone.
    """

    def __init__(self, memory: PeerMemory, sources: Sequence[ServedSource] = ()) -> None:
        for source in sources:
            check_prefix(source.prefix)
            if not source.prefix:
                raise UsageError("a source without a prefix would hide all objects.")
        self.memory = memory
        self._sources = tuple(sources)

    def read_only(self, key: str) -> bool:
        """Whether the key belongs to a source."""
        return self._source(key) is not None

    def reading(self, key: str) -> AbstractContextManager[ServedObject]:
        source = self._source(key)
        return self.memory.reading(key) if source is None else source.reading(key)

    def stat(self, key: str) -> Stat | None:
        source = self._source(key)
        return self.memory.stat(key) if source is None else source.stat(key)

    def page(self, prefix: str, after: str) -> tuple[list[Stat], bool]:
        """The next entries after ``after`` in key order, at most PAGE_ENTRIES_MAX, and whether
        there are more.
        """
        most = PAGE_ENTRIES_MAX + 1
        own = self.memory.list(prefix, after=after, entries_max=most)
        others = [
            [entry for entry in source.list() if entry.key.startswith(prefix) and entry.key > after]
            for source in self._sources
            if source.prefix.startswith(prefix) or prefix.startswith(source.prefix)
        ]
        entries = sorted(chain(own, *others), key=lambda entry: entry.key)
        return entries[:PAGE_ENTRIES_MAX], len(entries) >= most

    def _source(self, key: str) -> ServedSource | None:
        return next((source for source in self._sources if key.startswith(source.prefix)), None)
