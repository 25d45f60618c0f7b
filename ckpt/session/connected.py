"""What a session has once its ranks are connected, and how it opens epochs, also after its keeper
died.

Keeper failover happens in place only: a supervisor restarts its trainers instead. The ranks notice
the keeper's death at different snapshots, and must not wait for each other there: a rank that waits
holds up the step that the others need to reach theirs. So rank 0 alone decides, at its next
snapshot. It finds or starts a keeper, opens an epoch that continues from the newest snapshot that
all ranks have, and posts from which step on the new epoch counts. The others look for that message
at each of their snapshots. Until it is there their snapshots fail; the steps that they missed from
there on they refuse. So all ranks submit the same sequence, and the death of a keeper costs only
the snapshots around it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import msgspec

from ckpt.backends.base import Backend
from ckpt.capture.leaves import World
from ckpt.errors import (
    FencedError,
    IntegrityError,
    NewerSnapshotError,
    UnavailableError,
    UsageError,
)
from ckpt.events import Emit, Event
from ckpt.format.canonical import prepare_decoders
from ckpt.ipc.mailbox import wait_for_message
from ckpt.ipc.messages import Refuse, RemoteError, from_error
from ckpt.log.state import LogState
from ckpt.session.decisions import Decisions, RankDecisions, SoloDecisions
from ckpt.session.keeper.attachment import KeeperAttachment
from ckpt.session.keeper.connection import verified_chunks
from ckpt.session.log import SessionLineage, SessionLog, parse_opened
from ckpt.session.options import SessionOptions
from ckpt.session.restoring import FillRules, RestoreCandidate, Restoring
from ckpt.session.saving import Saving
from ckpt.session.slot_rule import newest_of
from ckpt.values import SnapshotId, SnapshotInfo

BYE_WAIT_S = 60.0
"""How long rank 0 waits for the other ranks to leave: it may own the message store."""

OPEN_WAIT_S = 600.0
"""How long the other ranks wait for rank 0 to open an epoch."""

CHOICES_MAX = 5
"""Choices of a snapshot before giving up, if a newer one is committed after each: only a writer
that was fenced a moment ago can commit one."""


class ConnectedSession:
    """The mailbox and the keeper of connected ranks, and what saves, restores and decides over
    them.
    """

    def __init__(
        self,
        attachment: KeeperAttachment,
        backend: Backend,
        options: SessionOptions,
        state: Callable[[], LogState],
        emit: Emit,
    ) -> None:
        self.attachment = attachment
        self.mailbox = mailbox = attachment.mailbox
        self.emit = emit
        self._uses_slots = False
        self.saving = Saving(mailbox, options, self.emit)
        self._orders: Decisions | None = None
        self.restoring = Restoring(
            mailbox,
            backend,
            world=World(mailbox.rank, mailbox.size),
            state=state,
            emit=self.emit,
            threads=options.threads,
            budget_bytes=options.read_budget_bytes,
            open_staged=attachment.open_staged,
        )

    def use_slots(self) -> None:
        """Stage into slots that the keeper holds too, if it is attached. Once."""
        if not self._uses_slots and self.attachment.regions is not None:
            self._uses_slots = True
            self.saving.use_regions(self.attachment.regions)

    @property
    def decisions(self) -> Decisions:
        """What all ranks decide together at a boundary. Only for a run that is open."""
        assert self._orders is not None, "a run is open"
        return self._orders

    def start_decisions(self) -> None:
        """Start deciding together. Only a run does; a checkpointer has no boundaries."""
        saving = self.saving
        self._orders = (
            SoloDecisions(saving.may_take, self._skipped)
            if self.mailbox.size == 1
            else RankDecisions(
                self.mailbox, saving.may_take, self._skipped, passed=lambda: saving.passed_step
            )
        )

    def leave(self, *, wait_s: float) -> None:
        """End what runs in the background, and leave. Rank 0 leaves last, because it may own the
        message store.

        Without ``wait_s`` an exception is being raised: nothing waits, and no other error replaces
        it.
        """
        try:
            if self._orders is not None:
                self._orders.close()
            if self.mailbox.rank != 0:
                self._post_bye(strict=wait_s > 0)
            elif wait_s > 0 and not self.attachment.supervised:
                self._await_byes(wait_s)
        finally:
            self.attachment.close()

    def _post_bye(self, *, strict: bool) -> None:
        rank = self.mailbox.rank
        try:
            self.mailbox.post(f"bye/{rank}", b"1")
        except (UnavailableError, RuntimeError) as error:  # RuntimeError: torch's own stores
            if strict:
                raise
            self.emit(
                Event("left", f"left without notice to the other ranks: {error}", {"rank": rank})
            )

    def _await_byes(self, wait_s: float) -> None:
        began_s = time.monotonic()
        for rank in range(1, self.mailbox.size):
            left_s = max(0.0, wait_s - (time.monotonic() - began_s))
            try:
                wait_for_message(
                    self.mailbox, f"bye/{rank}", timeout_s=left_s, awaited=f"rank {rank} to leave"
                )
            except UnavailableError as error:
                self.emit(Event("late-leaver", str(error), {"rank": rank}, alarm=True))

    def _skipped(self, boundary: int, reason: str) -> None:
        self.emit(
            Event(
                "skipped",
                f"the snapshot due at step {boundary} is skipped: {reason}",
                {"step": boundary},
                alarm=True,
            )
        )


class _EpochChange(msgspec.Struct, frozen=True):
    """From the snapshot of ``at_step`` on, ``epoch`` counts. ``alone``: it has no keeper.

    ``again``: what rank 0 had handed to the lost keeper without an outcome, in order;
    ``committed``: what the log has of that.
    """

    epoch: int
    origin: str
    at_step: int
    alone: bool
    again: tuple[SnapshotId, ...] = ()
    committed: tuple[SnapshotInfo, ...] = ()


class KeeperFailover:
    """One rank's part in replacing a lost keeper. Used by the training thread.

    ``open_epoch`` opens the next epoch, on rank 0. ``log`` tells rank 0 whether another writer did
    so meanwhile, and is written to if there is no other keeper.
    """

    def __init__(
        self,
        connected: ConnectedSession,
        *,
        open_epoch: Callable[[SnapshotId | None], tuple[int, str]],
        log: SessionLog,
    ) -> None:
        self._connected = connected
        self._open_epoch = open_epoch
        self._log = log
        self._completed = 0  # failovers of this rank: names the next one's message
        self._under_way = False
        self._gathered = -1  # the last failover that all ranks are known to have followed
        self._submitted: list[int] = []
        self._bases: dict[int, SnapshotId | None] = {}
        self.counts_from = 0
        """The first step of the epoch that the last failover opened."""

    @property
    def needed(self) -> bool:
        """Whether a session in place has lost its keeper, or has not finished replacing it."""
        attachment = self._connected.attachment
        lost = attachment.link is not None and attachment.link.lost is not None
        return not attachment.supervised and (lost or self._under_way)

    def late_ranks(self) -> Sequence[int]:
        """The ranks that have not followed the last failover of this one: only with their slots can
        the next keeper go on. Asks the mailbox until there is none.
        """
        mailbox, last = self._connected.mailbox, self._completed - 1
        if self._gathered >= last:
            return ()
        late = [
            rank for rank in range(mailbox.size) if mailbox.peek(f"follows/{last}/{rank}") is None
        ]
        if not late:
            self._gathered = last
        return late

    def record_submitted(self, step: int) -> None:
        """This rank submitted or refused a snapshot of that step."""
        if self._connected.mailbox.size > 1 and self._connected.attachment.link is not None:
            self._submitted = [*self._submitted[-999:], step]

    def reattach(self) -> None:
        """On rank 0, before an epoch is opened anyway: attach to the next keeper, or do without."""
        if self.needed:
            self._attach_next()

    def follow_rank0(self, *, alone: bool) -> None:
        """After that, on all ranks: do as rank 0 did. ``alone``: it opened the epoch without a
        keeper.
        """
        attachment, slots = self._connected.attachment, self._connected.saving.slots
        if alone and attachment.link is not None:
            attachment.detach(slots)
            if attachment.regions is not None:
                attachment.regions.give_up_all(slots)
        elif self.needed:
            attachment.reconnect(slots)
        self._under_way, self._submitted, self.counts_from = False, [], 0
        self._gathered = self._completed - 1  # they all open the same epoch

    def fail_over(
        self, step: int, *, epoch: int, base: SnapshotId | None, wait_s: float = 0.0
    ) -> int | None:
        """Before the snapshot of ``step``, if ``needed``: the epoch that counts from now on, or
        None if there is none yet.

        ``epoch`` is the one before, which continued from ``base``. ``wait_s``: no snapshot is to be
        taken now, and so ranks other than rank 0 may wait that long for its message.

        Raises FencedError if another writer opened a newer epoch, ConflictError if the next keeper
        serves another launch, UnavailableError if the store does not answer: the next snapshot
        tries again.
        """
        if self._connected.mailbox.rank == 0:
            change = self._decide(step, epoch, self._bases.get(epoch, base))
        else:
            key = f"mended/{self._completed}"
            body = (
                wait_for_message(
                    self._connected.mailbox, key, timeout_s=wait_s, awaited="the next keeper"
                )
                if wait_s
                else self._connected.mailbox.peek(key)
            )
            if body is None:
                return None
            change = msgspec.json.decode(body, type=_EpochChange)
            if change.at_step > step and not wait_s:
                return None  # rank 0 submitted this step to the old epoch
        self._follow(change, after=step - 1)
        return change.epoch

    def _decide(self, step: int, epoch: int, base: SnapshotId | None) -> _EpochChange:
        self._under_way = True
        self._attach_next()
        newest = self._log.newest_epoch()
        if newest > epoch:
            raise FencedError(
                f"another writer opened an epoch of this job. newest={newest} epoch={epoch}; stop "
                "this one"
            )
        resume = self._newest_of(epoch) or base
        number, origin = self._open_epoch(resume)
        again = self._connected.saving.handed_in
        committed = self._log.infos(again)  # after the open: no commit of the lost keeper follows
        alone = self._connected.attachment.link is None
        if alone:
            self._tag_committed(committed, epoch=number)
        change = _EpochChange(number, origin, step, alone, again, committed)
        self._bases[change.epoch] = resume
        if self._connected.mailbox.size > 1:
            self._connected.mailbox.post(f"mended/{self._completed}", msgspec.json.encode(change))
        text = f"the keeper was lost; epoch {change.epoch} continues from {resume}"
        self._connected.emit(
            Event(
                "keeper-replaced", text, {"epoch": change.epoch, "alone": change.alone}, alarm=True
            )
        )
        return change

    def _tag_committed(self, committed: Sequence[SnapshotInfo], *, epoch: int) -> None:
        """The lost keeper may have died between a commit and its tags."""
        keeper = self._connected.saving.through_keeper
        for info in committed:
            found = keeper.staged(info.id) if keeper is not None else None
            for tag in found[1] if found is not None else ():
                self._log.tag(tag, info.id, epoch=epoch)

    def _newest_of(self, epoch: int) -> SnapshotId | None:
        """The newest snapshot of ``epoch`` that the slots of all ranks hold, or that is durable."""
        board, durable = self._connected.attachment.board, self._connected.saving.durable
        snapshots = [
            board.newest_complete() if board is not None else None,
            durable.id if durable is not None else None,
        ]
        return newest_of(
            snapshot for snapshot in snapshots if snapshot is not None and snapshot.epoch == epoch
        )

    def _attach_next(self) -> None:
        """Attach to the next keeper and give it what the last one held; if there is none, do
        without from here on.
        """
        attachment, slots = self._connected.attachment, self._connected.saving.slots
        if attachment.link is None:
            return
        try:
            attachment.reconnect(slots)
        except (UnavailableError, UsageError, IntegrityError) as error:
            text = (
                "the keeper is lost and there is no other, so snapshots depend on this process "
                f"alone: {error}"
            )
            self._connected.emit(Event("no-keeper", text, alarm=True))
            attachment.detach(slots)

    def _follow(self, change: _EpochChange, *, after: int) -> None:
        attachment, saving = self._connected.attachment, self._connected.saving
        committed = {info.id: info for info in change.committed}
        again = tuple(pair for pair in change.again if pair not in committed)
        if not change.alone:
            self._go_on(change, again, committed, after=after)
        else:
            submit_again = saving.hand_back(again)
            if attachment.link is not None:
                attachment.detach(saving.slots)
            target = self._log.save_target(change.epoch, rank=self._connected.mailbox.rank)
            saving.write_locally(target, base=None, known_chunks=dict, after=after)
            if attachment.regions is not None:
                attachment.regions.epoch = change.epoch
            submit_again(committed)
            if attachment.regions is not None:  # also of what has failed before
                attachment.regions.give_up_all(saving.slots)
        mailbox = self._connected.mailbox
        mailbox.post(f"follows/{self._completed}/{mailbox.rank}", b"1")
        self._completed += 1
        self._under_way = False
        self.counts_from = change.at_step
        missed, self._submitted = [step for step in self._submitted if step >= change.at_step], []
        for step in missed:
            saving.refuse(
                SnapshotId(change.epoch, step),
                UnavailableError("the keeper was lost when the snapshot was submitted"),
            )

    def _go_on(
        self,
        change: _EpochChange,
        again: Sequence[SnapshotId],
        committed: Mapping[SnapshotId, SnapshotInfo],
        *,
        after: int,
    ) -> None:
        """Hand the slots to the next keeper, which goes on with what was handed in: slots are
        marked with that.
        """
        attachment, saving = self._connected.attachment, self._connected.saving
        attachment.reconnect(saving.slots)
        keeper = saving.through_keeper
        assert keeper is not None and attachment.link is not None, "the keeper was replaced"
        attachment.go_on_in(change.epoch)
        saving.go_on_through_keeper(origin=change.origin, after=after)
        for pair in again:
            if all(slot.snapshot != pair for slot in saving.slots):
                attachment.link.send(
                    Refuse(snapshot=pair, error=_missing_here(attachment.link.rank))
                )
        keeper.take_up(again, committed)


def _missing_here(rank: int) -> RemoteError:
    error = UnavailableError("the keeper was lost before this rank had staged the snapshot")
    return from_error(error, rank=rank)


class SessionEpochs:
    """The epochs that a session opens, and the snapshot that it continues from. For the training
    thread.

    Rank 0 opens an epoch and posts its number and origin, or the error; the other ranks wait for
    that message. Every rank makes the same calls in the same order.
    """

    def __init__(
        self, connected: ConnectedSession, lineage: SessionLineage, log: SessionLog
    ) -> None:
        self._connected = connected
        self._lineage = lineage
        self._log = log
        self._failover = KeeperFailover(connected, open_epoch=lineage.open_next, log=log)
        connected.saving.replace_keeper = self._replace_keeper
        connected.saving.late_ranks = self._failover.late_ranks
        self._tries = 0  # names the message about the next epoch
        self._verified = False
        self.epoch = 0
        """The epoch that is open; 0 if none is."""
        self.restored: SnapshotInfo | None = None
        """The snapshot that the session continues from."""

    def open_on_newest(self, choices: Callable[[], Sequence[RestoreCandidate]]) -> None:
        """Choose the newest snapshot and open an epoch that continues from it.

        Chooses again if a newer snapshot is committed in between, CHOICES_MAX times at most.
        """
        for tries_left in reversed(range(CHOICES_MAX)):
            self._choose(choices)
            try:
                self.open(newest=True)
                return
            except NewerSnapshotError as error:
                if not tries_left:
                    raise
                self._connected.emit(Event("chosen-anew", str(error)))

    def _choose(self, choices: Callable[[], Sequence[RestoreCandidate]]) -> None:
        """Choose the newest snapshot whose records can be read; its bytes are not read yet."""
        restoring = self._connected.restoring
        self.restored = None
        if restoring.choose(choices) is not None:
            self.restored = restoring.fill({}, FillRules())

    def open(self, *, newest: bool = False) -> None:
        """Open the next epoch as the continuation of ``restored``.

        ``newest``: it was chosen as the newest; all ranks raise NewerSnapshotError if it no longer
        is.
        """
        connected, mailbox = self._connected, self._connected.mailbox
        # What is in flight belongs to the epoch before, which the record written below closes.
        connected.saving.drain()
        self._tries += 1
        key = f"epoch/{self._tries}"
        resume = self.restored.id if self.restored is not None else None
        if mailbox.rank == 0:
            self._failover.reattach()
            mailbox.post(key, self._lineage.open_for_ranks(resume, newest=newest).encode())
        opened = wait_for_message(
            mailbox, key, timeout_s=OPEN_WAIT_S, awaited="rank 0 to open the epoch"
        )
        epoch, origin = parse_opened(opened.decode())
        self._failover.follow_rank0(alone=not origin)
        self.epoch = epoch
        base = resume if self._verified else None
        connected.emit(Event("epoch", f"epoch {epoch} is open", {"epoch": epoch}))
        attachment, restoring = connected.attachment, connected.restoring
        if attachment.link is not None:
            if base is not None:
                attachment.link.send(verified_chunks(base, dict(restoring.verified)))
            persister = attachment.persister(epoch, resume=resume if restoring.staged else None)
            connected.saving.write_through_keeper(persister, origin=origin)
            return
        target = self._log.save_target(epoch, rank=mailbox.rank)
        connected.saving.write_locally(
            target, base=base, known_chunks=lambda: dict(restoring.verified)
        )

    def fill(self, items: Mapping[str, object], rules: FillRules) -> None:
        """Fill a run's items from the chosen snapshot, or all items from an older one if it is
        damaged.

        In that case an open epoch is followed by one that continues from the older snapshot, so
        that later snapshots have a true lineage.
        """
        before = self.restored
        self.restored = self._connected.restoring.fill(items, rules)
        if self.epoch and before is not None and self.restored.id != before.id:
            self.open()

    def go_on_from(self, restored: SnapshotInfo, *, verified: bool) -> None:
        """The session restored a snapshot: the next save opens an epoch that continues from it.

        ``verified``: its chunks were read from the store, so that new snapshots may refer to them.
        """
        self.restored = restored
        self._verified = verified
        self.epoch = 0

    def before_snapshot(self, step: int) -> None:
        """Before a snapshot is submitted or refused: replace a lost keeper, which opens another
        epoch.
        """
        if self._failover.needed:
            base = self.restored.id if self.restored is not None else None
            self.epoch = self._failover.fail_over(step, epoch=self.epoch, base=base) or self.epoch
        if step < self._failover.counts_from:
            raise UnavailableError(
                "rank 0 handed this step to a keeper that was lost. "
                f"step={step} next={self._failover.counts_from}"
            )
        self._failover.record_submitted(step)

    def _replace_keeper(self, limit_s: float | None) -> None:
        """While nothing is submitted: have another keeper go on with what the lost one had."""
        last_step = self._connected.saving.last_step
        base = self.restored.id if self.restored is not None else None
        step = 0 if last_step is None else last_step + 1
        wait_s = OPEN_WAIT_S if limit_s is None else min(OPEN_WAIT_S, max(limit_s, 0.001))
        self.epoch = (
            self._failover.fail_over(step, epoch=self.epoch, base=base, wait_s=wait_s) or self.epoch
        )


prepare_decoders(_EpochChange)
