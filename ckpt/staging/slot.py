"""Slots: shared memory that holds one rank's state of one snapshot, reused for the whole job. No torch.

A pool hands a slot to one writer at a time; readers pin what is sealed. Which slot may be overwritten: one that nobody pins
or writes, whose snapshot the caller does not ask to keep, and that the owner of the memory gives free (``Regions``). Among
those, one that holds nothing, else the one sealed longest ago. Memory of this process alone is given free but for the slot
sealed last (a pool of a single slot has no other, so there the last one is given up).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection

from ckpt.errors import InternalError, UnavailableError, UsageError
from ckpt.staging.header import HEADER_BYTES_DEFAULT, generation_of, header_bytes_of, read_slot
from ckpt.staging.memory import pages
from ckpt.staging.memory_limit import check_available
from ckpt.staging.slot_state import SLOTS_MAX, OwnRegions, Pin, Regions, Shared, Slot
from ckpt.values import PAGE_BYTES, SnapshotId

__all__ = ["Pin", "Regions", "Slot", "SlotPool", "generation_of", "read_slot"]

SLOTS_DEFAULT = 3


class SlotPool:
    """Up to ``count`` slots with ``data_bytes`` (rounded up to pages) of data each, made and pre-faulted in the background.

    Slots are made when first needed or when the background thread comes to them. Raises UsageError where they exceed the
    memory that the machine and the control group have left. ``read_only_between_copies`` maps sealed slots read-only, so that
    a wild write of this process dies instead of spoiling them; it costs 32 ms a GiB a copy (digests find the damage
    without it). ``available_bytes`` replaces asking the system for free memory.

    ``regions`` owns the memory (default: this process). What it kept from before is taken over, with what it holds sealed;
    slots too small for ``data_bytes`` go once they are free.

    Where memory is short once a slot was handed out, the pool goes on with those it has; ``on_short`` hears of it once.
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
        regions: Regions | None = None,
        on_short: Callable[[UsageError], None] | None = None,
    ) -> None:
        self._regions: Regions = OwnRegions() if regions is None else regions
        most = min(SLOTS_MAX, self._regions.slots_max)
        if not self._regions.slots_min <= count <= most:
            raise UsageError(f"number of slots out of range. count={count} ({self._regions.slots_min}..{most})")
        self.count = count
        self._data_bytes = pages(max(1, data_bytes))
        self._header_bytes = pages(header_bytes)
        self._prefault = prefault
        self._read_only = read_only_between_copies
        self._available = available_bytes
        self._shared = Shared(self._regions)
        self._changed = self._shared.changed
        self._slots: list[Slot] = []
        self._retired: list[Slot] = []
        self._warming: Slot | None = None
        self._on_short = on_short
        self._served = False
        self.shortage: UsageError | None = None
        """Why there are fewer slots than were asked for, where memory was short for one."""
        self._closed = False
        self._thread: threading.Thread | None = None
        self._adopt()
        missing = count - len(self._slots)
        check_available(missing * self.slot_bytes, what=f"{missing} slots", available=available_bytes)
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
        UsageError where the first slot must be made and memory doesn't suffice; UnavailableError where nobody hands it out.
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
                    self._served = True
                    return slot
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                poll_s = self._regions.poll_s
                self._changed.wait(left if poll_s is None else min(left, poll_s))

    def has_room(self, *, keep: Collection[SnapshotId] = ()) -> bool:
        """Whether ``acquire`` would find a slot now. Takes and makes none."""
        with self._changed:
            return self._next_number() is not None or any(map(self._given_free, self._idle_slots(keep)))

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
        """Hand out slots of at least ``data_bytes`` from now on. Larger ones are made anew; old ones go once free.

        Slots never shrink. Raises UsageError, changing nothing, where memory doesn't suffice beside the old slots that can't
        go yet.
        """
        data = max(pages(max(1, data_bytes)), self._data_bytes)
        header = max(pages(header_bytes or 0), self._header_bytes)
        if (data, header) == (self._data_bytes, self._header_bytes):
            return
        with self._changed:
            roomy = [slot for slot in self._slots if len(slot.data) >= data and slot.header_bytes >= header]
            small = [slot for slot in self._slots if slot not in roomy]
            freed = sum(slot.size_bytes for slot in small if self._idle(slot))
            missing = self.count - len(roomy)
            needed = missing * (data + header)
            check_available(needed, what=f"{missing} slots", freed_bytes=freed, available=self._available)
            self._data_bytes, self._header_bytes = data, header
            self._retired += small
            self._slots = roomy
            self._free_retired(())
        self._start_prefault()

    def wait_prefaulted(self) -> None:
        """Wait until the background thread is done with all slots. For benchmarks and tests."""
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """End the background thread and give all memory back; views that are still held stay readable. Idempotent.

        Memory that another process owns too stays there, with what it holds.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        with self._changed:
            for slot in (*self._retired, *self._slots):
                slot._free()
            self._retired, self._slots = [], []

    def _adopt(self) -> None:
        """Take over what was kept: the newest ``count`` slots that are large enough; the others go once they are free."""
        kept = []
        for number, region in self._regions.kept():
            header_bytes = header_bytes_of(region.view) or min(self._header_bytes, region.size_bytes - PAGE_BYTES)
            slot = Slot(number, region, header_bytes=header_bytes, shared=self._shared, read_only=self._read_only)
            kept.append((slot.sealed_in_memory(), slot))
        found = []
        for snapshot, slot in sorted(kept, key=lambda one: one[0] or SnapshotId(-1, -1)):
            slot._adopt(snapshot)
            found.append(slot)
        fit = [slot for slot in found if len(slot.data) >= self._data_bytes and slot.header_bytes >= self._header_bytes]
        self._slots = fit[-self.count :]
        self._retired = [slot for slot in found if slot not in self._slots]

    def _choose(self, keep: Collection[SnapshotId]) -> Slot | None:
        idle = self._idle_slots(keep)
        empty = next((slot for slot in idle if slot.snapshot is None and self._given_free(slot)), None)
        if empty is not None:
            return empty
        made = self._make_or_do_without()
        if made is not None:
            return made
        return next((slot for slot in idle if slot.snapshot is not None and self._given_free(slot)), None)

    def _make_or_do_without(self) -> Slot | None:
        """A new slot; None where there are enough, or memory is short in mid-training: then the slots there are must do.

        With fewer than the memory's owner needs it is tried again next time, for otherwise nothing would ever be free.
        """
        try:
            return self._make()
        except UsageError as error:
            if not self._served:
                raise
            self.count = min(self.count, max(self._regions.slots_min, len(self._slots)))
            if self.shortage is None and self._on_short is not None:
                self._on_short(error)
            self.shortage = error
            return None

    def _idle_slots(self, keep: Collection[SnapshotId]) -> list[Slot]:
        """Those that nobody here uses, sealed longest ago first: mostly that one is free, and the owner is asked only once."""
        idle = (slot for slot in self._slots if self._idle(slot) and slot.snapshot not in keep)
        return sorted(idle, key=lambda slot: slot.order)

    def _newest(self) -> Slot | None:
        sealed = [slot for slot in (*self._retired, *self._slots) if slot.snapshot is not None]
        return max(sealed, key=lambda slot: slot.order, default=None)

    @staticmethod
    def _idle(slot: Slot) -> bool:
        return not slot.pinned and not slot.writing

    def _given_free(self, slot: Slot) -> bool:
        """Whether the owner of the memory lets an idle slot be overwritten."""
        return self._regions.may_overwrite(slot, spare=self.count == 1 or slot is not self._newest())

    def _next_number(self) -> int | None:
        """The number of a slot that may still be made; None where there are enough, or those that can't go yet have all."""
        if len(self._slots) >= self.count:
            return None
        taken = {slot.number for slot in (*self._retired, *self._slots)}
        return next((number for number in range(self._regions.slots_max) if number not in taken), None)

    def _make(self) -> Slot | None:
        number = self._next_number()
        if number is None:
            return None
        check_available(self.slot_bytes, what="a slot", available=self._available)
        region = self._regions.make(number, self.slot_bytes)
        slot = Slot(number, region, header_bytes=self._header_bytes, shared=self._shared, read_only=self._read_only)
        self._slots.append(slot)
        return slot

    def _free_retired(self, keep: Collection[SnapshotId]) -> None:
        for slot in list(self._retired):
            unused = self._idle(slot) and slot is not self._warming
            if unused and slot.snapshot not in keep and self._given_free(slot):
                self._retired.remove(slot)
                self._regions.dropped(slot)
                slot._free()

    def _start_prefault(self) -> None:
        if not self._prefault or (self._thread is not None and self._thread.is_alive()):
            return
        self._thread = threading.Thread(target=self._run_prefault, name="ckpt-prefault", daemon=True)
        self._thread.start()

    def _run_prefault(self) -> None:
        done: list[Slot] = []
        while True:
            with self._changed:
                self._warming = slot = self._next_cold(done)
            if slot is None:
                return
            done.append(slot)
            for _ in slot.prefault():
                if self._closed or slot not in self._slots:
                    break

    def _next_cold(self, done: Collection[Slot]) -> Slot | None:
        if self._closed:
            return None
        slot = next((slot for slot in self._slots if slot not in done), None)
        if slot is None:
            with contextlib.suppress(UsageError, UnavailableError):  # acquire meets the same and tells the caller
                slot = self._make()
        return slot
