"""Whether and how a session has a keeper, the daemon that holds its slots and makes its snapshots
durable.

A trainer under a supervisor always has one, and its ranks exchange messages through it. Any other
process (in place) has one if all ranks are on this node and another process can open the store; its
ranks exchange messages as they would without a keeper, and rank 0 names the launch.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from ckpt.backends.base import Backend
from ckpt.backends.open import address_of
from ckpt.errors import CkptError, UnavailableError, UsageError
from ckpt.events import Emit, Event
from ckpt.format.index import SnapshotIndex
from ckpt.ipc.board import Board
from ckpt.ipc.client import KeeperSpec
from ckpt.ipc.cluster_spec import local_rank_count, nodes_from_environment
from ckpt.ipc.mailbox import CountingMailbox, wait_for_message
from ckpt.ipc.messages import WIRE_VERSION, Hello, Policy
from ckpt.session.c10d_mailbox import connect_ranks
from ckpt.session.keeper.connection import KeeperBusyError, KeeperLink, LinkMailbox
from ckpt.session.keeper.persister import KeeperPersister
from ckpt.session.keeper.slots import SharedSlots, open_staged
from ckpt.session.options import SessionOptions, StorageOptions, StoreAddress
from ckpt.session.peer_memory import open_from_nodes
from ckpt.staging.slot import Slot
from ckpt.values import SnapshotId

BUSY_WAIT_S = 600.0
"""How long a new launch waits for a keeper that still uploads what the last launch left."""
BUSY_POLL_S = 0.25

LAUNCH_WAIT_S = BUSY_WAIT_S + 300.0
"""How long the other ranks wait for rank 0 to name the launch: longer than rank 0 waits for a busy
keeper.
"""

LAUNCH_VARIABLE = "CKPT_LAUNCH"
"""Names the launch to a supervisor's trainers, including spawned ones."""

KEEPER_VARIABLE = "CKPT_KEEPER"
"""Set to ``off``: no keeper; the training process makes its snapshots durable itself."""

SLOTS_SHARED_MAX = SharedSlots.slots_max // 2
"""With more slots, a process keeps them to itself: a pool that grows needs numbers for the new
slots beside the old ones.
"""

_OWN_MEMORY = ("memory://", "memory:")


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedTrainer:
    """This process as a trainer under a supervisor: its launch, attempt and rank, and its
    keeper.
    """

    launch: str
    attempt: int
    rank: int
    ranks: int
    spec: KeeperSpec

    def serves(self, spec: KeeperSpec) -> bool:
        """Whether the trainer's keeper is the keeper of ``spec``."""
        return (self.spec.store, self.spec.job) == (spec.store, spec.job)


_trainer: SupervisedTrainer | None = None
_sessions = 0


def set_supervised_trainer(trainer: SupervisedTrainer) -> None:
    """Make this process a supervised trainer. Called once, when it begins."""
    global _trainer  # noqa: PLW0603  a process has one rank
    _trainer = trainer


def set_supervised_from_environment(spec: KeeperSpec, attempt: int) -> None:
    """Make this process the trainer that its environment describes: launch, rank and number of
    ranks are variables.
    """
    rank = int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))
    set_supervised_trainer(
        SupervisedTrainer(
            launch=os.environ[LAUNCH_VARIABLE],
            attempt=attempt,
            rank=rank,
            ranks=local_rank_count() or 1,
            spec=spec,
        )
    )


def supervised_trainer() -> SupervisedTrainer | None:
    """This process as a supervised trainer, or None."""
    return _trainer


def keeper_spec(store: StoreAddress | Backend, options: SessionOptions) -> KeeperSpec | None:
    """What a keeper must know of the store, or None if no keeper can serve it: only this process
    can open it.

    Opens nothing. The job is named by the user, else by the last part of the address.
    """
    stores = (store,) if isinstance(store, str) else store
    if (
        not isinstance(stores, tuple)
        or any(address.startswith(_OWN_MEMORY) for address in stores)
        or sys.platform != "linux"
    ):
        return None
    first, *others = (address_of(address) for address in stores)
    spec = KeeperSpec(
        job=options.job or job_name(first),
        store=first,
        others=tuple(others),
        write_quorum=options.write_quorum,
        storage_options=_plain(options.storage_options),
        encryption_key=options.encryption_key,
        compression=options.compression,
        scrub_every_s=options.scrub_every_s,
        nodes=nodes_from_environment(),
    )
    try:
        spec.encode()
    except UsageError:  # the options hold objects of this process
        return None
    return spec


