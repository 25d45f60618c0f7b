"""What the parts of a keeper share of its job: its clients, its ranks' memory, the launch, the
uploads.

Each of these is one object that changes only through its own methods; ``JobState`` holds them
together. The parts (supervisors, trainer calls, nodes) import this module, and ``Job`` imports the
parts.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from ckpt.errors import UnavailableError
from ckpt.events import Emit
from ckpt.ipc.client import KeeperSpec
from ckpt.ipc.messages import DropSlot, Fenced, Hello, Outcome, Policy, RemoteError, Welcome
from ckpt.keeper.cluster_view import ClusterView, SingleNode
from ckpt.keeper.connection import AlarmRelay, ClientConnection, Clients
from ckpt.keeper.slots import PostToLoop, RankMemory
from ckpt.values import SnapshotId, SnapshotInfo

if TYPE_CHECKING:  # imported when uploads are first needed
    from ckpt.keeper.uploads.uploads import Uploads


class Launch:
    """One start of the program on this node: its id, what it asked for, and its cluster side."""

    def __init__(self, cluster: ClusterView) -> None:
        self.id = ""
        self.policy = Policy()
        self.capture_rule = ""
        self.cluster = cluster
        """``SingleNode`` until a launch with other nodes enters a cluster; replaced with each such
        launch."""
        self.cut_off = False
        """Whether a trainer that has no supervisor was lost."""

    def begin(self, hello: Hello) -> None:
        """Make the launch of ``hello`` the current one."""
        self.id = hello.launch
        self.policy = hello.policy or self.policy
        self.capture_rule = hello.capture_rule
        self.cut_off = False

    def enter_cluster(self, make: Callable[[], ClusterView]) -> None:
        """Leave the cluster of an earlier launch, then enter the one that ``make`` returns."""
        self.cluster.close()
        self.cluster = make()

    def trainer_lost(self) -> None:
        """A trainer that has no supervisor ended unplanned."""
        self.cut_off = True


class JobUploads:
    """The uploads of this node's ranks. They are made when first needed: their import takes longer
    than a hello may."""

    def __init__(
        self,
        spec: KeeperSpec,
        *,
        memory: RankMemory,
        launch: Launch,
        clients: Clients,
        post: PostToLoop,
        emit: Emit,
    ) -> None:
        self._spec = spec
        self._memory = memory
        self._launch = launch
        self._clients = clients
        self._post = post
        self._emit = emit
        self.current: Uploads | None = None
        """None while nothing needed uploads since the number of ranks changed."""
        self.on_superseded: Callable[[str], object] = lambda text: None
        """Called if a later membership epoch of this job writes the log: this node's attempt is
        over. Set by the cluster side of a launch."""
        self.fenced = ""
        """Why this launch may write no more to the log; "" while it may."""
        self._flushing: SnapshotId | None = None
        """The snapshot that the last ``flush_newest`` of this launch asked for."""

    def need(self) -> Uploads:
        """The uploads of these ranks, made if there are none."""
        if self.current is None:
            made: type[Uploads] = import_module("ckpt.keeper.uploads.uploads").Uploads
            self.current = made(
                self._spec,
                ranks=self._memory.ranks,
                post=self._post,
                on_outcome=self._outcome,
                on_fenced_text=self._fenced,
                emit=self._emit,
            )
            self.current.on_superseded = self._superseded
            # Before anything is submitted: persisters look the channels up when they start.
            shared = self._launch.cluster.uploads
            self.current.use_channels(shared.channel_of if shared is not None else None)
            self.slots_came()
        return self.current

    def slots_came(self) -> None:
        """Slots may have come that hold what was handed in to an earlier keeper."""
        slots, ranks = self._memory.slots, self._memory.ranks
        if self.current is not None and slots is not None and slots.handed_in_marks():
            self.current.slots_came(lambda: slots.handed_in(ranks), slots.hold_snapshot)

    @property
    def idle(self) -> bool:
        """Whether no upload, no record and no question to a store is left."""
        shared = self._launch.cluster.uploads
        if shared is not None and shared.settling:
            return False
        return self.current is None or self.current.idle

    @property
    def newest_staged(self) -> SnapshotId | None:
        """The newest snapshot that all of this node's ranks hold."""
        slots, shared = self._memory.slots, self._launch.cluster.uploads
        if shared is not None:
            return next(iter(shared.staged()), None)
        complete = slots.complete_snapshots(self._memory.ranks) if slots is not None else []
        return complete[0] if complete else None

    @property
    def newest_durable(self) -> SnapshotId | None:
        """The last snapshot that became durable here."""
        durable = self.current.durable if self.current is not None else None
        return durable.id if durable is not None else None

    def is_durable(self, snapshot: SnapshotId) -> bool:
        """Whether the log, as it was last read, has it or a later one of its epoch."""
        return self.current is not None and self.current.is_durable(snapshot)

    def new_launch(self) -> None:
        """Another launch begins: what an earlier one was refused says nothing about it.

        Its first epoch may continue from one that another writer opened in the meantime, so the
        uploads also forget what they knew of the log.
        """
        self.fenced = ""
        self._flushing = None
        if self.current is not None:
            self.current.new_launch()

    def new_generation(self, *, rank0_here: bool) -> None:
        """Other nodes hold the ranks from now on: the log may have another writer, and this keeper
        may become it."""
        self.fenced = ""
        if self.current is not None:
            self.current.new_generation(root=rank0_here)

    def end_term(self) -> None:
        """This node is no member any more: it opens no epoch of the log before it has ranks
        again."""
        if self.current is not None:
            self.current.end_term()

    def attempt_ended(self) -> None:
        """No trainer of the attempt is left: submit for each rank what other ranks submitted."""
        if self.current is not None and self._memory.slots is not None:
            self.current.attempt_ended(self._memory.slots.hold_snapshot)

    def flush_newest(self) -> None:
        """Nothing trains for now: make the newest complete snapshot, which only memory holds,
        durable."""
        slots = self._memory.slots
        if slots is None:
            return
        if (shared := self._launch.cluster.uploads) is not None:
            shared.settle()
            return
        snapshots = slots.complete_snapshots(self._memory.ranks)
        if snapshots:
            self._flushing = snapshots[0]
            self.need().flush_newest(snapshots, slots.hold_snapshot)

    def check_flushed(self) -> None:
        """Raise UnavailableError while a staged snapshot may still become durable; one that cannot
        is not waited for."""
        slots = self._memory.slots
        if slots is None:
            return
        newest = next(iter(slots.complete_snapshots(self._memory.ranks)), None)
        durable = (
            self.current.durable.id
            if self.current is not None and self.current.durable is not None
            else None
        )
        if (
            newest is not None
            and newest != self._flushing
            and (durable is None or newest > durable)
        ):
            self.flush_newest()
        if self.idle:
            return
        what = f"step {newest.step}" if newest is not None else "the last snapshot"
        raise UnavailableError(
            f"{what} is still being uploaded; wait. job={self._spec.job!r} "
            f"store={self._spec.store} ranks={self._memory.ranks}"
        )

    def discard(self) -> None:
        """The number of ranks changes: what the old ranks had in flight is given up."""
        if self.current is not None:
            self.current.close(0.0)
        self.current = None

    def close(self) -> None:
        """End the uploads; a store that is writing has a second."""
        if self.current is not None:
            self.current.close(1.0)

    def _outcome(
        self, rank: int, snapshot: SnapshotId, info: SnapshotInfo | None, error: RemoteError | None
    ) -> None:
        self._clients.broadcast(
            "events", Outcome(snapshot=snapshot, info=info, error=error), rank=rank
        )

    def _superseded(self, text: str) -> None:
        self.on_superseded(text)

    def _fenced(self, text: str) -> None:
        self.fenced = text
        self._clients.broadcast("events", Fenced(text=text))


