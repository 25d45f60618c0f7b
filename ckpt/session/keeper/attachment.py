"""Whether and how a session has a keeper: the daemon that holds its slots and makes its snapshots
durable.

A trainer under a supervisor has one always, and its ranks speak through it. Any other process has
one where all ranks are on this node and the store can be opened by another process; its ranks speak
as before, and rank 0 names the launch.
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
from ckpt.session.keeper.connection import KeeperBusyError, KeeperLink
from ckpt.session.keeper.persister import KeeperPersister
from ckpt.session.keeper.slots import SharedSlots, open_staged
from ckpt.session.options import SessionOptions, StorageOptions, StoreAddress
from ckpt.session.peer_memory import open_from_nodes
from ckpt.staging.slot import Slot
from ckpt.values import SnapshotId

BUSY_WAIT_S = 600.0
"""How long a new launch waits for a keeper that still brings to the store what the last one
left."""
BUSY_POLL_S = 0.25

LAUNCH_WAIT_S = BUSY_WAIT_S + 300.0

LAUNCH_VARIABLE = "CKPT_LAUNCH"
"""Names the launch to a supervisor's trainers, spawned ones too."""

KEEPER_VARIABLE = "CKPT_KEEPER"
"""Set to ``off``: no keepers; snapshots are made durable by the training process itself."""

SLOTS_SHARED_MAX = SharedSlots.slots_max // 2
"""More slots than this are this process's alone: a pool that grows needs numbers for the new ones
beside the old."""

_OWN_MEMORY = ("memory://", "memory:")


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedTrainer:
    """This process is a trainer under a supervisor: of which launch, attempt and rank, and whose
    keeper has it."""

    launch: str
    attempt: int
    rank: int
    ranks: int
    spec: KeeperSpec

    def serves(self, spec: KeeperSpec) -> bool:
        """Whether that keeper is the one of ``spec``."""
        return (self.spec.store, self.spec.job) == (spec.store, spec.job)


_seat: SupervisedTrainer | None = None
_sessions = 0


def set_supervised_trainer(seat: SupervisedTrainer) -> None:
    """Make this process a trainer. Called once, right after it began."""
    global _seat  # noqa: PLW0603  a process has one seat, as it has one rank
    _seat = seat


def set_supervised_from_environment(spec: KeeperSpec, attempt: int) -> None:
    """Take the seat that the supervisor's environment describes: launch, rank and ranks are
    there."""
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
    """The seat, or None."""
    return _seat


def keeper_spec(store: StoreAddress | Backend, options: SessionOptions) -> KeeperSpec | None:
    """What a keeper would have to know, or None where none can serve: the store or its options live
    in this process alone.

    Opens nothing. ``job`` is the user's name or the address's last part.
    """
    stores = (store,) if isinstance(store, str) else store
    if (
        not isinstance(stores, tuple)
        or any(one.startswith(_OWN_MEMORY) for one in stores)
        or sys.platform != "linux"
    ):
        return None
    first, *others = (address_of(one) for one in stores)
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
    except UsageError:  # a session object, say: it can't be handed on
        return None
    return spec


def _plain(
    options: StorageOptions,
) -> Mapping[str, object] | list[Mapping[str, object] | None] | None:
    """The same as JSON brings it back."""
    if options is None or isinstance(options, Mapping):
        return dict(options) if options is not None else None
    return [dict(one) if one is not None else None for one in options]


def job_name(address: str) -> str:
    """The name of a job that its user gave none: the last part of its store's address."""
    return address.rstrip("/").rpartition("/")[2] or "job"


def may_use_keeper(size: int, slots: int) -> bool:
    """Whether this process may use a keeper: all ranks on this node, slots to share, and nobody
    said no."""
    fits = SharedSlots.slots_min <= slots <= SLOTS_SHARED_MAX
    return (
        fits
        and os.environ.get(KEEPER_VARIABLE, "") != "off"
        and (size == 1 or local_rank_count() == size)
    )


