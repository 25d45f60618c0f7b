"""What a node holds for others, in memory: whole objects within a budget, gone with the process."""

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

# The memory that a vault's objects lie in: where it comes from, and what is kept of it for the
# next object.

SMALL_BYTES = 64 << 10
"""Smaller objects are plain memory: a memfd each would cost a descriptor for little."""

DESCRIPTORS_SHARE = 4
"""One in so many of the descriptors that this process may have is spent on objects; what lies
beyond is memory without one."""

OVERSIZE = 1.25
"""Spare memory is used for objects down to this many times smaller."""


class MemoryBlock:
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


class BlockPool:
    """Makes blocks, and keeps up to ``spare_bytes_max`` of freed ones: fresh pages cost several
    times a copy into old ones.

    Not thread-safe: the vault's lock is over it.
    """

    def __init__(self, spare_bytes_max: int) -> None:
        self._spare_bytes_max = spare_bytes_max
        self._spare: list[Region] = []
        self._descriptors_max = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // DESCRIPTORS_SHARE
        self._descriptors = 0
        self.spare_bytes = 0
        """What is kept at the moment."""

    def make(self, size_bytes: int) -> MemoryBlock:
        """A block, of spare memory where that fits. Raises StoreFullError where the system gives
        none."""
        if size_bytes < SMALL_BYTES:
            return MemoryBlock(size_bytes, None)
        fitting = [
            one for one in self._spare if size_bytes <= one.size_bytes <= size_bytes * OVERSIZE
        ]
        if fitting:
            region = min(fitting, key=lambda one: one.size_bytes)
            self._spare.remove(region)
            self.spare_bytes -= region.size_bytes
            return MemoryBlock(size_bytes, region)
        try:
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
        """The room of the spare memory that ``make`` would take, or 0."""
        fitting = (
            one.size_bytes
            for one in self._spare
            if size_bytes <= one.size_bytes <= size_bytes * OVERSIZE
        )
        return min(fitting, default=0) if size_bytes >= SMALL_BYTES else 0

    def free(self, block: MemoryBlock) -> None:
        """Take a block back, whose bytes nobody reads any more: not the kernel either, which was
        given copies to send."""
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
    """Copy ``data`` into ``out``, which is as long; without the interpreter's lock, for numpy does
    it."""
    if data.nbytes:
        np.copyto(np.frombuffer(out, np.uint8), np.frombuffer(data, np.uint8))


def room_bytes(size_bytes: int) -> int:
    """What an object of this size is charged: whole pages, and one at least, for names and tables
    cost memory too."""
    return round_to_pages(max(1, size_bytes))


# What a server serves beside its vault: memory of its own node, read-only.


def never_changes() -> bool:
    """For bytes that nobody changes."""
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedObject:
    """An object's bytes while somebody sends them. Where ``fd`` is given, ``view`` is a mapping of
    it at ``offset_bytes``, and the kernel sends its pages: they must not be used for anything else
    soon, or the reader gets an error.

    ``unchanged`` is asked when all were sent: where it says no, the reader gets an error.
    ``version`` tells one content of a key from the next, within one start of the server.
    """

    view: memoryview
    fd: int | None
    offset_bytes: int
    version: int
    modified_unix_s: float
    unchanged: Callable[[], bool] = field(default=never_changes)


class ServedSource(Protocol):
    """Objects below one prefix that others may read: a node's slots, for one. Thread-safe."""

    @property
    def prefix(self) -> str:
        """All its keys begin so, and no other source's or vault object's do."""
        ...

    def reading(self, key: str) -> AbstractContextManager[ServedObject]:
        """The object, pinned until the end where the source can. Raises NotFoundError."""
        ...

    def stat(self, key: str) -> Stat | None:
        """The object's facts, or None."""
        ...

    def list(self) -> list[Stat]:
        """All objects, in key order; few."""
        ...


OBJECTS_MAX = 65_536
"""Objects of one vault, those under way included."""

ASKED_BYTES_MIN = 1 << 20
"""For smaller objects the system isn't asked how much memory it has left."""


class TooLargeError(StoreFullError):
    """The object can never fit, however much is deleted."""

    code = "too-large"


