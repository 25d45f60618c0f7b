"""Slots: shared memory that holds one rank's state of one snapshot, reused for the whole job. No
torch.

A pool hands a slot to one writer at a time; readers pin what is sealed. Which slot may be
overwritten: one that nobody pins or writes, whose snapshot the caller does not ask to keep, and
that the owner of the memory gives free (``Regions``). Among those, one that holds nothing, else the
one sealed longest ago. Memory of this process alone is given free but for the slot sealed last (a
pool of a single slot has no other, so there the last one is given up).
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from types import TracebackType
from typing import Protocol

from ckpt.errors import IntegrityError, InternalError, UnavailableError, UsageError
from ckpt.staging.header import (
    HEADER_BYTES_DEFAULT,
    Header,
    generation_of,
    header_bytes_of,
    read_slot,
    read_summary,
)
from ckpt.staging.memory import PREFAULT_BYTES, Region, check_available, round_to_pages
from ckpt.values import PAGE_BYTES, SnapshotId, StagedIndex

# One slot: who writes it, who reads it, and where its memory comes from. No torch.

SLOTS_MAX = 64


class Regions(Protocol):
    """Where the memory of a pool's slots comes from, and who else has a say about it.

    A pool asks and tells under its lock, so everything here is quick, but for ``make`` and
    ``kept``. A slot that was begun counts as held until ``idle``.
    """

    @property
    def slots_min(self) -> int:
        """The fewest slots that a pool over this memory can work with."""
        ...

    @property
    def slots_max(self) -> int:
        """Slots are numbered below this."""
        ...

    @property
    def poll_s(self) -> float | None:
        """How often ``may_overwrite`` may change its answer without this process doing anything;
        None: never."""
        ...

    def kept(self) -> Sequence[tuple[int, Region]]:
        """Memory that slots had before this process began, by number; asked once."""
        ...

    def make(self, number: int, size_bytes: int) -> Region:
        """Zeroed memory for a new slot. Raises UsageError where memory is short, UnavailableError
        where nobody answers."""
        ...

    def may_overwrite(self, slot: Slot, *, spare: bool) -> bool:
        """Whether nobody needs what an idle ``slot`` holds. ``spare``: a slot of this process was
        sealed after it."""
        ...

    def emptied(self, slot: Slot) -> None:
        """The slot is begun or invalidated: it holds nothing any more."""
        ...

    def sealed(self, slot: Slot) -> None:
        """The slot holds ``slot.snapshot`` under ``slot.generation``."""
        ...

    def idle(self, slot: Slot) -> None:
        """Nobody in this process writes or pins the slot any more."""
        ...

    def dropped(self, slot: Slot) -> None:
        """The pool gives the slot up for good; its memory is unmapped next. Not told when the whole
        pool is closed."""
        ...


class OwnRegions:
    """Memory of this process alone: the slot sealed last is kept, every other one is free once
    nobody pins it."""

    slots_min = 1
    slots_max = 4 * SLOTS_MAX
    poll_s = None

    def kept(self) -> Sequence[tuple[int, Region]]:
        """See ``Regions``."""
        return ()

    def make(self, number: int, size_bytes: int) -> Region:
        """See ``Regions``."""
        del number
        return Region(size_bytes)

    def may_overwrite(self, slot: Slot, *, spare: bool) -> bool:
        """See ``Regions``."""
        del slot
        return spare

    def emptied(self, slot: Slot) -> None:
        """See ``Regions``."""

    def sealed(self, slot: Slot) -> None:
        """See ``Regions``."""

    def idle(self, slot: Slot) -> None:
        """See ``Regions``."""

    def dropped(self, slot: Slot) -> None:
        """See ``Regions``."""


class Slot:
    """One slot. ``memory`` is header and data, ``data`` the page-aligned data area, ``address``
    where it starts.

    ``fd`` can be handed to another process, which reads the slot with ``read_slot``. Only the
    writer that acquired the slot calls ``begin``, then ``seal``, ``invalidate`` or ``release``;
    pinning is thread-safe.
    """

    __slots__ = (
        "__weakref__",
        "_changed",
        "_header",
        "_on_free",
        "_orders",
        "_pins",
        "_read_only",
        "_region",
        "_regions",
        "_writing",
        "address",
        "data",
        "memory",
        "number",
        "order",
        "registered",
        "snapshot",
    )

    def __init__(
        self,
        number: int,
        region: Region,
        *,
        header_bytes: int,
        pool: PoolState,
        read_only: bool = False,
    ) -> None:
        self._region = region
        self._regions = pool.regions
        self._header = Header(self._region.view, header_bytes=header_bytes)
        self._changed = pool.changed
        self._orders = pool.orders
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
        """The descriptor of the whole slot, owned by the slot; None where memory can't be handed
        on."""
        return self._region.fd

    @property
    def size_bytes(self) -> int:
        """Header and data."""
        return self._region.size_bytes

    @property
    def header_bytes(self) -> int:
        """The header's area, before the data."""
        return self._region.size_bytes - len(self.data)

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
        """Give up what the slot holds and return the new generation. Before the first byte of data
        is written."""
        self._check_writer()
        if self._read_only and self._header.valid:
            self._region.protect(writable=True)
        generation = self._header.begin()
        with self._changed:
            self.snapshot, self.order = None, 0
            self._regions.emptied(self)
        return generation

    def seal(self, index: StagedIndex) -> None:
        """Write ``index`` and make the slot valid; the writer lets go of it.

        Raises UsageError where the index doesn't fit the header; the slot is then still the
        writer's, and invalid.
        """
        self._check_writer()
        self._header.seal(index)
        if self._read_only:
            self._region.protect(writable=False)
        with self._changed:
            self.snapshot, self.order = index.snapshot, next(self._orders)
            self._regions.sealed(self)
            self._let_go()

    def invalidate(self) -> None:
        """Give up what the slot holds, sealed or half written, and let go of it where a writer held
        it."""
        if self._read_only and self._header.valid:
            self._region.protect(writable=True)
        self._header.begin()
        with self._changed:
            self.snapshot, self.order = None, 0
            self._regions.emptied(self)
            self._let_go()

    def release(self) -> None:
        """The writer lets go; what the slot holds stays as it is: the old snapshot before
        ``begin``, nothing after."""
        with self._changed:
            self._let_go()

    def pin(self) -> Pin:
        """Keep the slot from being overwritten until the pin is released.

        For its writer, who pins before ``seal`` so that no gap is left; a reader asks
        ``SlotPool.pin_newest``, or reads the slot's generation after pinning it.
        """
        with self._changed:
            self._pins += 1
        return Pin(self)

    def prefault(self) -> Iterator[int]:
        """Make the data area, and as much header as is usual, present in small pieces; safe beside
        a writer."""
        header_bytes = self.header_bytes
        yield from self._region.prefault(0, min(PREFAULT_BYTES, header_bytes))
        yield from self._region.prefault(header_bytes, self._region.size_bytes)

    def on_free(self, call: Callable[[], object]) -> None:
        """Have ``call`` called just before the memory is given back (to undo a registration of
        it)."""
        self._on_free.append(call)

    def sealed_in_memory(self) -> SnapshotId | None:
        """What the memory holds sealed, read from its bytes. What contradicts itself counts as
        nothing."""
        try:
            found = read_summary(self.memory)
        except IntegrityError:
            return None
        return None if found is None else found[0].snapshot

    def _check_writer(self) -> None:
        if not self._writing:
            raise InternalError(f"a slot is written that nobody acquired. slot={self.number}")

    def _let_go(self) -> None:
        self._writing = False
        self._maybe_idle()

    def _unpin(self) -> None:
        with self._changed:
            self._pins -= 1
            self._maybe_idle()

    def _maybe_idle(self) -> None:
        if not self._writing and not self._pins:
            self._regions.idle(self)
        self._changed.notify_all()

    def _take(self) -> None:
        self._writing = True

    def _adopt(self, snapshot: SnapshotId | None) -> None:
        self.snapshot = snapshot
        self.order = 0 if snapshot is None else next(self._orders)

    def _free(self) -> None:
        for call in self._on_free:
            call()
        self.data = self.memory = memoryview(b"")
        self._region.close()


