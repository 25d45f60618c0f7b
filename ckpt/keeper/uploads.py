"""Everything about one job's log and store inside its keeper: what can be restored, epochs, and making slots durable.

Used by the keeper's loop alone, which it never holds up: what may wait for a store is done in threads (``StoreLog`` in one, a
``Persister`` a rank), and comes back through ``post``. All futures are resolved and all callbacks called by the loop.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

from ckpt.backends.base import Backend
from ckpt.backends.open import open_backend
from ckpt.commit.state import LogState, Opened
from ckpt.encode.choose import Compression
from ckpt.errors import CkptError, FencedError, InternalError, UnavailableError, UsageError
from ckpt.keeper.choices import NOT_WRITTEN, STAGED, ahead, assumed, best_first
from ckpt.keeper.settling import SealedOf, Settler, unfit
from ckpt.keeper.store_log import RETRY_FIRST_S, Begun, StoreLog, give_out
from ckpt.keeper.turns import Turn, Turns
from ckpt.link.client import KeeperSpec
from ckpt.link.messages import Choice, RemoteError
from ckpt.link.remote import from_error
from ckpt.manifest.keys import writer_name
from ckpt.observe.events import Event, Tell
from ckpt.persist.channel import Room, RoomChannel
from ckpt.persist.persister import Persister, Place, Sealed
from ckpt.persist.queue import CallQueue
from ckpt.values import ChunkLocation, Digest, SnapshotId, SnapshotInfo

T = TypeVar("T")

Post = Callable[[Callable[[], object]], None]
"""Has a call made by the keeper's loop, soon; from any thread."""

Told = Callable[[int, SnapshotId, SnapshotInfo | None, RemoteError | None], None]
"""A rank's snapshot is settled: its facts, or why it failed; both where it is durable and could not be tagged."""

Known = Mapping[Digest, ChunkLocation]

_COMPRESSIONS = {"off": Compression("off"), "auto": Compression("auto"), "on": Compression("on")}


