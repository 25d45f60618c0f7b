"""The saving half of a session: stage, submit, watch what is in flight, end well."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

import msgspec
import torch

from ckpt.capture.leaves import TensorLeaf, World
from ckpt.errors import (
    CkptError,
    ConflictError,
    FencedError,
    StoreFullError,
    UnavailableError,
    UsageError,
)
from ckpt.events import Emit, Event, Fact
from ckpt.ipc.mailbox import CountingMailbox, wait_for_message
from ckpt.ipc.messages import RemoteError, from_error, to_error
from ckpt.maintenance.gc.rounds import GcRounds, RetentionSettings
from ckpt.maintenance.gc.sweep import GRACE_S
from ckpt.save.chunks import Compression
from ckpt.save.persister import Persister, SaveTarget, new_writer
from ckpt.session.agreement import Skip, Take, take_or_skip
from ckpt.session.keeper.persister import KeeperPersister
from ckpt.session.options import SessionOptions, check_metadata
from ckpt.session.staging import (
    COMPARE_WAIT_S,
    SLOT_WAIT_S,
    CopyTime,
    Stager,
    compare_replicas,
    sealed_again,
)
from ckpt.staging.devices import HostCopies
from ckpt.staging.memory import MemoryRoom
from ckpt.staging.slot import Regions, Slot
from ckpt.values import ChunkLocation, Digest, SnapshotId, SnapshotInfo

AwaitOutcome = Callable[[Future[SnapshotInfo], float | None], None]

SUCCESSOR_WAIT_S = 300.0
"""After a keeper's death: how long a wait for an outcome goes on while no successor can give one,
because the thread that saves has not started it, or a rank has not handed over its slots. Shorter
than the time limits of collectives, in which that rank may wait for this one.
"""
LATE_LOOK_S = 0.25
"""How often such a wait looks for the rank."""


class Pending:
    """What ``save_async`` returns. The state is copied, so training may change it; it becomes
    durable in the background.

    One object for each save. Thread-safe. Dropping it loses nothing.
    """

    __slots__ = ("_await", "_future", "_snapshot", "_tags")

    def __init__(
        self,
        snapshot: SnapshotId,
        future: Future[SnapshotInfo],
        *,
        tags: tuple[str, ...] = (),
        await_outcome: AwaitOutcome | None = None,
    ) -> None:
        """``await_outcome``: waits for the future, and replaces a lost keeper meanwhile."""
        self._snapshot = snapshot
        self._future = future
        self._tags = tags
        self._await = await_outcome

    @property
    def step(self) -> int:
        """The step that this snapshot captured."""
        return self._snapshot.step

    @property
    def epoch(self) -> int:
        """The epoch in which it was captured."""
        return self._snapshot.epoch

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags that it gets once it is durable."""
        return self._tags

    def done(self) -> bool:
        """Whether the outcome is known; ``durable`` then returns or raises at once."""
        return self._future.done()

    def durable(self, timeout_s: float | None = None) -> SnapshotInfo:
        """Wait until the snapshot is committed on the store and return its facts.

        Raises what made it fail (StoreFullError, StoreDeniedError, FencedError, ...), and
        UnavailableError after ``timeout_s`` seconds without an outcome. The save then still goes on
        and may be waited for again. If the keeper that has it dies, the thread that saves has
        another one started, which goes on with it once all ranks saved or waited again; without
        that, UnavailableError after SUCCESSOR_WAIT_S seconds.
        """
        began_s = time.monotonic()
        if self._await is not None:
            self._await(self._future, timeout_s)
        try:
            left_s = None if timeout_s is None else timeout_s - (time.monotonic() - began_s)
            return self._future.result(left_s if left_s is None else max(0.0, left_s))
        except CancelledError as error:
            raise self._abandoned() from error
        except FutureTimeoutError as error:
            if self._future.done():  # the save itself failed with a timeout
                raise
            raise UnavailableError(
                f"the snapshot is not durable yet, the save continues. {self._snapshot} "
                f"waited_s={timeout_s}"
            ) from error

    @property
    def future(self) -> Future[SnapshotInfo]:
        """The outcome as a future, to wait for several at once."""
        return self._future

    def failure(self) -> CkptError | None:
        """The error of a save that has an outcome, or None if it is durable or still in flight."""
        if not self._future.done():
            return None
        if self._future.cancelled():
            return self._abandoned()
        error = self._future.exception()
        return error if isinstance(error, CkptError) else None

    def _abandoned(self) -> CkptError:
        return UnavailableError(
            "the snapshot was abandoned before it was durable, because an exception ended its "
            f"session. {self._snapshot}"
        )

    def __repr__(self) -> str:
        state = "in flight" if not self.done() else "failed" if self.failure() else "durable"
        return f"<Pending {self._snapshot}: {state}>"


