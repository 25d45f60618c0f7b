"""One slot: who writes it, who reads it, and where its memory comes from. No torch."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Protocol

from ckpt.errors import IntegrityError, InternalError
from ckpt.staging.header import Header, read_brief
from ckpt.staging.memory import PREFAULT_BYTES, Region
from ckpt.values import SnapshotId, StagedIndex

SLOTS_MAX = 64


class Regions(Protocol):
    """Where the memory of a pool's slots comes from, and who else has a say about it.

    A pool asks and tells under its lock, so everything here is quick, but for ``make`` and ``kept``. A slot that was begun
    counts as held until ``idle``.
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
        """How often ``may_overwrite`` may change its answer without this process doing anything; None: never."""
        ...

    def kept(self) -> Sequence[tuple[int, Region]]:
        """Memory that slots had before this process began, by number; asked once."""
        ...

    def make(self, number: int, size_bytes: int) -> Region:
        """Zeroed memory for a new slot. Raises UsageError where memory is short, UnavailableError where nobody answers."""
        ...

    def may_overwrite(self, slot: Slot, *, spare: bool) -> bool:
        """Whether nobody needs what an idle ``slot`` holds. ``spare``: a slot of this process was sealed after it."""
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
        """The pool gives the slot up for good; its memory is unmapped next. Not told when the whole pool is closed."""
        ...


class OwnRegions:
    """Memory of this process alone: the slot sealed last is kept, every other one is free once nobody pins it."""

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
    """One slot. ``memory`` is header and data, ``data`` the page-aligned data area, ``address`` where it starts.

    ``fd`` can be handed to another process, which reads the slot with ``read_slot``. Only the writer that acquired the slot
    calls ``begin``, then ``seal``, ``invalidate`` or ``release``; pinning is thread-safe.
    """

    __slots__ = ("__weakref__", "_changed", "_header", "_on_free", "_orders", "_pins", "_read_only", "_region", "_regions",
                 "_writing", "address", "data", "memory", "number", "order", "registered", "snapshot")  # fmt: skip

    def __init__(
        self, number: int, region: Region, *, header_bytes: int, shared: Shared, read_only: bool = False
    ) -> None:
        self._region = region
        self._regions = shared.regions
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
        """Give up what the slot holds and return the new generation. Before the first byte of data is written."""
        self._check_writer()
        if self._read_only and self._header.valid:
            self._region.protect(writable=True)
        generation = self._header.open()
        with self._changed:
            self.snapshot, self.order = None, 0
            self._regions.emptied(self)
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
            self._regions.sealed(self)
            self._let_go()

    def invalidate(self) -> None:
        """Give up what the slot holds, sealed or half written, and let go of it where a writer held it."""
        if self._read_only and self._header.valid:
            self._region.protect(writable=True)
        self._header.open()
        with self._changed:
            self.snapshot, self.order = None, 0
            self._regions.emptied(self)
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
        header_bytes = self.header_bytes
        yield from self._region.prefault(0, min(PREFAULT_BYTES, header_bytes))
        yield from self._region.prefault(header_bytes, self._region.size_bytes)

    def on_free(self, call: Callable[[], object]) -> None:
        """Have ``call`` called just before the memory is given back (to undo a registration of it)."""
        self._on_free.append(call)

    def sealed_in_memory(self) -> SnapshotId | None:
        """What the memory holds sealed, read from its bytes. What contradicts itself counts as nothing."""
        try:
            found = read_brief(self.memory)
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


class Shared:
    """What the slots of one pool have in common: the lock of all their states, the order of seals, and whose memory it is."""

    __slots__ = ("changed", "orders", "regions")

    def __init__(self, regions: Regions) -> None:
        self.changed = threading.Condition()  # of a re-entrant lock
        self.orders = itertools.count(1)
        self.regions = regions


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
