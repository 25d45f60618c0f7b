"""Slots: shared memory that holds one rank's state of one snapshot, reused for the whole job. No
torch.

A pool gives a slot to one writer at a time; readers pin what is sealed. A slot may be overwritten
if it is neither pinned nor written and the owner of the memory allows it (``Regions``). Among those
the pool takes one that holds nothing, else the one that was sealed longest ago. Memory of this
process alone may be overwritten except for the slot sealed last (a pool of a single slot has no
other, so there the last one is given up).
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
from ckpt.staging.memory import (
    PREFAULT_BYTES,
    MemoryRoom,
    Region,
    check_available,
    round_to_pages,
)
from ckpt.values import PAGE_BYTES, SnapshotId, StagedIndex

SLOTS_MAX = 64


class Regions(Protocol):
    """Where the memory of a pool's slots comes from, and who else decides about overwriting it.

    The pool calls everything but ``make`` and ``kept`` under its lock, so it must be quick. A slot
    that was begun counts as in use until ``idle``.
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
        """How often ``may_overwrite`` may change its answer without a change in this process; None:
        never.
        """
        ...

    def kept(self) -> Sequence[tuple[int, Region]]:
        """Memory that slots had before this process began, by number. Called once."""
        ...

    def make(self, number: int, size_bytes: int, *, free_share: float) -> Region:
        """Zeroed memory for a new slot. Raises UsageError if memory is short, or ``free_share`` of
        all memory would not stay free; UnavailableError if its owner does not answer.
        """
        ...

    def may_overwrite(self, slot: Slot, *, spare: bool) -> bool:
        """Whether what an idle ``slot`` holds is no longer needed. ``spare``: a slot of this
        process was sealed after it.
        """
        ...

    def emptied(self, slot: Slot) -> None:
        """The slot is begun or invalidated: it holds nothing any more."""
        ...

    def sealed(self, slot: Slot) -> None:
        """The slot holds ``slot.snapshot`` under ``slot.generation``."""
        ...

    def idle(self, slot: Slot) -> None:
        """The slot is no longer written or pinned in this process."""
        ...

    def dropped(self, slot: Slot) -> None:
        """The pool gives the slot up for good; its memory is unmapped next. Not called when the
        whole pool is closed.
        """
        ...


class Pinner(Protocol):
    """Has a device's driver lock the memory of slots, in the pool's background thread."""

    def wants(self, slot: Slot) -> bool:
        """Whether ``pin`` would do something. Quick: the pool holds its lock."""
        ...

    def pin(self, slot: Slot) -> None:
        """Lock the memory, or note why not; ``wants`` is false from then on."""
        ...


class OwnRegions:
    """Memory of this process alone: the slot sealed last is kept, any other may be overwritten once
    it is not pinned.
    """

    slots_min = 1
    slots_max = 4 * SLOTS_MAX
    poll_s = None

    def kept(self) -> Sequence[tuple[int, Region]]:
        return ()

    def make(self, number: int, size_bytes: int, *, free_share: float) -> Region:
        del number, free_share  # the pool has looked
        return Region(size_bytes)

    def may_overwrite(self, slot: Slot, *, spare: bool) -> bool:
        del slot
        return spare

    def emptied(self, slot: Slot) -> None:
        pass

    def sealed(self, slot: Slot) -> None:
        pass

    def idle(self, slot: Slot) -> None:
        pass

    def dropped(self, slot: Slot) -> None:
        pass


