"""Makes a staged snapshot durable after its trainers are gone, and repeats that while the store
does not take it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ckpt.backends.base import Backend
from ckpt.errors import CkptError, ConflictError, FencedError, NotFoundError, UnavailableError
from ckpt.events import Emit, Event
from ckpt.format.records import Commit, Tag, Untag
from ckpt.keeper.uploads.epochs import LogEpochs
from ckpt.keeper.uploads.persisters import Persisters
from ckpt.keeper.uploads.retry import Retries
from ckpt.keeper.uploads.submissions import Submission, Submissions
from ckpt.log.journal import Journal
from ckpt.log.reader import RECORDS_AT_ONCE, records_back
from ckpt.save.receipts import shares_problem
from ckpt.save.sealed import SealedSlot
from ckpt.values import SnapshotId

HoldSnapshot = Callable[[int, SnapshotId], SealedSlot | None]
"""Holds the slot of a rank that has a snapshot, for an upload; None if there is none."""

UnfitReason = Callable[[Submission, Mapping[int, SealedSlot]], CkptError | None]
"""Why the shares that were submitted and those in slots make no snapshot, or None."""


KIND = "settle-waits"


@dataclass(slots=True, eq=False)
class _Task:
    pairs: deque[SnapshotId]
    sealed_of: HoldSnapshot
    submission: Submission | None = None


class FinalFlush:
    """At most one task at a time: the newest of some snapshots that can be saved. The last request
    counts. With several nodes it is at the node of rank 0, and the others follow what it submits.
    """

    def __init__(
        self,
        epochs: LogEpochs,
        persisters: Persisters,
        submissions: Submissions,
        retries: Retries,
        *,
        ranks: int,
        emit: Emit,
        unfit: UnfitReason,
    ) -> None:
        self._epochs = epochs
        self._view = epochs.view
        self._persisters = persisters
        self._submissions = submissions
        self._retries = retries
        self._ranks = ranks
        self._emit = emit
        self._unfit = unfit
        self._task: _Task | None = None

    @property
    def busy(self) -> bool:
        """Whether a snapshot is still to be flushed."""
        return self._task is not None

    @property
    def wanted(self) -> SnapshotId | None:
        """The snapshot that is to be flushed, or None."""
        return self._task.pairs[0] if self._task is not None else None

    def start(self, pairs: Sequence[SnapshotId], sealed_of: HoldSnapshot) -> None:
        """Flush the newest of ``pairs`` that can be; no second upload beside one in flight."""
        self.stop()
        if not pairs or self._view.not_needed(max(pairs)):
            return
        self._task = task = _Task(
            deque(sorted(pairs, reverse=True)),
            sealed_of,
            submission=self._submissions.find(max(pairs)),
        )
        if task.submission is None:
            self._read_first(task)

    def stop(self) -> None:
        """Flush nothing any more; an upload in flight continues."""
        self._task = None
        self._retries.cancel(KIND)

    def submission_completed(self, submission: Submission) -> None:
        """All ranks are done with a submission."""
        task = self._task
        if task is None or task.submission is not submission:
            return
        task.submission = None
        if submission.error is None:
            self.stop()
        elif submission.error.retry:
            self._later(task, submission.error)
        elif isinstance(submission.error, FencedError):
            self._give_up(task, submission.error)
        else:
            self._next(task, submission.error)

    def _read_first(self, task: _Task) -> None:
        """Read the log first: a commit that got no answer may have made the snapshot durable."""
        if task is self._task:
            epochs = frozenset(pair.epoch for pair in task.pairs)
            self._epochs.read_log(
                epochs, lambda: self._try(task), lambda error: self._later(task, error)
            )

    def _try(self, task: _Task) -> None:
        if task is not self._task:
            return
        pair = task.pairs[0]
        if self._view.not_needed(pair):
            self.stop()
            return
        task.submission = self._submissions.find(pair)
        if task.submission is not None:
            return
        if not self._submissions.level:
            # Trainers are back, and some ranks have submitted what others have not yet.
            self._later(task, None)
            return
        sealed = {rank: slot for rank in range(self._ranks) if (slot := task.sealed_of(rank, pair))}
        # From here on the slots are held: each way out submits or frees them.
        reason = self._unfit(Submission(0, pair), sealed)
        if reason is None and not self._view.restorable(pair, sealed[0].index.origin):
            reason = ConflictError(
                "what is staged is not on the job's lineage, or another writer opened a newer "
                f"epoch. snapshot={pair}"
            )
        if reason is None and self._persisters:
            task.submission = self._persisters.submit_again(sealed)
            return
        origin = sealed[0].index.origin if reason is None else ""
        for slot in sealed.values():
            slot.free()
        if reason is not None:
            self._next(task, reason)
            return
        self._epochs.open_to_flush(
            pair,
            origin,
            lambda: self._read_first(task),
            lambda error: self._not_opened(task, error),
        )

    def _not_opened(self, task: _Task, error: CkptError) -> None:
        if isinstance(error, ConflictError | NotFoundError):
            self._give_up(task, error)
        else:
            self._later(task, error)

    def _next(self, task: _Task, reason: CkptError) -> None:
        """The snapshot can't be saved at all: an older one is better than nothing."""
        if len(task.pairs) == 1:
            self._give_up(task, reason)
            return
        if task is self._task:
            step = task.pairs.popleft().step
            text = f"a staged snapshot can't be saved, the one before it is tried: {reason}"
            self._emit(
                Event("settle-failed", text, {"step": step, "code": reason.code}, alarm=True)
            )
            self._read_first(task)

    def _give_up(self, task: _Task, reason: CkptError) -> None:
        if task is not self._task:
            return
        step = task.pairs[0].step
        self.stop()
        text = f"what is staged stays in memory only: {reason}"
        self._emit(Event("settle-failed", text, {"step": step, "code": reason.code}, alarm=True))

    def _later(self, task: _Task, error: CkptError | None) -> None:
        if task is not self._task:
            return
        if isinstance(error, FencedError):
            self._give_up(task, error)
            return
        task.submission = None
        text = f"{task.pairs[0]} is staged and not durable yet; trying again"
        self._retries.schedule(KIND, text, error, lambda: self._read_first(task))