class Uploads:
    """The uploads of one job with a fixed number of ranks. Lives as long as that number does, over any number of attempts.

    ``outcome`` hears of each snapshot that a rank handed in, ``fenced`` once, when another writer opened a newer epoch; every
    call fails with FencedError from then on.
    """

    def __init__(
        self, spec: KeeperSpec, *, ranks: int, post: Post, outcome: Told, fenced: Callable[[str], None], tell: Tell,
        open_store: Callable[[], Backend] | None = None, retry_first_s: float = RETRY_FIRST_S,
    ) -> None:  # fmt: skip
        self._spec = spec
        self._ranks = ranks
        self._compression = _COMPRESSIONS[spec.compression]
        self.post = post
        self._outcome = outcome
        self._on_fenced = fenced
        self.tell: Tell = lambda event: post(lambda: tell(event))
        self._log = StoreLog(
            open_store or (lambda: open_backend(spec.store, spec.storage_options)), job=spec.job,
            named=spec.job != spec.store.rstrip("/").rpartition("/")[2], tell=self.tell, retry_first_s=retry_first_s,
        )  # fmt: skip
        self._store = CallQueue("ckpt-log")
        self._persisters: list[Persister] = []
        self._turns = Turns(ranks)
        self._state: LogState | None = None
        self._opens: list[Opened] = []
        self._commits: list[SnapshotId] = []
        self._staged: frozenset[SnapshotId] = frozenset()
        self._fresh = True  # the launch has opened no epoch yet, so that another writer's isn't a rival
        self._beginning = False
        self._waiting: list[tuple[SnapshotId | None, Future[int]]] = []
        self._under_way = 0
        self._settler = Settler(self, self._turns, ranks=ranks, retry_first_s=retry_first_s)
        self._fenced: FencedError | None = None
        self._closed = False
        self.durable: SnapshotInfo | None = None
        """The last snapshot that became durable here."""

    @property
    def epoch(self) -> int:
        """The newest epoch that was given out here; 0 before the first."""
        return self._opens[-1].epoch if self._opens else 0

    @property
    def in_flight(self) -> int:
        """Snapshots that some rank handed in and that are not settled on all ranks yet."""
        return len(self._turns)

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do: no upload, no record to write, no question on its way."""
        return not self._turns and not self._under_way and not self._settler.busy

    def choices(self, staged: Sequence[SnapshotId]) -> Future[tuple[Choice, ...]]:
        """What can be restored, best first; ``staged`` are the pairs that all ranks' slots hold.

        Answered at once where this launch opened an epoch and a staged pair is on its line, else after reading the log. Fails
        with what keeps the log from being read.
        """
        future: Future[tuple[Choice, ...]] = Future()
        self._staged = frozenset(staged)
        if self._fenced is not None:
            future.set_exception(self._fenced)
            return future
        found = self._best_first(staged)
        if not self._fresh and any(choice.tier == STAGED for choice in found):
            future.set_result(found)
            return future
        self.read_log(lambda _: future.set_result(self._best_first(staged)), future.set_exception)
        return future

    def open_epoch(self, resume: SnapshotId | None) -> Future[int]:
        """Open the next epoch, going on from ``resume`` (None: afresh); its number.

        A launch's first one is written before the number is given: it makes the store where there is none, and fails with what
        keeps it from being written. Later ones get their number at once; the record follows before any commit after it.
        """
        future: Future[int] = Future()
        self._open(resume, future)
        return future

    def new_launch(self) -> None:
        """The program was started anew. Others may have gone on with the job in between, and that is no reason to stop."""
        self._fresh, self._fenced = True, None

    def known(self, rank: int, base: SnapshotId, known: Known) -> None:
        """Let what ``rank`` hands in next refer to chunks of the committed ``base``, unless it knows others."""
        if self._persisters:
            self._persisters[rank].refer_next(base, known)

    def persist(self, rank: int, sealed: Sealed, tags: tuple[str, ...]) -> None:
        """Make a sealed slot durable; ``outcome`` hears how it went. Every rank hands in the same sequence."""
        snapshot = sealed.index.snapshot
        why: CkptError | None = self._fenced
        if why is None and not self._persisters:
            why = UsageError(
                f"a snapshot is handed in before this keeper opened an epoch. snapshot={snapshot} open one first"
            )
        if why is not None:
            sealed.let_go()
            self._outcome(rank, snapshot, None, from_error(why, rank=rank))
            self.refuse(rank, snapshot, why)
            return
        self._submit(rank, sealed, tags)

    def refuse(self, rank: int, snapshot: SnapshotId, error: CkptError) -> None:
        """Instead of ``persist``: this rank has no share to give, which fails the snapshot on all ranks."""
        if not self._persisters:
            return
        turn = self._turns.hand_in(rank, snapshot, (), error)
        refused = self._persisters[rank].refuse(snapshot, error)
        refused.add_done_callback(lambda _: self.post(lambda: self._turn_settled(rank, turn, error)))

    def attempt_ended(self, sealed_of: SealedOf) -> None:
        """No trainer of the attempt lives: hand in for each rank what others handed in and it did not, or refuse it.

        Then all ranks have handed in the same, and what is in flight settles.
        """
        for turn, missing in list(self._turns.uneven()):
            sealed = {rank: found for rank in missing if (found := sealed_of(rank, turn.snapshot)) is not None}
            why = turn.refused or unfit(turn, sealed, self._ranks)
            for rank in missing:
                if why is None:
                    self.persist(rank, replace(sealed[rank], shared=None), turn.tags)
                    continue
                if rank in sealed:
                    sealed[rank].let_go()
                self.refuse(rank, turn.snapshot, why)

    def settle(self, snapshot: SnapshotId, sealed_of: SealedOf) -> None:
        """Make a staged pair durable that nobody handed in, or that failed before; repeated while its slots hold it.

        For a job without trainers: after ``attempt_ended``. Nothing where it is durable, or can't be any more.
        """
        if self._fenced is not None:
            return
        if not self._persisters:  # to open an epoch for it would fence whoever goes on with the job elsewhere
            text = f"{snapshot} is staged, and stays so: this keeper opened no epoch"
            self.tell(Event("settle-failed", text, {"step": snapshot.step}, alarm=True))
            return
        self._settler.start(snapshot, sealed_of)

    def tag(self, name: str, snapshot: SnapshotId) -> Future[None]:
        """Tag a durable snapshot, after what was handed in before."""
        future: Future[None] = Future()
        if self._fenced is not None:
            future.set_exception(self._fenced)
        elif not self._persisters:
            future.set_exception(UsageError(f"a tag is set before this keeper opened an epoch. tag={name!r}"))
        else:
            log = self._log
            tagged = self._persisters[0].call(lambda: log.journal.tag(name, snapshot, epoch=log.writer_epoch()))
            self._call(tagged, lambda _: future.set_result(None), future.set_exception)
        return future

    def close(self, timeout_s: float) -> None:
        """Drop what has not begun and end the threads, waiting ``timeout_s`` seconds at most for what a store holds up."""
        deadline_s = time.monotonic() + timeout_s
        self._closed = True
        self._settler.stop()
        self._log.stop()
        for persister in self._persisters:
            persister.stop_waiting()
        ended = [persister.abandon(max(0.0, deadline_s - time.monotonic())) for persister in self._persisters]
        ended.append(self._store.close(cancel=True, timeout_s=max(0.0, deadline_s - time.monotonic())))
        if all(ended):
            self._log.close()

    # ---- in the loop, when threads are done

    def _call(self, call: Future[T], then: Callable[[T], object], failed: Callable[[CkptError], object]) -> None:
        """When ``call`` is done in its thread, go on in the loop."""
        self._under_way += 1

        def done() -> None:
            self._under_way -= 1
            error = UnavailableError("the keeper ends.") if self._closed else _error_of(call)
            if error is None:
                then(call.result())
                return
            if isinstance(error, FencedError):
                self._fence(error)
            failed(error)

        call.add_done_callback(lambda _: self.post(done))

    def read_log(self, then: Callable[[LogState], object], failed: Callable[[CkptError], object]) -> None:
        """Read the log in the background; ``then`` gets it with what was given out and committed meanwhile."""
        before = set(self._commits)

        def have(state: LogState) -> None:
            self._state = state
            self._commits = [pair for pair in self._commits if pair not in before]  # those were there when it was read
            if not self._fresh and state.epoch > self.epoch:
                self._fence(_foreign(state.epoch, self.epoch))
            if self._fenced is not None:
                failed(self._fenced)
            else:
                then(ahead(state, self._opens, self._commits))

        self._call(self._store.submit(self._log.read), have, failed)

    def hand_in_again(self, sealed: Mapping[int, Sealed]) -> Turn:
        """Hand in all ranks' shares of one pair that may have been handed in before."""
        turn: Turn | None = None
        for rank, one in sealed.items():
            # Its part may be in the store already, named by a commit that was never answered: it must not be overwritten.
            self._persisters[rank].write_as(_new_writer())
            turn = self._submit(rank, replace(one, shared=None), ())
        assert turn is not None, "there is at least one rank"
        return turn

    def _ahead(self) -> LogState | None:
        return ahead(self._state, self._opens, self._commits) if self._state is not None else None

    def _best_first(self, staged: Sequence[SnapshotId]) -> tuple[Choice, ...]:
        state = self._ahead()
        return best_first(ahead(state, assumed(state, staged)), staged) if state is not None else ()

    def _open(self, resume: SnapshotId | None, future: Future[int]) -> None:
        if self._fenced is not None:
            future.set_exception(self._fenced)
        elif self._beginning:
            self._waiting.append((resume, future))
        elif not self._fresh:
            self._give_out(resume, future)
        else:
            self._beginning = True
            seen = self._staged | ({resume} if resume is not None else set())
            # What an earlier launch left in flight is committed first: the new epoch would make those commits void.
            do = self._persisters[0].call if self._persisters else self._store.submit
            self._call(do(lambda: self._log.begin(resume, seen)), lambda begun: self._begun(begun, future),
                       lambda error: self._not_begun(error, future))  # fmt: skip

    def _begun(self, begun: Begun, future: Future[int]) -> None:
        self._fresh = False
        self._state = begun.state
        self._opens += begun.opens
        if not self._persisters:
            self._persist_with(Room())
        self.tell(Event("epoch", f"epoch {self.epoch} is open", {"epoch": self.epoch}))
        future.set_result(self.epoch)
        self._open_waiting()

    def _persist_with(self, room: Room) -> None:
        for rank in range(self._ranks):
            place = Place(
                backend=self._log.backend, writer=_new_writer(), epoch=self._log.writer_epoch,
                journal=self._log.journal if rank == 0 else None,
            )  # fmt: skip
            self._persisters.append(
                Persister(
                    RoomChannel(room, rank=rank, size=self._ranks), place, compression=self._compression,
                    verify=True, tell=self.tell if rank == 0 else _silent,
                )
            )  # fmt: skip

    def _not_begun(self, error: CkptError, future: Future[int]) -> None:
        future.set_exception(error)
        self._open_waiting()

    def _open_waiting(self) -> None:
        self._beginning = False
        waiting, self._waiting = self._waiting, []
        for resume, future in waiting:
            self._open(resume, future)

    def _give_out(self, resume: SnapshotId | None, future: Future[int]) -> None:
        state = self._ahead()
        assert state is not None, "an epoch was opened"
        if resume is not None and all(opened.epoch != resume.epoch for opened in state.opens):
            future.set_exception(UsageError(f"goes on from an epoch that was never opened. from={resume}"))
            return
        given = give_out(state.epoch + 1, resume)
        self._opens.append(Opened(given.epoch, NOT_WRITTEN, resume))
        recorded = self._persisters[0].call(lambda: self._log.record(given))
        facts = {"epoch": given.epoch}
        self._call(
            recorded,
            lambda _: self.tell(Event("epoch", f"epoch {given.epoch} is open", facts)),
            lambda error: self.tell(
                Event("open-failed", f"epoch {given.epoch} is not open: {error}", facts, alarm=True)
            ),
        )
        future.set_result(given.epoch)

    def _submit(self, rank: int, sealed: Sealed, tags: tuple[str, ...]) -> Turn:
        snapshot = sealed.index.snapshot
        turn = self._turns.hand_in(rank, snapshot, tags, sealed.index)
        persister = self._persisters[rank]

        def settled(future: Future[SnapshotInfo]) -> None:
            last = persister.last_info  # asked before the persister takes its next call
            info = last if last is not None and last.id == snapshot else None
            error = _error_of(future)
            self.post(lambda: self._settled(rank, turn, info, error))

        persister.submit(sealed, tags=tags).add_done_callback(settled)
        return turn

    def _settled(self, rank: int, turn: Turn, info: SnapshotInfo | None, error: CkptError | None) -> None:
        if self._closed:
            return
        if rank == 0 and info is not None:
            self.durable = info
            self._commits.append(info.id)
        if rank == 0 and isinstance(
            error, FencedError
        ):  # the writer's own; other ranks hear it later, of a launch before perhaps
            self._fence(error)
        message = from_error(error, rank=rank) if error is not None else None
        self._outcome(rank, turn.indexes[rank].snapshot, info, message)
        self._turn_settled(rank, turn, error if info is None else None)

    def _turn_settled(self, rank: int, turn: Turn, error: CkptError | None) -> None:
        if not self._closed and self._turns.settle(rank, turn, error):
            self._settler.turn_settled(turn)

    def _fence(self, error: FencedError) -> None:
        if self._fenced is None and not self._fresh:
            self._fenced = error
            self._settler.stop()
            self._on_fenced(str(error))


def _error_of(future: Future[T]) -> CkptError | None:
    if future.cancelled():
        return UnavailableError("the keeper ended before this was done.")
    error = future.exception()
    if error is None or isinstance(error, CkptError):
        return error
    wrapped = InternalError(f"a keeper failed in an unforeseen way. cause={error!r}")
    wrapped.__cause__ = error
    return wrapped


def _foreign(newest: int, mine: int) -> FencedError:
    return FencedError(f"another writer opened an epoch of this job. newest={newest} mine={mine} stop this one")


def _new_writer() -> str:
    return writer_name(socket.gethostname(), secrets.token_hex(8))


def _silent(event: Event) -> None:
    """Rank 0's persister tells what concerns all."""