def _plain(
    options: StorageOptions,
) -> Mapping[str, object] | list[Mapping[str, object] | None] | None:
    """The options as they are after a round trip through JSON, which ``KeeperSpec.encode`` compares
    with.
    """
    if options is None or isinstance(options, Mapping):
        return dict(options) if options is not None else None
    return [dict(entry) if entry is not None else None for entry in options]


def job_name(address: str) -> str:
    """The name of a job that its user did not name: the last part of its store's address."""
    return address.rstrip("/").rpartition("/")[2] or "job"


def may_use_keeper(size: int, slots: int) -> bool:
    """Whether a process in place may use a keeper: all ranks on this node, few enough slots, not
    switched off.
    """
    fits = SharedSlots.slots_min <= slots <= SLOTS_SHARED_MAX
    return (
        fits
        and os.environ.get(KEEPER_VARIABLE, "") != "off"
        and (size == 1 or local_rank_count() == size)
    )


class KeeperAttachment:
    """One session's keeper, if it has one, and the mailbox of its ranks. Every rank makes the same
    calls in the same order.

    ``trainer_link`` is the connection of a supervised trainer: its ranks use it as their mailbox
    even if they only read.
    """

    def __init__(
        self,
        mailbox: CountingMailbox,
        trainer_link: KeeperLink | None,
        *,
        spec: KeeperSpec | None,
        slots: int,
        emit: Emit,
    ) -> None:
        self.mailbox = mailbox
        self.link: KeeperLink | None = None
        """The keeper that this session writes through; None before ``start``."""
        self.supervised = trainer_link is not None
        """Whether a supervisor restarts this process after a failure."""
        self.trainer_link = trainer_link
        """The connection of a supervised trainer, to the keeper that decides about its failures."""
        self.board: Board | None = None
        self.regions: SharedSlots | None = None
        self._spec = spec
        self._slots = slots
        self._emit = emit
        self._asked = False

    @classmethod
    def join(
        cls, spec: KeeperSpec | None, options: SessionOptions, emit: Emit, *, name: str
    ) -> KeeperAttachment:
        """Join the other ranks: through the keeper if a supervisor uses the same one, else by a
        handshake over torch's store.
        """
        trainer = supervised_trainer()
        if trainer is None or spec is None or not trainer.serves(spec):
            return cls(
                connect_ranks(name=name), None, spec=spec, slots=options.slots_max, emit=emit
            )
        global _sessions  # noqa: PLW0603  a mailbox outlives sessions: each session of a trainer has its own keys
        _sessions += 1
        link = KeeperLink.connect(
            trainer.spec,
            _hello(trainer.launch, trainer.rank, trainer.ranks, trainer.attempt),
            start=False,
        )
        return cls(
            LinkMailbox(link, f"{_sessions}/"), link, spec=spec, slots=options.slots_max, emit=emit
        )

    def start(self) -> None:
        """Attach to a keeper to write through, if this session may have one and has none yet."""
        if self.link is not None or self._asked or self._spec is None:
            return
        if self.trainer_link is not None:
            _check_stores(self._spec)
            self._use(self.trainer_link)
            return
        if not may_use_keeper(self.mailbox.size, self._slots):
            return
        self._asked = True
        link = connect_in_place(self._spec, self.mailbox, emit=self._emit)
        if link is not None:
            self._use(link)

    def reconnect(self, slots: Sequence[Slot]) -> None:
        """Replace a lost keeper by the next one, and give it the board and ``slots``. Only in
        place. Nothing if the keeper is not lost.
        """
        assert self.link is not None and self.regions is not None and self.board is not None, (
            "there was a keeper"
        )
        if self.link.lost is None:
            return
        before = self.link.welcome.boot
        self.link.reconnect(self.board)
        # The same keeper has the slots already, and may be uploading one: only the connection
        # broke.
        if self.link.welcome.boot != before:
            self.regions.hand_over_all(slots)

    def detach(self, slots: Sequence[Slot]) -> None:
        """Give up on keepers: from now on ``slots`` belong to this process alone, which makes its
        snapshots durable itself.
        """
        assert self.link is not None and self.regions is not None, "there was a keeper"
        link, self.link = self.link, None
        link.close()
        self.regions.detach_keeper(slots)

    def persister(self, epoch: int, *, resume: SnapshotId | None = None) -> KeeperPersister:
        """The persister for snapshots of ``epoch``. ``resume``: the staged snapshot that the epoch
        continues from, or None.
        """
        assert self.link is not None and self.regions is not None, "there is a keeper"
        self.regions.epoch = epoch
        self.regions.resume = resume
        return KeeperPersister(
            self.link, self.regions, emit=self._emit, survives=not self.supervised
        )

    def go_on_in(self, epoch: int) -> None:
        """Another keeper has replaced a lost one: snapshots are captured in ``epoch`` from now
        on.
        """
        assert self.regions is not None, "there is a keeper"
        self.regions.epoch = epoch
        self.regions.resume = None

    def open_staged(
        self, snapshot: SnapshotId
    ) -> AbstractContextManager[tuple[SnapshotIndex, Backend]]:
        """Open a staged snapshot to restore from: of this node's ranks, or of all nodes'."""
        assert self.link is not None and self._spec is not None, (
            "only a keeper names staged snapshots"
        )
        if self._spec.nodes is not None:
            return open_from_nodes(self.link, snapshot, nodes=self._spec.nodes, job=self._spec.job)
        return open_staged(self.link, snapshot, ranks=self.mailbox.size, job=self._spec.job)

    def close(self) -> None:
        """Leave the keeper as planned."""
        for link in (self.link, self.trainer_link):
            if link is not None:
                link.close()
        if self.regions is not None:
            self.regions.close()
        if self.board is not None:
            self.board.close()

    def _use(self, link: KeeperLink) -> None:
        self.link = link
        link.on_alarm(lambda text: self._emit(Event("keeper-alarm", text, alarm=True)))
        self.board = link.board()
        self.regions = SharedSlots(link, self.board, link.local_rank)


