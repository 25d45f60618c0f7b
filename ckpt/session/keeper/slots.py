"""Slots whose memory the keeper holds too: where it comes from, and when a slot may be reused.

The keeper and this process map the same memfds, so that staged state outlives the trainer. The
board shows the other ranks what each slot holds, and carries an in-use mark for each slot. A
trainer sets the mark before it publishes a slot that is to become durable; the mark is cleared by
the party that is responsible for the slot then: the keeper once the slot was submitted to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from ckpt.backends.base import Backend
from ckpt.errors import IntegrityError, UnavailableError
from ckpt.format.index import SnapshotIndex
from ckpt.ipc.board import SLOTS_MAX, Board
from ckpt.restore.from_slots import SlotStore, staged_index
from ckpt.session.slot_rule import BoardView, newest_of, passed, reason_kept
from ckpt.staging.header import read_summary
from ckpt.staging.memory import Region
from ckpt.staging.slot import Slot
from ckpt.values import SnapshotId

SLOT_POLL_S = 0.002
"""How often a rank that waits for a slot reads the board: other ranks and the keeper free slots
there.
"""

_NOTHING_SEEN = BoardView((), ())


class SlotHolder(Protocol):
    """The part of a keeper's connection that slots need."""

    def slots(self, rank: int) -> Sequence[tuple[int, Region]]:
        """The slots of a rank that the keeper holds, by number."""
        ...

    def slot_created(
        self, index: int, fd: int, size_bytes: int, *, free_share: float = 0.0
    ) -> None:
        """Give a slot to the keeper, which holds it on return. ``fd`` stays the caller's."""
        ...

    def slot_released(self, index: int) -> None:
        """Report that a slot was given up."""
        ...


class _NoKeeper:
    """Stands in for a keeper that is gone for good: accepts every slot and holds none."""

    def slots(self, rank: int) -> Sequence[tuple[int, Region]]:
        del rank
        return ()

    def slot_created(
        self, index: int, fd: int, size_bytes: int, *, free_share: float = 0.0
    ) -> None:
        pass

    def slot_released(self, index: int) -> None:
        pass