@dataclass(frozen=True, slots=True)
class JobState:
    """One job of a keeper, for the keeper's loop alone. ``post`` brings a call of another thread to
    the loop."""

    spec: KeeperSpec
    incarnation: str
    post: PostToLoop
    emit: AlarmRelay
    clients: Clients
    memory: RankMemory
    launch: Launch
    uploads: JobUploads

    @classmethod
    def create(
        cls, spec: KeeperSpec, *, incarnation: str, post: PostToLoop, emit: Emit
    ) -> JobState:
        """The state of a job that nothing has joined yet."""
        clients = Clients()
        relay = AlarmRelay(emit, clients, post)

        def dropped(rank: int, index: int) -> None:
            clients.broadcast("supervisor", DropSlot(rank=rank, index=index))

        memory = RankMemory(post, dropped=dropped)
        launch = Launch(SingleNode(memory))
        uploads = JobUploads(
            spec, memory=memory, launch=launch, clients=clients, post=post, emit=relay
        )
        return cls(spec, incarnation, post, relay, clients, memory, launch, uploads)

    def welcome(self, client: ClientConnection, hello: Hello, *, attempt: int, new: bool) -> None:
        """Answer the hello of a supervisor or trainer."""
        placement = self.launch.cluster.placement
        client.send(
            Welcome(
                id=hello.id,
                boot=self.incarnation,
                pid=os.getpid(),
                attempt=attempt,
                new=new,
                seating=placement,
            )
        )