class Slot:
    """One slot. ``memory`` is header and data, ``data`` the page-aligned data area, ``address``
    where that starts.

    ``fd`` can be given to another process, which reads the slot with ``read_slot``. Only the writer
    that acquired the slot calls ``begin``, then ``seal``, ``invalidate`` or ``release``; pinning is
    thread-safe. Its size is that of the memory's, the writer's and the readers' view of one state
    under one lock.
    """

    __slots__ = (
        "__weakref__",
        "_changed",
        "_header",
        "_on_free",
        "_orders",
        "_pins",
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
    ) -> None:
        self._region = region
        self._regions = pool.regions
        self._header = Header(self._region.view, header_bytes=header_bytes)
        self._changed = pool.changed
        self._orders = pool.orders
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
        """The descriptor of the whole slot, owned by the slot; None if memory can't be shared."""
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
        """Give up what the slot holds and return the new generation. Must come before the first
        byte of data is written.
        """
        self._check_writer()
        generation = self._header.begin()
        with self._changed:
            self.snapshot, self.order = None, 0
            self._regions.emptied(self)
        return generation

    def seal(self, index: StagedIndex) -> None:
        """Write ``index`` and make the slot valid; the writer releases it.

        Raises UsageError if the index does not fit the header; the slot is then still the writer's,
        and invalid.
        """
        self._check_writer()
        self._header.seal(index)
        with self._changed:
            self.snapshot, self.order = index.snapshot, next(self._orders)
            self._regions.sealed(self)
            self._release()

    def hand_in(self, tags: tuple[str, ...]) -> bool:
        """Mark what is sealed as handed in: see ``Header.hand_in``. For the holder of a pin."""
        return self._header.hand_in(tags)

    def invalidate(self) -> None:
        """Give up what the slot holds, sealed or half written, and release it if a writer
        held it.
        """
        self._header.begin()
        with self._changed:
            self.snapshot, self.order = None, 0
            self._regions.emptied(self)
            self._release()

    def release(self) -> None:
        """The writer releases the slot; it keeps what it holds: the old snapshot before ``begin``,
        nothing after.
        """
        with self._changed:
            self._release()

    def pin(self) -> Pin:
        """Keep the slot from being overwritten until the pin is released.

        Its writer pins it before ``seal``, so that it is never sealed and unpinned. Others read the
        slot's generation after pinning it.
        """
        with self._changed:
            self._pins += 1
        return Pin(self)

    def prefault(self) -> Iterator[int]:
        """Make the data area, and as much of the header as is usual, present in small pieces; safe
        beside a writer.
        """
        header_bytes = self.header_bytes
        yield from self._region.prefault(0, min(PREFAULT_BYTES, header_bytes))
        yield from self._region.prefault(header_bytes, self._region.size_bytes)

    def on_free(self, call: Callable[[], object]) -> None:
        """Call ``call`` just before the memory is given back (to undo a registration of it)."""
        self._on_free.append(call)

    def sealed_in_memory(self) -> SnapshotId | None:
        """What the memory holds sealed, read from its bytes; None if they contradict themselves."""
        try:
            sealed = read_summary(self.memory)
        except IntegrityError:
            return None
        return None if sealed is None else sealed[0].snapshot

    def _check_writer(self) -> None:
        if not self._writing:
            raise InternalError(f"the slot was not acquired by a writer. slot={self.number}")

    def _release(self) -> None:
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
    """What the slots of one pool share: the lock of all their states, the order of seals, and the
    owner of the memory.
    """

    __slots__ = ("changed", "orders", "regions")

    def __init__(self, regions: Regions) -> None:
        self.changed = threading.Condition()  # of a re-entrant lock
        self.orders = itertools.count(1)
        self.regions = regions


