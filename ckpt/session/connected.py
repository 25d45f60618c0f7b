"""In place: after a keeper's death the next snapshot goes to the next keeper, or to nobody but this
process.

The ranks learn of the death at different snapshots, and must not wait for each other there: one
that waits holds up the step that the others need to get to theirs. So rank 0 alone decides, at its
next snapshot: it finds or starts a keeper, opens an epoch that goes on from the newest pair that
all ranks have, and posts from which step on the new one counts. The others look for that word at
each snapshot of theirs; until it is there their snapshots fail, and what they missed from that step
on they refuse. So all ranks hand in the same sequence, and a death costs the snapshots around it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from ckpt.backends.base import Backend
from ckpt.capture.leaves import World
from ckpt.errors import FencedError, IntegrityError, UnavailableError, UsageError
from ckpt.events import Emit, Event
from ckpt.format.canonical import prepare_decoders
from ckpt.ipc.mailbox import wait_for_message
from ckpt.log.state import LogState
from ckpt.session.decisions import Decisions, RankDecisions, SoloDecisions
from ckpt.session.keeper.attachment import KeeperAttachment
from ckpt.session.log import SessionLog
from ckpt.session.options import SessionOptions
from ckpt.session.restoring import Restoring
from ckpt.session.saving import Saving
from ckpt.session.slot_rule import newest_of
from ckpt.values import SnapshotId

# What a session has once its ranks have met: the channel and keeper, and what saves, restores and
# agrees over them.


class ConnectedSession:
    """What exists once the ranks have met."""

    def __init__(
        self,
        attachment: KeeperAttachment,
        backend: Backend,
        options: SessionOptions,
        state: Callable[[], LogState],
        emit: Emit,
    ) -> None:
        self.attachment = attachment
        self.channel = channel = attachment.channel
        self.emit = emit
        self._uses_slots = False
        self.saving = Saving(channel, options, self.emit)
        self._orders: Decisions | None = None
        self.restoring = Restoring(
            channel,
            backend,
            world=World(channel.rank, channel.size),
            state=state,
            emit=self.emit,
            threads=options.threads,
            budget_bytes=options.read_budget_bytes,
            open_staged=attachment.open_staged,
        )

    def use_slots(self) -> None:
        """Stage into slots that the keeper holds too, where there is one; once."""
        if not self._uses_slots and self.attachment.regions is not None:
            self._uses_slots = True
            self.saving.use_regions(self.attachment.regions)

    @property
    def decisions(self) -> Decisions:
        """What all ranks do at a boundary."""
        assert self._orders is not None, "a run is open"
        return self._orders

    def start_decisions(self) -> None:
        """For a run; a checkpointer has no boundaries to agree on."""
        saving = self.saving
        self._orders = (
            SoloDecisions(saving.may_take, self._skipped)
            if self.channel.size == 1
            else RankDecisions(
                self.channel, saving.may_take, self._skipped, passed=lambda: saving.passed_step
            )
        )

    def leave(self, *, wait_s: float) -> None:
        """End what runs in the background and leave: rank 0 last, because it may own the message
        store.

        Without ``wait_s`` an exception is on its way out: nothing waits, and nothing is raised over
        it.
        """
        try:
            if self._orders is not None:
                self._orders.close()
            if self.channel.rank != 0:
                self._say_bye(heard=wait_s > 0)
            elif wait_s > 0 and not self.attachment.supervised:
                self._see_off(wait_s)
        finally:
            self.attachment.close()

    def _say_bye(self, *, heard: bool) -> None:
        rank = self.channel.rank
        try:
            self.channel.post(f"bye/{rank}", b"1")
        except (UnavailableError, RuntimeError) as error:  # RuntimeError: torch's own stores
            if heard:
                raise
            self.emit(
                Event("left", f"left without a word to the other ranks: {error}", {"rank": rank})
            )

    def _see_off(self, wait_s: float) -> None:
        began_s = time.monotonic()
        for rank in range(1, self.channel.size):
            left_s = max(0.0, wait_s - (time.monotonic() - began_s))
            try:
                wait_for_message(
                    self.channel, f"bye/{rank}", timeout_s=left_s, awaited=f"rank {rank} to leave"
                )
            except UnavailableError as error:
                self.emit(Event("late-leaver", str(error), {"rank": rank}, alarm=True))

    def _skipped(self, boundary: int, why: str) -> None:
        self.emit(
            Event(
                "skipped",
                f"the snapshot due at step {boundary} is skipped: {why}",
                {"step": boundary},
                alarm=True,
            )
        )


class _EpochChange(msgspec.Struct, frozen=True):
    """From snapshot ``at_step`` on, ``epoch`` counts; ``alone``: without keeper."""

    epoch: int
    origin: str
    at_step: int
    alone: bool


class KeeperFailover:
    """One rank's part in it. Used by the training thread.

    ``open_epoch`` opens the next epoch, on rank 0; ``log`` is asked there whether another writer
    did, and used without keeper.
    """

    def __init__(
        self,
        connected: ConnectedSession,
        *,
        open_epoch: Callable[[SnapshotId | None], tuple[int, str]],
        log: SessionLog,
    ) -> None:
        self._joined = connected
        self._open_epoch = open_epoch
        self._log = log
        self._mended = 0
        self._under_way = False
        self._handed_in: list[int] = []
        self._bases: dict[int, SnapshotId | None] = {}

    @property
    def needed(self) -> bool:
        """Whether the keeper of a session in place is gone, or what follows is not done yet."""
        keeping = self._joined.attachment
        lost = keeping.link is not None and keeping.link.lost is not None
        return not keeping.supervised and (lost or self._under_way)

    def record_submitted(self, step: int) -> None:
        """This rank handed in, or refused, a snapshot of that step."""
        if self._joined.channel.size > 1 and self._joined.attachment.link is not None:
            self._handed_in = [*self._handed_in[-999:], step]

    def reattach(self) -> None:
        """Rank 0, before an epoch is opened anyway: find the next keeper, or do without."""
        if self.needed:
            self._reach()

    def follow_rank0(self, *, alone: bool) -> None:
        """After that, on all ranks: do as rank 0 did. ``alone``: it opened the epoch without
        keeper."""
        keeping, slots = self._joined.attachment, self._joined.saving.slots
        if alone and keeping.link is not None:
            keeping.detach(slots)
        elif self.needed:
            keeping.reconnect(slots)
        self._under_way, self._handed_in = False, []

    def fail_over(self, step: int, *, epoch: int, base: SnapshotId | None) -> int | None:
        """Before the snapshot of ``step``, where it is ``needed``: the epoch that counts from now
        on, or None if none does yet.

        ``epoch`` is open and went on from ``base``. Raises FencedError where another writer opened
        a newer one, ConflictError where another launch has the next keeper, UnavailableError where
        the store can't be asked: the next one tries again.
        """
        if self._joined.channel.rank == 0:
            word = self._decide(step, epoch, self._bases.get(epoch, base))
        else:
            body = self._joined.channel.peek(f"mended/{self._mended}")
            if body is None:
                return None
            word = msgspec.json.decode(body, type=_EpochChange)
            if word.at_step > step:  # rank 0 handed this one in before it knew
                return None
        self._follow(word, after=step - 1)
        return word.epoch

    def _decide(self, step: int, epoch: int, base: SnapshotId | None) -> _EpochChange:
        self._under_way = True
        self._reach()
        newest = self._log.newest_epoch()
        if newest > epoch:
            raise FencedError(
                f"another writer opened an epoch of this job. newest={newest} mine={epoch}; stop "
                "this one"
            )
        resume = self._newest_of(epoch) or base
        number, origin = self._open_epoch(resume)
        word = _EpochChange(number, origin, step, self._joined.attachment.link is None)
        self._bases[word.epoch] = resume
        if self._joined.channel.size > 1:
            self._joined.channel.post(f"mended/{self._mended}", msgspec.json.encode(word))
        text = f"the keeper was lost; epoch {word.epoch} goes on from {resume}"
        self._joined.emit(
            Event("keeper-replaced", text, {"epoch": word.epoch, "alone": word.alone}, alarm=True)
        )
        return word

    def _newest_of(self, epoch: int) -> SnapshotId | None:
        """The newest pair of ``epoch`` that all ranks' slots hold, or that is durable."""
        board, durable = self._joined.attachment.board, self._joined.saving.durable
        found = [
            board.newest_complete() if board is not None else None,
            durable.id if durable is not None else None,
        ]
        return newest_of(pair for pair in found if pair is not None and pair.epoch == epoch)

    def _reach(self) -> None:
        """Find or start the next keeper, and give it what the last one had; else do without from
        here on."""
        keeping, slots = self._joined.attachment, self._joined.saving.slots
        if keeping.link is None:
            return
        try:
            keeping.reconnect(slots)
        except (UnavailableError, UsageError, IntegrityError) as error:
            text = f"the keeper is lost and there is no other, so snapshots depend on this process alone: {error}"
            self._joined.emit(Event("no-keeper", text, alarm=True))
            keeping.detach(slots)

    def _follow(self, word: _EpochChange, *, after: int) -> None:
        keeping, saving = self._joined.attachment, self._joined.saving
        if not word.alone:
            keeping.reconnect(saving.slots)
            saving.write_through_keeper(
                keeping.persister(word.epoch), origin=word.origin, after=after
            )
        else:
            if keeping.link is not None:
                keeping.detach(saving.slots)
            place = self._log.place(word.epoch, rank=self._joined.channel.rank)
            saving.write_locally(place, base=None, known_chunks=dict, after=after)
            if keeping.regions is not None:
                keeping.regions.epoch = word.epoch
        self._mended += 1
        self._under_way = False
        missed, self._handed_in = [step for step in self._handed_in if step >= word.at_step], []
        for step in missed:
            saving.refuse(
                SnapshotId(word.epoch, step),
                UnavailableError("the keeper was lost when it was handed in"),
            )


prepare_decoders(_EpochChange)
