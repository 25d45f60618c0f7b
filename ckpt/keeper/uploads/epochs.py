"""One job's log epochs inside its keeper: what can be restored, opening the next one, and whether
another writer took over.

For the keeper's loop alone, which it never blocks: calls that may wait for the store run in threads
and return through ``post``. The loop resolves all futures and makes all callbacks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from ckpt.errors import (
    CkptError,
    FencedError,
    IntegrityError,
    SupersededError,
    UnavailableError,
    UsageError,
)
from ckpt.events import Emit, Event
from ckpt.ipc.messages import Choice
from ckpt.keeper.slots import PostToLoop
from ckpt.keeper.uploads.choices import STAGED
from ckpt.keeper.uploads.log_view import LogView
from ckpt.keeper.uploads.persisters import Persisters, error_of
from ckpt.keeper.uploads.retry import Retries
from ckpt.keeper.uploads.store_log import (
    FirstOpen,
    FirstOpened,
    LogReading,
    StoreLog,
    Term,
    new_origin,
)
from ckpt.log.select import ResumeChoice
from ckpt.threads import CallQueue
from ckpt.values import MembershipEpoch, SnapshotId

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Asked:
    """An epoch that was asked for while another is being opened."""

    resume: SnapshotId | None
    chosen: ResumeChoice | None
    answer: Future[int]


class LogEpochs:
    """The log as the loop knows it, and the epochs issued from it. Lives over any number of
    launches and attempts.

    ``on_fenced`` is called if another writer opened a newer epoch: once a launch with FencedError,
    with SupersededError if that writer is the job's own, of a later membership epoch;
    ``on_store_changed`` if the store is another one than in the launch before, or gone.

    It has more attributes than usual: collaborators and callbacks aside, each is one fact about the
    launch's first epoch, which all entry points must see alike.
    """

    def __init__(
        self,
        log: StoreLog,
        persisters: Persisters,
        retries: Retries,
        *,
        store: str,
        post: PostToLoop,
        emit: Emit,
        on_fenced: Callable[[FencedError | SupersededError], object],
        on_store_changed: Callable[[], object],
    ) -> None:
        self._log = log
        self._persisters = persisters
        self._retries = retries
        self._store = store
        self._post = post
        self._emit = emit
        self._on_fenced = on_fenced
        self._on_store_changed = on_store_changed
        self.on_begun: Callable[[], object] = lambda: None
        """Called when a launch's first epoch is open, before anybody is told."""
        self._thread = CallQueue("ckpt-log")
        self.view = LogView()
        """What is known of the log."""
        self.expected_log = ""
        """The log that other nodes say this launch writes to; "": none is known."""
        self.fenced: FencedError | None = None
        """Why nothing more may be written; None while this keeper is the log's writer, or may
        become it."""
        self.term = Term()
        """In which epochs are opened now."""
        self._fresh = True
        """Whether the launch has opened no epoch yet: then another writer's is no rival."""
        self._beginning = False
        self._waiting: list[_Asked] = []
        self._chosen: ResumeChoice | None = None
        """What the log's newest snapshot was when choices were last read from it."""
        self._in_flight = 0
        self._generations = 0
        self._closed = False

    @property
    def busy(self) -> bool:
        """Whether a call to the store is in flight."""
        return self._in_flight > 0

    def choices(self, staged: Mapping[SnapshotId, str]) -> Future[tuple[Choice, ...]]:
        """What can be restored, best first. ``staged``: the snapshots that all ranks' slots hold,
        with their origins.

        Answered at once if this launch opened an epoch and a staged snapshot is on its lineage,
        else after reading the log. Fails with what keeps the log from being read; but if slots hold
        snapshots, which the log may know nothing newer than, it waits for the store.
        """
        self._log.restoring(True)
        self._chosen = None
        future: Future[tuple[Choice, ...]] = Future()
        self.view.staged = dict(staged)
        if self.fenced is not None:
            future.set_exception(self.fenced)
            return future
        choices = self.view.best_first(staged)
        if not self._fresh and any(choice.tier == STAGED for choice in choices):
            future.set_result(choices)
            return future
        self._read_choices(staged, future, self.view.stores)
        return future

    def open(self, resume: SnapshotId | None, *, newest: bool) -> Future[int]:
        """Open the next epoch: see ``Uploads.open_epoch``."""
        future: Future[int] = Future()
        self._open(_Asked(resume, self._chosen if newest else None, future))
        return future

    def open_to_flush(
        self,
        snapshot: SnapshotId,
        origin: str,
        then: Callable[[], object],
        failed: Callable[[CkptError], object],
    ) -> None:
        """Open an epoch that continues from a staged snapshot, unless another writer continued the
        job."""
        if self._beginning:  # trainers are back
            failed(UnavailableError("an epoch is being opened."))
            return
        opening = FirstOpen(snapshot, {snapshot: origin}, True, new_origin(), term=self.term)
        self._beginning = True

        def begun(done: FirstOpened) -> None:
            self._begun(done)
            then()
            self._open_waiting()

        def not_begun(error: CkptError) -> None:
            failed(error)
            self._open_waiting()

        self._begin(opening, begun, not_begun)

    def open_store(self, then: Callable[[], object], failed: Callable[[CkptError], object]) -> None:
        """Open the store, if it is not open yet, to write chunks and parts to it; then call
        ``then``."""
        self.when_done(self._thread.submit(lambda: self._log.backend), lambda _: then(), failed)

    def check_log(
        self, log_id: str, then: Callable[[], object], failed: Callable[[CkptError], object]
    ) -> None:
        """Look whether the stores hold the log ``log_id``, then call ``then``. Fails with
        UsageError if they hold another one, with NotFoundError if they hold none."""
        self.when_done(
            self._thread.submit(lambda: self._log.check_log(log_id)), lambda _: then(), failed
        )

    def read_log(
        self,
        epochs: frozenset[int],
        then: Callable[[], object],
        failed: Callable[[CkptError], object],
    ) -> None:
        """Read the log in the background, with the ids of ``epochs``; then call ``then``."""
        before = self.view.commits()

        def read(reading: LogReading) -> None:
            # A launch that has opened an epoch must not write to a store that replaced its own.
            if not self._fresh and reading.log_id != self.view.log_id:
                failed(UnavailableError(f"store identity changed. store={self._store}"))
                return
            self._see_store(reading.log_id)
            foreign: CkptError | None = None
            if self.view.update(reading, before) and not self._fresh:
                self.fence(foreign := self.view.fenced(self.term.membership))
            if (error := self.fenced or foreign) is not None:
                failed(error)
            else:
                then()

        self.when_done(self._thread.submit(lambda: self._log.read(epochs)), read, failed)

    def when_done(
        self, call: Future[T], then: Callable[[T], object], failed: Callable[[CkptError], object]
    ) -> None:
        """When ``call`` is done in its thread, continue in the loop."""
        self._in_flight += 1
        generation = self._generations

        def done() -> None:
            self._in_flight -= 1
            error = UnavailableError("the keeper ends.") if self._closed else error_of(call)
            if error is None:
                then(call.result())
                return
            # A call of an earlier placement generation was fenced as it should be: no rival now.
            if generation == self._generations:
                self.fence(error)
            failed(error)

        call.add_done_callback(lambda _: self._post(done))

    def fence(self, error: CkptError) -> None:
        """A call failed. If another writer opened a newer epoch: write nothing more, unless this
        launch has opened no epoch of its own yet.

        If that writer is the job's own, of a later membership epoch, this node only missed who is
        who: its attempt ends, the program does not.
        """
        if isinstance(error, SupersededError):
            self.term.end()
            self._on_fenced(error)
        elif isinstance(error, FencedError) and self.fenced is None and not self._fresh:
            self.fenced = error
            self._on_fenced(error)

    def new_launch(self) -> None:
        """The program was started again: neither a writer that continued the job in between nor
        another store is a rival now."""
        self._fresh, self.fenced, self._chosen = True, None, None
        self._log.recheck_store()

    def new_generation(self, *, root: bool) -> None:
        """Other nodes or placements than before: see ``Uploads.new_generation``. Epochs asked for
        and not yet open fail, and are not opened later: what waits for a store ends at its next
        claim."""
        self._generations += 1
        self.term.end()
        self.term = Term()
        for kind in ("choices-wait", "open-waits"):
            self._retries.cancel(kind)
        waiting, self._waiting, self._beginning = self._waiting, [], False
        gone = UnavailableError("cluster membership changed; the attempt that asked is over.")
        for asked in waiting:
            asked.answer.set_exception(gone)
        self.new_launch()
        if not root:
            self.view.staged = {}

    def begin_attempt(
        self, membership: MembershipEpoch | None, may_act: Callable[[], bool]
    ) -> None:
        """See ``Uploads.begin_attempt``."""
        self.term.begin_attempt(membership, may_act)

    def stop(self) -> None:
        """What is in flight fails from now on."""
        self._closed = True

    def close(self, timeout_s: float) -> bool:
        """End the thread; whether it ended in time."""
        return self._thread.close(cancel=True, timeout_s=timeout_s)

    def _read_choices(
        self, staged: Mapping[SnapshotId, str], future: Future[tuple[Choice, ...]], stores: int
    ) -> None:
        def read() -> None:
            self._retries.succeeded("choices-wait")
            if self.expected_log and self.view.log_id != self.expected_log:
                future.set_exception(
                    UsageError(
                        "this job's nodes hold snapshots of another log than the one that is here. "
                        f"theirs={self.expected_log} here={self.view.log_id or 'none'} "
                        f"store={self._store}; give all nodes the same stores"
                    )
                )
                return
            self._chosen = ResumeChoice(self.view.state.newest())
            choices = self.view.best_first(staged if stores == self.view.stores else {})
            hole = self.view.state.hole
            if hole is not None and not choices:
                # Damage must not pass for absence: a fresh start would abandon what is behind it.
                future.set_exception(
                    IntegrityError(
                        "no snapshot can be seen, and the log is damaged: "
                        f"{hole.reason} run ckpt scrub"
                    )
                )
                return
            future.set_result(choices)

        def failed(error: CkptError) -> None:
            if not (staged and self._fresh and error.retry) or self._closed:
                future.set_exception(error)
                return
            text = (
                "slots hold snapshots, but the log that says which of them count can't be read; "
                "waiting"
            )
            self._retries.schedule(
                "choices-wait", text, error, lambda: self._read_choices(staged, future, stores)
            )

        self.read_log(frozenset(pair.epoch for pair in staged), read, failed)

    def _open(self, asked: _Asked) -> None:
        if self.fenced is not None:
            asked.answer.set_exception(self.fenced)
        elif self._beginning:
            self._waiting.append(asked)
        elif not self._fresh:
            self._issue(asked)
        else:
            self._beginning = True
            self._open_first(
                FirstOpen(
                    asked.resume, self.view.staged, False, new_origin(), asked.chosen, self.term
                ),
                asked.answer,
            )

    def _open_first(self, opening: FirstOpen, future: Future[int]) -> None:
        generation = self._generations

        def begun(done: FirstOpened) -> None:
            if generation != self._generations:
                not_begun(
                    UnavailableError("cluster membership changed; the attempt that asked is over.")
                )
                return
            self._retries.succeeded("open-waits")
            self._begun(done)
            future.set_result(self.view.epoch)
            self._open_waiting()

        def not_begun(error: CkptError) -> None:
            if generation != self._generations:
                future.set_exception(error)
                return
            if opening.staged and error.retry and not self._closed:
                text = "slots hold snapshots, but no epoch can be opened to continue; waiting"
                self._retries.schedule(
                    "open-waits", text, error, lambda: self._open_first(opening, future)
                )
                return
            future.set_exception(error)
            self._open_waiting()

        self._begin(opening, begun, not_begun)

    def _begin(
        self,
        opening: FirstOpen,
        begun: Callable[[FirstOpened], object],
        failed: Callable[[CkptError], object],
    ) -> None:
        # Behind the uploads that an earlier launch left in flight: the new epoch would void their
        # commits.
        do = self._persisters.call if self._persisters else self._thread.submit
        self.when_done(do(lambda: self._log.begin(opening)), begun, failed)

    def _begun(self, begun: FirstOpened) -> None:
        self._see_store(begun.seen.log_id)
        self._fresh = False
        self.view.begin(begun)
        if not self._persisters:
            self._persisters.start(self._log)
        self._emit(Event("epoch", f"epoch {self.view.epoch} is open", {"epoch": self.view.epoch}))
        self.on_begun()

    def _see_store(self, log_id: str) -> None:
        """Begin anew if the store is another one than in the last launch, or gone."""
        if not self.view.store_changed(log_id):
            return
        self._on_store_changed()
        state = "another one now" if log_id else "gone"
        text = (
            f"the store is {state}: what was staged for it is given up, and the job starts anew. "
            f"store={self._store}"
        )
        self._emit(Event("store-changed", text, {"log_id": log_id}, alarm=True))

    def _open_waiting(self) -> None:
        self._beginning = False
        waiting, self._waiting = self._waiting, []
        for asked in waiting:
            self._open(asked)

    def _issue(self, asked: _Asked) -> None:
        try:
            issued = self.view.issue(asked.resume)
        except UsageError as error:
            asked.answer.set_exception(error)
            return
        term = self.term
        recorded = self._persisters.call(lambda: self._log.record(issued, term))
        facts = {"epoch": issued.epoch}
        self.when_done(
            recorded,
            lambda _: self._emit(Event("epoch", f"epoch {issued.epoch} is open", facts)),
            lambda error: self._emit(
                Event(
                    "open-failed", f"epoch {issued.epoch} is not open: {error}", facts, alarm=True
                )
            ),
        )
        asked.answer.set_result(issued.epoch)