ABANDON_WAIT_S = 60.0
"""After an exception in training: how long what is staged may take to become durable."""

END_PAUSES_S = (1.0, 5.0, 15.0)
END_PAUSE_S = 60.0
"""Pauses between tries to save the end of a training, and every later one."""


def end_pauses(retry_s: float) -> Iterator[float]:
    """The pauses between tries that take about ``retry_s`` seconds together.

    Counted rather than measured, so that all ranks make the same number of tries.
    """
    waited_s = 0.0
    for pause_s in itertools.chain(END_PAUSES_S, itertools.repeat(END_PAUSE_S)):
        if waited_s >= retry_s:
            return
        waited_s += pause_s
        yield pause_s


LAST_ROUND_WAIT_S = 30.0
"""Without a keeper: how long the end waits until old snapshots are dropped. The next run drops the
rest.
"""


class Saving:
    """Stages one rank's share of each snapshot and makes it durable, in order. Used by the training
    thread.

    Larger than other classes: it is one state machine over the stager, the persister, retention and
    the snapshots in flight.
    """

    def __init__(self, mailbox: CountingMailbox, options: SessionOptions, emit: Emit) -> None:
        self._mailbox = mailbox
        self._options = options
        self._emit = emit
        self._compared = 0
        self._prepared = 0
        self._stager = Stager(
            World(mailbox.rank, mailbox.size),
            slots=options.slots_max,
            room=MemoryRoom(free_share=options.free_share),
            threads=options.threads,
            compare_replicas=self._compare,
            on_short=self._memory_short,
            on_unsampled=self._unsampled,
            copies=HostCopies(on_slow=self._pinning_refused),
        )
        self._short_reported = False
        self._persister: Persister | KeeperPersister | None = None
        self._rounds: GcRounds | None = None
        self._last_step: int | None = None
        self._staged_step: int | None = None
        self._reserved = 0
        self._pendings: list[Pending] = []
        self._began_s = time.monotonic()
        self._saves_in = threading.get_ident()
        """The thread that took the last snapshot: the only one that may replace a keeper."""
        self._replacing = threading.RLock()
        self.replace_keeper: Callable[[float | None], None] | None = None
        """Has another keeper go on with what a lost one had, or raises why none can. Waits that
        many seconds at most for another rank.
        """
        self.late_ranks: Callable[[], Sequence[int]] = tuple
        """The ranks that have not followed to the keeper that replaced a lost one."""

    def prepare(self, items: Mapping[str, object]) -> None:
        """Lay out and pre-fault the slots in the background. Every rank calls it, and all raise the
        error of any rank.
        """
        self._prepared += 1
        own_error: CkptError | None = None
        try:
            self._stager.prepare(items)
        except CkptError as error:
            own_error = error
        except BaseException as error:
            # A user's state_dict, a device: the other ranks must not wait for this one.
            self._post_prepared(
                UnavailableError(f"the state could not be laid out. cause={error!r}")
            )
            raise
        if self._mailbox.size == 1:
            if own_error is not None:
                raise own_error
            return
        self._post_prepared(own_error)
        results = [self._prepare_error(rank) for rank in range(self._mailbox.size)]
        errors = [error for error in results if error is not None]
        if errors and isinstance(own_error, UsageError):
            raise own_error
        if errors:  # a rank that only stopped waiting for another one is not the cause
            raise to_error(
                next((error for error in errors if error.code != UnavailableError.code), errors[0])
            ) from own_error

    def write_locally(
        self,
        place: SaveTarget,
        *,
        base: SnapshotId | None,
        known_chunks: Callable[[], Mapping[Digest, ChunkLocation]],
        after: int | None = None,
    ) -> None:
        """From now on make snapshots durable in this process, as ``place`` says. What is in flight
        ends first.

        They may refer to chunks of ``base``. Steps must grow from ``after`` on; None: from
        anywhere.
        """
        self.drain()
        self._last_step = self._staged_step = after
        self._stager.origin = ""
        self._persister = Persister(
            self._mailbox,
            place,
            compression=Compression(self._options.compression),
            verify=self._options.verify_staged,
            emit=self._emit,
            base=base,
            stored_chunks=known_chunks() if base is not None else None,
        )
        self._end_rounds()
        if self._options.keep is not None and place.journal is not None:
            keep = RetentionSettings(
                policy=self._options.keep,
                grace_s=self._options.grace_s if self._options.grace_s is not None else GRACE_S,
                adapts=self._options.grace_s is None,
            )
            self._rounds = GcRounds(place.backend, keep, epoch=place.epoch, emit=self._emit)

    def write_through_keeper(
        self, persister: KeeperPersister, *, origin: str, after: int | None = None
    ) -> None:
        """As ``write_locally``, but the keeper writes, and drops old snapshots. Staged indexes
        carry the epoch's ``origin``.
        """
        self.drain()
        self._end_rounds()
        self._stager.origin = origin
        self._last_step = self._staged_step = after
        self._persister = persister

    def go_on_through_keeper(self, *, origin: str, after: int) -> None:
        """Another keeper has replaced a lost one, and a new epoch is open: what is in flight goes
        on.
        """
        self._stager.origin = origin
        self._last_step = self._staged_step = after

    def hand_back(
        self, again: Sequence[SnapshotId]
    ) -> Callable[[Mapping[SnapshotId, SnapshotInfo]], None]:
        """The keeper is lost and none follows. To be called before ``write_locally``; what it
        returns after that: it submits ``again``, on all ranks alike. ``committed`` is in the log.
        """
        before, self._persister = self._persister, None

        def submit(committed: Mapping[SnapshotId, SnapshotInfo]) -> None:
            assert isinstance(self._persister, Persister), "written locally from here on"
            outcomes: dict[SnapshotId, Future[SnapshotInfo]] = {}
            for snapshot in again:
                found = before.staged(snapshot) if isinstance(before, KeeperPersister) else None
                if found is None:
                    lost = UnavailableError("the keeper was lost when the snapshot was submitted")
                    self._persister.submit_failure(snapshot, lost)
                    continue
                slot, tags = found
                outcomes[snapshot] = self._persister.submit(sealed_again(slot), tags=tags)
            if isinstance(before, KeeperPersister):
                before.leave(outcomes, committed)

        return submit

    @property
    def handed_in(self) -> tuple[SnapshotId, ...]:
        """What a keeper was handed in and has given no outcome of."""
        keeper = self._persister
        return keeper.unsettled if isinstance(keeper, KeeperPersister) else ()

    @property
    def through_keeper(self) -> KeeperPersister | None:
        """The persister that hands snapshots to a keeper, if there is one."""
        return self._persister if isinstance(self._persister, KeeperPersister) else None

    @property
    def last_step(self) -> int | None:
        """The step that was staged last, to become durable."""
        return self._last_step

    def await_outcome(self, future: Future[SnapshotInfo], timeout_s: float | None) -> None:
        """Wait until a snapshot has an outcome, ``timeout_s`` seconds at most. The thread that
        saves replaces a lost keeper meanwhile; if no keeper follows, what is in flight has failed.

        Raises UnavailableError if for SUCCESSOR_WAIT_S seconds no keeper can go on with it: in
        another thread nobody replaced it, or another rank has not followed.
        """
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        stuck_s: float | None = None  # since when no keeper can go on with it
        while not future.done():
            keeper, replace_keeper = self.through_keeper, self.replace_keeper
            left_s = None if until_s is None else until_s - time.monotonic()
            if keeper is None or replace_keeper is None or (left_s is not None and left_s <= 0):
                return
            owns = threading.get_ident() == self._saves_in
            if keeper.lost.done() and owns:
                self._replace(keeper, replace_keeper, until_s)
                continue
            late = () if keeper.lost.done() else self.late_ranks()
            if not keeper.lost.done() and not late:
                stuck_s = None
                either: list[Future[Any]] = [future, keeper.lost]
                wait(either, timeout=left_s, return_when=FIRST_COMPLETED)
                continue
            stuck_s = time.monotonic() if stuck_s is None else stuck_s
            stuck_left_s = stuck_s + SUCCESSOR_WAIT_S - time.monotonic()
            if stuck_left_s <= 0:
                raise _no_successor(late)
            pause_s = min(LATE_LOOK_S, stuck_left_s)
            wait([future], timeout=pause_s if left_s is None else min(pause_s, left_s))

    def _replace(
        self,
        keeper: KeeperPersister,
        replace_keeper: Callable[[float | None], None],
        until_s: float | None = None,
    ) -> None:
        with self._replacing:
            if not keeper.lost.done():  # the thread that saved before has done it
                return
            try:
                replace_keeper(None if until_s is None else until_s - time.monotonic())
            except CkptError as error:
                if until_s is None or time.monotonic() < until_s:
                    keeper.fail(error)
                # Else only this wait is over: the next one tries again.

    def use_regions(self, regions: Regions) -> None:
        """Take the slots' memory from ``regions``. Once, before anything is laid out."""
        self._stager.use_regions(regions)

    def stage(
        self, items: Mapping[str, object], snapshot: SnapshotId, *, metadata: Mapping[str, Fact]
    ) -> CopyTime | None:
        """Stage ``items`` for memory alone. Waits for nothing: None if no slot is free.

        Raises as ``snapshot``, but does not tell the other ranks: their slots keep an older
        complete snapshot.
        """
        if self._staged_step is not None and snapshot.step <= self._staged_step:
            raise UsageError(f"steps must grow. step={snapshot.step} last_step={self._staged_step}")
        try:
            staged = self._stager.stage(items, snapshot, metadata=metadata, wait_s=0.0)
        except UnavailableError:
            return None
        staged.release()
        self._staged_step = snapshot.step
        return staged.copied

    def snapshot(
        self,
        items: Mapping[str, object],
        snapshot: SnapshotId,
        *,
        metadata: Mapping[str, Fact],
        tags: tuple[str, ...],
        wait_s: float = SLOT_WAIT_S,
    ) -> Pending:
        """Stage ``items`` now and make them durable in the background. Waits only for a free slot,
        ``wait_s`` at most.

        Raises FencedError if a newer epoch was found before, UsageError if steps do not grow or the
        state can't be captured. The other ranks then learn that this snapshot failed.
        """
        persister = self._persister
        assert persister is not None, "an epoch is open"
        self._saves_in = threading.get_ident()
        failure = self.last_failure_of(snapshot.epoch)
        if isinstance(failure, FencedError):
            persister.submit_failure(
                snapshot, failure
            )  # another rank may not know yet, and wait for this one
            raise failure
        if self._last_step is not None and snapshot.step <= self._last_step:
            raise UsageError(
                f"steps must grow from one snapshot to the next. step={snapshot.step} "
                f"last_step={self._last_step}; "
                "to go back, restore the older snapshot first"
            )
        began_s = time.monotonic()
        try:
            staged = self._stager.stage(
                items, snapshot, metadata=metadata, wait_s=wait_s, sample=True
            )
        except CkptError as error:
            persister.submit_failure(snapshot, error)
            raise
        except BaseException as error:
            # A user's state_dict, a device, Ctrl-C: the other ranks must not wait for this one.
            text = (
                f"the state could not be staged. snapshot={snapshot} "
                f"rank={self._mailbox.rank} cause={error!r}"
            )
            persister.submit_failure(snapshot, UnavailableError(text))
            raise
        self._last_step = self._staged_step = snapshot.step
        durable = (
            persister.submit(staged, tags=tags)
            if isinstance(persister, KeeperPersister)
            else persister.submit(staged.sealed(), tags=tags)
        )
        if self._rounds is not None:
            self._rounds.resume()
            durable.add_done_callback(_report_committed(self._rounds))
        pending = Pending(snapshot, durable, tags=tags, await_outcome=self.await_outcome)
        settled = [earlier for earlier in self._pendings if earlier.done()]
        self._pendings = [
            *settled[-1:],
            *(earlier for earlier in self._pendings if not earlier.done()),
            pending,
        ]
        seconds = time.monotonic() - began_s
        self._emit(
            Event(
                "staged",
                f"{snapshot} is staged",
                {"step": snapshot.step, "seconds": round(seconds, 4)},
            )
        )
        return pending

    def refuse(self, snapshot: SnapshotId, error: CkptError) -> None:
        """Take part in a snapshot that this rank can't give: all ranks learn that it failed, and
        why.
        """
        assert self._persister is not None, "an epoch is open"
        self._persister.submit_failure(snapshot, error)

    def refer_to(self, base: SnapshotId, known: Mapping[Digest, ChunkLocation]) -> None:
        """Let the first snapshot of this epoch refer to chunks of ``base`` that were read and
        verified.
        """
        if self._persister is not None:
            self._persister.refer_to(base, known)

    def may_take(self, reserved: int) -> Take | Skip:
        """On rank 0: whether one more snapshot finds a slot, beside ``reserved`` that are decided
        and not yet taken.
        """
        in_flight = self._persister.in_flight if self._persister is not None else 0
        slots = max(1, self._stager.slots_max - self._reserved)
        return take_or_skip(in_flight=in_flight + reserved, slots=slots)

    def reserve_slots(self, slots: int) -> None:
        """Keep that many slots free of uploads, if there are so many: staging for memory needs one
        to write and one that is complete.
        """
        self._reserved = slots

    @property
    def passed_step(self) -> int:
        """On rank 0: the last step whose boundary every rank is known to have passed; -1
        for none.
        """
        return self._persister.passed_step if self._persister is not None else -1

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight."""
        return all(pending.done() for pending in self._pendings)

    @property
    def last(self) -> Pending | None:
        """The last snapshot that was submitted."""
        return self._pendings[-1] if self._pendings else None

    @property
    def last_failure(self) -> CkptError | None:
        """Why the last snapshot with an outcome failed, or None if it did not."""
        return next(
            (pending.failure() for pending in reversed(self._pendings) if pending.done()), None
        )

    def last_failure_of(self, epoch: int) -> CkptError | None:
        """As ``last_failure``, of the snapshots captured in ``epoch``: an earlier epoch's fence
        does not fence this one.
        """
        settled = (
            pending
            for pending in reversed(self._pendings)
            if pending.done() and pending.epoch == epoch
        )
        return next((pending.failure() for pending in settled), None)

    def stale_s(self) -> float:
        """Seconds since a snapshot became durable, or since the start."""
        durable_s = self._persister.durable_at_s if self._persister is not None else None
        return time.monotonic() - (durable_s or self._began_s)

    def drain(self) -> None:
        """Wait until nothing is in flight and end the persister's thread. From here on the calling
        thread is the one that saves.

        What no keeper can go on with in time has failed (see ``await_outcome``).
        """
        self._saves_in = threading.get_ident()
        keeper = self.through_keeper
        for future in keeper.futures if keeper is not None else ():
            self._await_or_fail(future, None)
        if self._persister is not None:
            self._persister.close()
            self._persister = None

    def wait_idle(self, timeout_s: float) -> None:
        """Wait until nothing is in flight, ``timeout_s`` seconds at most."""
        until_s = time.monotonic() + timeout_s
        for pending in self._pendings:
            self._await_or_fail(pending.future, max(0.0, until_s - time.monotonic()))
        left_s = max(0.0, until_s - time.monotonic())
        wait([pending.future for pending in self._pendings], timeout=left_s)

    def hold_gc(self) -> None:
        """Something is restored: drop and delete nothing until the next submission. A keeper does
        so by itself.
        """
        if self._rounds is not None:
            self._rounds.pause()

    def _end_rounds(self, *, last_s: float = 0.0) -> None:
        rounds, self._rounds = self._rounds, None
        if rounds is not None:
            if last_s:
                rounds.start_last_round()
                rounds.await_idle(last_s)
            rounds.stop(0.0)

    def retry_last(
        self,
        retry_s: float,
        *,
        stop: threading.Event,
        committed: Callable[[SnapshotId], SnapshotInfo | None],
    ) -> None:
        """The training is finished: while the store does not take its last snapshot, submit that
        again, after pauses of ``retry_s`` seconds together, or until ``stop`` is set.

        Every rank calls it alike: they all know each outcome, and make the same tries. Raises
        nothing: ``finish`` raises what the last try met. ``committed`` gives the facts of a
        snapshot that is in the log after all, which a lost reply leaves open, or None.
        """
        for pause_s in end_pauses(retry_s):
            last = self.last
            if last is None:
                return
            self._await_settled(last.future)
            error = last.failure()
            if error is None or not error.retry or stop.is_set():
                return
            self._tell_end_waits(last, error, pause_s)
            if stop.wait(pause_s) or not self._submit_again(last, committed):
                return

    def _await_settled(self, future: Future[SnapshotInfo]) -> None:
        self._await_or_fail(future, None)
        wait([future])

    def _await_or_fail(self, future: Future[SnapshotInfo], timeout_s: float | None) -> None:
        """As ``await_outcome``, but what no keeper goes on with fails."""
        try:
            self.await_outcome(future, timeout_s)
        except UnavailableError as error:
            if (keeper := self.through_keeper) is not None:
                keeper.fail(error)

    def _tell_end_waits(self, last: Pending, error: CkptError, pause_s: float) -> None:
        if self._mailbox.rank != 0:
            return
        durable = self.durable
        text = (
            f"the training is finished, and its end at step {last.step} is in memory only (durable "
            f"is {f'step {durable.step}' if durable is not None else 'nothing'}): {error}; make "
            f"room for it or repair the store. It is tried again in {pause_s:.0f} s and later; "
            "interrupting the program gives it up"
        )
        self._emit(Event("end-waits", text, {"step": last.step, "code": error.code}, alarm=True))

    def _submit_again(
        self, last: Pending, committed: Callable[[SnapshotId], SnapshotInfo | None]
    ) -> bool:
        """Submit what the last snapshot staged once more; False if no try can follow."""
        persister = self._persister
        snapshot = SnapshotId(last.epoch, last.step)
        staged = self._stager.staged_again(snapshot) if persister is not None else None
        if persister is None or staged is None:
            return False
        if isinstance(persister, KeeperPersister):
            durable = persister.submit(staged, tags=last.tags)
        else:
            # Its part may be in the store, named by a commit that was never answered.
            persister.write_as(new_writer())
            durable = persister.submit(staged.sealed(), tags=last.tags)
        self._pendings[-1] = Pending(
            snapshot, durable, tags=last.tags, await_outcome=self.await_outcome
        )
        self._await_settled(durable)
        failure = self._pendings[-1].failure()
        conflict = isinstance(failure, ConflictError) and not isinstance(failure, FencedError)
        info = committed(snapshot) if conflict else None
        if info is not None:  # by the try before, whose reply was lost
            settled: Future[SnapshotInfo] = Future()
            settled.set_result(info)
            self._pendings[-1] = Pending(snapshot, settled, tags=last.tags)
        return True

    def finish(self) -> None:
        """Make everything durable, or raise the error that kept the last snapshot from it."""
        self.drain()
        self._stager.close()
        self._end_rounds(last_s=LAST_ROUND_WAIT_S)
        if self.last is not None:
            self.last.durable()

    def abandon(self) -> None:
        """After an exception: what is staged gets a bounded time to become durable. Raises nothing;
        failures were reported.

        With a keeper there is no wait: it continues by itself. If it is lost, another one is
        started, which goes on with what was handed in.
        """
        keeper, replace_keeper = self.through_keeper, self.replace_keeper
        if (
            keeper is not None
            and replace_keeper is not None
            and keeper.lost.done()
            and keeper.unsettled
            and self._mailbox.rank == 0
        ):
            self._replace(keeper, replace_keeper)
        if self._persister is not None:
            if isinstance(self._persister, Persister):
                wait([pending.future for pending in self._pendings], timeout=ABANDON_WAIT_S)
            self._persister.abandon()
            self._persister = None
        self._stager.close()
        self._end_rounds()

    def last_info(self) -> SnapshotInfo | None:
        """The facts of the last snapshot once it is durable; waits for that."""
        return self.last.durable() if self.last is not None else None

    @property
    def slots(self) -> Sequence[Slot]:
        """The slots made so far."""
        return self._stager.slots

    @property
    def durable(self) -> SnapshotInfo | None:
        """The last snapshot that is known to be durable; waits for nothing."""
        return self._persister.last_info if self._persister is not None else None

    def _memory_short(self, error: UsageError) -> None:
        if not self._short_reported:
            self._short_reported = True
            self._emit(
                Event(
                    "memory-short",
                    "memory has room for fewer slots than asked for: while one is uploaded, copies "
                    "in memory are skipped, and a restart then repeats the steps since the last "
                    f"one: {error}",
                    alarm=True,
                )
            )

    def _unsampled(self, reason: str) -> None:
        self._emit(
            Event(
                "replicas-unsampled",
                "the memory of a device is too full to compare a part of what ranks hold alike; "
                f"snapshots go on without. {reason}; leave some MiB of it free",
                alarm=True,
            )
        )

    def _pinning_refused(self, reason: str) -> None:
        """Called by the thread that pins."""
        self._emit(
            Event(
                "pinning-refused",
                "CUDA does not lock the slots' memory, so copies from the device are several times "
                f"slower. {reason}; raise the limit on locked memory (ulimit -l)",
                alarm=True,
            )
        )

    def _compare(self, leaves: Sequence[TensorLeaf]) -> None:
        self._compared += 1
        compare_replicas(self._mailbox, leaves, n=self._compared, stop=self._failed_elsewhere)

    def _failed_elsewhere(self) -> bool:
        """Whether another rank failed to prepare, so that it will not come to the comparison."""
        results = (
            self._mailbox.peek(f"prepared/{self._prepared}/{rank}")
            for rank in range(self._mailbox.size)
        )
        return any(result not in (None, b"null") for result in results)

    def _post_prepared(self, error: CkptError | None) -> None:
        rank = self._mailbox.rank
        message = from_error(error, rank=rank) if error is not None else None
        self._mailbox.post(f"prepared/{self._prepared}/{rank}", msgspec.json.encode(message))

    def _prepare_error(self, rank: int) -> RemoteError | None:
        key = f"prepared/{self._prepared}/{rank}"
        result = wait_for_message(
            self._mailbox,
            key,
            timeout_s=COMPARE_WAIT_S,
            awaited=f"rank {rank} to lay out its share",
        )
        return msgspec.json.decode(result, type=RemoteError | None)


def _no_successor(late: Sequence[int]) -> UnavailableError:
    cause = (
        f"ranks have not followed to the next one. ranks={list(late)}; call save or durable on "
        "every rank"
        if late
        else "the thread that saves has not replaced it; save, wait or close there"
    )
    return UnavailableError(
        "the snapshot is not durable yet: its keeper was lost, and "
        f"{cause}. waited_s={SUCCESSOR_WAIT_S:g}"
    )


def _report_committed(rounds: GcRounds) -> Callable[[Future[SnapshotInfo]], None]:
    def done(future: Future[SnapshotInfo]) -> None:
        if future.cancelled():
            return
        error = future.exception()
        if error is None:
            rounds.on_commit()
        elif isinstance(error, StoreFullError):
            rounds.on_store_full()

    return done


# ---- metrics: the latest value of each name that the user logs, to be stored with the next
# snapshot

Loggable = float | int | str | bool | torch.Tensor | None


class Metrics:
    """Rank 0 keeps the latest values; the other ranks call it too and keep nothing. Thread-safe."""

    def __init__(self, emit: Emit, *, rank: int) -> None:
        self._emit = emit
        self._rank = rank
        self._latest: dict[str, Fact | torch.Tensor] = {}
        self._lock = threading.Lock()

    def log(self, values: Mapping[str, Loggable]) -> None:
        """Keep values. A tensor of one element is read at once on the CPU, later on other devices.
        Raises UsageError for anything else.
        """
        noted = {name: _noted(name, value) for name, value in values.items()}
        if self._rank != 0:
            return
        with self._lock:
            self._latest.update(noted)
        ready = {
            name: value for name, value in noted.items() if not isinstance(value, torch.Tensor)
        }
        self._emit(Event("log", "logged", ready))

    def facts(self) -> dict[str, Fact]:
        """The latest values as plain ones; waits for the devices that hold some."""
        with self._lock:
            latest = dict(self._latest)
        return {
            name: _item(value) if isinstance(value, torch.Tensor) else value
            for name, value in latest.items()
        }


def _noted(name: str, value: Loggable) -> Fact | torch.Tensor:
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise UsageError(
                f"only a tensor of one element can be logged. name={name} "
                f"shape={tuple(value.shape)}"
            )
        detached = value.detach()
        return _item(detached) if detached.device.type == "cpu" else detached.clone()
    if value is None or isinstance(value, (bool, int, float, str)):
        return check_metadata({name: value})[name]
    raise UsageError(
        f"only None, bool, int, float, str and tensors of one element can be logged. name={name} "
        f"type={type(value).__name__}"
    )


def _item(value: torch.Tensor) -> Fact:
    item = value.item()
    return item if isinstance(item, (bool, int, float)) else str(item)
