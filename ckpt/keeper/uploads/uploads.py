"""One job's uploads inside its keeper: making slots durable, over attempts, launches and placement
generations.

For the keeper's loop alone, which it never blocks: calls that may wait for a store run in threads
(one for the log, ``LogEpochs``; one per rank, ``Persister``) and return through ``post``. The loop
resolves all futures and makes all callbacks. Imported when it is first needed, because stores and
compression take long to import.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from ckpt.backends.base import Backend
from ckpt.errors import CkptError, FencedError, UnavailableError, UsageError
from ckpt.events import Emit, Event
from ckpt.ipc.client import KeeperSpec
from ckpt.ipc.mailbox import RankMailbox
from ckpt.ipc.messages import Choice, RemoteError, Retention, from_error
from ckpt.keeper.uploads.epochs import LogEpochs
from ckpt.keeper.uploads.final_flush import FinalFlush, HoldSnapshot, unfit_reason
from ckpt.keeper.uploads.persisters import Persisters
from ckpt.keeper.uploads.retry import Retries
from ckpt.keeper.uploads.store_log import RETRY_FIRST_S, StoreLog, open_job_of
from ckpt.keeper.uploads.submissions import Submission, SubmissionEntry, Submissions
from ckpt.save.chunks import Compression
from ckpt.save.sealed import SealedSlot
from ckpt.values import ChunkLocation, Digest, SnapshotId, SnapshotInfo

PostToLoop = Callable[[Callable[[], object]], None]
"""Has a call made by the keeper's loop, soon; from any thread."""

OutcomeObserver = Callable[[int, SnapshotId, SnapshotInfo | None, RemoteError | None], None]
"""A rank's snapshot is done: its facts, or why it failed; both if it is durable and could not be
tagged."""

Known = Mapping[Digest, ChunkLocation]


_COMPRESSIONS = {"off": Compression("off"), "auto": Compression("auto"), "on": Compression("on")}


def _nothing() -> None:
    """Nothing is to be released."""


@dataclass(frozen=True, slots=True)
class _Early:
    """A call of a rank before its epoch was known to be open: to be made then, or dropped with its
    attempt."""

    do: Callable[[], object]
    drop: Callable[[], object] = _nothing


