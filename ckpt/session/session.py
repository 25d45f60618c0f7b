"""One process's use of one store in one attempt: connect the ranks, restore, open the epoch,
snapshot.

``Checkpointer`` and ``Run`` are its two faces. Everything here is called by the training thread.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import torch.distributed as dist

from ckpt.backends.base import Backend
from ckpt.backends.checked import stores_of
from ckpt.backends.replicated.open import open_job_stores, require_key_fits
from ckpt.capture.leaves import escape
from ckpt.capture.streams import RngState
from ckpt.errors import NotFoundError, UnavailableError, UsageError
from ckpt.events import Emit, Event, Fact, emit_to_logging
from ckpt.ipc.board import Board
from ckpt.ipc.mailbox import CountingMailbox
from ckpt.ipc.messages import Decided, Failing, SetTag
from ckpt.log.state import LogState
from ckpt.rate_limit import AlarmLimiter
from ckpt.restore.reader import item_names
from ckpt.session.c10d_mailbox import world_of_process
from ckpt.session.connected import BYE_WAIT_S, ConnectedSession, SessionEpochs
from ckpt.session.decisions import Decisions, check_capture_rule
from ckpt.session.keeper.attachment import (
    KEEPER_VARIABLE,
    KeeperAttachment,
    job_name,
    keeper_spec,
    set_supervised_from_environment,
    supervised_trainer,
)
from ckpt.session.keeper.connection import KeeperLink
from ckpt.session.log import SessionLineage, SessionLog, await_final_flush
from ckpt.session.options import SessionOptions, StoreAddress, only_below
from ckpt.session.restoring import FillRules, RestoreCandidate
from ckpt.session.saving import Pending, Saving
from ckpt.session.staging import CopyTime
from ckpt.values import SnapshotId, SnapshotInfo

RNG_ITEM = "rng"
"""The item under which a run's random number generators are stored."""


class TrainerReporter:
    """Reports this trainer's progress and end to its keeper, which decides about its failures.

    ``link`` gives the keeper's connection; nothing is reported while it gives None.
    """

    def __init__(self, link: Callable[[], KeeperLink | None]) -> None:
        self._link = link

    def report(self, point: str, at_s: float) -> None:
        """This trainer reached a milestone of its start at ``at_s``, CLOCK_MONOTONIC."""
        if (link := self._link()) is not None:
            link.phase(point, at_s)

    def failing(self, failing: Failing) -> None:
        """This trainer is about to end with an exception."""
        if (link := self._link()) is not None:
            with suppress(UnavailableError):  # a lost keeper decides nothing
                link.failing(failing)

    def finished(self) -> None:
        """This trainer's run is over and durable; what follows is the rest of the program."""
        if (link := self._link()) is not None:
            with suppress(UnavailableError):  # everything is durable already
                link.finished()


# ---- writers: the sessions of this process that write, one for each store. A second one would open
# a newer epoch through the same keeper, over the same slots: the snapshots of the first would be
# off the lineage without its knowing.

_writers: weakref.WeakValueDictionary[str, object] = weakref.WeakValueDictionary()


def register_writer(store: str, session: object) -> None:
    """Make ``session`` the writer to ``store``; may be repeated. Raises UsageError if another one
    is.
    """
    writer = _writers.setdefault(store, session)
    if writer is not session:
        raise UsageError(
            "a run or Checkpointer of this process writes to this store already, and a second one "
            "would cut it off. "
            f"store={store}; call run.save(), close the other one first, or give this one another "
            "store"
        )


def unregister_writer(store: str, session: object) -> None:
    """``session`` is closed. Nothing if it is not the writer."""
    if _writers.get(store) is session:
        del _writers[store]