class PoolState:
    """What the slots of one pool have in common: the lock of all their states, the order of seals,
    and whose memory it is."""

    __slots__ = ("changed", "orders", "regions")

    def __init__(self, regions: Regions) -> None:
        self.changed = threading.Condition()  # of a re-entrant lock
        self.orders = itertools.count(1)
        self.regions = regions


class Pin:
    """A reader's hold on a sealed slot; a context manager. ``release`` may be called more than
    once."""

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
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


__all__ = ["Pin", "Regions", "Slot", "SlotPool", "generation_of", "read_slot"]

SLOTS_DEFAULT = 3


class SlotPool:
    """Up to ``count`` slots with ``data_bytes`` (rounded up to pages) of data each, made and
    pre-faulted in the background.

    Slots are made when first needed or when the background thread comes to them. Raises UsageError
    where they exceed the memory that the machine and the control group have left.
    ``read_only_between_copies`` maps sealed slots read-only, so that a wild write of this process
    dies instead of spoiling them; it costs 32 ms a GiB a copy (digests find the damage without it).
    ``available_bytes`` replaces asking the system for free memory.

    ``regions`` owns the memory (default: this process). What it kept from before is taken over,
    with what it holds sealed; slots too small for ``data_bytes`` go once they are free.

    Where memory is short once a slot was handed out, the pool goes on with those it has;
    ``on_short`` hears of it once.
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
            raise UsageError(
                f"number of slots out of range. count={count} ({self._regions.slots_min}..{most})"
            )
        self.count = count
        self._data_bytes = round_to_pages(max(1, data_bytes))
        self._header_bytes = round_to_pages(header_bytes)
        self._prefault = prefault
        self._read_only = read_only_between_copies
        self._available = available_bytes
        self._shared = PoolState(self._regions)
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
        check_available(
            missing * self.slot_bytes, purpose=f"{missing} slots", available=available_bytes
        )
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

        ``keep`` names snapshots that must not be overwritten. What the slot held stays valid until
        ``begin``. Raises UsageError where the first slot must be made and memory doesn't suffice;
        UnavailableError where nobody hands it out.
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
            return self._next_number() is not None or any(
                map(self._given_free, self._idle_slots(keep))
            )

    def newest(self) -> Slot | None:
        """The slot that was sealed last, or None."""
        with self._changed:
            return self._newest()

    def pin_newest(self) -> Pin | None:
        """Pin the slot that was sealed last, or None where none is sealed (and not given to a
        writer again)."""
        with self._changed:
            slot = self._newest()
            return None if slot is None or slot.writing else slot.pin()

    def resize(self, data_bytes: int, *, header_bytes: int | None = None) -> None:
        """Hand out slots of at least ``data_bytes`` from now on. Larger ones are made anew; old
        ones go once free.

        Slots never shrink. Raises UsageError, changing nothing, where memory doesn't suffice beside
        the old slots that can't go yet.
        """
        data = max(round_to_pages(max(1, data_bytes)), self._data_bytes)
        header = max(round_to_pages(header_bytes or 0), self._header_bytes)
        if (data, header) == (self._data_bytes, self._header_bytes):
            return
        with self._changed:
            roomy = [
                slot
                for slot in self._slots
                if len(slot.data) >= data and slot.header_bytes >= header
            ]
            small = [slot for slot in self._slots if slot not in roomy]
            freed = sum(slot.size_bytes for slot in small if self._idle(slot))
            missing = self.count - len(roomy)
            needed = missing * (data + header)
            check_available(
                needed, purpose=f"{missing} slots", freed_bytes=freed, available=self._available
            )
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
        """End the background thread and give all memory back; views that are still held stay
        readable. Idempotent.

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
        """Take over what was kept: the newest ``count`` slots that are large enough; the others go
        once they are free."""
        kept = []
        for number, region in self._regions.kept():
            header_bytes = header_bytes_of(region.view) or min(
                self._header_bytes, region.size_bytes - PAGE_BYTES
            )
            slot = Slot(
                number,
                region,
                header_bytes=header_bytes,
                pool=self._shared,
                read_only=self._read_only,
            )
            kept.append((slot.sealed_in_memory(), slot))
        found = []
        for snapshot, slot in sorted(kept, key=lambda one: one[0] or SnapshotId(-1, -1)):
            slot._adopt(snapshot)
            found.append(slot)
        fit = [
            slot
            for slot in found
            if len(slot.data) >= self._data_bytes and slot.header_bytes >= self._header_bytes
        ]
        self._slots = fit[-self.count :]
        self._retired = [slot for slot in found if slot not in self._slots]

    def _choose(self, keep: Collection[SnapshotId]) -> Slot | None:
        idle = self._idle_slots(keep)
        empty = next(
            (slot for slot in idle if slot.snapshot is None and self._given_free(slot)), None
        )
        if empty is not None:
            return empty
        made = self._make_or_do_without()
        if made is not None:
            return made
        return next(
            (slot for slot in idle if slot.snapshot is not None and self._given_free(slot)), None
        )

    def _make_or_do_without(self) -> Slot | None:
        """A new slot; None where there are enough, or memory is short in mid-training: then the
        slots there are must do.

        With fewer than the memory's owner needs it is tried again next time, for otherwise nothing
        would ever be free.
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
        """Those that nobody here uses, sealed longest ago first: mostly that one is free, and the
        owner is asked only once."""
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
        return self._regions.may_overwrite(
            slot, spare=self.count == 1 or slot is not self._newest()
        )

    def _next_number(self) -> int | None:
        """The number of a slot that may still be made; None where there are enough, or those that
        can't go yet have all."""
        if len(self._slots) >= self.count:
            return None
        taken = {slot.number for slot in (*self._retired, *self._slots)}
        return next(
            (number for number in range(self._regions.slots_max) if number not in taken), None
        )

    def _make(self) -> Slot | None:
        number = self._next_number()
        if number is None:
            return None
        check_available(self.slot_bytes, purpose="a slot", available=self._available)
        region = self._regions.make(number, self.slot_bytes)
        slot = Slot(
            number,
            region,
            header_bytes=self._header_bytes,
            pool=self._shared,
            read_only=self._read_only,
        )
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
        self._thread = threading.Thread(
            target=self._run_prefault, name="ckpt-prefault", daemon=True
        )
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
            with contextlib.suppress(
                UsageError, UnavailableError
            ):  # acquire meets the same and tells the caller
                slot = self._make()
        return slot