@dataclass(frozen=True, slots=True)
class PeerMemoryStats:
    """Bytes are memory charged: ``objects_bytes`` of what can be read, ``going_bytes`` of what was
    deleted or replaced and is still sent, ``coming_bytes`` of puts under way, ``spare_bytes`` kept
    for the next. Their sum never exceeds the budget.
    """

    objects: int
    objects_bytes: int
    removed_bytes: int
    incoming_bytes: int
    spare_bytes: int
    budget_bytes: int

    @property
    def total_bytes(self) -> int:
        """All memory of the vault."""
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
    """Memory for an object under way. It is nobody's object before ``publish``."""

    __slots__ = ("_object", "_vault", "key", "view")

    def __init__(self, vault: PeerMemory, entry: _Object) -> None:
        self._vault = vault
        self._object: _Object | None = entry
        self.key = entry.key
        self.view = entry.block.view
        """To be filled, every byte: memory is reused."""

    def publish(self, *, create_only: bool = False) -> int:
        """Make it the object at its key, at once and whole; returns its version. Raises
        KeyExistsError."""
        entry = self._object
        if entry is None:
            raise InternalError(f"an object is published twice. key={self.key}")
        self._vault._publish(entry, create_only=create_only)
        self._object = None
        return entry.version

    def abandon(self) -> None:
        """Give the memory back, unless it was published. Idempotent."""
        entry, self._object = self._object, None
        self.view = memoryview(b"")
        if entry is not None:
            self._vault._abandon(entry)