class Session:
    """One process's use of one store. With several ranks every rank makes the same calls in the
    same order.

    It is larger than other classes because both faces, ``Run`` and ``Checkpointer``, use it: what
    it knows of epochs is in ``SessionEpochs``, of connected ranks in ``ConnectedSession``.
    """

    def __init__(self, store: StoreAddress | Backend, options: SessionOptions) -> None:
        self._options = options
        self._owns_backend = isinstance(store, str | tuple)
        self._spec = keeper_spec(store, options)
        self.emit: Emit = AlarmLimiter(emit_to_logging(world_of_process()[0]))
        """Receives the session's events. May be replaced before the ranks are connected."""
        self._backend = (
            store
            if not isinstance(store, str | tuple)
            else open_job_stores(
                (store,) if isinstance(store, str) else store,
                options.storage_options,
                write_quorum=options.write_quorum,
                encryption_key=options.encryption_key,
                emit=lambda event: self.emit(event),  # noqa: PLW0108  it may be replaced
            )
        )
        self._job = options.job or job_name(stores_of(self._backend)[0].url)
        self._log = SessionLog(self._backend, job=self._job, named=options.job)
        self._lineage = SessionLineage(self._log, options, link=lambda: self._link)
        self.reporter = TrainerReporter(self._trainer_link)
        """Reports this trainer's progress and end to its keeper."""
        self._connected: ConnectedSession | None = None
        self._epochs: SessionEpochs | None = None
        self._key_fits = not self._owns_backend or options.encryption_key is None
        self._items: dict[str, object] = {}
        self._rng = RngState()
        self._all_tracked = False  # whether a run tracks all that it restored
        self._closed = False

    @property
    def url(self) -> str:
        """The store's address, without credentials."""
        return self._backend.url

    @property
    def backend(self) -> Backend:
        """The store."""
        return self._backend

    @property
    def epoch(self) -> int:
        """The epoch that this session opened; 0 before."""
        return self._epochs.epoch if self._epochs is not None else 0

    @property
    def restored(self) -> SnapshotInfo | None:
        """The snapshot that the session continues from."""
        return self._epochs.restored if self._epochs is not None else None

    @property
    def mailbox(self) -> CountingMailbox:
        """Messages between the ranks; connects them first."""
        return self.join().mailbox

    @property
    def decisions(self) -> Decisions:
        """What all ranks decide together at a boundary; connects them first."""
        return self.join().decisions

    @property
    def saving(self) -> Saving:
        """The saving half; connects the ranks first."""
        return self.join().saving

    @property
    def opened(self) -> bool:
        """Whether an epoch is open."""
        return self.epoch > 0

    def join(self) -> ConnectedSession:
        """Connect the ranks, once."""
        if self._closed:
            raise UsageError(f"closed already; make a new one. store={self.url}")
        if self._connected is None:
            attachment = KeeperAttachment.join(self._spec, self._options, self.emit, name=self._job)
            self._connected = ConnectedSession(
                attachment, self._backend, self._options, self.state, self.emit
            )
            self._epochs = SessionEpochs(self._connected, self._lineage, self._log)
        if not self._key_fits:
            # Only after the ranks are connected, so that the keeper learns why this process ends:
            # another start would end in the same way.
            require_key_fits(self._backend, self._options.encryption_key)
            self._key_fits = True
        return self._connected

    def _joined_epochs(self) -> SessionEpochs:
        self.join()
        assert self._epochs is not None, "joined"
        return self._epochs

    @property
    def _link(self) -> KeeperLink | None:
        """The keeper that this session writes through, or None."""
        return self._connected.attachment.link if self._connected is not None else None

    def _trainer_link(self) -> KeeperLink | None:
        """The connection of a supervised trainer, while the session is in use."""
        if self._connected is None or self._closed:
            return None
        return self._connected.attachment.trainer_link

    @property
    def board(self) -> Board | None:
        """The board that this rank shares with the others of its node, or None without a keeper."""
        return self._connected.attachment.board if self._connected is not None else None

    @property
    def local_rank(self) -> int:
        """This rank among those of its node, as on the board. Only after the ranks are
        connected.
        """
        return self._link.local_rank if self._link is not None else self.mailbox.rank

    @property
    def announce_decision(self) -> Callable[[int, int], object] | None:
        """Shows rank 0's decision about a boundary on the boards of other nodes; None if there are
        none.

        The other nodes learn it a moment later. Without a keeper they do not.
        """
        link = self._link
        if link is None or not link.spans_nodes:
            return None

        def announce(boundary: int, flags: int) -> None:
            with suppress(UnavailableError):  # the loop notices a lost keeper by itself
                link.send(Decided(boundary=boundary, flags=flags))

        return announce

    @property
    def supervised(self) -> bool:
        """Whether this session's keeper also has a supervisor of this process. Connects nothing."""
        trainer = supervised_trainer()
        return trainer is not None and self._spec is not None and trainer.serves(self._spec)

    @property
    def must_save_restored(self) -> bool:
        """Whether a run that ends at the step where it began must save it: it may be in memory
        only.

        Only if the run tracks all that it restored, or the new snapshot would lack something.
        """
        return self._all_tracked and self.join().restoring.staged

    def on_stop(self, call: Callable[[float], object]) -> None:
        """Call ``call`` in another thread when the job is preempted, with the seconds left."""
        if self._link is not None:
            self._link.on_stop(call)

    def join_attempt(self, attempt: int) -> None:
        """A prepared trainer was promoted: from here on it belongs to ``attempt``. Before the ranks
        connect.
        """
        if supervised_trainer() is None and self._spec is not None:
            set_supervised_from_environment(self._spec, attempt)

    def attach_keeper(self) -> None:
        """Attach to a keeper, if this session may have one. Before anything is staged, on every
        rank.

        Raises UsageError, with no effect, if another session of this trainer writes to the same
        store.
        """
        trainer = supervised_trainer()
        if (
            trainer is not None
            and self._spec is not None
            and trainer.spec.store == self._spec.store
            and not self._closed
        ):
            register_writer(self._spec.store, self)
        connected = self.join()
        connected.attachment.start()
        connected.use_slots()

    def await_previous_run(self) -> None:
        """Before the store is read: wait, for a bounded time, until the last run's keeper has made
        durable what it holds.
        """
        if (
            self._spec is not None
            and self._link is None
            and os.environ.get(KEEPER_VARIABLE, "") != "off"
        ):
            await_final_flush(self._spec, self.emit, has=self._log.has)

    def state(self) -> LogState:
        """The log's fold, fresh from the store. Raises NotFoundError if there is no store yet."""
        return self._log.state()

    def newest_first(self) -> Sequence[RestoreCandidate]:
        """The snapshots of the lineage, best first, with staged ones; empty if there is no store
        yet.
        """
        return self._lineage.newest_first()

    def open_run(self, capture_rule: str = "") -> None:
        """For a run: choose the newest snapshot and open an epoch that continues from it. Once.

        ``capture_rule``: see ``check_capture_rule``. Raises UsageError if it is not that of rank 0,
        or if the process group has other ranks than those that the run began with.
        """
        self._check_world()
        if self.opened:
            return
        self.attach_keeper()
        check_capture_rule(self.mailbox, capture_rule)
        if self.board is not None and self.supervised:
            # Of an earlier call of this attempt: its steps are not this one's.
            self.board.rank(self.local_rank).completed = None
        self._joined_epochs().open_on_newest(self.newest_first)
        self.join().start_decisions()  # on every rank, or a proposal would miss answers

    def _check_world(self) -> None:
        """Ranks that were started after this one connected to the others are no part of the run: it
        would go on alone, and they would wait for it.
        """
        if self._connected is None or not (dist.is_available() and dist.is_initialized()):
            return
        mailbox = self._connected.mailbox
        group = (dist.get_rank(), dist.get_world_size())
        if group != (mailbox.rank, mailbox.size):
            raise UsageError(
                "the process group has other ranks than this run began with. "
                f"rank={mailbox.rank} ranks={mailbox.size} group_rank={group[0]} "
                f"group_ranks={group[1]}; a framework that starts ranks inside the function can't "
                f"be followed: start it with torchrun --nproc-per-node={group[1]}, and let the "
                "framework use the ranks that are there"
            )

    def track(self, items: Mapping[str, object]) -> None:
        """Add items to a run's state and fill them from its snapshot. Falls back for all items
        together.
        """
        for name in items:
            if name in self._items or name == RNG_ITEM:
                raise UsageError(
                    f"an item of that name is tracked already. name={name}; choose another name"
                )
        if self.restored is not None:
            only = only_below(self._options.only, items)
            self._joined_epochs().fill(
                items, FillRules(only, self._options.missing, self._options.classes)
            )
        self._items.update(items)
        self.saving.prepare(self._state())

    def begin(self) -> None:
        """Before a run's first step: restore the random number generators.

        Reports what the snapshot has and the run does not track: the next snapshot will lack it.
        Raises UsageError if ``only`` names what is not tracked.
        """
        if self.restored is None:
            return
        restoring = self.join().restoring
        if self._options.only is None or RNG_ITEM in self._options.only:
            self._joined_epochs().fill({RNG_ITEM: self._rng}, FillRules(None, "keep"))
        if not restoring.staged:
            self.saving.refer_to(self.restored.id, dict(restoring.verified))
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
        untracked = sorted(set(item_names(restoring.index())) - tracked)
        self._all_tracked = not untracked and self._options.only is None
        restoring.close()
        if untracked:
            text = (
                "the restored snapshot has items that are not tracked, later ones will lack them: "
                f"{', '.join(untracked)}"
            )
            self.emit(Event("untracked", text, {"items": ",".join(untracked)}, alarm=True))

    def restore(
        self,
        items: Mapping[str, object],
        choices: Callable[[], Sequence[RestoreCandidate]],
        rules: FillRules,
    ) -> SnapshotInfo:
        """For a checkpointer: fill ``items`` from the first readable of ``choices``. Later saves go
        on from it.
        """
        self.saving.hold_gc()
        restoring = self.join().restoring

        def choose_after_flush() -> Sequence[RestoreCandidate]:
            self.await_previous_run()
            return choices()

        if restoring.choose(choose_after_flush) is None:
            raise NotFoundError(f"the store holds no snapshot yet. store={self.url}")
        restored = restoring.fill(items, rules)
        restoring.close()
        if restored.maybe_stale:
            text = (
                f"restored {restored.id}, but a newer one may exist: the log has a hole. "
                f"store={self.url}"
            )
            self.emit(Event("maybe-stale", text, {"step": restored.step}, alarm=True))
        self._joined_epochs().go_on_from(restored, verified=not restoring.staged)
        return restored

    def snapshot(
        self, step: int, *, metadata: Mapping[str, Fact], tags: tuple[str, ...], wait_s: float
    ) -> Pending:
        """Stage a run's items now, waiting ``wait_s`` seconds at most for a slot; durable later."""
        self._joined_epochs().before_snapshot(step)
        return self.saving.snapshot(
            self._state(),
            SnapshotId(self.epoch, step),
            metadata=metadata,
            tags=tags,
            wait_s=wait_s,
        )

    def stage(self, step: int, *, metadata: Mapping[str, Fact]) -> CopyTime | None:
        """Stage a run's items for memory alone; None if no slot is free."""
        return self.saving.stage(self._state(), SnapshotId(self.epoch, step), metadata=metadata)

    def await_durable(self, timeout_s: float) -> None:
        """Wait, ``timeout_s`` seconds at most, until the last snapshot is durable or has failed."""
        self.saving.wait_idle(timeout_s)

    def is_durable(self, step: int) -> bool:
        """Whether the snapshot of ``step`` is known to be durable."""
        info = self.saving.durable
        return info is not None and info.step >= step

    def refuse(self, step: int, reason: str) -> None:
        """Instead of ``snapshot``: this rank can't take it, and all ranks learn why."""
        self._joined_epochs().before_snapshot(step)
        self.saving.refuse(SnapshotId(self.epoch, step), UsageError(reason))

    def save(
        self,
        items: Mapping[str, object],
        step: int,
        *,
        metadata: Mapping[str, Fact],
        tags: tuple[str, ...],
    ) -> Pending:
        """For a checkpointer: stage ``items`` now; durable later. Opens an epoch first if none is
        open.
        """
        if not items:
            raise UsageError("nothing to save; give a dict of names to objects")
        if not self.opened:
            self.attach_keeper()
            if self.restored is None:
                self._joined_epochs().open_on_newest(self.newest_first)
            else:
                self._joined_epochs().open()
        self._joined_epochs().before_snapshot(step)
        return self.saving.snapshot(
            items, SnapshotId(self.epoch, step), metadata=metadata, tags=tags
        )

    def tag_last(self, tags: Sequence[str]) -> None:
        """Tag the last snapshot once it is durable; waits for that."""
        info = self.saving.last_info()
        if info is None and self.restored is not None:
            info = self.restored
        if info is None or self.mailbox.rank != 0:
            return
        for tag in tags:
            if self._link is not None:
                self._link.call(SetTag(name=tag, snapshot=info.id))
            else:
                self._log.tag(tag, info.id, epoch=self.epoch)

    def retry_last(self, retry_s: float, *, stop: threading.Event) -> None:
        """The run is over: while the store does not take its last snapshot, try again for about
        ``retry_s`` seconds, or until ``stop`` is set. Every rank calls it alike.
        """
        if self._connected is not None:
            self._connected.saving.retry_last(retry_s, stop=stop, committed=self._log.committed)

    def finish(self, *, run: bool = True) -> None:
        """End well: everything durable, all ranks done. Raises what kept the last snapshot from
        being durable.

        ``run``: this was the trainer's run, and its keeper learns that the work is done.
        """
        if self._connected is None:
            self._close_store()
            return
        try:
            self._connected.saving.finish()
            if run:
                self.reporter.finished()
        finally:
            self._leave(wait_s=BYE_WAIT_S)

    def abandon(self) -> None:
        """End after an exception: what is staged gets a bounded time to become durable."""
        if self._connected is not None and not self._closed:
            self._connected.saving.abandon()
            self._leave(wait_s=0.0)
        elif not self._closed:
            self._close_store()

    def _leave(self, *, wait_s: float) -> None:
        assert self._connected is not None, "joined"
        try:
            self._connected.leave(wait_s=wait_s)
        finally:
            self._close_store()

    def _close_store(self) -> None:
        self._closed = True
        if self._spec is not None:
            unregister_writer(self._spec.store, self)
        if self._owns_backend:
            self._backend.close()

    def _state(self) -> dict[str, object]:
        """A run's items and its random number generators."""
        return {**self._items, RNG_ITEM: self._rng}
