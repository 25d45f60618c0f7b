"""One process's use of one store in one attempt: joins the other ranks, restores, opens the epoch,
snapshots.

``Checkpointer`` and ``Run`` are two faces of it. Everything here is called by the training thread.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from ckpt.backends.base import Backend
from ckpt.backends.checked import stores_of
from ckpt.backends.replicated.open import open_job_stores, require_key_fits
from ckpt.capture.leaves import escape
from ckpt.capture.streams import RngState
from ckpt.errors import NewerSnapshotError, NotFoundError, UnavailableError, UsageError
from ckpt.events import Emit, Event, Fact, emit_to_logging
from ckpt.ipc.board import Board
from ckpt.ipc.mailbox import CountingMailbox, wait_for_message
from ckpt.log.state import LogState
from ckpt.restore.reader import item_names
from ckpt.session.c10d_mailbox import world_of_process
from ckpt.session.connected import ConnectedSession, KeeperFailover
from ckpt.session.decisions import Decisions
from ckpt.session.keeper.attachment import (
    KEEPER_VARIABLE,
    KeeperAttachment,
    job_name,
    keeper_spec,
    set_supervised_from_environment,
    supervised_trainer,
)
from ckpt.session.keeper.connection import KeeperLink
from ckpt.session.log import SessionLineage, SessionLog, await_final_flush, parse_opened
from ckpt.session.options import SessionOptions, StoreAddress, only_below
from ckpt.session.restoring import FillRules, RestoreCandidate
from ckpt.session.saving import Pending, Saving
from ckpt.values import SnapshotId, SnapshotInfo

# A trainer as the keeper that judges it hears of it: how far it is, what it dies of, that it is
# done.


class TrainerReporter:
    """Tells ``judge()``; nobody where that is None."""

    def __init__(self, judge: Callable[[], KeeperLink | None]) -> None:
        self._judge = judge

    def report(self, point: str, at_s: float) -> None:
        """This trainer reached a point of its start at ``at_s``, CLOCK_MONOTONIC."""
        if (judge := self._judge()) is not None:
            judge.phase(point, at_s)

    def failing(self, kind: str, text: str, *, fingerprint: str, step: int, final: bool) -> None:
        """This trainer is about to die of an exception."""
        if (judge := self._judge()) is not None:
            with suppress(UnavailableError):  # without a keeper nobody judges it
                judge.failing(kind, text, fingerprint=fingerprint, step=step, final=final)

    def finished(self) -> None:
        """This trainer's run is over and durable; what follows is the rest of the program."""
        if (judge := self._judge()) is not None:
            with suppress(UnavailableError):  # nothing is lost any more
                judge.finished()


# Which sessions of this process write: under one supervisor, one a store, which is one job's
# whatever name it is given.
#
# A second one would open a newer epoch through the same keeper, over the same slots: the first
# would be off the line and go on without knowing it.

_open: weakref.WeakValueDictionary[str, object] = weakref.WeakValueDictionary()


def register_writer(store: str, session: object) -> None:
    """Note that ``session`` writes from now on; again is free. Raises UsageError where another one
    does that isn't closed."""
    other = _open.setdefault(store, session)
    if other is not session:
        raise UsageError(
            "a run or Checkpointer of this process writes to this store already, and a second one "
            "would cut it off. "
            f"store={store}; call run.save(), close the other one first, or give this one another "
            "store"
        )


def unregister_writer(store: str, session: object) -> None:
    """``session`` is closed. Nothing where it never wrote."""
    if _open.get(store) is session:
        del _open[store]


BYE_WAIT_S = 60.0
"""How long rank 0 stays for the other ranks to read its last words: it may own the message
store."""

OPEN_WAIT_S = 600.0

CHOICES_MAX = 5
"""How often a snapshot is chosen anew where a newer one is committed in between: only who was
fenced a moment ago can."""

RNG_ITEM = "rng"
"""The item under which a run's random number generators are stored."""