class KeeperAttachment:
    """One session's keeper, or that it has none, and how its ranks speak. Every rank makes the same
    calls in the same order.

    ``seat`` is the connection of a trainer under a supervisor: its ranks speak through it even
    where they only read.
    """

    def __init__(
        self,
        channel: CountingMailbox,
        trainer_link: KeeperLink | None,
        *,
        spec: KeeperSpec | None,
        slots: int,
        emit: Emit,
    ) -> None:
        self.channel = channel
        self.link: KeeperLink | None = None
        """The keeper that this session writes through, from ``start`` on."""
        self.supervised = trainer_link is not None
        """Whether a supervisor starts this process anew where it dies."""
        self.trainer_link = trainer_link
        """The connection of a trainer under a supervisor, whose keeper judges it."""
        self.board: Board | None = None
        self.regions: SharedSlots | None = None
        self._spec = spec
        self._slots = slots
        self._tell = emit
        self._settled = False

    @classmethod
    def join(
        cls, spec: KeeperSpec | None, options: SessionOptions, emit: Emit, *, name: str
    ) -> KeeperAttachment:
        """Meet the other ranks: through the keeper where a supervisor uses the same one, else as
        ``connect`` does."""
        seat = supervised_trainer()
        if seat is None or spec is None or not seat.serves(spec):
            return cls(connect_ranks(name=name), None, spec=spec, slots=options.slots, emit=emit)
        global _sessions  # noqa: PLW0603  rooms outlive sessions: each session of a trainer has its own corner
        _sessions += 1
        link = KeeperLink.connect(
            seat.spec, _hello(seat.launch, seat.rank, seat.ranks, seat.attempt), start=False
        )
        return cls(
            PrefixedMailbox(link, f"{_sessions}/"), link, spec=spec, slots=options.slots, emit=emit
        )

    def start(self) -> None:
        """Get a keeper to write through, where this session may have one and has none yet."""
        if self.link is not None or self._settled or self._spec is None:
            return
        if self.trainer_link is not None:
            self._use(self.trainer_link)
            return
        if not may_use_keeper(self.channel.size, self._slots):
            return
        self._settled = True
        link = connect_in_place(self._spec, self.channel, emit=self._tell)
        if link is not None:
            self._use(link)

    def reconnect(self, slots: Sequence[Slot]) -> None:
        """In the place of a keeper that is gone, use the next one, and hand it the board and
        ``slots``. In place only."""
        assert self.link is not None and self.regions is not None and self.board is not None, (
            "there was a keeper"
        )
        if self.link.lost is None:
            return
        before = self.link.welcome.boot
        self.link.reconnect(self.board)
        if (
            self.link.welcome.boot != before
        ):  # else only the connection broke: it has the slots, and perhaps uses them
            self.regions.hand_over_all(slots)

    def detach(self, slots: Sequence[Slot]) -> None:
        """Do without a keeper for the rest: ``slots`` are this process's alone now, as is what it
        makes durable."""
        assert self.link is not None and self.regions is not None, "there was a keeper"
        link, self.link = self.link, None
        link.close()
        self.regions.detach_keeper(slots)

    def persister(self, epoch: int, *, resume: SnapshotId | None = None) -> KeeperPersister:
        """What makes snapshots of ``epoch`` durable, which goes on from ``resume`` (None: not from
        a staged pair)."""
        assert self.link is not None and self.regions is not None, "there is a keeper"
        self.regions.epoch = epoch
        self.regions.resume = resume
        return KeeperPersister(self.link, self.regions, emit=self._tell)

    def open_staged(
        self, snapshot: SnapshotId
    ) -> AbstractContextManager[tuple[SnapshotIndex, Backend]]:
        """A staged snapshot to restore from: of this node's ranks, or of all nodes'."""
        assert self.link is not None and self._spec is not None, (
            "only a keeper names staged snapshots"
        )
        if self._spec.nodes is not None:
            return open_from_nodes(self.link, snapshot, nodes=self._spec.nodes, job=self._spec.job)
        return open_staged(self.link, snapshot, ranks=self.channel.size, job=self._spec.job)

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
        self.board = link.board()
        self.regions = SharedSlots(link, self.board, link.local_rank)


class PrefixedMailbox:
    """A channel's messages under a prefix. Waits as its channel does."""

    def __init__(self, channel: KeeperLink, prefix: str) -> None:
        self._channel = channel
        self._prefix = prefix
        self.rank = channel.rank
        self.size = channel.size

    def post(self, key: str, value: bytes) -> None:
        """See ``Channel``."""
        self._channel.post(self._prefix + key, value)

    def peek(self, key: str) -> bytes | None:
        """See ``Channel``."""
        return self._channel.peek(self._prefix + key)

    def wait(self, key: str, timeout_s: float) -> bytes | None:
        """See ``WaitingMailbox``."""
        return self._channel.wait(self._prefix + key, timeout_s)

    def count(self, key: str, amount: int = 0) -> int:
        """See ``Channel``."""
        return self._channel.count(self._prefix + key, amount)

    def forget(self, key: str) -> None:
        """See ``Channel``."""
        self._channel.forget(self._prefix + key)


def connect_in_place(
    spec: KeeperSpec, channel: CountingMailbox, *, emit: Emit
) -> KeeperLink | None:
    """A link for a process without supervisor, or None for all ranks where no keeper can be had;
    that is told as an alarm.

    All ranks call it alike, once a session. Rank 0 names the launch, unless it has a seat at
    another keeper, and goes first. Raises ConflictError where another launch of the job lives on
    this node.
    """
    seat = supervised_trainer()
    attempt = seat.attempt if seat is not None else 0
    key = "launch"
    if channel.rank == 0:
        launch = seat.launch if seat is not None else f"{os.getpid()}-{secrets.token_hex(8)}"
        try:
            link = _when_it_has_settled(spec, _hello(launch, 0, channel.size, attempt), emit)
        except UnavailableError as error:
            text = f"there is no keeper, so snapshots depend on this process alone: {error}"
            emit(Event("no-keeper", text, alarm=True))
            channel.post(key, b"")
            return None
        except CkptError:
            channel.post(key, b"")
            raise
        channel.post(key, launch.encode())
        return link
    launch = wait_for_message(
        channel, key, timeout_s=LAUNCH_WAIT_S, awaited="rank 0 to name the launch"
    ).decode()
    return (
        KeeperLink.connect(spec, _hello(launch, channel.rank, channel.size, attempt), start=False)
        if launch
        else None
    )


def _when_it_has_settled(spec: KeeperSpec, hello: Hello, tell: Emit) -> KeeperLink:
    """A link to the job's keeper, as soon as it takes one. Raises UnavailableError after
    BUSY_WAIT_S."""
    until_s = time.monotonic() + BUSY_WAIT_S
    told = False
    while True:
        try:
            return KeeperLink.connect(spec, hello)
        except KeeperBusyError as error:
            if time.monotonic() > until_s:
                raise
            if not told:
                told = True
                tell(
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