class Uploads:
    """The uploads of one job with a fixed number of ranks. Lives as long as that number does, over
    any number of attempts.

    ``on_outcome`` is called for each snapshot that a rank submitted; ``on_fenced_text`` once, when
    another writer opened a newer epoch: from then on every call fails with FencedError.

    It has more public methods and attributes than usual: it is the face of one state machine over
    persisters, epochs and the final flush, which must see each event in one order.
    """

    def __init__(
        self,
        spec: KeeperSpec,
        *,
        ranks: int,
        post: PostToLoop,
        on_outcome: OutcomeObserver,
        on_fenced_text: Callable[[str], None],
        emit: Emit,
        open_store: Callable[[], Backend] | None = None,
        retry_first_s: float = RETRY_FIRST_S,
    ) -> None:
        self._spec = spec
        self._ranks = ranks
        self.post = post
        self._outcome = on_outcome
        self._tell_fenced = on_fenced_text
        self._tell_now = emit
        self.tell: Emit = lambda event: post(lambda: emit(event))
        self._log = StoreLog(
            open_store or (lambda: open_job_of(spec, self.tell)),
            job=spec.job,
            named=spec.job != spec.store.rstrip("/").rpartition("/")[2],
            emit=self.tell,
            retry_first_s=retry_first_s,
            scrub_every_s=spec.scrub_every_s,
        )
        self._turns = Submissions(ranks)
        self._hands = Persisters(
            self._turns,
            ranks=ranks,
            compression=_COMPRESSIONS[spec.compression],
            post=post,
            emit=self.tell,
            settled=self._settled,
        )
        self._waits = Retries(post, self.tell, retry_first_s=retry_first_s)
        self._epochs = LogEpochs(self._log, self._hands, self._waits, self, store=spec.store)
        self._settler = FinalFlush(
            self._epochs, self._hands, self._turns, self._waits, ranks=ranks, emit=self.tell
        )
        self._closed = False
        self._era_from = 0
        self._until_opened: list[_Early] | None = None
        """With several nodes: what is submitted before the epoch is known to be open here."""
        self._attempts = 0
        """Grows with each attempt and generation, so that callbacks of an earlier one are
        recognised."""
        self.durable: SnapshotInfo | None = None
        """The last snapshot that became durable here."""

    @property
    def epoch(self) -> int:
        """The newest epoch that was issued here; 0 before the first."""
        return self._epochs.view.epoch

    def origin_of(self, epoch: int) -> str:
        """What staged indexes of an epoch that was issued here carry: the write id of its
        record."""
        return self._epochs.view.origin_of(epoch)

    @property
    def in_flight(self) -> int:
        """Snapshots that some rank submitted and that not all ranks are done with."""
        return len(self._turns)

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do: no upload, no record to write, no question to a store."""
        return not (self._turns or self._epochs.busy or self._waits or self._settler.busy)

    def choices(
        self, staged: Sequence[SnapshotId], origins: Mapping[SnapshotId, str] | None = None
    ) -> Future[tuple[Choice, ...]]:
        """What can be restored, best first. ``staged``: the snapshots that all ranks' slots hold;
        ``origins``: theirs.

        Answered at once if this launch opened an epoch and a staged snapshot is on its lineage,
        else after reading the log. Fails with what keeps the log from being read; but if slots hold
        snapshots, it waits for the store.
        """
        return self._epochs.choices({pair: (origins or {}).get(pair, "") for pair in staged})

    def open_epoch(
        self, resume: SnapshotId | None, retention: Retention | None = None, *, newest: bool = False
    ) -> Future[int]:
        """Open the next epoch, continuing from ``resume`` (None: from the start); returns its
        number.

        ``retention``: what is dropped from now on. ``newest``: ``resume`` is the best of the
        ``choices`` that were read last; fails with NewerSnapshotError if a newer one was committed
        since, and choices must be read again.

        A launch's first epoch is written before its number is returned. It makes the store if there
        is none, and fails with what keeps it from being written, or waits for the store if slots
        hold snapshots. Later epochs get their number at once; the record follows before any commit
        after it.
        """
        self._log.set_retention(retention)
        return self._epochs.open(resume, newest=newest)

    def new_launch(self) -> None:
        """The program was started again. It is no error that another writer continued the job in
        between, nor that the store was removed or replaced."""
        self._epochs.new_launch()

    def refer_next(self, rank: int, base: SnapshotId, known: Known) -> None:
        """Let what ``rank`` submits next refer to chunks of the committed ``base``, unless it knows
        others."""
        if self._until_opened is not None:
            self._until_opened.append(_Early(lambda: self.refer_next(rank, base, known)))
            return
        self._hands.refer_next(rank, base, known)

    def persist(self, rank: int, sealed: SealedSlot, tags: tuple[str, ...]) -> None:
        """Make a sealed slot durable; ``on_outcome`` gets the result. Every rank submits the same
        sequence."""
        if self._until_opened is not None:
            self._until_opened.append(
                _Early(lambda: self._persist(rank, sealed, tags), sealed.free)
            )
            return
        self._persist(rank, sealed, tags)

    def _persist(self, rank: int, sealed: SealedSlot, tags: tuple[str, ...]) -> None:
        snapshot = sealed.index.snapshot
        why: CkptError | None = self._epochs.fenced
        if why is None and not self._hands:
            why = UsageError(
                f"a snapshot is handed in before this keeper opened an epoch. snapshot={snapshot} "
                "open one first"
            )
        if why is not None:
            sealed.free()
            self._outcome(rank, snapshot, None, from_error(why, rank=rank))
            self._refuse(rank, snapshot, why)
            return
        self._log.restoring(False)  # whoever hands in is past it, and all ranks restore together
        self._hands.submit(rank, sealed, tags)

    def refuse(self, rank: int, snapshot: SnapshotId, error: CkptError) -> None:
        """Instead of ``persist``: this rank has no share to submit, which fails the snapshot on all
        ranks."""
        if self._until_opened is not None:
            self._until_opened.append(_Early(lambda: self._refuse(rank, snapshot, error)))
            return
        self._refuse(rank, snapshot, error)

    def _refuse(self, rank: int, snapshot: SnapshotId, error: CkptError) -> None:
        if self._hands:
            self._hands.refuse(rank, snapshot, error)

    # ---- with several nodes

    def use_channels(self, channel_of: Callable[[int], RankMailbox] | None) -> None:
        """Makes the mailbox of each local rank to the ranks of all nodes; None: there are no other
        nodes.

        To be called before anything is submitted.
        """
        self._hands.channel_of = channel_of

    @property
    def submitted(self) -> tuple[int, tuple[SubmissionEntry, ...]]:
        """How many snapshots were submitted here in this generation, and the last of them, counted
        from its beginning."""
        first = self._era_from
        tail = ((n - first, snapshot, tags) for n, snapshot, tags in self._turns.tail if n >= first)
        return self._turns.count - first, tuple(tail)

    def new_generation(self, *, root: bool) -> None:
        """Other nodes or placements than before: what is in flight fails, since not all its ranks
        are there any more.

        ``root``: rank 0 is on this node now, so this keeper may write the log, and what it knew of
        it is out of date. If it is not, this keeper is no longer the log's writer: it opens no
        epoch, drops nothing, and nothing in the log fences it.
        """
        self._drop_early()
        self._settler.stop()
        self._level()
        self._hands.leave()
        self._era_from = self._turns.count
        self._waits.cancel("follow-waits")
        self._epochs.new_generation(root=root)

    def hold_submissions(self) -> None:
        """An attempt begins: hold what is submitted until the node of rank 0 reports that the
        attempt's epoch is open."""
        self._drop_early()
        self._until_opened = []

    def epoch_opened(self, handed: Sequence[SubmissionEntry], sealed_of: HoldSnapshot) -> None:
        """The attempt's epoch is open. ``handed``: what some node submitted; what this one did not
        is submitted first."""
        attempt = self._attempts

        def go_on() -> None:
            if attempt != self._attempts or self._closed:
                return  # another attempt awaits its own word
            self._waits.succeeded("follow-waits")
            if not self._hands:
                self._hands.start(self._log)
            early, self._until_opened = self._until_opened or [], None
            self._catch_up(handed, sealed_of)
            for one in early:
                one.do()

        def failed(error: CkptError) -> None:
            if attempt == self._attempts and not self._closed:
                what = (
                    "the store can't be opened here, so nothing of this node becomes durable; "
                    "waiting"
                )
                self._waits.schedule(
                    "follow-waits", what, error, lambda: self.epoch_opened(handed, sealed_of)
                )

        if self._hands:
            go_on()
        else:
            self._epochs.open_store(go_on, failed)

    def _catch_up(self, handed: Sequence[SubmissionEntry], sealed_of: HoldSnapshot) -> None:
        for n, snapshot, tags in handed:
            if n < self._turns.count - self._era_from:
                continue
            for rank in range(self._ranks):
                sealed = sealed_of(rank, snapshot)
                if sealed is not None:
                    self._persist(rank, replace(sealed, shared=None), tags)
                    continue
                lost = UnavailableError(
                    f"a rank died before it handed in its share. snapshot={snapshot} rank={rank}"
                )
                self._refuse(rank, snapshot, lost)

    def _drop_early(self) -> None:
        """The attempt that made these submissions is over: they count as never made."""
        self._attempts += 1
        self._waits.cancel("follow-waits")
        early, self._until_opened = self._until_opened or [], None
        for one in early:
            one.drop()

    def _level(self) -> None:
        """Make all ranks' submissions equal; no trainer is left that would need the outcome."""
        for turn, missing in list(self._turns.uneven()):
            error = UnavailableError(f"the job's nodes are others now. snapshot={turn.snapshot}")
            for rank in missing:
                self._turns.submit(rank, turn.snapshot, (), error)
                self._settled(rank, turn, None, error, False)

    def _unfit(self, turn: Submission, sealed: Mapping[int, SealedSlot]) -> CkptError | None:
        """As ``unfit_reason``; of several nodes' snapshot this node has not all shares, so only its
        own must match."""
        if self._hands.channel_of is None:
            return unfit_reason(turn, sealed, self._ranks)
        indexes = [*turn.indexes.values(), *(one.index for one in sealed.values())]
        if len(indexes) < self._ranks:
            return UnavailableError(f"ranks died before they staged it. snapshot={turn.snapshot}")
        kinds = {(index.snapshot, index.origin, index.world_size) for index in indexes}
        text = f"the ranks hold different snapshots. snapshot={turn.snapshot}"
        return UnavailableError(text) if len(kinds) > 1 else None

    def attempt_ended(self, sealed_of: HoldSnapshot) -> None:
        """No trainer of the attempt is alive: for each rank, submit or refuse what other ranks
        submitted and it did not.

        Then all ranks have submitted the same, and what is in flight can complete.
        """
        self._drop_early()
        for turn, missing in list(self._turns.uneven()):
            sealed = {
                rank: found
                for rank in missing
                if (found := sealed_of(rank, turn.snapshot)) is not None
            }
            why = turn.refused or self._unfit(turn, sealed)
            for rank in missing:
                if why is None:
                    self._persist(rank, replace(sealed[rank], shared=None), turn.tags)
                    continue
                if rank in sealed:
                    sealed[rank].free()
                self._refuse(rank, turn.snapshot, why)

    def flush_newest(self, pairs: Sequence[SnapshotId], sealed_of: HoldSnapshot) -> None:
        """Make the newest of ``pairs`` durable that was not submitted, or failed before; repeated
        while slots hold it.

        For a job without trainers, after ``attempt_ended``. ``pairs``: all that the slots hold; if
        one can't be saved at all, the next older is tried. Nothing happens if it is durable, or
        can't be any more. A keeper that opened no epoch opens one for it, if no other writer
        continued the job.
        """
        if self._epochs.fenced is None:
            self._settler.start(pairs, sealed_of)

    def tag(self, name: str, snapshot: SnapshotId) -> Future[None]:
        """Tag a durable snapshot, after what was submitted before."""
        future: Future[None] = Future()
        if self._epochs.fenced is not None:
            future.set_exception(self._epochs.fenced)
        elif not self._hands:
            future.set_exception(
                UsageError(f"a tag is set before this keeper opened an epoch. tag={name!r}")
            )
        else:
            log = self._log
            tagged = self._hands.call(
                lambda: log.journal.tag(name, snapshot, epoch=log.writer_epoch())
            )
            self._epochs.when_done(tagged, lambda _: future.set_result(None), future.set_exception)
        return future

    def finish_retention(self, *, begin: bool) -> bool:
        """The job is over: ``begin`` to drop and delete what is due without pauses; whether that is
        done."""
        return self._log.tidy(begin=begin)

    def close(self, timeout_s: float) -> None:
        """Drop what has not begun and end the threads; waits at most ``timeout_s`` seconds for a
        store that blocks them."""
        deadline_s = time.monotonic() + timeout_s
        self._closed = True
        self._epochs.stop()
        self._drop_early()
        self._tell_lost()
        self._settler.stop()
        self._waits.stop()
        self._log.stop()
        ended = self._hands.close(deadline_s)
        if self._epochs.close(max(0.0, deadline_s - time.monotonic())) and ended:
            self._log.close()

    # ---- told by the epochs, in the loop

    def on_fenced(self, error: FencedError) -> None:
        self._settler.stop()
        self._tell_fenced(str(error))

    def on_moved(self) -> None:
        self._settler.stop()
        self._hands.leave()

    def _settled(
        self,
        rank: int,
        turn: Submission,
        info: SnapshotInfo | None,
        error: CkptError | None,
        handed_in: bool,
    ) -> None:
        if self._closed:
            return
        if rank == 0 and info is not None:
            self.durable = info
            self._epochs.view.committed(info.id)
            self._log.committed()
        if rank == 0 and isinstance(error, FencedError) and handed_in and turn.n >= self._era_from:
            self._epochs.fence(
                error
            )  # the writer's own; other ranks hear it later, of a launch before perhaps
        if handed_in:
            message = from_error(error, rank=rank) if error is not None else None
            self._outcome(rank, turn.indexes[rank].snapshot, info, message)
        if self._turns.settle(rank, turn, error if info is None else None):
            self._settler.submission_completed(turn)

    def _tell_lost(self) -> None:
        """Report what ends with the keeper and is in no store."""
        wanted = self._settler.wanted
        what = (
            [f"the newest staged snapshot is not durable: {wanted}"] if wanted is not None else []
        )
        what += (
            [f"{len(self._turns)} snapshots on their way are not durable"] if self._turns else []
        )
        if what:
            facts = {"store": self._spec.store}
            self._tell_now(
                Event("dropped", f"the keeper ends, and {' and '.join(what)}", facts, alarm=True)
            )