class Session:
    """Joins, restores, opens the epoch, snapshots. With several ranks every rank makes the same
    calls in the same order."""

    def __init__(self, store: StoreAddress | Backend, options: SessionOptions) -> None:
        self._options = options
        self._owns_backend = isinstance(store, str | tuple)
        self._spec = keeper_spec(store, options)
        self.emit: Emit = emit_to_logging(world_of_process()[0])
        """Where events go."""
        self._backend = (
            store
            if not isinstance(store, str | tuple)
            else open_job_stores(
                (store,) if isinstance(store, str) else store,
                options.storage_options,
                write_quorum=options.write_quorum,
                encryption_key=options.encryption_key,
                emit=lambda event: self.emit(event),  # noqa: PLW0108  it may change
            )
        )
        self._job = options.job or job_name(stores_of(self._backend)[0].url)
        self._log = SessionLog(self._backend, job=self._job, named=options.job)
        self._line = SessionLineage(self._log, options, link=lambda: self._link)
        self.reporter = TrainerReporter(
            lambda: (
                self._joined.attachment.trainer_link
                if self._joined is not None and not self._closed
                else None
            )
        )
        """What the keeper that judges this trainer hears."""
        self._joined: ConnectedSession | None = None
        self._key_fits = not self._owns_backend or options.encryption_key is None
        self._items: dict[str, object] = {}
        self._rng = RngState()
        self._opens, self._closed = 0, False
        self._whole = False  # whether all that was restored is tracked
        self._refers = False  # whether what was restored was also read: only verified chunks may be referred to
        self.epoch = 0
        """The epoch that this session opened; 0 before."""
        self.restored: SnapshotInfo | None = None
        """The snapshot that the session goes on from."""

    @property
    def url(self) -> str:
        """The store's address, without credentials."""
        return self._backend.url

    @property
    def backend(self) -> Backend:
        """The store."""
        return self._backend

    @property
    def mailbox(self) -> CountingMailbox:
        """The other ranks; joins them first."""
        return self.join().channel

    @property
    def decisions(self) -> Decisions:
        """What all ranks do at a boundary; joins first."""
        return self.join().decisions

    @property
    def saving(self) -> Saving:
        """The saving half; joins first."""
        return self.join().saving

    @property
    def opened(self) -> bool:
        """Whether an epoch is open."""
        return self.epoch > 0

    def join(self) -> ConnectedSession:
        """Meet the other ranks; once, then free."""
        if self._closed:
            raise UsageError(f"closed already; make a new one. store={self.url}")
        if self._joined is None:
            keeping = KeeperAttachment.join(self._spec, self._options, self.emit, name=self._job)
            self._joined = ConnectedSession(
                keeping, self._backend, self._options, self.state, self.emit
            )
            self._mending = KeeperFailover(
                self._joined, open_epoch=self._line.open_next, log=self._log
            )
        if not self._key_fits:
            # Only now, so that the keeper can be told why this process ends: starting it again
            # would not help.
            require_key_fits(self._backend, self._options.encryption_key)
            self._key_fits = True
        return self._joined

    @property
    def _link(self) -> KeeperLink | None:
        """The keeper, where this session has one by now."""
        return self._joined.attachment.link if self._joined is not None else None

    @property
    def board(self) -> Board | None:
        """The board that this rank shares with the others of its node, or None without a keeper."""
        return self._joined.attachment.board if self._joined is not None else None

    @property
    def local_rank(self) -> int:
        """This rank among those of its node, on whose board it is. Joined."""
        return self._link.local_rank if self._link is not None else self.mailbox.rank

    @property
    def announce_decision(self) -> Callable[[int, int], object] | None:
        """Tells other nodes what is done at a boundary; None where the job has no others."""
        return self._link.decided if self._link is not None and self._link.spans_nodes else None

    @property
    def supervised(self) -> bool:
        """Whether a supervisor uses the same keeper as this session does: it judges how this
        process ends. Joins nobody."""
        seat = supervised_trainer()
        return seat is not None and self._spec is not None and seat.serves(self._spec)

    @property
    def must_save_restored(self) -> bool:
        """Whether a run that ends where it began saves that once more: perhaps memory alone had it,
        and all of it is here."""
        return self._whole and self.join().restoring.staged

    def on_stop(self, call: Callable[[float], object]) -> None:
        """Have ``call`` told, in another thread, when the job is preempted: in how many seconds it
        must have stopped."""
        if self._link is not None:
            self._link.on_stop(call)

    def join_attempt(self, attempt: int) -> None:
        """A prepared trainer was promoted: it belongs to ``attempt`` from here on. Before the ranks
        meet."""
        if supervised_trainer() is None and self._spec is not None:
            set_supervised_from_environment(self._spec, attempt)

    def attach_keeper(self) -> None:
        """Get a keeper, where this session may have one; before anything is staged. Every rank
        calls it alike.

        Raises UsageError, having touched nothing, where another session of this trainer writes to
        the same store.
        """
        seat = supervised_trainer()
        if (
            seat is not None
            and self._spec is not None
            and seat.spec.store == self._spec.store
            and not self._closed
        ):
            register_writer(self._spec.store, self)
        joined = self.join()
        joined.attachment.start()
        joined.use_slots()

    def await_previous_run(self) -> None:
        """Before the store is read: wait, for a bounded time, until what the last run left with its
        keeper is durable."""
        if (
            self._spec is not None
            and self._link is None
            and os.environ.get(KEEPER_VARIABLE, "") != "off"
        ):
            await_final_flush(self._spec, self.emit, has=self._log.has)

    def state(self) -> LogState:
        """The log's fold, fresh from the store. Raises NotFoundError where there is no store
        yet."""
        return self._log.state()

    def newest_first(self) -> Sequence[RestoreCandidate]:
        """The snapshots on the line, best first, staged ones too; none where there is no store
        yet."""
        return self._line.newest_first()

    def open_run(self) -> None:
        """For a run: choose the newest snapshot and open an epoch that goes on from it; once, then
        free."""
        if self.opened:
            return
        self.attach_keeper()
        self._open_on_newest()
        self.join().start_decisions()  # every rank's must be there to answer the others'

    def _open_on_newest(self) -> None:
        """Go on from the newest snapshot; from a newer one where somebody commits it in between. On
        all ranks alike."""
        for left in reversed(range(CHOICES_MAX)):
            self.choose_newest()
            try:
                self.open_epoch(newest=True)
                return
            except NewerSnapshotError as error:
                if not left:
                    raise
                self.emit(Event("chosen-anew", str(error)))

    def choose_newest(self) -> None:
        """Choose the newest snapshot whose records can be read; its bytes are not read yet."""
        restoring = self.join().restoring
        self.restored = None
        if restoring.choose(self.newest_first) is not None:
            self.restored = restoring.fill({}, FillRules())

    def open_epoch(self, *, newest: bool = False) -> None:
        """Open the next epoch as the continuation of what was restored; rank 0 writes the record,
        all learn the number.

        ``newest``: that was taken for the newest; all raise NewerSnapshotError where it is that no
        more.
        """
        joined = self.join()
        joined.saving.drain()  # what is in flight belongs to the epoch before, which the record below closes
        self._opens += 1
        key = f"epoch/{self._opens}"
        resume = self.restored.id if self.restored is not None else None
        if joined.channel.rank == 0:
            self._mending.reattach()
            joined.channel.post(key, self._line.open_for_ranks(resume, newest=newest).encode())
        word = wait_for_message(
            joined.channel, key, timeout_s=OPEN_WAIT_S, awaited="rank 0 to open the epoch"
        ).decode()
        epoch, origin = parse_opened(word)
        self._mending.follow_rank0(alone=not origin)
        self.epoch = epoch
        base = resume if self._refers else None
        joined.emit(Event("epoch", f"epoch {epoch} is open", {"epoch": epoch}))
        if joined.attachment.link is not None:
            if base is not None:
                joined.attachment.link.known(base, dict(joined.restoring.verified))
            staged = resume if joined.restoring.staged else None
            joined.saving.write_through_keeper(
                joined.attachment.persister(epoch, resume=staged), origin=origin
            )
            return
        place = self._log.place(epoch, rank=joined.channel.rank)
        joined.saving.write_locally(
            place, base=base, known_chunks=lambda: dict(joined.restoring.verified)
        )

    def track(self, items: Mapping[str, object]) -> None:
        """Add items to a run's state, filling them from its snapshot. Falls back for all items
        together."""
        for name in items:
            if name in self._items or name == RNG_ITEM:
                raise UsageError(
                    f"an item of that name is tracked already. name={name}; choose another name"
                )
        if self.restored is not None:
            self._fill(
                items, FillRules(only_below(self._options.only, items), self._options.missing)
            )
        self._items.update(items)
        self.saving.prepare({**self._items, RNG_ITEM: self._rng})

    def begin(self) -> None:
        """Before a run's first step: put the random number generators where its snapshot had them.

        Tells what the snapshot has and nobody tracked: it would be gone from the next snapshot on.
        Raises UsageError where ``only`` names what is not tracked.
        """
        if self.restored is None:
            return
        if self._options.only is None or RNG_ITEM in self._options.only:
            self._fill({RNG_ITEM: self._rng}, FillRules(None, "keep"))
        if not self.join().restoring.staged:
            self.saving.refer_to(self.restored.id, dict(self.join().restoring.verified))
        tracked = {escape(name) for name in self._items} | {RNG_ITEM}
        unknown = [
            path
            for path in self._options.only or ()
            if path.strip("/").split("/")[0] not in tracked
        ]
        if unknown:
            raise UsageError(
                f"only names what is not tracked. only={unknown} tracked={sorted(tracked)}; "
                "correct it"
            )
        lost = sorted(set(item_names(self.join().restoring.index())) - tracked)
        self._whole = not lost and self._options.only is None
        self.join().restoring.close()
        if lost:
            text = f"the restored snapshot has items that nobody tracks, later ones will lack them: {', '.join(lost)}"
            self.emit(Event("untracked", text, {"items": ",".join(lost)}, alarm=True))

    def restore(
        self,
        items: Mapping[str, object],
        choices: Callable[[], Sequence[RestoreCandidate]],
        rules: FillRules,
    ) -> SnapshotInfo:
        """For a checkpointer: fill ``items`` from the first readable of ``choices``. Later saves go
        on from it."""
        self.saving.hold_gc()
        restoring = self.join().restoring

        def settled() -> Sequence[RestoreCandidate]:
            self.await_previous_run()
            return choices()

        if restoring.choose(settled) is None:
            raise NotFoundError(f"the store holds no snapshot yet. store={self.url}")
        self.restored = restoring.fill(items, rules)
        restoring.close()
        if self.restored.maybe_stale:
            text = f"restored {self.restored.id}, but a newer one may exist: the log has a hole. store={self.url}"
            self.emit(Event("maybe-stale", text, {"step": self.restored.step}, alarm=True))
        self._refers = not restoring.staged
        self.epoch = 0  # the next save opens an epoch that goes on from here
        return self.restored

    def snapshot(
        self, step: int, *, metadata: Mapping[str, Fact], tags: tuple[str, ...], wait_s: float
    ) -> Pending:
        """Stage a run's tracked items now, waiting ``wait_s`` seconds at most for a slot; durable
        later."""
        self._mend(step)
        items = {**self._items, RNG_ITEM: self._rng}
        return self.saving.snapshot(
            items, SnapshotId(self.epoch, step), metadata=metadata, tags=tags, wait_s=wait_s
        )

    def stage(self, step: int, *, metadata: Mapping[str, Fact]) -> bool:
        """Stage a run's tracked items for memory alone; False where no slot is free."""
        items = {**self._items, RNG_ITEM: self._rng}
        return self.saving.stage(items, SnapshotId(self.epoch, step), metadata=metadata)

    def await_durable(self, timeout_s: float) -> None:
        """Wait until the last snapshot is durable, as long as there is time; failures were told."""
        self.saving.wait_idle(timeout_s)

    def refuse(self, step: int, reason: str) -> None:
        """Instead of ``snapshot``: this rank can't take it, which all ranks learn."""
        self._mend(step)
        self.saving.refuse(SnapshotId(self.epoch, step), UsageError(reason))

    def save(
        self,
        items: Mapping[str, object],
        step: int,
        *,
        metadata: Mapping[str, Fact],
        tags: tuple[str, ...],
    ) -> Pending:
        """For a checkpointer: stage ``items`` now; durable later. Opens an epoch first where none
        is open."""
        if not items:
            raise UsageError("nothing to save; give a dict of names to objects")
        if not self.opened:
            self.attach_keeper()
            if self.restored is None:
                self._open_on_newest()
            else:
                self.open_epoch()
        self._mend(step)
        return self.saving.snapshot(
            items, SnapshotId(self.epoch, step), metadata=metadata, tags=tags
        )

    def tag_last(self, tags: Sequence[str]) -> None:
        """Tag the last snapshot once it is durable."""
        info = self.saving.last_info()
        if info is None and self.restored is not None:
            info = self.restored
        if info is None or self.mailbox.rank != 0:
            return
        for tag in tags:
            if self._link is not None:
                self._link.set_tag(tag, info.id)
            else:
                self._log.tag(tag, info.id, epoch=self.epoch)

    def finish(self, *, run: bool = True) -> None:
        """End well: everything durable, all ranks done. Raises what kept the last snapshot from
        being durable.

        ``run``: this was the trainer's run, so that the keeper learns that its work is done.
        """
        if self._joined is None:
            self._close_store()
            return
        try:
            self._joined.saving.finish()
            if run:
                self.reporter.finished()
        finally:
            self._part(wait_s=BYE_WAIT_S)

    def abandon(self) -> None:
        """End after an exception: what is staged gets a bounded time to become durable."""
        if self._joined is not None and not self._closed:
            self._joined.saving.abandon()
            self._part(wait_s=0.0)
        elif not self._closed:
            self._close_store()

    def _part(self, *, wait_s: float) -> None:
        """Leave: rank 0 last, because it may own the message store."""
        assert self._joined is not None, "joined"
        try:
            self._joined.leave(wait_s=wait_s)
        finally:
            self._close_store()

    def _close_store(self) -> None:
        self._closed = True
        if self._spec is not None:
            unregister_writer(self._spec.store, self)
        if self._owns_backend:
            self._backend.close()

    def _fill(self, items: Mapping[str, object], rules: FillRules) -> None:
        before = self.restored
        self.restored = self.join().restoring.fill(items, rules)
        if self.opened and before is not None and self.restored.id != before.id:
            self.open_epoch()  # the line goes on from the older snapshot that was readable

    def _mend(self, step: int) -> None:
        """Before a snapshot: where its keeper is lost, go on with the next one. Notes that the
        snapshot is handed in."""
        if self._mending.needed:
            base = self.restored.id if self.restored is not None else None
            self.epoch = self._mending.fail_over(step, epoch=self.epoch, base=base) or self.epoch
        self._mending.record_submitted(step)
