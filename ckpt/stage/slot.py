"""Slots: shared memory that holds one rank's state of one snapshot, reused for the whole job. No torch.

A pool hands a slot to one writer at a time; readers pin what is sealed. Which slot may be overwritten: one that nobody pins
or writes, whose snapshot the caller does not ask to keep, and that is not the one sealed last (a pool of a single slot has no
other, so there the last one is given up). Among those, one that holds nothing, else the one sealed longest ago.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Collection, Iterator
from types import TracebackType

from ckpt.errors import InternalError, UsageError
from ckpt.stage.memory import PREFAULT_BYTES, Region, pages
from ckpt.stage.memory_limit import check_available
from ckpt.stage.slot_header import HEADER_BYTES_DEFAULT, Header, generation_of, read_slot
from ckpt.values import SnapshotId, StagedIndex

__all__ = ["Pin", "Slot", "SlotPool", "generation_of", "read_slot"]

SLOTS_DEFAULT = 3
SLOTS_MAX = 64


class Slot:
    """One slot. ``memory`` is header and data, ``data`` the page-aligned data area, ``address`` where it starts.

    ``fd`` can be handed to another process, which reads the slot with ``read_slot``. Only the writer that acquired the slot
    calls ``begin``, then ``seal``, ``invalidate`` or ``release``; pinning is thread-safe.
    """

    __slots__ = ("__weakref__", "_changed", "_header", "_on_free", "_orders", "_pins", "_read_only", "_region", "_writing",
                 "address", "data", "memory", "number", "order", "registered", "snapshot")  # fmt: skip

    def __init__(
        self, number: int, *, data_bytes: int, header_bytes: int, shared: _Shared, read_only: bool = False
    ) -> None:
        self._region = Region(header_bytes + data_bytes)
        self._header = Header(self._region.view, header_bytes=header_bytes)
        self._changed = shared.changed
        self._orders = shared.orders
        self._read_only = read_only
        self._pins = 0
        self._writing = False
        self._on_free: list[Callable[[], object]] = []
        self.number = number
        self.memory = self._region.view
        self.data = self.memory[header_bytes:]
        self.address = self._region.address + header_bytes
        self.snapshot: SnapshotId | None = None
        """What the slot holds sealed, or None."""
        self.registered = False
        """Whether a device's driver was asked to lock the memory."""
        self.order = 0
        """Grows with each seal in the pool; 0 for a slot that holds nothing."""

    @property
    def fd(self) -> int | None:
        """The descriptor of the whole slot, owned by the slot; None where memory can't be handed on."""
        return self._region.fd

    @property
    def size_bytes(self) -> int:
        """Header and data."""
        return self._region.size_bytes

    @property
    def generation(self) -> int:
        """How often the slot was begun."""
        return self._header.generation

    @property
    def valid(self) -> bool:
        """Whether the slot is sealed now."""
        return self._header.valid

    @property
    def pinned(self) -> bool:
        """Whether a reader holds it."""
        return self._pins > 0

    @property
    def writing(self) -> bool:
        """Whether a writer holds it."""
        return self._writing

    def begin(self) -> int:
        """Give up what the slot holds and return the new generation. Before the first byte of data is written."""
        self._check_writer()
        if self._read_only and self._header.valid:
            self._region.protect(writable=True)
        generation = self._header.open()
        with self._changed:
            self.snapshot, self.order = None, 0
        return generation

    def seal(self, index: StagedIndex) -> None:
        """Write ``index`` and make the slot valid; the writer lets go of it.

        Raises UsageError where the index doesn't fit the header; the slot is then still the writer's, and invalid.
        """
        self._check_writer()
        self._header.close(index)
        if self._read_only:
            self._region.protect(writable=False)
        with self._changed:
            self.snapshot, self.order = index.snapshot, next(self._orders)
            self._let_go()

    def invalidate(self) -> None:
        """Give up what the slot holds, sealed or half written, and let go of it where a writer held it."""
        if self._read_only and self._header.valid:
            self._region.protect(writable=True)
        self._header.open()
        with self._changed:
            self.snapshot, self.order = None, 0
            self._let_go()

    def release(self) -> None:
        """The writer lets go; what the slot holds stays as it is: the old snapshot before ``begin``, nothing after."""
        with self._changed:
            self._let_go()

    def pin(self) -> Pin:
        """Keep the slot from being overwritten until the pin is released.

        For its writer, who pins before ``seal`` so that no gap is left; a reader asks ``SlotPool.pin_newest``, or reads the
        slot's generation after pinning it.
        """
        with self._changed:
            self._pins += 1
        return Pin(self)

    def prefault(self) -> Iterator[int]:
        """Make the data area, and as much header as is usual, present in small pieces; safe beside a writer."""
        header_bytes = self._region.size_bytes - len(self.data)
        yield from self._region.prefault(0, min(PREFAULT_BYTES, header_bytes))
        yield from self._region.prefault(header_bytes, self._region.size_bytes)

    def on_free(self, call: Callable[[], object]) -> None:
        """Have ``call`` called just before the memory is given back (to undo a registration of it)."""
        self._on_free.append(call)

    def _check_writer(self) -> None:
        if not self._writing:
            raise InternalError(f"a slot is written that nobody acquired. slot={self.number}")

    def _let_go(self) -> None:
        self._writing = False
        self._changed.notify_all()

    def _unpin(self) -> None:
        with self._changed:
            self._pins -= 1
            self._changed.notify_all()

    def _take(self) -> None:
        self._writing = True

    def _free(self) -> None:
        for call in self._on_free:
            call()
        self.data = self.memory = memoryview(b"")
        self._region.close()


