"""The memory of this node's ranks: slots (memfds) of all ranks, what they hold sealed, and what the
board says of that."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from ckpt.errors import IntegrityError, UsageError
from ckpt.ipc.board import SLOTS_MAX, Board
from ckpt.ipc.messages import SlotEntry, SlotReport
from ckpt.save.sealed import SealedSlot
from ckpt.staging.header import (
    Header,
    SlotSummary,
    generation_of,
    handed_in,
    header_bytes_of,
    read_slot,
    read_summary,
)
from ckpt.staging.memory import available_bytes
from ckpt.values import SnapshotId, StagedIndex

PostToLoop = Callable[[Callable[[], object]], None]
"""Has the keeper's loop make a call, soon; from any thread."""

PAGE_BLOCK_BYTES = 512
"""The unit of ``st_blocks``."""


class Estate(msgspec.Struct, frozen=True):
    """What a keeper leaves to its successor, by descriptors that both have: the lock of the job's
    folder, the board (-1: there is none), and the slots as rank, index, size and descriptor."""

    lock: int
    board: int
    slots: tuple[tuple[int, int, int, int], ...]

    @property
    def fds(self) -> tuple[int, ...]:
        """All descriptors."""
        board = (self.board,) if self.board >= 0 else ()
        return (self.lock, *board, *(fd for *_, fd in self.slots))


@dataclass(slots=True, eq=False)
class HeldSlot:
    """One memfd and its mapping. ``uploads``: how many hold it now. ``retired``: its rank has given
    it up meanwhile."""

    rank: int
    index: int
    fd: int
    size_bytes: int
    mapping: mmap.mmap
    uploads: int = 0
    retired: bool = False

    @property
    def memory(self) -> memoryview:
        """Header and data."""
        return memoryview(self.mapping)

    def read(self) -> tuple[StagedIndex, int] | None:
        """What is sealed, and its generation; None if nothing is, or the header is damaged."""
        try:
            return read_slot(self.memory)
        except IntegrityError:
            return None

    def handed_in(self) -> tuple[str, ...] | None:
        """The tags of what is sealed, if it was handed in to a keeper; else None."""
        try:
            return handed_in(self.memory)
        except IntegrityError:
            return None

    def summary(self) -> tuple[SlotSummary, int] | None:
        """As ``read``, but only which snapshot of which rank it is: far quicker."""
        try:
            return read_summary(self.memory)
        except IntegrityError:
            return None