class Pin:
    """A reader's hold on a sealed slot; a context manager. ``release`` may be called more than
    once.
    """

    __slots__ = ("_held", "slot")

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self._held = True

    def release(self) -> None:
        """Release the slot."""
        was_held, self._held = self._held, False
        if was_held:
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
    pre-faulted in the background; fewer if memory has no room for so many.

    A slot is made when it is first needed or when the background thread gets to it. Raises
    UsageError if the slots exceed the memory that the machine and the control group have left.
    ``room``: how much memory there is, and which share of it stays free, unless there would be
    fewer slots than the owner of the memory needs.

    ``regions`` owns the memory (default: this process). What it kept from before is taken over,
    with what it holds sealed; slots that are too small for ``data_bytes`` go once they are free.

    If memory is short after a slot was first given out, the pool continues with the slots that it
    has; ``on_short`` is called once. ``pinner`` is given each slot once its pages are there.

    It is one state machine under one lock, so it has more attributes than other classes.
    """

    def __init__(
        self,
        *,
        count: int = SLOTS_DEFAULT,
        data_bytes: int,
        header_bytes: int = HEADER_BYTES_DEFAULT,
        prefault: bool = True,
        room: MemoryRoom | None = None,
        regions: Regions | None = None,
        on_short: Callable[[UsageError], None] | None = None,
        pinner: Pinner | None = None,
    ) -> None:
        self._pinner = pinner
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
        self._room = MemoryRoom() if room is None else room
        self._shared = PoolState(self._regions)
        self._changed = self._shared.changed
        self._slots: list[Slot] = []
        self._retired: list[Slot] = []
        self._warming: Slot | None = None
        self._on_short = on_short
        self._served = False
        self.shortage: UsageError | None = None
        """Why there are fewer slots than were asked for: memory was short for one. Else None."""
        self._closed = False
        self._thread: threading.Thread | None = None
        self._adopt()
        self._fit_in_memory()
        self._start_prefault()

    @property
    def data_bytes(self) -> int:
        """The data area of each slot that is given out from now on."""
        return self._data_bytes

    @property
    def slot_bytes(self) -> int:
        """One slot's memory at most; unused header pages are never taken."""
        return self._data_bytes + self._header_bytes

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The slots made so far, with those about to be freed after a resize."""
        with self._changed:
            return (*self._retired, *self._slots)

    def acquire(self, *, wait_s: float = 0.0) -> Slot | None:
        """A slot for one writer, or None if none is free within ``wait_s`` seconds.

        What the slot held stays valid until ``begin``. Raises UsageError if the first slot must be
        made and memory does not suffice; UnavailableError if the owner of the memory does not
        answer.
        """
        deadline = time.monotonic() + wait_s
        with self._changed:
            while True:
                if self._closed:
                    raise InternalError("the slot pool is closed.")
                self._free_retired()
                slot = self._choose()
                if slot is not None:
                    slot._take()
                    self._served = True
                    return slot
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return None
                poll_s = self._regions.poll_s
                self._changed.wait(left_s if poll_s is None else min(left_s, poll_s))

    def has_room(self) -> bool:
        """Whether ``acquire`` would find a slot now. Takes and makes none."""
        with self._changed:
            self._free_retired()
            return self._next_number() is not None or any(
                map(self._may_overwrite, self._idle_slots())
            )

    def newest(self) -> Slot | None:
        """The slot that was sealed last, or None."""
        with self._changed:
            return self._newest()

    def resize(self, data_bytes: int, *, header_bytes: int | None = None) -> None:
        """Give out slots of at least ``data_bytes`` from now on. Larger ones are made anew; old
        ones go once free.

        Slots never shrink. Raises UsageError, changing nothing, if memory does not suffice beside
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
                needed,
                purpose=f"{missing} slots",
                freed_bytes=freed,
                available=self._room.available_bytes,
            )
            self._data_bytes, self._header_bytes = data, header
            self._retired += small
            self._slots = roomy
            self._free_retired()
        self._start_prefault()

    def warm(self) -> None:
        """Pre-fault and pin, in the background, whatever is not yet. Call it if ``pinner`` wants
        more than before.
        """
        with self._changed:
            if any(map(self._is_unpinned, self._slots)):
                self._start_prefault()

    def wait_prefaulted(self) -> None:
        """Wait until the background thread is done with all slots. For benchmarks and tests."""
        if (thread := self._thread) is not None:
            thread.join()

    def close(self) -> None:
        """End the background thread and give all memory back; views that are still held stay
        readable. Idempotent.

        Memory that another process owns too stays there, with what it holds.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.wait_prefaulted()
        with self._changed:
            for slot in (*self._retired, *self._slots):
                slot._free()
            self._retired, self._slots = [], []

    def _adopt(self) -> None:
        """Take over what was kept: the newest ``count`` slots that are large enough; the others go
        once they are free.
        """
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
            )
            kept.append((slot.sealed_in_memory(), slot))
        adopted = []
        for snapshot, slot in sorted(kept, key=lambda pair: pair[0] or SnapshotId(-1, -1)):
            slot._adopt(snapshot)
            adopted.append(slot)
        fit = [
            slot
            for slot in adopted
            if len(slot.data) >= self._data_bytes and slot.header_bytes >= self._header_bytes
        ]
        self._slots = fit[-self.count :]
        self._retired = [slot for slot in adopted if slot not in self._slots]

    def _fit_in_memory(self) -> None:
        """Do with as many slots as memory has room for, and say so. With the fewest that the owner
        of the memory needs, training still survives, but skips snapshots while one is uploaded.

        Raises UsageError if not even these fit.
        """
        fewest = max(1, self._regions.slots_min, len(self._slots))
        for count in range(self.count, fewest - 1, -1):
            missing = count - len(self._slots)
            try:
                check_available(
                    missing * self.slot_bytes,
                    purpose=f"{missing} slots",
                    available=self._room.available_bytes,
                    free_share=self._free_share(count),
                )
            except UsageError as error:
                if count <= fewest:
                    raise
                self.shortage = self.shortage or error
                continue
            if self.shortage is not None and self._on_short is not None:
                self._on_short(self.shortage)
            self.count = count
            return

    def _free_share(self, count: int) -> float:
        """What is to stay free with that many slots: nothing for those that must be."""
        return self._room.free_share if count > max(1, self._regions.slots_min) else 0.0

    def _choose(self) -> Slot | None:
        idle = self._idle_slots()
        empty = next(
            (slot for slot in idle if slot.snapshot is None and self._may_overwrite(slot)), None
        )
        if empty is not None:
            return empty
        made = self._make_or_do_without()
        if made is not None:
            return made
        return next(
            (slot for slot in idle if slot.snapshot is not None and self._may_overwrite(slot)), None
        )

    def _make_or_do_without(self) -> Slot | None:
        """A new slot; None if there are enough, or if memory is short during training: then the
        existing slots must suffice.

        With fewer slots than the memory's owner needs, it is tried again next time: otherwise no
        slot would ever become free.
        """
        try:
            return self._make()
        except UsageError as error:
            if not self._served:
                raise
            self._do_without(error)
            return None

    def _do_without(self, error: UsageError) -> None:
        """Memory is short for another slot: those that there are must suffice."""
        self.count = min(self.count, max(self._regions.slots_min, len(self._slots)))
        if self.shortage is None and self._on_short is not None:
            self._on_short(error)
        self.shortage = error

    def _idle_slots(self) -> list[Slot]:
        """The slots that this process does not use, sealed longest ago first: usually that one is
        free, and the owner is asked only once.
        """
        idle = (slot for slot in self._slots if self._idle(slot))
        return sorted(idle, key=lambda slot: slot.order)

    def _newest(self) -> Slot | None:
        sealed = [slot for slot in (*self._retired, *self._slots) if slot.snapshot is not None]
        return max(sealed, key=lambda slot: slot.order, default=None)

    @staticmethod
    def _idle(slot: Slot) -> bool:
        return not slot.pinned and not slot.writing

    def _may_overwrite(self, slot: Slot) -> bool:
        """Whether the owner of the memory lets an idle slot be overwritten."""
        return self._regions.may_overwrite(
            slot, spare=self.count == 1 or slot is not self._newest()
        )

    def _next_number(self) -> int | None:
        """The number of a slot that may still be made; None if there are enough, or all numbers are
        taken.
        """
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
        free_share = self._free_share(len(self._slots) + 1)
        check_available(
            self.slot_bytes,
            purpose="a slot",
            available=self._room.available_bytes,
            free_share=free_share,
        )
        region = self._regions.make(number, self.slot_bytes, free_share=free_share)
        slot = Slot(
            number,
            region,
            header_bytes=self._header_bytes,
            pool=self._shared,
        )
        self._slots.append(slot)
        return slot

    def _free_retired(self) -> None:
        for slot in list(self._retired):
            unused = self._idle(slot) and slot is not self._warming
            if unused and self._may_overwrite(slot):
                self._retired.remove(slot)
                self._regions.dropped(slot)
                slot._free()

    def _start_prefault(self) -> None:
        with self._changed:
            running = self._thread is not None and self._thread.is_alive()
            if not self._prefault or running or self._closed:
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
                    self._thread = None  # whoever wants more starts another
                    return
            if slot not in done:
                done.append(slot)
                for _ in slot.prefault():
                    if self._closed or slot not in self._slots:
                        break
            if self._pinner is not None and not self._closed and slot in self._slots:
                self._pinner.pin(slot)

    def _is_unpinned(self, slot: Slot) -> bool:
        return self._pinner is not None and self._pinner.wants(slot)

    def _next_cold(self, done: Collection[Slot]) -> Slot | None:
        if self._closed:
            return None
        slot = next(
            (slot for slot in self._slots if slot not in done or self._is_unpinned(slot)), None
        )
        if slot is None:
            # The next acquire meets the same error and raises it to its caller.
            with contextlib.suppress(UnavailableError):
                try:
                    slot = self._make()
                except UsageError as error:
                    if self._free_share(len(self._slots) + 1):
                        self._do_without(error)
        return slot