class PeerMemory:
    """Objects by key, whole or not at all, within ``budget_bytes`` of memory. Thread-safe.

    Nothing is evicted: what is here goes by ``delete``, ``retain`` or another put of its key. A
    replaced or deleted object stays for those who read it. ``spare_bytes_max`` (default: half of
    the budget) of freed memory is kept for reuse. ``available`` says how much memory the machine
    has left.
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
            raise UsageError(f"a vault without a budget. budget_bytes={budget_bytes}")
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
        self._coming = 0
        self._objects_bytes = self._going_bytes = self._coming_bytes = 0

    @contextlib.contextmanager
    def incoming(self, key: str, size_bytes: int) -> Iterator[IncomingObject]:
        """Memory for an object of ``size_bytes``, taken back at the end unless it was published.

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
        """The object at ``key``, its bytes unchanged until the end, whatever becomes of the key.
        Raises NotFoundError."""
        check_key(key)
        with self._lock:
            entry = self._objects.get(key)
            if entry is None:
                raise NotFoundError(f"no such object. key={key}")
            entry.pins += 1
            held = ServedObject(
                view=entry.block.view,
                fd=None,
                offset_bytes=0,
                version=entry.version,
                modified_unix_s=entry.modified_unix_s,
            )
        try:
            yield held
        finally:
            with self._lock:
                entry.pins -= 1
                self._free_unused(entry)

    def stat(self, key: str) -> Stat | None:
        """The object's facts, or None."""
        check_key(key)
        with self._lock:
            entry = self._objects.get(key)
            return None if entry is None else _stat(entry)

    def list(
        self, prefix: str = "", *, after: str = "", entries_max: int | None = None
    ) -> list[Stat]:
        """At most ``entries_max`` objects whose key starts with ``prefix`` and is greater than
        ``after``, in key order."""
        check_prefix(prefix)
        found: list[Stat] = []
        with self._lock:
            at = max(bisect_left(self._keys, prefix), bisect_right(self._keys, after))
            while at < len(self._keys) and (entries_max is None or len(found) < entries_max):
                if not self._keys[at].startswith(prefix):
                    break
                found.append(_stat(self._objects[self._keys[at]]))
                at += 1
        return found

    def delete(self, key: str) -> bool:
        """Remove the object; says whether there was one."""
        check_key(key)
        with self._lock:
            return self._remove(key)

    def retain(self, prefixes: Collection[str]) -> int:
        """Remove every object whose key starts with none of ``prefixes``; says how many."""
        starts = tuple(check_prefix(prefix) for prefix in prefixes)
        with self._lock:
            gone = [key for key in self._keys if not key.startswith(starts)]
            for key in gone:
                self._remove(key)
        return len(gone)

    def stats(self) -> PeerMemoryStats:
        """What is held at this moment."""
        with self._lock:
            return PeerMemoryStats(
                len(self._objects),
                self._objects_bytes,
                self._going_bytes,
                self._coming_bytes,
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
            spare = self._blocks.spare_for(size_bytes)
            used = self._objects_bytes + self._going_bytes + self._coming_bytes
            if len(self._objects) + self._coming >= self._objects_max:
                raise StoreFullError(
                    f"too many objects. count={len(self._objects)} limit={self._objects_max}"
                )
            if used + (spare or room) > self.budget_bytes:
                raise StoreFullError(
                    f"the budget is used up. size_bytes={size_bytes} used_bytes={used} "
                    f"budget_bytes={self.budget_bytes}"
                )
            if not spare:
                self._blocks.shrink(used + room + self._blocks.spare_bytes - self.budget_bytes)
                self._ask_system(size_bytes)
            block = self._blocks.make(size_bytes)
            self._coming += 1
            self._coming_bytes += block.room_bytes
            return _Object(key, size_bytes, block)

    def _ask_system(self, size_bytes: int) -> None:
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
            self._remove(entry.key)
            self._coming -= 1
            self._coming_bytes -= entry.block.room_bytes
            self._objects_bytes += entry.block.room_bytes
            self._versions += 1
            entry.version, entry.modified_unix_s, entry.listed = self._versions, time.time(), True
            self._objects[entry.key] = entry
            insort(self._keys, entry.key)

    def _abandon(self, entry: _Object) -> None:
        with self._lock:
            self._coming -= 1
            self._coming_bytes -= entry.block.room_bytes
            self._blocks.free(entry.block)

    def _remove(self, key: str) -> bool:
        entry = self._objects.pop(key, None)
        if entry is None:
            return False
        del self._keys[bisect_left(self._keys, key)]
        entry.listed = False
        self._objects_bytes -= entry.block.room_bytes
        self._going_bytes += entry.block.room_bytes
        self._free_unused(entry)
        return True

    def _free_unused(self, entry: _Object) -> None:
        if not entry.listed and not entry.pins:
            self._going_bytes -= entry.block.room_bytes
            self._blocks.free(entry.block)


def _stat(entry: _Object) -> Stat:
    return Stat(entry.key, entry.size_bytes, entry.modified_unix_s)


# A vault and the sources beside it, as one flat map of keys.

PAGE_ENTRIES_MAX = 1000
"""Entries of one answer to a listing."""


class PeerCatalog:
    """Reads come from the source whose prefix a key has, or from the vault; writes go to the vault
    alone. Thread-safe."""

    def __init__(self, vault: PeerMemory, sources: Sequence[ServedSource] = ()) -> None:
        for source in sources:
            check_prefix(source.prefix)
            if not source.prefix:
                raise UsageError("a source without a prefix would hide the vault.")
        self.memory = vault
        self._sources = tuple(sources)

    def read_only(self, key: str) -> bool:
        """Whether the key is a source's."""
        return self._source(key) is not None

    def reading(self, key: str) -> AbstractContextManager[ServedObject]:
        """See Vault and Source."""
        source = self._source(key)
        return self.memory.reading(key) if source is None else source.reading(key)

    def stat(self, key: str) -> Stat | None:
        """See Vault and Source."""
        source = self._source(key)
        return self.memory.stat(key) if source is None else source.stat(key)

    def page(self, prefix: str, after: str) -> tuple[list[Stat], bool]:
        """The next entries behind ``after`` in key order, PAGE_ENTRIES_MAX at most, and whether
        there are more."""
        most = PAGE_ENTRIES_MAX + 1
        held = self.memory.list(prefix, after=after, entries_max=most)
        others = [
            [one for one in source.list() if one.key.startswith(prefix) and one.key > after]
            for source in self._sources
            if source.prefix.startswith(prefix) or prefix.startswith(source.prefix)
        ]
        found = sorted(chain(held, *others), key=lambda one: one.key)
        return found[:PAGE_ENTRIES_MAX], len(found) >= most

    def _source(self, key: str) -> ServedSource | None:
        return next((source for source in self._sources if key.startswith(source.prefix)), None)