def unfit_reason(
    submission: Submission, sealed: Mapping[int, SealedSlot], ranks: int
) -> CkptError | None:
    """Why the shares that were submitted and those in slots make no snapshot, or None."""
    indexes = {**submission.indexes, **{rank: slot.index for rank, slot in sealed.items()}}
    missing = [rank for rank in range(ranks) if rank not in indexes]
    if missing:
        return UnavailableError(
            f"ranks died before they staged it. snapshot={submission.snapshot} ranks={missing}"
        )
    problem = shares_problem([indexes[rank] for rank in range(ranks)])
    return UnavailableError(f"{problem} snapshot={submission.snapshot}") if problem else None


def tag_late(
    journal: Journal,
    stores: Sequence[Backend],
    snapshot: SnapshotId,
    tags: Sequence[str],
    *,
    epoch: Callable[[], int],
) -> None:
    """Set the tags of a snapshot that another keeper was to commit and tag: those that no record
    names since the commit. What people removed or moved stays so.

    Raises ConflictError if it was never committed, or was dropped before a tag was set; as
    ``Journal.tag`` and ``records_back``. ``epoch``: the writer's. Cost: reads the log back to the
    commit, or if there is none to the opening of its epoch.
    """
    state = journal.refresh()
    named: set[str] = set()
    opened = next((one.seq for one in state.opens if one.epoch == snapshot.epoch), 0)
    expected, top = state.head_digest, state.next_seq
    while top > opened:
        seqs = range(top - 1, max(opened, top - RECORDS_AT_ONCE) - 1, -1)
        for record in records_back(stores, seqs, expected):
            expected = record.prev
            if state.void_at(record.seq) is not None:
                continue
            match record.body:
                case Tag(name) | Untag(name):
                    named.add(name)
                case Commit(committed) if committed == snapshot:
                    for tag in tags:
                        if tag not in named:
                            journal.tag(tag, snapshot, epoch=epoch())
                    return
        top = seqs[-1]
    raise ConflictError(f"a later snapshot of its epoch is durable already. snapshot={snapshot}")


