"""Making staged snapshots durable through the keeper: submit slots, receive outcomes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any

from ckpt.errors import CkptError, InternalError, UnavailableError, UsageError
from ckpt.events import Emit
from ckpt.ipc.messages import Outcome, Persist, Refuse, from_error, to_error
from ckpt.save import persister as events
from ckpt.session.keeper.connection import KeeperLink, verified_chunks
from ckpt.session.keeper.slots import SharedSlots
from ckpt.session.staging import StagedSlot
from ckpt.staging.slot import Slot
from ckpt.values import ChunkLocation, Digest, SnapshotId, SnapshotInfo


@dataclass(frozen=True, slots=True, eq=False)
class _PendingSubmission:
    snapshot: SnapshotId
    began_s: float
    slot: Slot | None = None
    """Where it is staged; None if this rank refused it."""
    generation: int = 0
    tags: tuple[str, ...] = ()
    future: Future[SnapshotInfo] = field(default_factory=Future)

    @property
    def is_staged(self) -> bool:
        """Whether its slot still holds it."""
        return self.slot is not None and self.slot.valid and self.slot.generation == self.generation


class KeeperPersister:
    """One rank's snapshots of one epoch, made durable by the keeper, in the order in which all
    ranks submit them.

    It replaces ``Persister``, which works without a keeper. What was submitted survives this
    process. The link has one observer of outcomes, so only the newest persister of a link receives
    them.

    ``survives``: if the keeper is lost another one follows (``take_up``), so what was handed in is
    kept in its slots and stays in flight until then. Else it fails at once.
    """

    def __init__(
        self, link: KeeperLink, slots: SharedSlots, *, emit: Emit, survives: bool = False
    ) -> None:
        self._link = link
        self._survives = survives
        self.lost: Future[None] = Future()
        """Done once the keeper is lost and ``survives``; another one after ``take_up``."""
        self._slots = slots
        self._emit = emit
        self._changed = threading.Lock()
        self._pending: list[_PendingSubmission] = []
        self._any = False
        self._unsent: dict[SnapshotId, str] = {}
        """What could not be sent, with the keeper that did not take it."""
        self.durable_at_s: float | None = None
        """When the last snapshot became durable, by the monotonic clock."""
        self.last_info: SnapshotInfo | None = None
        """The last snapshot that became durable."""
        self.passed_step = -1
        """The last step whose boundary every rank is known to have passed."""
        link.on_outcome(self._settle)
        link.on_lost(self._lose if survives else self._fail_all)

    @property
    def in_flight(self) -> int:
        """Number of snapshots submitted and without an outcome."""
        with self._changed:
            return len(self._pending)

    def submit(self, staged: StagedSlot, *, tags: tuple[str, ...]) -> Future[SnapshotInfo]:
        """Submit a sealed slot to the keeper; the future gives the commit's facts or the error.

        Every rank submits the same sequence. On return the keeper makes the snapshot durable even
        if this process is killed, unless the future has an error already.
        """
        slot, snapshot = staged.slot, staged.index.snapshot
        # Before the keeper hears of it: it may die at any moment, and the next one finds the mark.
        slot.hand_in(tags)
        submission = self._expect(snapshot, slot, tags)
        self._slots.hand_over(slot)
        kept = False
        try:
            self._link.send(
                Persist(
                    snapshot=snapshot,
                    index=slot.number,
                    generation=slot.generation,
                    tags=tags,
                    shared=dict(staged.shared),
                    samples=dict(staged.samples),
                )
            )
        except CkptError as error:
            # A message that is too long is too long for the next keeper as well.
            kept = self._survives and not isinstance(error, UsageError)
            if not kept:
                self._slots.take_back(slot)
                self._fail(submission, error)
        finally:
            staged.release()
            if kept:
                self._slots.take_back(slot)
        if kept:
            self._unsent[snapshot] = self._link.welcome.boot
            self._link.count_as_lost()
        return submission.future

    def submit_failure(self, snapshot: SnapshotId, error: CkptError) -> None:
        """Take part in a snapshot that this rank could not stage: all ranks learn that it failed,
        and why.
        """
        submission = self._expect(snapshot)
        try:
            self._link.send(
                Refuse(snapshot=snapshot, error=from_error(error, rank=self._link.rank))
            )
        except CkptError as lost:
            self._fail(submission, lost)

    @property
    def unsettled(self) -> tuple[SnapshotId, ...]:
        """What was handed in and has no outcome, in order."""
        with self._changed:
            return tuple(one.snapshot for one in self._pending if one.slot is not None)

    @property
    def futures(self) -> tuple[Future[SnapshotInfo], ...]:
        """Those of all that has no outcome."""
        with self._changed:
            return tuple(one.future for one in self._pending)

    def staged(self, snapshot: SnapshotId) -> tuple[Slot, tuple[str, ...]] | None:
        """Where a snapshot that was handed in is still staged, with its tags; None if nowhere."""
        with self._changed:
            found = [one for one in self._pending if one.snapshot == snapshot]
        for one in found:
            if one.slot is not None and one.is_staged:
                return one.slot, one.tags
        return None

    def take_up(
        self, going_on: Collection[SnapshotId], committed: Mapping[SnapshotId, SnapshotInfo]
    ) -> None:
        """The next keeper holds the slots, and a new epoch is open. It makes ``going_on`` durable;
        the facts of ``committed`` are in the log. All else fails.
        """
        with self._changed:
            pending = [one for one in self._pending if one.slot is not None]
            self.lost = Future()
            self._any = True
        if self._link.lost is not None:  # this one as well
            self._note_loss()
        unsent, self._unsent = self._unsent, {}
        refused = {pair for pair, boot in unsent.items() if boot == self._link.welcome.boot}
        for one in pending:
            assert one.slot is not None, "chosen above"
            wanted = one.snapshot in going_on and one.snapshot not in committed
            if wanted and one.snapshot not in refused:
                self._slots.hand_over(one.slot)
                continue
            if one.is_staged:
                self._slots.give_up(one.slot)
            if one.snapshot in committed:
                self._settle(Outcome(snapshot=one.snapshot, info=committed[one.snapshot]))
            elif wanted:  # only the connection broke, and this keeper takes up no slots
                error = UnavailableError("the keeper did not take the snapshot, and lives on")
                self._fail(one, error)
                message = from_error(error, rank=self._link.rank)
                self._link.send(Refuse(snapshot=one.snapshot, error=message))
            else:
                self._fail(one, _not_on_all_ranks())

    def leave(
        self,
        outcomes: Mapping[SnapshotId, Future[SnapshotInfo]],
        committed: Mapping[SnapshotId, SnapshotInfo],
    ) -> None:
        """No keeper follows, and this process makes durable what it can itself: ``outcomes``. Slots
        of all else are free. The persister ends with that.
        """
        for snapshot in self.unsettled:
            submission = self._take(snapshot)
            if submission is None:
                continue
            if submission.slot is not None and submission.is_staged and snapshot not in outcomes:
                self._slots.give_up(submission.slot)
            if snapshot in committed:
                submission.future.set_result(committed[snapshot])
            elif snapshot in outcomes:
                outcomes[snapshot].add_done_callback(_passing_on(submission.future))
            else:
                error = _not_on_all_ranks()
                self._emit(events.failed_event(snapshot, error))
                submission.future.set_exception(error)

    def fail(self, error: CkptError) -> None:
        """No keeper follows, for this reason: all that has no outcome fails. The slots keep it, and
        a later keeper finds it there.
        """
        self._fail_all(error)

    def refer_to(self, base: SnapshotId, known: Mapping[Digest, ChunkLocation]) -> None:
        """Let the first snapshot refer to chunks of ``base``. Nothing after the first submission.
        Every rank calls it alike.

        ``known`` holds the chunks that this rank read from the store and verified.
        """
        if not self._any and self._link.lost is None:
            self._link.send(verified_chunks(base, known))

    def close(self) -> None:
        """Wait until every submission has its outcome, or the keeper is lost: then the rest fails,
        and its slots keep it.
        """
        for future in self.futures:
            either: list[Future[Any]] = [future, self.lost]
            wait(either, return_when=FIRST_COMPLETED)
        if self.lost.done():
            self._fail_all(UnavailableError("the keeper was lost before the snapshot was durable"))

    def abandon(self) -> None:
        """Stop waiting. The keeper continues with what was submitted."""
        self._fail_all(
            UnavailableError(
                "the session ended before the snapshot was durable; the keeper continues with it"
            ),
            quiet=True,
        )

    def _lose(self, error: CkptError) -> None:
        """The keeper is lost: hold the slots of what has no outcome. In the link's thread."""
        with self._changed:
            pending = list(self._pending)
        for one in pending:
            if one.slot is None:
                self._fail(one, error)
            elif one.is_staged:
                self._slots.take_back(one.slot)
        self._note_loss()

    def _note_loss(self) -> None:
        with self._changed:
            if not self.lost.done():
                self.lost.set_result(None)

    def _expect(
        self, snapshot: SnapshotId, slot: Slot | None = None, tags: tuple[str, ...] = ()
    ) -> _PendingSubmission:
        """Register a submission. Must come before its message is sent: the outcome may arrive at
        once.
        """
        submission = _PendingSubmission(
            snapshot, time.monotonic(), slot, slot.generation if slot is not None else 0, tags
        )
        submission.future.set_running_or_notify_cancel()  # the keeper's work can't be cancelled
        with self._changed:
            self._any = True
            self._pending.append(submission)
        return submission

    def _settle(self, outcome: Outcome) -> None:
        """Handle the outcome of a snapshot on all ranks; an earlier attempt may have
        submitted it.
        """
        snapshot, info = outcome.snapshot, outcome.info
        submission = self._take(snapshot)
        self.passed_step = (
            max(self.passed_step, snapshot.step) if submission is not None else self.passed_step
        )
        error = to_error(outcome.error) if outcome.error is not None else None
        if info is not None:
            self.durable_at_s, self.last_info = time.monotonic(), info
            self._emit(
                events.durable_event(
                    info,
                    seconds=time.monotonic() - submission.began_s
                    if submission is not None
                    else 0.0,
                )
            )
            different = info.metadata.get(events.SUSPECT_KEY)
            if different is not None and self._link.rank == 0:
                self._emit(events.diverged_event(snapshot, str(different)))
            if error is not None:
                self._emit(events.untagged_event(info, error))
        else:
            error = error or InternalError(
                f"the keeper gave an outcome without facts or error. snapshot={snapshot}"
            )
            self._emit(events.failed_event(snapshot, error))
        if submission is None:
            return
        if error is not None:
            submission.future.set_exception(error)
        elif info is not None:
            submission.future.set_result(info)

    def _take(self, snapshot: SnapshotId) -> _PendingSubmission | None:
        with self._changed:
            submission = next(
                (submission for submission in self._pending if submission.snapshot == snapshot),
                None,
            )
            if submission is not None:
                self._pending.remove(submission)
        return submission

    def _fail(self, submission: _PendingSubmission, error: CkptError) -> None:
        with self._changed:
            if submission not in self._pending:  # the link's thread took it first
                return
            self._pending.remove(submission)
        self._emit(events.failed_event(submission.snapshot, error))
        submission.future.set_exception(error)

    def _fail_all(self, error: CkptError, *, quiet: bool = False) -> None:
        with self._changed:
            unsettled, self._pending = self._pending, []
        for submission in unsettled:
            if not quiet:
                self._emit(events.failed_event(submission.snapshot, error))
            submission.future.set_exception(error)


def _not_on_all_ranks() -> UnavailableError:
    return UnavailableError(
        "the keeper was lost, and not all ranks hold the snapshot that was handed in"
    )


def _passing_on(future: Future[SnapshotInfo]) -> Callable[[Future[SnapshotInfo]], None]:
    def done(outcome: Future[SnapshotInfo]) -> None:
        error = (
            UnavailableError("the session ended before the snapshot was durable")
            if outcome.cancelled()
            else outcome.exception()
        )
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(outcome.result())

    return done