def _check_stores(spec: KeeperSpec) -> None:
    """Raise UsageError if a session of a supervised trainer would write elsewhere than it says."""
    trainer = supervised_trainer()
    if trainer is not None and trainer.spec.stores_digest() != spec.stores_digest():
        raise UsageError(
            "this session names other stores, another write quorum or another encryption key than "
            f"the run of this program, whose keeper writes for both. session={list(spec.stores)} "
            f"run={list(trainer.spec.stores)}; pass the same to both, or another job name"
        )


def connect_in_place(
    spec: KeeperSpec, mailbox: CountingMailbox, *, emit: Emit
) -> KeeperLink | None:
    """A link for a process without supervisor, or None on all ranks if there can be no keeper,
    which raises an alarm.

    All ranks call it, once a session. Rank 0 goes first and names the launch, unless it is a
    supervised trainer with another keeper. Raises ConflictError if another launch of the job is
    alive on this node.
    """
    trainer = supervised_trainer()
    attempt = trainer.attempt if trainer is not None else 0
    key = "launch"
    if mailbox.rank == 0:
        launch = trainer.launch if trainer is not None else f"{os.getpid()}-{secrets.token_hex(8)}"
        try:
            link = _connect_when_idle(spec, _hello(launch, 0, mailbox.size, attempt), emit)
        except UnavailableError as error:
            text = f"there is no keeper, so snapshots depend on this process alone: {error}"
            emit(Event("no-keeper", text, alarm=True))
            mailbox.post(key, b"")
            return None
        except CkptError:
            mailbox.post(key, b"")
            raise
        mailbox.post(key, launch.encode())
        return link
    launch = wait_for_message(
        mailbox, key, timeout_s=LAUNCH_WAIT_S, awaited="rank 0 to name the launch"
    ).decode()
    return (
        KeeperLink.connect(spec, _hello(launch, mailbox.rank, mailbox.size, attempt), start=False)
        if launch
        else None
    )


def _connect_when_idle(spec: KeeperSpec, hello: Hello, emit: Emit) -> KeeperLink:
    """Connect to the job's keeper as soon as it accepts a new launch. Raises UnavailableError after
    BUSY_WAIT_S.
    """
    until_s = time.monotonic() + BUSY_WAIT_S
    reported = False
    while True:
        try:
            return KeeperLink.connect(spec, hello)
        except KeeperBusyError as error:
            if time.monotonic() > until_s:
                raise
            if not reported:
                reported = True
                emit(
                    Event(
                        "keeper-busy",
                        f"waiting for the keeper of the last run, at most {BUSY_WAIT_S:.0f} s: "
                        f"{error}",
                    )
                )
        time.sleep(BUSY_POLL_S)


def _hello(launch: str, rank: int, ranks: int, attempt: int) -> Hello:
    return Hello(
        version=WIRE_VERSION,
        role="trainer",
        pid=os.getpid(),
        launch=launch,
        rank=rank,
        ranks=ranks,
        attempt=attempt,
        policy=Policy(),
    )