class HandedIn:
    """What an earlier keeper was handed in and died with: slots carry a mark of it, with the tags.
    It is submitted once an epoch is open here, as soon as all ranks' slots are here.

    ``find``: the marked snapshots that all ranks hold, oldest first. ``failed`` tells all ranks why
    one of them can't become durable; ``follow_up`` sees to one that may be, as ``tag_late`` does:
    sets the tags that its keeper may not have come to.
    """

    def __init__(
        self,
        epochs: LogEpochs,
        persisters: Persisters,
        submissions: Submissions,
        *,
        ranks: int,
        unfit: UnfitReason,
        failed: Callable[[SnapshotId, CkptError], object],
        follow_up: Callable[[SnapshotId, tuple[str, ...]], object],
    ) -> None:
        self._view = epochs.view
        self._persisters = persisters
        self._submissions = submissions
        self._ranks = ranks
        self._unfit = unfit
        self._failed = failed
        self._follow_up = follow_up
        self._find: Callable[[], Mapping[SnapshotId, tuple[str, ...]]] | None = None
        self._sealed_of: HoldSnapshot | None = None
        self._first_epoch = 0
        self._done: set[SnapshotId] = set()

    def look_for(
        self, find: Callable[[], Mapping[SnapshotId, tuple[str, ...]]], sealed_of: HoldSnapshot
    ) -> None:
        """Slots came that this keeper did not see being filled; or no attempt follows on several
        nodes, and this is that of rank 0."""
        self._find, self._sealed_of = find, sealed_of

    def begun(self) -> None:
        """An epoch is open here: the first one that this keeper opens separates what was handed in
        to it from what was handed in before."""
        self._first_epoch = self._first_epoch or self._view.epoch

    def is_earlier(self, snapshot: SnapshotId) -> bool:
        """Whether it was captured before this keeper opened its first epoch."""
        return snapshot.epoch < self._first_epoch

    def refuse(self, snapshot: SnapshotId, error: CkptError) -> None:
        """A rank has lost its share."""
        if snapshot not in self._done:
            self._done.add(snapshot)
            self._failed(snapshot, error)

    def submit(self) -> None:
        """Submit what is here and was not. Costs nothing if there is nothing to look for."""
        find, sealed_of = self._find, self._sealed_of
        if find is None or sealed_of is None or not self._first_epoch or not self._persisters:
            return
        if not self._submissions.level:
            return  # some ranks have submitted what others have not yet: all submit one sequence
        self._find = self._sealed_of = None
        for pair, tags in find().items():
            if pair in self._done:
                continue
            self._done.add(pair)
            if self._submissions.find(pair) is None:
                self._submit(pair, tags, sealed_of)

    def of_nodes(
        self, marked: Mapping[SnapshotId, tuple[str, ...]], staged: Mapping[SnapshotId, str]
    ) -> tuple[tuple[SnapshotId, tuple[str, ...]], ...]:
        """On the node of rank 0, whose epoch is open: those of ``marked`` that all nodes submit
        now, oldest first. ``staged``: what all nodes hold, with origins.

        Nothing of this placement generation is among them. What an earlier one had in flight is:
        it failed with that one.
        """
        wanted = []
        for pair, tags in sorted(marked.items()):
            told = pair in self._done
            if self._view.superseded(pair):
                if not told:
                    self._see_superseded(pair, tags)
            elif pair in staged and self._view.restorable(pair, staged[pair]):
                wanted.append((pair, tags))
                continue  # another generation may interrupt it, and submits it again
            elif not told:
                why = (
                    "training continues from another snapshot"
                    if pair in staged
                    else "not all nodes have their shares of it any more"
                )
                self._failed(pair, UnavailableError(f"{why}. snapshot={pair}"))
            self._done.add(pair)
        return tuple(wanted)

    def _see_superseded(self, pair: SnapshotId, tags: tuple[str, ...]) -> None:
        # A snapshot that retention dropped is not in the fold any more, but was durable.
        if tags or not self._view.has(pair):
            self._follow_up(pair, tags)

    def _submit(self, pair: SnapshotId, tags: tuple[str, ...], sealed_of: HoldSnapshot) -> None:
        if self._view.superseded(pair):
            self._see_superseded(pair, tags)
            return
        sealed = {rank: slot for rank in range(self._ranks) if (slot := sealed_of(rank, pair))}
        reason = self._unfit(Submission(0, pair), sealed)
        if reason is None and not self._view.restorable(pair, sealed[0].index.origin):
            reason = ConflictError(
                f"training continues from another snapshot, or another writer did. snapshot={pair}"
            )
        if reason is None:
            self._persisters.submit_again(sealed, tags)
            return
        for slot in sealed.values():
            slot.free()
        self._failed(pair, reason)
