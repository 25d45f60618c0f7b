"""What a node holds for others, in memory: whole objects within a budget, gone with the process."""

from __future__ import annotations

import contextlib
import threading
import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from ckpt.backends.base import Stat
from ckpt.backends.keys import check_key, check_prefix
from ckpt.cluster.peermem.memory import Block, Blocks, room_bytes
from ckpt.cluster.peermem.sources import Held
from ckpt.errors import InternalError, KeyExistsError, NotFoundError, StoreFullError, UsageError
from ckpt.staging.memory_limit import available_bytes

OBJECTS_MAX = 65_536
"""Objects of one vault, those under way included."""

ASKED_BYTES_MIN = 1 << 20
"""For smaller objects the system isn't asked how much memory it has left."""


class TooLargeError(StoreFullError):
    """The object can never fit, however much is deleted."""

    code = "too-large"


@dataclass(frozen=True, slots=True)
class VaultStats:
    """Bytes are memory charged: ``objects_bytes`` of what can be read, ``going_bytes`` of what was deleted or replaced and is
    still sent, ``coming_bytes`` of puts under way, ``spare_bytes`` kept for the next. Their sum never exceeds the budget.
    """

    objects: int
    objects_bytes: int
    going_bytes: int
    coming_bytes: int
    spare_bytes: int
    budget_bytes: int

    @property
    def held_bytes(self) -> int:
        """All memory of the vault."""
        return self.objects_bytes + self.going_bytes + self.coming_bytes + self.spare_bytes


@dataclass(slots=True, eq=False)
class _Object:
    key: str
    size_bytes: int
    block: Block
    version: int = 0
    modified_unix_s: float = 0.0
    pins: int = 0
    listed: bool = field(default=False)


class Incoming:
    """Memory for an object under way. It is nobody's object before ``publish``."""

    __slots__ = ("_object", "_vault", "key", "view")

    def __init__(self, vault: Vault, entry: _Object) -> None:
        self._vault = vault
        self._object: _Object | None = entry
        self.key = entry.key
        self.view = entry.block.view
        """To be filled, every byte: memory is reused."""

    def publish(self, *, create_only: bool = False) -> int:
        """Make it the object at its key, at once and whole; returns its version. Raises KeyExistsError."""
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


class Vault:
    """Objects by key, whole or not at all, within ``budget_bytes`` of memory. Thread-safe.

    Nothing is evicted: what is here goes by ``delete``, ``retain`` or another put of its key. A replaced or deleted object
    stays for those who read it. ``spare_bytes_max`` (default: half of the budget) of freed memory is kept for reuse.
    ``available`` says how much memory the machine has left.
    """

    def __init__(
        self, budget_bytes: int, *, object_bytes_max: int | None = None, spare_bytes_max: int | None = None,
        objects_max: int = OBJECTS_MAX, available: Callable[[], int | None] = available_bytes,
    ) -> None:  # fmt: skip
        if budget_bytes <= 0:
            raise UsageError(f"a vault without a budget. budget_bytes={budget_bytes}")
        self.budget_bytes = budget_bytes
        self.object_bytes_max = budget_bytes if object_bytes_max is None else min(object_bytes_max, budget_bytes)
        self._objects_max = objects_max
        self._available = available
        self._blocks = Blocks(budget_bytes // 2 if spare_bytes_max is None else spare_bytes_max)
        self._lock = threading.Lock()
        self._objects: dict[str, _Object] = {}
        self._keys: list[str] = []
        self._versions = 0
        self._coming = 0
        self._objects_bytes = self._going_bytes = self._coming_bytes = 0

    @contextlib.contextmanager
    def incoming(self, key: str, size_bytes: int) -> Iterator[Incoming]:
        """Memory for an object of ``size_bytes``, taken back at the end unless it was published.

        Raises TooLargeError and StoreFullError before any memory is taken.
        """
        check_key(key)
        incoming = Incoming(self, self._reserve(key, size_bytes))
        try:
            yield incoming
        finally:
            incoming.abandon()

    @contextlib.contextmanager
    def reading(self, key: str) -> Iterator[Held]:
        """The object at ``key``, its bytes unchanged until the end, whatever becomes of the key. Raises NotFoundError."""
        check_key(key)
        with self._lock:
            entry = self._objects.get(key)
            if entry is None:
                raise NotFoundError(f"no such object. key={key}")
            entry.pins += 1
            held = Held(
                view=entry.block.view, fd=None, offset_bytes=0, version=entry.version,
                modified_unix_s=entry.modified_unix_s,
            )  # fmt: skip
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

    def list(self, prefix: str = "", *, after: str = "", entries_max: int | None = None) -> list[Stat]:
        """At most ``entries_max`` objects whose key starts with ``prefix`` and is greater than ``after``, in key order."""
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

    def stats(self) -> VaultStats:
        """What is held at this moment."""
        with self._lock:
            return VaultStats(
                len(self._objects), self._objects_bytes, self._going_bytes, self._coming_bytes, self._blocks.spare_bytes,
                self.budget_bytes,
            )  # fmt: skip

    def _reserve(self, key: str, size_bytes: int) -> _Object:
        room = room_bytes(size_bytes)
        if size_bytes > self.object_bytes_max or room > self.budget_bytes:
            raise TooLargeError(f"larger than any object may be. size_bytes={size_bytes} limit={self.object_bytes_max}")
        with self._lock:
            spare = self._blocks.spare_for(size_bytes)
            used = self._objects_bytes + self._going_bytes + self._coming_bytes
            if len(self._objects) + self._coming >= self._objects_max:
                raise StoreFullError(f"too many objects. count={len(self._objects)} limit={self._objects_max}")
            if used + (spare or room) > self.budget_bytes:
                raise StoreFullError(
                    f"the budget is used up. size_bytes={size_bytes} used_bytes={used} budget_bytes={self.budget_bytes}"
                )
            if not spare:
                self._blocks.shrink(used + room + self._blocks.spare_bytes - self.budget_bytes)
                self._ask_system(size_bytes)
            block = self._blocks.make(size_bytes)
            self._coming += 1
            self._coming_bytes += block.room_bytes
            return _Object(key, size_bytes, block)

    def _ask_system(self, size_bytes: int) -> None:
        if size_bytes >= ASKED_BYTES_MIN and (left := self._available()) is not None and size_bytes > left:
            raise StoreFullError(f"the machine is short of memory. size_bytes={size_bytes} available_bytes={left}")

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