class SlotTable:
    """All slots of one job on this node, for the keeper's loop alone. ``post`` brings releases of
    other threads to it.

    ``dropped`` is called with rank and index of each slot that is gone.
    """

    def __init__(
        self, board: Board, post: PostToLoop, *, dropped: Callable[[int, int], None]
    ) -> None:
        self._dropped = dropped
        self._board = board
        self._post = post
        self._slots: dict[tuple[int, int], HeldSlot] = {}
        self._outlived: list[HeldSlot] = []
        """Slots that uploads still hold and whose number another slot has taken: the board says
        nothing of them."""

    def add(
        self, rank: int, index: int, fd: int, size_bytes: int, *, free_share: float = 0.0
    ) -> HeldSlot:
        """Take ``fd`` over. Raises UsageError if the number is taken, sizes differ or memory is
        short; ``fd`` is then closed. ``free_share``: see ``SlotCreated``.

        The number of a slot that was given up is free, even while an upload still holds that slot.
        """
        try:
            self._check(rank, index, fd, size_bytes)
            self._check_memory(rank, fd, size_bytes, free_share=free_share)
            mapping = mmap.mmap(fd, size_bytes)
        except BaseException:
            os.close(fd)
            raise
        if (rank, index) in self._slots:
            self._outlive(self._slots.pop((rank, index)))
        slot = HeldSlot(rank, index, fd, size_bytes, mapping)
        self._slots[rank, index] = slot
        return slot

    def of_rank(self, rank: int) -> list[HeldSlot]:
        """The slots that ``rank`` still uses, by index."""
        return sorted(
            (slot for slot in self if slot.rank == rank and not slot.retired),
            key=lambda slot: slot.index,
        )

    def __iter__(self) -> Iterator[HeldSlot]:
        """The slots that have a number."""
        return iter(list(self._slots.values()))

    @property
    def total_bytes(self) -> int:
        """Memory of all slots, header and data."""
        return sum(slot.size_bytes for slot in self._all())

    def drop(self, rank: int, index: int) -> bool:
        """The rank gave its slot up; the memory is freed once no upload holds it. True if it is
        freed now."""
        slot = self._slots.get((rank, index))
        if slot is None:
            return False
        slot.retired = True
        return self._free_retired(slot)

    def hold(self, rank: int, index: int, generation: int) -> SealedSlot | None:
        """Slot ``index`` for an upload, if it is still sealed under ``generation``; held until it
        is released."""
        slot = self._slots.get((rank, index))
        sealed = slot.read() if slot is not None else None
        if slot is None or sealed is None or sealed[1] != generation:
            if slot is not None and not slot.uploads:
                # The trainer marked it as held before it asked; without an upload nothing else
                # clears the mark.
                self._board.rank(rank).release(index)
            return None
        return self._hold(slot, *sealed)

    def hold_snapshot(self, rank: int, snapshot: SnapshotId) -> SealedSlot | None:
        """The slot of ``rank`` that holds ``snapshot``, for an upload; held until it is
        released."""
        for slot in self.of_rank(rank):
            summary = slot.summary()
            if summary is None or summary[0].snapshot != snapshot:
                continue
            sealed = slot.read()
            if sealed is not None and sealed[0].snapshot == snapshot:
                return self._hold(slot, *sealed)
        return None

    def sync_board(self) -> None:
        """Between attempts: make the board say what the headers say. Half-written slots hold
        nothing.

        A trainer that died after it marked a slot as held and before it sent the message leaves a
        mark that nothing would clear, so only marks of uploads stay.
        """
        for slot in self:
            if not slot.uploads:
                self._board.rank(slot.rank).release(slot.index)
            entry = self._board.rank(slot.rank).slot(slot.index)
            summary = slot.summary()
            if summary is None:
                self._board.rank(slot.rank).clear(slot.index)
            elif (entry.snapshot, entry.generation) != (summary[0].snapshot, summary[1]):
                self._board.rank(slot.rank).publish(slot.index, summary[0].snapshot, summary[1])

    def handed_in_marks(self) -> bool:
        """Whether any slot holds a snapshot that was handed in."""
        return any(slot.handed_in() is not None for slot in self)

    def marked(self) -> dict[SnapshotId, tuple[str, ...]]:
        """The snapshots that some rank handed in to a keeper, with their tags; oldest first."""
        found: dict[SnapshotId, tuple[str, ...]] = {}
        for slot in self:
            summary, tags = slot.summary(), slot.handed_in()
            if summary is not None and tags is not None:
                found[summary[0].snapshot] = tags
        return dict(sorted(found.items()))

    def handed_in(self, ranks: int) -> dict[SnapshotId, tuple[str, ...]]:
        """Those of ``marked`` that all ranks hold."""
        marked = self.marked()
        complete = frozenset(self.complete_snapshots(ranks)) if marked else frozenset()
        return {pair: tags for pair, tags in marked.items() if pair in complete}

    def discard_after(self, resume: SnapshotId | None) -> None:
        """Training continues from ``resume``: captures after it (None: all) are on no lineage, and
        their slots are free."""
        for slot in self:
            entry = self._board.rank(slot.rank).slot(slot.index)
            if (
                entry.snapshot is not None
                and not entry.held
                and (resume is None or entry.snapshot > resume)
            ):
                self._board.rank(slot.rank).clear(slot.index)
                header_bytes = header_bytes_of(slot.memory)
                if (
                    header_bytes is not None
                ):  # else the header is damaged, and the slot holds nothing
                    Header(slot.memory, header_bytes=header_bytes).begin()

    def complete_snapshots(self, ranks: int) -> list[SnapshotId]:
        """Every snapshot that all ranks hold sealed, newest first, by their headers."""
        return list(self.snapshot_origins(ranks))

    def snapshot_origins(self, ranks: int) -> dict[SnapshotId, str]:
        """As ``complete_snapshots``, with the origins in the headers: equal numbers of different
        origins do not match."""
        return self.shares_of(range(ranks), ranks)

    def shares_of(self, ranks: range, world_size: int) -> dict[SnapshotId, str]:
        """The snapshots of a world of that size of which the slots here hold the shares of all of
        ``ranks``, this node's, with their origins; newest first."""
        held: list[set[tuple[SnapshotId, str]]] = [set() for _ in ranks]
        for slot in self:
            summary = slot.summary()
            if summary is None or slot.rank >= len(ranks):
                continue
            if (summary[0].rank, summary[0].world_size) == (ranks[slot.rank], world_size):
                held[slot.rank].add((summary[0].snapshot, summary[0].origin))
        return dict(sorted(set.intersection(*held), reverse=True)) if held else {}

    def report(self, rank: int) -> tuple[SlotReport, ...]:
        """For tools."""
        board = self._board.rank(rank)
        return tuple(
            SlotReport(
                index=slot.index,
                size_bytes=slot.size_bytes,
                snapshot=board.slot(slot.index).snapshot,
                held=board.slot(slot.index).held,
            )
            for slot in self.of_rank(rank)
        )

    def entries(self, rank: int) -> tuple[SlotEntry, ...]:
        """The answer to ``GetSlots``."""
        return tuple(SlotEntry(slot.index, slot.size_bytes) for slot in self.of_rank(rank))

    def close(self) -> None:
        """Give everything up. Views that an upload still holds stay readable."""
        for slot in self._all():
            os.close(slot.fd)
        self._slots.clear()
        self._outlived.clear()

    def _all(self) -> list[HeldSlot]:
        return [*self._slots.values(), *self._outlived]

    def _outlive(self, slot: HeldSlot) -> None:
        """Another slot takes the number of one that was given up. Supervisors and board know slots
        by number only."""
        self._outlived.append(slot)
        self._board.rank(slot.rank).clear(slot.index)
        self._board.rank(slot.rank).release(slot.index)
        self._dropped(slot.rank, slot.index)

    def _hold(self, slot: HeldSlot, index: StagedIndex, generation: int) -> SealedSlot:
        header_bytes = _header_bytes(slot)
        rank_board = self._board.rank(slot.rank)
        rank_board.hold(slot.index)
        slot.uploads += 1

        def released() -> None:
            slot.uploads -= 1
            if slot.uploads:
                return
            if slot in self._outlived:  # its number on the board is another slot's now
                self._outlived.remove(slot)
                os.close(slot.fd)
            elif self._slots.get((slot.rank, slot.index)) is slot:
                rank_board.release(slot.index)
                self._free_retired(slot)

        def release() -> None:  # by an upload's thread; the table belongs to the loop
            self._post(released)

        def unchanged() -> bool:
            return generation_of(slot.memory) == generation

        return SealedSlot(
            index=index,
            data=slot.memory[header_bytes:],
            release=release,
            shared={},
            unchanged=unchanged,
        )

    def _free_retired(self, slot: HeldSlot) -> bool:
        if not slot.retired or slot.uploads:
            return False
        if self._slots.pop((slot.rank, slot.index), None) is slot:
            self._board.rank(slot.rank).clear(slot.index)
            os.close(slot.fd)
            self._dropped(slot.rank, slot.index)
        return True

    def _check(self, rank: int, index: int, fd: int, size_bytes: int) -> None:
        other = self._slots.get((rank, index))
        taken = other is not None and not other.retired
        if not 0 <= index < SLOTS_MAX or not 0 <= rank < self._board.ranks or taken:
            raise UsageError(f"a slot number is taken or out of range. rank={rank} index={index}")
        found_bytes = os.fstat(fd).st_size
        if size_bytes <= 0 or found_bytes != size_bytes:
            raise UsageError(
                f"slot size mismatch. size_bytes={found_bytes} declared_bytes={size_bytes}"
            )

    def _check_memory(self, rank: int, fd: int, size_bytes: int, *, free_share: float) -> None:
        # Slots take their pages little by little: memory that is promised and not taken yet counts
        # as used. So does what the other ranks still need for as many slots, or the first rank to
        # come would take what they are to have.
        others = range(self._board.ranks) if free_share else ()
        count = len(self.of_rank(rank)) + 1
        owed = sum(max(0, count - len(self.of_rank(other))) for other in others if other != rank)
        promised = (owed + 1) * size_bytes + sum(
            max(0, slot.size_bytes - _taken(slot.fd)) for slot in self._all()
        )
        available = available_bytes(free_share=free_share)
        if available is not None and promised - _taken(fd) > available:
            raise UsageError(
                f"not enough memory for another slot. rank={rank} slot_bytes={size_bytes} "
                f"promised_bytes={promised} available_bytes={available} slots={len(self._all())}; "
                "allow fewer slots or set memory_every=0"
            )


