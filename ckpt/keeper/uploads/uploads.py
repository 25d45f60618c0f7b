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
from ckpt.backends.checked import stores_of
from ckpt.errors import (
    CkptError,
    ConflictError,
    FencedError,
    NotFoundError,
    StoreFullError,
    SupersededError,
    UnavailableError,
    UsageError,
)
from ckpt.events import Emit, Event, Fact
from ckpt.ipc.client import KeeperSpec
from ckpt.ipc.mailbox import RankMailbox
from ckpt.ipc.messages import Choice, RemoteError, Retention, StoreBehind, from_error
from ckpt.keeper.slots import PostToLoop
from ckpt.keeper.uploads.epochs import LogEpochs
from ckpt.keeper.uploads.final_flush import (
    FinalFlush,
    HandedIn,
    HoldSnapshot,
    tag_late,
    unfit_reason,
)
from ckpt.keeper.uploads.persisters import Persisters
from ckpt.keeper.uploads.retry import Retries
from ckpt.keeper.uploads.store_log import RETRY_FIRST_S, StoreLog, open_job_of
from ckpt.keeper.uploads.submissions import Submission, SubmissionEntry, Submissions
from ckpt.save.chunks import Compression
from ckpt.save.sealed import SealedSlot
from ckpt.values import ChunkLocation, Digest, MembershipEpoch, SnapshotId, SnapshotInfo

OutcomeObserver = Callable[[int, SnapshotId, SnapshotInfo | None, RemoteError | None], None]
"""A rank's snapshot is done: its facts, or why it failed; both if it is durable and could not be
tagged."""

_COMPRESSIONS = {"off": Compression("off"), "auto": Compression("auto"), "on": Compression("on")}


LOG_VISIBLE_S = 5.0
"""How long a log that another node has just made may be invisible here."""


def _nothing() -> None:
    """Nothing is to be released."""


@dataclass(frozen=True, slots=True)
class _Early:
    """A call of a rank before its epoch was known to be open: to be made then, or dropped with its
    attempt."""

    do: Callable[[], object]
    drop: Callable[[], object] = _nothing