class SharedSlots:
    """The ``Regions`` of a pool whose slots a keeper holds. Make it before this rank is announced
    to the others.

    The memory is the truth, the board follows it: if the trainer before this one died between
    changing the one and the other, the board is corrected. Set ``epoch``, the one that snapshots
    are captured in, as soon as it is open. Raises UnavailableError if the keeper is lost. Its size
    is that of the ``Regions`` protocol, plus handing slots over and back.
    """

    slots_min = 2
    """A single slot could not be written while it keeps the complete snapshot."""
    slots_max = SLOTS_MAX
    poll_s = SLOT_POLL_S

    def __init__(self, keeper: SlotHolder, board: Board, rank: int) -> None:
        self._keeper: SlotHolder = keeper
        self._board = board
        self._own = board.rank(rank)
        self._marked: set[int] = set()
        self._complete: SnapshotId | None = None
        self.epoch = 0
        self.resume: SnapshotId | None = None
        """The staged snapshot that the epoch continues from, or None."""
        self._kept: dict[int, Region] = dict(keeper.slots(rank))
        self._correct_board()

    def kept(self) -> Sequence[tuple[int, Region]]:
        kept, self._kept = self._kept, {}
        return list(kept.items())

    def make(self, number: int, size_bytes: int, *, free_share: float) -> Region:
        region = Region(size_bytes)
        try:
            if region.fd is None:
                raise UnavailableError(
                    "memory can't be shared with a keeper on this system; set CKPT_KEEPER=off"
                )
            self._own.clear(number)
            self._own.release(number)
            self._keeper.slot_created(number, region.fd, size_bytes, free_share=free_share)
        except BaseException:
            region.close()
            raise
        return region

    def may_overwrite(self, slot: Slot, *, spare: bool) -> bool:
        """``spare`` does not matter here: what all ranks hold decides, not what this rank sealed
        last.
        """
        del spare
        return self.reason_kept(slot) is None

    def reason_kept(self, slot: Slot) -> str | None:
        """Why an idle slot must not be overwritten now, or None if it may be."""
        in_use, pair = self._own.slot(slot.number).held, slot.snapshot
        if in_use or pair is None or self._replaced(pair):
            view = (
                _NOTHING_SEEN
                if self._complete is None
                else BoardView((), (frozenset([self._complete]),))
            )
        else:
            view = self._look()
        return reason_kept(pair, in_use=in_use, view=view, epoch=self.epoch, resume=self.resume)

    def _replaced(self, pair: SnapshotId) -> bool:
        """Whether a newer snapshot than ``pair`` is complete.

        Once a snapshot is complete, one at least as new stays complete (the slot rule), so the last
        answer saves reading the board.
        """
        if self._complete is None or pair >= self._complete:
            self._complete = newest_of([self._complete, self._board.newest_complete()])
        return self._complete is not None and pair < self._complete

    def emptied(self, slot: Slot) -> None:
        self._own.clear(slot.number)

    def sealed(self, slot: Slot) -> None:
        """Publish the slot on the board. The in-use mark is set first if the stager holds a pin: no
        other reader may see the slot unmarked.
        """
        assert slot.snapshot is not None, "sealed"
        if slot.pinned:
            self._marked.add(slot.number)
            self._own.hold(slot.number)
        self._own.publish(slot.number, slot.snapshot, slot.generation)

    def idle(self, slot: Slot) -> None:
        if slot.number in self._marked:
            self._marked.discard(slot.number)
            self._own.release(slot.number)

    def dropped(self, slot: Slot) -> None:
        self._own.clear(slot.number)
        self._keeper.slot_released(slot.number)

    def hand_over(self, slot: Slot) -> None:
        """From now on the keeper clears the mark of ``slot``. Call it before the message that
        submits the slot.
        """
        self._marked.discard(slot.number)

    def take_back(self, slot: Slot) -> None:
        """The submission could not be sent: this process is responsible for the mark again."""
        self._marked.add(slot.number)
        self._own.hold(slot.number)  # the end of staging may have cleared it meanwhile

    def give_up(self, slot: Slot) -> None:
        """What a lost keeper was to make durable will not be: the slot may be overwritten."""
        self._marked.discard(slot.number)
        self._own.release(slot.number)

    def give_up_all(self, slots: Sequence[Slot]) -> None:
        """No keeper follows: as ``give_up``, of all that nothing in this process uses."""
        for slot in slots:
            if slot.number in self._marked and not slot.pinned:
                self.give_up(slot)

    def hand_over_all(self, slots: Sequence[Slot]) -> None:
        """Give every slot of a pool to a new keeper. Clears marks that this process did not set:
        the keeper that set them is gone.
        """
        for slot in slots:
            if slot.number not in self._marked:
                self._own.release(slot.number)
            if slot.fd is not None:
                self._keeper.slot_created(slot.number, slot.fd, slot.size_bytes)
        for number, region in self._kept.items():  # not yet taken over by a pool
            self._own.release(number)
            if region.fd is not None:
                self._keeper.slot_created(number, region.fd, region.size_bytes)

    def detach_keeper(self, slots: Sequence[Slot]) -> None:
        """There is no keeper any more and none will come: slots, new ones too, belong to this
        process alone.
        """
        self._keeper = _NoKeeper()
        self.hand_over_all(slots)

    def close(self) -> None:
        """Unmap what no pool took over. Idempotent."""
        for _, region in self.kept():
            region.close()

    def _look(self) -> BoardView:
        ranks = self._board.all_ranks()
        reached = tuple(
            passed(rank.sealed_snapshots(), completed=rank.completed, epoch=self.epoch)
            for rank in ranks
        )
        return BoardView(reached, tuple(rank.sealed_snapshots() for rank in ranks))

    def _correct_board(self) -> None:
        for shown in self._own.slots():
            region = self._kept.get(shown.index)
            sealed = None if region is None else _sealed(region)
            if sealed is not None:
                if (shown.snapshot, shown.generation) != sealed:
                    self._own.publish(shown.index, *sealed)
                continue
            if shown.generation:
                self._own.clear(shown.index)
            if region is not None:
                self._own.release(shown.index)


@contextmanager
def open_staged(
    keeper: SlotHolder, snapshot: SnapshotId, *, ranks: int, job: str
) -> Iterator[tuple[SnapshotIndex, Backend]]:
    """Open a staged snapshot to restore from: its index, and the slots of all ranks as a store.

    Raises IntegrityError if a rank's slot does not hold it (any more). It may do so at the end:
    what was read before may then be of several snapshots. Raises UnavailableError if the keeper is
    lost.
    """
    regions: list[Region] = []
    try:
        memories: dict[int, list[memoryview]] = {}
        for rank in range(ranks):
            slots = [region for _, region in keeper.slots(rank)]
            regions += slots
            memories[rank] = [region.view for region in slots]
        store = SlotStore.find(snapshot, memories)
        try:
            yield staged_index(store.indexes, job=job), store
            if not store.unchanged():
                raise IntegrityError(
                    f"a slot was overwritten while it was read. snapshot={snapshot}"
                )
        finally:
            memories.clear()
            store.close()
    finally:
        for region in regions:
            region.close()


def _sealed(region: Region) -> tuple[SnapshotId, int] | None:
    try:
        summary = read_summary(region.view)
    except IntegrityError:  # no reader accepts it, so it counts as empty
        return None
    return None if summary is None else (summary[0].snapshot, summary[1])
