"""Making staged snapshots durable through the keeper: submit slots, receive outcomes."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

from ckpt.errors import CkptError, InternalError, UnavailableError
from ckpt.events import Emit
from ckpt.ipc.messages import Outcome, Persist, Refuse, from_error, to_error
from ckpt.save import persister as events
from ckpt.session.keeper.connection import KeeperLink, verified_chunks
from ckpt.session.keeper.slots import SharedSlots
from ckpt.session.staging import StagedSlot
from ckpt.values import ChunkLocation, Digest, SnapshotId, SnapshotInfo


@dataclass(frozen=True, slots=True, eq=False)
class _PendingSubmission:
    snapshot: SnapshotId
    began_s: float
    future: Future[SnapshotInfo] = field(default_factory=Future)


class KeeperPersister:
    """One rank's snapshots of one epoch, made durable by the keeper, in the order in which all
    ranks submit them.

    It replaces ``Persister``, which works without a keeper. What was submitted survives this
    process. The link has one observer of outcomes, so only the newest persister of a link receives
    them.
    """

    def __init__(self, link: KeeperLink, slots: SharedSlots, *, emit: Emit) -> None:
        self._link = link
        self._slots = slots
        self._emit = emit
        self._changed = threading.Lock()
        self._pending: list[_PendingSubmission] = []
        self._any = False
        self.durable_at_s: float | None = None
        """When the last snapshot became durable, by the monotonic clock."""
        self.last_info: SnapshotInfo | None = None
        """The last snapshot that became durable."""
        self.passed_step = -1
        """The last step whose boundary every rank is known to have passed."""
        link.on_outcome(self._settle)
        link.on_lost(self._fail_all)

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
        submission = self._expect(snapshot)
        self._slots.hand_over(slot)
        try:
            self._link.send(
                Persist(
                    snapshot=snapshot,
                    index=slot.number,
                    generation=slot.generation,
                    tags=tags,
                    shared=dict(staged.shared),
                )
            )
        except CkptError as error:
            self._slots.take_back(slot)
            self._fail(submission, error)
        finally:
            staged.release()
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

    def refer_to(self, base: SnapshotId, known: Mapping[Digest, ChunkLocation]) -> None:
        """Let the first snapshot refer to chunks of ``base``. Nothing after the first submission.
        Every rank calls it alike.

        ``known`` holds the chunks that this rank read from the store and verified.
        """
        if not self._any and self._link.lost is None:
            self._link.send(verified_chunks(base, known))

    def close(self) -> None:
        """Wait until every submission has its outcome, or the keeper is lost."""
        with self._changed:
            futures = [submission.future for submission in self._pending]
        wait(futures)

    def abandon(self) -> None:
        """Stop waiting. The keeper continues with what was submitted."""
        self._fail_all(
            UnavailableError(
                "the session ended before the snapshot was durable; the keeper continues with it"
            ),
            quiet=True,
        )

    def _expect(self, snapshot: SnapshotId) -> _PendingSubmission:
        """Register a submission. Must come before its message is sent: the outcome may arrive at
        once.
        """
        submission = _PendingSubmission(snapshot, time.monotonic())
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