class _Shared:
    """What the slots of one pool have in common: the lock of all their states, and the order in which they are sealed."""

    __slots__ = ("changed", "orders")

    def __init__(self) -> None:
        self.changed = threading.Condition()  # of a re-entrant lock
        self.orders = itertools.count(1)


class Pin:
    """A reader's hold on a sealed slot; a context manager. ``release`` may be called more than once."""

    __slots__ = ("_held", "slot")

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self._held = True

    def release(self) -> None:
        """Let go."""
        held, self._held = self._held, False
        if held:
            self.slot._unpin()

    def __enter__(self) -> Slot:
        return self.slot

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class SlotPool:
    """Up to ``count`` slots with ``data_bytes`` (rounded up to pages) of data each, made and pre-faulted in the background.

    Slots are made when first needed or when the background thread comes to them. Raises UsageError where they exceed the
    memory that the machine and the control group have left. ``read_only_between_copies`` maps sealed slots read-only, so that
    a wild write of this process dies instead of spoiling them; it costs 32 ms a GiB a copy (digests find the damage
    without it). ``available_bytes`` replaces asking the system for free memory.
    """

    def __init__(
        self,
        *,
        count: int = SLOTS_DEFAULT,
        data_bytes: int,
        header_bytes: int = HEADER_BYTES_DEFAULT,
        prefault: bool = True,
        read_only_between_copies: bool = False,
        available_bytes: int | None = None,
    ) -> None:
        if not 1 <= count <= SLOTS_MAX:
            raise UsageError(f"number of slots out of range. count={count} (1..{SLOTS_MAX})")
        self.count = count
        self._data_bytes = pages(max(1, data_bytes))
        self._header_bytes = pages(header_bytes)
        self._prefault = prefault
        self._read_only = read_only_between_copies
        self._available = available_bytes
        self._shared = _Shared()
        self._changed = self._shared.changed
        self._slots: list[Slot] = []
        self._retired: list[Slot] = []
        self._made = 0
        self._warming: Slot | None = None
        self._closed = False
        self._thread: threading.Thread | None = None
        check_available(count * self.slot_bytes, what=f"{count} slots", available=available_bytes)
        self._start_prefault()

    @property
    def data_bytes(self) -> int:
        """The data area of each slot that is handed out from now on."""
        return self._data_bytes

    @property
    def slot_bytes(self) -> int:
        """One slot's memory at most; unused header pages are never taken."""
        return self._data_bytes + self._header_bytes

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The slots made so far, those about to be freed after a resize too."""
        with self._changed:
            return (*self._retired, *self._slots)

    def acquire(self, *, keep: Collection[SnapshotId] = (), wait_s: float = 0.0) -> Slot | None:
        """A slot for one writer, or None where none is free within ``wait_s`` seconds.

        ``keep`` names snapshots that must not be overwritten. What the slot held stays valid until ``begin``. Raises
        UsageError where a slot must be made and memory no longer suffices.
        """
        deadline = time.monotonic() + wait_s
        with self._changed:
            while True:
                if self._closed:
                    raise InternalError("a slot is asked of a closed pool.")
                self._free_retired(keep)
                slot = self._choose(keep)
                if slot is not None:
                    slot._take()
                    return slot
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                self._changed.wait(left)

    def newest(self) -> Slot | None:
        """The slot that was sealed last, or None."""
        with self._changed:
            return self._newest()

    def pin_newest(self) -> Pin | None:
        """Pin the slot that was sealed last, or None where none is sealed (and not given to a writer again)."""
        with self._changed:
            slot = self._newest()
            return None if slot is None or slot.writing else slot.pin()

    def resize(self, data_bytes: int, *, header_bytes: int | None = None) -> None:
        """Hand out slots of at least ``data_bytes`` from now on. Larger ones are made anew; old ones go once unpinned.

        Slots never shrink. Raises UsageError, changing nothing, where memory doesn't suffice beside the old slots that can't
        go yet.
        """
        data = max(pages(max(1, data_bytes)), self._data_bytes)
        header = max(pages(header_bytes or 0), self._header_bytes)
        if (data, header) == (self._data_bytes, self._header_bytes):
            return
        with self._changed:
            freed = sum(slot.size_bytes for slot in self._slots if self._idle(slot))
            needed = self.count * (data + header)
            check_available(needed, what=f"{self.count} slots", freed_bytes=freed, available=self._available)
            self._data_bytes, self._header_bytes = data, header
            self._retired += self._slots
            self._slots = []
            self._free_retired(())
        self._start_prefault()

    def wait_prefaulted(self) -> None:
        """Wait until the background thread is done with all slots. For benchmarks and tests."""
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """End the background thread and give all memory back; views that are still held stay readable. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        with self._changed:
            for slot in (*self._retired, *self._slots):
                slot._free()
            self._retired, self._slots = [], []

    def _choose(self, keep: Collection[SnapshotId]) -> Slot | None:
        newest = self._newest() if self.count > 1 else None
        free = [slot for slot in self._slots if self._idle(slot) and slot is not newest and slot.snapshot not in keep]
        empty = next((slot for slot in free if slot.snapshot is None), None)
        if empty is not None:
            return empty
        if len(self._slots) < self.count:
            return self._make()
        return min(free, key=lambda slot: slot.order, default=None)

    def _newest(self) -> Slot | None:
        sealed = [slot for slot in (*self._retired, *self._slots) if slot.snapshot is not None]
        return max(sealed, key=lambda slot: slot.order, default=None)

    @staticmethod
    def _idle(slot: Slot) -> bool:
        return not slot.pinned and not slot.writing

    def _make(self) -> Slot:
        check_available(self.slot_bytes, what="a slot", available=self._available)
        slot = Slot(
            self._made,
            data_bytes=self._data_bytes,
            header_bytes=self._header_bytes,
            shared=self._shared,
            read_only=self._read_only,
        )
        self._made += 1
        self._slots.append(slot)
        return slot

    def _free_retired(self, keep: Collection[SnapshotId]) -> None:
        newest = self._newest() if self.count > 1 else None
        for slot in list(self._retired):
            unused = self._idle(slot) and slot is not newest and slot is not self._warming
            if unused and slot.snapshot not in keep:
                self._retired.remove(slot)
                slot._free()

    def _start_prefault(self) -> None:
        if not self._prefault or (self._thread is not None and self._thread.is_alive()):
            return
        self._thread = threading.Thread(target=self._run_prefault, name="ckpt-prefault", daemon=True)
        self._thread.start()

    def _run_prefault(self) -> None:
        done: set[int] = set()
        while True:
            with self._changed:
                self._warming = slot = self._next_cold(done)
            if slot is None:
                return
            done.add(slot.number)
            for _ in slot.prefault():
                if self._closed or slot not in self._slots:
                    break

    def _next_cold(self, done: set[int]) -> Slot | None:
        if self._closed:
            return None
        slot = next((slot for slot in self._slots if slot.number not in done), None)
        if slot is None and len(self._slots) < self.count:
            with contextlib.suppress(UsageError):  # acquire meets the same shortage and tells the caller
                slot = self._make()
        return slot