@dataclass(frozen=True, slots=True)
class WrittenLog:
    """The log to which the node of rank 0 writes: its id, and its stores as that node names them.
    ``on_other`` is called with a text that names both sides if this node's stores are others."""

    log_id: str
    stores: str
    on_other: Callable[[str], object]


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
        self._post = post
        self._outcome = on_outcome
        self._on_fenced_text = on_fenced_text
        self.on_superseded: Callable[[str], object] = lambda text: None
        """Called if the writer that fences this one is the job's own, of a later membership
        epoch."""
        self._emit_now = emit
        self._emit: Emit = lambda event: post(lambda: emit(event))
        self._log = StoreLog(
            open_store or (lambda: open_job_of(spec, self._emit)),
            job=spec.job,
            named=spec.named,
            emit=self._emit,
            retry_first_s=retry_first_s,
            scrub_every_s=spec.scrub_every_s,
        )
        self._submissions = Submissions(ranks)
        self._persisters = Persisters(
            self._submissions,
            ranks=ranks,
            compression=_COMPRESSIONS[spec.compression],
            post=post,
            emit=self._emit,
            settled=self._settled,
        )
        self._retries = Retries(post, self._emit, retry_first_s=retry_first_s)
        self._epochs = LogEpochs(
            self._log,
            self._persisters,
            self._retries,
            store=spec.store,
            post=post,
            emit=self._emit,
            on_fenced=self._fenced,
            on_store_changed=self._store_changed,
        )
        self._epochs.on_begun = self._begun
        self._handed_in = HandedIn(
            self._epochs,
            self._persisters,
            self._submissions,
            ranks=ranks,
            unfit=self._unfit,
            failed=self._not_durable,
            follow_up=self._tag_late,
        )
        self._final_flush = FinalFlush(
            self._epochs,
            self._persisters,
            self._submissions,
            self._retries,
            ranks=ranks,
            emit=self._emit,
            unfit=self._unfit,
        )
        self._closed = False
        self._generation_from = 0
        """The number of submissions when the placement generation began."""
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
        return len(self._submissions)

    @property
    def stores_behind(self) -> tuple[StoreBehind, ...]:
        """The stores that are known to lack what others have."""
        return self._log.behind()

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do: no upload, no record to write, no question to a store."""
        return not (
            self._submissions or self._epochs.busy or self._retries or self._final_flush.busy
        )

    def is_durable(self, snapshot: SnapshotId) -> bool:
        """Whether the log, as it was last read, has it or a later one of its epoch."""
        return self._epochs.view.superseded(snapshot)

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

    @property
    def log_id(self) -> str:
        """The id of the log that was used last; "" if there was none."""
        return self._epochs.view.log_id or ""

    def expect_log(self, log_id: str) -> None:
        """With several nodes: the log that this launch writes to, "" if none is known. Choices are
        not read from another one."""
        self._epochs.expected_log = log_id

    def new_launch(self) -> None:
        """The program was started again. It is no error that another writer continued the job in
        between, nor that the store was removed or replaced."""
        self._epochs.expected_log = ""
        self._epochs.new_launch()

    def refer_next(
        self, rank: int, base: SnapshotId, locations: Mapping[Digest, ChunkLocation]
    ) -> None:
        """Let what ``rank`` submits next refer to chunks of the committed ``base``, unless it knows
        others."""
        if self._until_opened is not None:
            self._until_opened.append(_Early(lambda: self.refer_next(rank, base, locations)))
            return
        self._persisters.refer_next(rank, base, locations)

    def persist(self, rank: int, sealed: SealedSlot, tags: tuple[str, ...]) -> None:
        """Make a sealed slot durable; ``on_outcome`` gets the result. Every rank submits the same
        sequence."""
        if self._until_opened is not None:
            # Its slot stays held meanwhile: it must not be overwritten before the epoch is open.
            self._until_opened.append(
                _Early(lambda: self._persist(rank, sealed, tags), sealed.free)
            )
            return
        self._persist(rank, sealed, tags)

    def _persist(self, rank: int, sealed: SealedSlot, tags: tuple[str, ...]) -> None:
        snapshot = sealed.index.snapshot
        error: CkptError | None = self._epochs.fenced
        if error is None and not self._persisters:
            error = UsageError(
                f"a snapshot was submitted before this keeper opened an epoch. snapshot={snapshot} "
                "open one first"
            )
        if error is not None:
            sealed.free()
            self._outcome(rank, snapshot, None, from_error(error, rank=rank))
            self._refuse(rank, snapshot, error)
            return
        # All ranks restore together, so a rank that submits shows that all are done with it.
        self._log.restoring(False)
        self._persisters.submit(rank, sealed, tags)
        self._handed_in.submit()

    def slots_came(
        self,
        find: Callable[[], Mapping[SnapshotId, tuple[str, ...]]],
        sealed_of: HoldSnapshot,
    ) -> None:
        """Slots were taken over that an earlier keeper held: what was handed in to that one and is
        not durable is submitted here. ``find``: the marked snapshots that all ranks hold.

        Only where all ranks are on this node: of several nodes that of rank 0 says what all submit
        (``handed_in_before``).
        """
        if self._persisters.channel_of is None:
            earlier = self._handed_in.is_earlier
            self._handed_in.look_for(
                lambda: {pair: tags for pair, tags in find().items() if earlier(pair)}, sealed_of
            )
            self._handed_in.submit()

    def refuse(self, rank: int, snapshot: SnapshotId, error: CkptError) -> None:
        """Instead of ``persist``: this rank has no share to submit, which fails the snapshot on all
        ranks."""
        if self._handed_in.is_earlier(snapshot):
            self._handed_in.refuse(snapshot, error)
            return
        if self._until_opened is not None:
            self._until_opened.append(_Early(lambda: self._refuse(rank, snapshot, error)))
            return
        self._refuse(rank, snapshot, error)

    def _refuse(self, rank: int, snapshot: SnapshotId, error: CkptError) -> None:
        if self._persisters:
            self._persisters.refuse(rank, snapshot, error)
            self._handed_in.submit()

    # ---- with several nodes

    def use_channels(self, channel_of: Callable[[int], RankMailbox] | None) -> None:
        """Makes the mailbox of each local rank to the ranks of all nodes; None: there are no other
        nodes.

        To be called before anything is submitted.
        """
        self._persisters.channel_of = channel_of

    @property
    def submitted(self) -> tuple[int, tuple[SubmissionEntry, ...]]:
        """How many snapshots were submitted here in this generation, and the last of them, counted
        from its beginning."""
        first = self._generation_from
        tail = (
            (n - first, snapshot, tags)
            for n, snapshot, tags in self._submissions.tail
            if n >= first
        )
        return self._submissions.count - first, tuple(tail)

    @property
    def asks_store(self) -> bool:
        """Whether a question to a store, or a record for one, has no answer yet."""
        return self._epochs.busy or bool(self._retries)

    @property
    def flushing(self) -> bool:
        """Whether ``flush_newest`` has something left to do."""
        return self._final_flush.busy

    def handed_in_before(
        self, marked: Mapping[SnapshotId, tuple[str, ...]], staged: Mapping[SnapshotId, str]
    ) -> tuple[tuple[SnapshotId, tuple[str, ...]], ...]:
        """On the node of rank 0, whose epoch is open: what all nodes submit next, of what was
        handed in and is not among the submissions of this generation: it died with a keeper, an
        attempt or an earlier generation. ``marked``: what slots of any node have marks of, with
        tags; ``staged``: what all nodes hold, with origins."""
        return self._handed_in.of_nodes(marked, staged)

    def settle_nodes(
        self,
        marked: Mapping[SnapshotId, tuple[str, ...]],
        staged: Mapping[SnapshotId, str],
        sealed_of: HoldSnapshot,
    ) -> None:
        """On the node of rank 0, of several nodes on which no attempt follows: submit what was
        handed in, as above, then ``flush_newest`` of what all nodes hold. The others are to submit
        the same (``submitted``)."""
        held = {pair: tags for pair, tags in marked.items() if pair in staged}
        self._handed_in.look_for(lambda: held, sealed_of)
        self._handed_in.submit()
        self.flush_newest(list(staged), sealed_of)

    def new_generation(self, *, root: bool) -> None:
        """Other nodes or placements than before: what is in flight fails, since not all its ranks
        are there any more.

        ``root``: rank 0 is on this node now, so this keeper may write the log, and what it knew of
        it is out of date. If it is not, this keeper is no longer the log's writer: it opens no
        epoch, drops nothing, and nothing in the log fences it.
        """
        self._drop_early()
        self._retries.cancel("store-waits")
        self._final_flush.stop()
        self._level()
        # What is in flight when the persisters are left is committed under no epoch at all: this
        # node may hold rank 0 again later, under an epoch that would make such a commit count.
        self._persisters.leave()
        self._generation_from = self._submissions.count
        self._retries.cancel("follow-waits")
        self._epochs.new_generation(root=root)

    def hold_submissions(self) -> None:
        """An attempt begins: hold what is submitted until the node of rank 0 reports that the
        attempt's epoch is open."""
        self._drop_early()
        self._until_opened = []

    def begin_attempt(
        self, membership: MembershipEpoch | None, may_act: Callable[[], bool]
    ) -> None:
        """The attempt of a membership epoch begins: epochs of the log are opened in its name, and
        only while ``may_act`` says so. It is asked in any thread."""
        self._epochs.begin_attempt(membership, may_act)

    def end_term(self) -> None:
        """This node is no member any more: it opens no epoch before another generation begins."""
        self._epochs.term.end()

    def epoch_opened(
        self,
        entries: Sequence[SubmissionEntry],
        sealed_of: HoldSnapshot,
        written: WrittenLog | None = None,
    ) -> None:
        """The attempt's epoch is open. ``entries``: what some node submitted; what this one did not
        is submitted first. ``written``: on another node than that of rank 0, where that one writes:
        nothing is submitted before it is known to be here as well."""
        attempt = self._attempts

        def go_on() -> None:
            if attempt != self._attempts or self._closed:
                return  # another attempt has begun, and waits for its own epoch
            self._retries.succeeded("follow-waits")
            if not self._persisters:
                self._persisters.start(self._log)
            early, self._until_opened = self._until_opened or [], None
            self._catch_up(entries, sealed_of)
            for call in early:
                call.do()

        def failed(error: CkptError) -> None:
            if attempt == self._attempts and not self._closed:
                text = (
                    "the store can't be opened here, so nothing of this node becomes durable; "
                    "waiting"
                )
                self._retries.schedule(
                    "follow-waits",
                    text,
                    error,
                    lambda: self.epoch_opened(entries, sealed_of, written),
                )

        if self._persisters:
            go_on()
        elif written is not None:
            self.check_store(written, lambda: self._epochs.open_store(go_on, failed))
        else:
            self._epochs.open_store(go_on, failed)

    def check_store(self, written: WrittenLog, then: Callable[[], object] = _nothing) -> None:
        """Look whether the stores here hold the log to which the node of rank 0 writes; then call
        ``then``. Stores that do not answer are looked at again."""
        attempt, until_s = self._attempts, time.monotonic() + LOG_VISIBLE_S

        def found() -> None:
            if not self._closed and attempt == self._attempts:
                self._retries.succeeded("store-waits")
                then()

        def look() -> None:
            self._epochs.check_log(written.log_id, found, failed)

        def failed(error: CkptError) -> None:
            if self._closed or attempt != self._attempts:
                return
            here = ", ".join(self._spec.stores)
            missing = isinstance(error, NotFoundError) and time.monotonic() >= until_s
            if isinstance(error, UsageError) or missing:
                written.on_other(
                    f"it sees another store than the node of rank 0. {error} here={here} "
                    f"there={written.stores}; give all nodes the same stores, which every node can "
                    "reach under its address"
                )
                return
            text = "whether this node sees the stores of rank 0's node is not known yet"
            self._retries.schedule("store-waits", text, error, look)

        look()

    def _catch_up(self, entries: Sequence[SubmissionEntry], sealed_of: HoldSnapshot) -> None:
        for n, snapshot, tags in entries:
            if n < self._submissions.count - self._generation_from:
                continue
            for rank in range(self._ranks):
                sealed = sealed_of(rank, snapshot)
                if sealed is not None:
                    self._persist(rank, replace(sealed, shared=None), tags)
                    continue
                lost = UnavailableError(
                    f"a rank died before it submitted its share, and no node has it any more. "
                    f"snapshot={snapshot} rank={rank}"
                )
                self._refuse(rank, snapshot, lost)

    def _drop_early(self) -> None:
        """The attempt that made these submissions is over: they count as never made."""
        self._attempts += 1
        self._retries.cancel("follow-waits")
        early, self._until_opened = self._until_opened or [], None
        for call in early:
            call.drop()

    def _level(self) -> None:
        """Make all ranks' submissions equal; no trainer is left that would need the outcome."""
        for submission, missing in list(self._submissions.uneven()):
            error = UnavailableError(f"cluster membership changed. snapshot={submission.snapshot}")
            for rank in missing:
                self._submissions.submit(rank, submission.snapshot, (), error)
                self._settled(rank, submission, None, error, False)

    def _unfit(self, submission: Submission, sealed: Mapping[int, SealedSlot]) -> CkptError | None:
        """As ``unfit_reason``; of several nodes' snapshot this node has not all shares, so only its
        own must match."""
        if self._persisters.channel_of is None:
            return unfit_reason(submission, sealed, self._ranks)
        indexes = [*submission.indexes.values(), *(slot.index for slot in sealed.values())]
        if len(indexes) < self._ranks:
            return UnavailableError(
                f"ranks died before they staged it. snapshot={submission.snapshot}"
            )
        kinds = {(index.snapshot, index.origin, index.world_size) for index in indexes}
        text = f"the ranks hold different snapshots. snapshot={submission.snapshot}"
        return UnavailableError(text) if len(kinds) > 1 else None

    def attempt_ended(self, sealed_of: HoldSnapshot) -> None:
        """No trainer of the attempt is alive: for each rank, submit or refuse what other ranks
        submitted and it did not.

        Then all ranks have submitted the same, and what is in flight can complete.
        """
        self._drop_early()
        for submission, missing in list(self._submissions.uneven()):
            sealed = {
                rank: slot
                for rank in missing
                if (slot := sealed_of(rank, submission.snapshot)) is not None
            }
            error = submission.refused or self._unfit(submission, sealed)
            for rank in missing:
                if error is None:
                    self._persist(rank, replace(sealed[rank], shared=None), submission.tags)
                    continue
                if rank in sealed:
                    sealed[rank].free()
                self._refuse(rank, submission.snapshot, error)

    def flush_newest(self, pairs: Sequence[SnapshotId], sealed_of: HoldSnapshot) -> None:
        """Make the newest of ``pairs`` durable that was not submitted, or failed before; repeated
        while slots hold it.

        For a job without trainers, after ``attempt_ended``. ``pairs``: all that the slots hold,
        with several nodes those of all nodes; if one can't be saved at all, the next older is
        tried. Nothing happens if it is durable, or can't be any more. A keeper that opened no epoch
        opens one for it, if no other writer continued the job.
        """
        if self._epochs.fenced is None:
            self._final_flush.start(pairs, sealed_of)

    def tag(self, name: str, snapshot: SnapshotId) -> Future[None]:
        """Tag a durable snapshot, after what was submitted before."""
        future: Future[None] = Future()
        if self._epochs.fenced is not None:
            future.set_exception(self._epochs.fenced)
        elif not self._persisters:
            future.set_exception(
                UsageError(f"a tag was set before this keeper opened an epoch. tag={name!r}")
            )
        else:
            log = self._log
            tagged = self._persisters.call(
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
        self._report_unfinished()
        self._final_flush.stop()
        self._retries.stop()
        self._log.stop()
        ended = self._persisters.close(deadline_s)
        if self._epochs.close(max(0.0, deadline_s - time.monotonic())) and ended:
            self._log.close()

    # ---- called by the epochs and persisters, in the loop

    def _begun(self) -> None:
        self._handed_in.begun()
        self._handed_in.submit()

    def _not_durable(self, snapshot: SnapshotId, error: CkptError) -> None:
        """What was handed in to an earlier keeper is lost: tell all ranks, and the log."""
        text = f"{snapshot} was handed in to a keeper that is gone, and is not durable: {error}"
        facts: dict[str, Fact] = {"step": snapshot.step, "code": error.code}
        self._emit_now(Event("save-failed", text, facts, alarm=True))
        for rank in range(self._ranks):
            self._outcome(rank, snapshot, None, from_error(error, rank=-1))

    def _tag_late(self, snapshot: SnapshotId, tags: tuple[str, ...]) -> None:
        """What was handed in to an earlier keeper may be durable, and lack tags."""
        log = self._log

        def tag() -> None:
            stores = stores_of(log.backend)
            tag_late(log.journal, stores, snapshot, tags, epoch=log.writer_epoch)

        def failed(error: CkptError) -> None:
            if isinstance(error, ConflictError) and not self._epochs.view.has(snapshot):
                self._not_durable(snapshot, error)
                return
            facts: dict[str, Fact] = {"step": snapshot.step, "code": error.code}
            text = (
                f"what an earlier keeper was handed in with tags may lack them. "
                f"snapshot={snapshot} tags={list(tags)} why={error}"
            )
            self._emit_now(Event("tag-failed", text, facts, alarm=True))

        self._epochs.when_done(self._persisters.call(tag), lambda _: None, failed)

    def _fenced(self, error: FencedError | SupersededError) -> None:
        self._final_flush.stop()
        if isinstance(error, FencedError):
            self._on_fenced_text(str(error))
        else:
            self.on_superseded(str(error))

    def _store_changed(self) -> None:
        self._final_flush.stop()
        self._persisters.leave()

    def _settled(
        self,
        rank: int,
        submission: Submission,
        info: SnapshotInfo | None,
        error: CkptError | None,
        submitted: bool,
    ) -> None:
        if self._closed:
            return
        if rank == 0 and info is not None:
            self.durable = info
            self._epochs.view.committed(info.id)
            self._log.committed()
        if isinstance(error, StoreFullError):
            self._log.store_full()
        if rank == 0 and error is not None and submitted and submission.n >= self._generation_from:
            # Only rank 0 writes the log. Other ranks report it later, perhaps after a new launch
            # began.
            self._epochs.fence(error)
        if submitted:
            message = from_error(error, rank=rank) if error is not None else None
            self._outcome(rank, submission.indexes[rank].snapshot, info, message)
        if self._submissions.settle(rank, submission, error if info is None else None):
            self._final_flush.submission_completed(submission)

    def _report_unfinished(self) -> None:
        """Report what ends with the keeper and is in no store."""
        wanted = self._final_flush.wanted
        lost = (
            [f"the newest staged snapshot is not durable: {wanted}"] if wanted is not None else []
        )
        lost += (
            [f"{len(self._submissions)} snapshots in flight are not durable"]
            if self._submissions
            else []
        )
        if lost:
            facts = {"store": self._spec.store}
            self._emit_now(
                Event("dropped", f"the keeper ends, and {' and '.join(lost)}", facts, alarm=True)
            )
