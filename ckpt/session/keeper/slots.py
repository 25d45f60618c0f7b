"""Slots whose memory a keeper holds too, so that it outlives the trainer: where it comes from and
when it may be reused.

The keeper and this process map the same memfds. The board tells the other ranks what each slot
holds, and carries the marks of slots that are in use: a trainer sets one before it publishes a slot
that is to be made durable, and whoever is responsible for the slot then clears it, the keeper once
the slot was handed to it.
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
"""How often a rank that waits for a slot looks at the board: other ranks and the keeper free slots
there."""

_NOTHING_SEEN = BoardView((), ())


class SlotHolder(Protocol):
    """The part of a keeper's connection that slots need."""

    def slots(self, rank: int) -> Sequence[tuple[int, Region]]:
        """The slots of a rank that the keeper holds, by number."""
        ...

    def slot_made(self, index: int, fd: int, size_bytes: int) -> None:
        """Hand a slot to the keeper, which has it on return. ``fd`` stays the caller's."""
        ...

    def slot_gone(self, index: int) -> None:
        """Tell that a slot is given up."""
        ...


class _NoKeeper:
    """Takes every slot and holds none."""

    def slots(self, rank: int) -> Sequence[tuple[int, Region]]:
        """See ``SlotHolder``."""
        del rank
        return ()

    def slot_made(self, index: int, fd: int, size_bytes: int) -> None:
        """See ``SlotHolder``."""

    def slot_gone(self, index: int) -> None:
        """See ``SlotHolder``."""


class SharedSlots:
    """The ``Regions`` of a pool whose slots a keeper holds. Make it before this rank tells the
    others that it is there.

    What the memory holds is true; the board is corrected where the trainer before this one died
    between a change of the one and of the other. ``epoch`` is the one that snapshots are captured
    in: set it as soon as it is open. Raises UnavailableError where the keeper is gone.
    """

    slots_min = 2
    """One slot can't be written while it keeps what is complete."""
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
        """The staged pair that the epoch goes on from."""
        self._kept: dict[int, Region] = dict(keeper.slots(rank))
        self._correct_board()

    def kept(self) -> Sequence[tuple[int, Region]]:
        """See ``Regions``."""
        found, self._kept = self._kept, {}
        return list(found.items())

    def make(self, number: int, size_bytes: int) -> Region:
        """See ``Regions``."""
        region = Region(size_bytes)
        try:
            if region.fd is None:
                raise UnavailableError(
                    "memory can't be shared with a keeper on this system; train without one"
                )
            self._own.clear(number)
            self._own.release(number)
            self._keeper.slot_made(number, region.fd, size_bytes)
        except BaseException:
            region.close()
            raise
        return region

    def may_overwrite(self, slot: Slot, *, spare: bool) -> bool:
        """See ``Regions``. ``spare`` says nothing here: what all ranks hold counts, not what this
        one sealed last."""
        del spare
        return self.reason_kept(slot) is None

    def reason_kept(self, slot: Slot) -> str | None:
        """Why an idle slot must not be overwritten now, or None where it may be."""
        in_use, pair = self._own.slot(slot.number).held, slot.snapshot
        if in_use or pair is None or self._replaced(pair):
            seen = (
                _NOTHING_SEEN
                if self._complete is None
                else BoardView((), (frozenset([self._complete]),))
            )
        else:
            seen = self._look()
        return reason_kept(pair, in_use=in_use, view=seen, epoch=self.epoch, resume=self.resume)

    def _replaced(self, pair: SnapshotId) -> bool:
        """Whether a newer pair is complete: once one was, one at least as new always is, so the
        board needs no look then."""
        if self._complete is None or pair >= self._complete:
            self._complete = newest_of([self._complete, self._board.newest_complete()])
        return self._complete is not None and pair < self._complete

    def emptied(self, slot: Slot) -> None:
        """See ``Regions``."""
        self._own.clear(slot.number)

    def sealed(self, slot: Slot) -> None:
        """See ``Regions``. Marked as in use before it is published, where whoever staged it holds a
        pin."""
        assert slot.snapshot is not None, "sealed"
        if slot.pinned:
            self._marked.add(slot.number)
            self._own.hold(slot.number)
        self._own.publish(slot.number, slot.snapshot, slot.generation)

    def idle(self, slot: Slot) -> None:
        """See ``Regions``."""
        if slot.number in self._marked:
            self._marked.discard(slot.number)
            self._own.release(slot.number)

    def dropped(self, slot: Slot) -> None:
        """See ``Regions``."""
        self._own.clear(slot.number)
        self._keeper.slot_gone(slot.number)

    def hand_over(self, slot: Slot) -> None:
        """From now on the keeper says when ``slot`` is in use no more. Before it is told to persist
        it."""
        self._marked.discard(slot.number)

    def take_back(self, slot: Slot) -> None:
        """The keeper could not be told: this process is responsible for the mark again."""
        self._marked.add(slot.number)

    def hand_over_all(self, slots: Sequence[Slot]) -> None:
        """To a keeper that is new: every slot of a pool. Their marks are cleared where this process
        didn't set them."""
        for slot in slots:
            if slot.number not in self._marked:
                self._own.release(slot.number)
            if slot.fd is not None:
                self._keeper.slot_made(slot.number, slot.fd, slot.size_bytes)
        for number, region in self._kept.items():  # no pool has taken them over yet
            self._own.release(number)
            if region.fd is not None:
                self._keeper.slot_made(number, region.fd, region.size_bytes)

    def detach_keeper(self, slots: Sequence[Slot]) -> None:
        """The keeper is gone and none comes: a pool's slots are this process's alone, and new ones
        are handed to nobody."""
        self._keeper = _NoKeeper()
        self.hand_over_all(slots)

    def close(self) -> None:
        """Unmap what no pool took over. Idempotent."""
        for _, region in self.kept():
            region.close()

    def _look(self) -> BoardView:
        ranks = self._board.all_ranks()
        come = tuple(
            passed(one.sealed_snapshots(), completed=one.completed, epoch=self.epoch)
            for one in ranks
        )
        return BoardView(come, tuple(one.sealed_snapshots() for one in ranks))

    def _correct_board(self) -> None:
        for word in self._own.slots():
            region = self._kept.get(word.index)
            found = None if region is None else _sealed(region)
            if found is not None:
                if (word.snapshot, word.generation) != found:
                    self._own.publish(word.index, *found)
                continue
            if word.generation:
                self._own.clear(word.index)
            if region is not None:
                self._own.release(word.index)


@contextmanager
def open_staged(
    keeper: SlotHolder, snapshot: SnapshotId, *, ranks: int, job: str
) -> Iterator[tuple[SnapshotIndex, Backend]]:
    """A staged snapshot to restore from: its index, and the slots of all ranks as a store.

    Raises IntegrityError where a rank's slot doesn't hold it (any more), also at the end: then what
    was read in between may be no snapshot. UnavailableError where the keeper is gone.
    """
    regions: list[Region] = []
    try:
        memories: dict[int, list[memoryview]] = {}
        for rank in range(ranks):
            found = [region for _, region in keeper.slots(rank)]
            regions += found
            memories[rank] = [region.view for region in found]
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
        found = read_summary(region.view)
    except IntegrityError:  # no reader believes it, so it is as good as empty
        return None
    return None if found is None else (found[0].snapshot, found[1])