class RankMemory:
    """What this node's ranks stage: how many they are, their board and their slots. For the
    keeper's loop alone.

    Board and slots are None until a launch is admitted; they are replaced together if the number of
    ranks changes.
    """

    def __init__(self, post: PostToLoop, *, dropped: Callable[[int, int], None]) -> None:
        self._post = post
        self._dropped = dropped
        self.ranks = 0
        self.board: Board | None = None
        self.slots: SlotTable | None = None

    def resize(self, ranks: int) -> None:
        """A fresh board and no slots, for another number of ranks; after ``close``."""
        self.ranks = ranks
        self.board = Board.create(ranks)
        self.slots = SlotTable(self.board, self._post, dropped=self._dropped)

    def adopt_board(self, fd: int) -> None:
        """Take over the board that a supervisor kept from an earlier keeper, if this one has only
        an unused one."""
        kept = Board.attach(fd)
        if self.board is None or self.slots is None or kept.ranks != self.ranks or list(self.slots):
            kept.close()
            return
        kept.attempt = max(kept.attempt, self.board.attempt)
        self.board.close()
        self.board = kept
        self.slots = SlotTable(kept, self._post, dropped=self._dropped)

    def estate(self, lock: int) -> Estate:
        """What a successor takes over; slots that were given up are not among it."""
        if self.board is None or self.slots is None:
            return Estate(lock, -1, ())
        slots = (
            (slot.rank, slot.index, slot.size_bytes, slot.fd)
            for slot in self.slots
            if not slot.retired
        )
        return Estate(lock, self.board.fd, tuple(slots))

    def inherit(self, estate: Estate) -> None:
        """Take over board and slots of the keeper before this one; their descriptors are owned
        here from now on."""
        if estate.board < 0:
            return
        self.board = Board.attach(estate.board)
        self.ranks = self.board.ranks
        self.slots = SlotTable(self.board, self._post, dropped=self._dropped)
        for rank, index, size_bytes, fd in estate.slots:
            self.slots.add(rank, index, fd, size_bytes)
        self.slots.sync_board()

    def completed(self) -> int:
        """The most steps that any rank has completed in this attempt; -1 for none."""
        if self.board is None:
            return -1
        steps = [self.board.rank(rank).completed for rank in range(self.ranks)]
        return max((step for step in steps if step is not None), default=-1)

    def close(self) -> None:
        """Give slots and board up."""
        if self.slots is not None:
            self.slots.close()
        if self.board is not None:
            self.board.close()


def _taken(fd: int) -> int:
    return os.fstat(fd).st_blocks * PAGE_BLOCK_BYTES


def _header_bytes(slot: HeldSlot) -> int:
    fields = slot.memory[:64].cast("Q")
    return int(fields[3])
