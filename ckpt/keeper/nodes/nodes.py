"""This keeper among those of the job's other nodes, for its loop: epochs, the room of rank 0's
node, how far all are.

``Node`` (in ``fleet``) has threads and speaks with the membership; all that it tells comes here
through ``Job.post``. On the node of rank 0 this has the rooms, and others ask it; elsewhere it
asks. What becomes durable and what memory holds are the matter of ``uploads`` and ``memory``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from importlib import import_module

from ckpt.cluster.membership.leases import LeaseState
from ckpt.cluster.membership.records import StateInventory
from ckpt.cluster.mesh import messages as said
from ckpt.cluster.mesh.messages import MeshMessage
from ckpt.cluster.node.epochs import NodeEpoch, NodeObserver
from ckpt.cluster.node.node import Node
from ckpt.cluster.secret import job_secret
from ckpt.errors import CkptError
from ckpt.events import Event
from ckpt.ipc.board import Board
from ckpt.ipc.cluster_spec import NodesSpec, host_towards
from ckpt.ipc.messages import RankPlacement, StartPrepared
from ckpt.keeper.attempts.events import EpochChanged, Failure, JobEnded, Rank0Unreachable
from ckpt.keeper.attempts.failures import with_global_rank
from ckpt.keeper.job import Job
from ckpt.keeper.mailbox import KeeperMailbox, LocalMailbox
from ckpt.keeper.mirrors.memory import ClusterMemory
from ckpt.keeper.nodes.join import KeeperFacts, check_spec, join
from ckpt.keeper.nodes.progress import LivenessExchange, ProgressExchange, Standbys
from ckpt.keeper.nodes.remote_mailbox import RemoteMailbox, RemoteMailboxes, attempt_mailbox
from ckpt.keeper.nodes.uploads import ClusterUploads
from ckpt.threads import start_thread

LOOK_S = 1.0
"""How often the clock is looked at where nothing is due."""


class Nodes:
    """See the module. ``on`` takes what the roster has to know; in the loop, as all calls here are.

    Raises UsageError where the specification can't work.
    """

    def __init__(
        self,
        job: Job,
        spec: NodesSpec,
        *,
        on: Callable[[EpochChanged | JobEnded | Rank0Unreachable], object],
    ) -> None:
        check_spec(spec)
        self._job = job
        self._spec = spec
        self._on = on
        self._node: Node | None = None
        self.epoch: NodeEpoch | None = None
        """See Among."""
        self._rooms = RemoteMailboxes(self.say)
        self._roll = LivenessExchange(self, ttl_s=spec.ttl_s)
        self._ended_at_s: float | None = None
        self._all_ended = False
        self._leaving: Future[None] | None = None
        self._out = False
        """Whether this node is no member at the moment."""
        self._attempt = 0
        self._ran_ahead = 0
        """The last epoch in which the supervisors here heard that they stand by."""
        host, secret = spec.host or host_towards(spec.where), job_secret(spec)
        self._host, self._secret = host, secret
        self.uploads = ClusterUploads(job, self, seating=lambda: self.seating)
        """What becomes durable together."""
        self.memory = ClusterMemory(job, self, spec, secret, host=host, emit=self._tell)
        """What all hold together."""
        self._progress = ProgressExchange(job, self, self.memory)
        self.standbys = Standbys(self, self.memory, holds=self._holds)
        """What those have that hold no ranks."""

    # ---- the roster's

    def ask(self, failure: Failure | None, completed: int, attempt: int) -> None:
        """This node is ready for the next epoch; ``failure``: why the last one ended here."""
        self._attempt = max(self._attempt, attempt)
        if self._node is None:
            # It takes long to import, and the first attempt here needs it: the others shall not
            # wait for that.
            import_module("ckpt.keeper.uploads.uploads")
            try:
                self._node = self._join()
            except (CkptError, OSError) as error:
                self._post(partial(self._fail, f"this node can't meet the job's others: {error}"))
                return
        if failure is not None:
            first = self._ranks_here().start if self.placed else 0
            told = with_global_rank(failure, first)
            self._node.report_failure(
                said.NodeFailed(
                    attempt=attempt,
                    rank=told.rank,
                    kind=told.kind,
                    text=told.text,
                    status=told.status,
                    fingerprint=told.fingerprint,
                    step=told.step,
                    final=told.final,
                    completed=completed,
                )
            )

    def begin(self, attempt: int, own: LocalMailbox) -> KeeperMailbox:
        """An attempt begins; its room: ``own`` on the node of rank 0."""
        self.uploads.begin(attempt)
        assert self.epoch is not None, "an epoch with ranks here"
        if (
            not self.root
            and self._node is not None
            and not self._node.is_connected(self.epoch.record.rank0_node)
        ):
            self._post(
                lambda: self._cut("it broke before the attempt began")
            )  # once the roster knows that it runs
        return self.room(attempt_mailbox(attempt), own)

    def ended(self, attempt: int) -> None:
        """All ranks of this node ended well: it stays for the others."""
        self._ended_at_s = time.monotonic()
        if self._node is not None:
            self._node.report_ended(attempt)

    @property
    def busy(self) -> bool:
        """Whether this node is still needed though its own ranks have ended: the others may not
        have."""
        if self._ended_at_s is None or self._all_ended:
            return False
        return time.monotonic() - self._ended_at_s < self._job.policy.linger_s

    # ---- what everybody asks

    @property
    def me(self) -> str:
        """See Among. Of the newest epoch, though this node may have joined anew since."""
        if self.epoch is not None:
            return self.epoch.me
        return self._node.node_id if self._node is not None else ""

    @property
    def placed(self) -> bool:
        """Whether the newest epoch has ranks for this node."""
        return self.epoch is not None and not self._out and self.me in self.epoch.record.ranks

    @property
    def root(self) -> bool:
        """See Among."""
        return self.epoch is not None and self.epoch.record.rank0_node == self.me

    @property
    def others(self) -> tuple[str, ...]:
        """See Among."""
        return (
            tuple(node for node in self.epoch.record.ranks if node != self.me)
            if self.epoch is not None
            else ()
        )

    @property
    def seating(self) -> RankPlacement | None:
        """Where this node's ranks are in the newest epoch; None where it has none."""
        epoch = self.epoch
        if epoch is None or epoch.meeting is None or not self.placed:
            return None
        nodes = list(epoch.record.ranks)
        return RankPlacement(
            host=epoch.meeting.host,
            first_rank=self._ranks_here().start,
            world_size=epoch.record.world_size,
            node=nodes.index(self.me),
            nodes=len(nodes),
        )

    @property
    def port(self) -> int:
        """Where the trainers of the newest epoch meet."""
        assert self.epoch is not None and self.epoch.meeting is not None, "an epoch with ranks here"
        return self.epoch.meeting.port

    @property
    def refused(self) -> dict[str, int]:
        """What was turned away, by kind: see Report."""
        lines = self._node.refused if self._node is not None else 0
        return {**self.memory.refused, **({"line": lines} if lines else {})}

    def room(self, name: str, own: LocalMailbox) -> KeeperMailbox:
        """See Among."""
        assert self.epoch is not None, "an epoch with ranks here"
        if self.root:
            self._rooms.serve(name, own)
            return own
        return RemoteMailbox(self._rooms, name, self.epoch.record.rank0_node)

    def say(self, node: str, word: MeshMessage) -> bool:
        """See Among."""
        return self._node is not None and self._node.send(node, word)

    def say_to_all(self, word: MeshMessage) -> None:
        """See Among."""
        for node in self.others:
            self.say(node, word)

    def decided(self, boundary: int, flags: int) -> None:
        """Rank 0 decided what all ranks do at a boundary."""
        if self._job.board is not None:
            self.say_to_all(
                said.MeshDecided(attempt=self._job.board.attempt, boundary=boundary, flags=flags)
            )

    def tick(self, now_s: float) -> float:
        """Tell how far this node is, and until when it may act; returns seconds until the next
        look."""
        board, node = self._job.board, self._node
        if board is None or node is None:
            return LOOK_S
        self._tell_time(board, node)
        wait_s = min(LOOK_S, self.memory.tick(now_s, placed=self.placed))
        self.standbys.tick(now_s)
        if not self.placed or not (self.others or (self.epoch is not None and self.epoch.standbys)):
            return wait_s
        self._roll.tick(now_s)
        return max(0.0, min(self._progress.tick(now_s), wait_s))

    def _tell_time(self, board: Board, node: Node) -> None:
        """Until when this node may act, where its supervisors see it, whatever becomes of this
        process.

        While its lease may have run out unheard of, because nothing answers there, all nodes'
        answers do as well.
        """
        standing = node.lease_status
        until_s = standing.act_until_s
        if standing.state is not LeaseState.LOST and self.placed:
            until_s = max(until_s, self._roll.until_s())
        board.extend_act_until(int(until_s * 1e9))

    def _acts(self, until_s: float) -> None:
        """Its lease was prolonged. In the lease's own thread: a loop that stands still, for a disk
        say, costs no trainer."""
        if (board := self._job.board) is not None:
            board.extend_act_until(int(until_s * 1e9))

    def leave(self) -> None:
        """Leave the membership, beside the loop: nothing of this launch follows here.

        Where the job ended everywhere the membership is over already, and lines stay for what is on
        its way to a store.
        """
        if not self._all_ended:
            self._hang_up()

    def close(self) -> None:
        """Leave the membership and lend no more; waits until that is done."""
        self._hang_up()
        if self._leaving is not None:
            self._leaving.result()
        self.memory.close()

    def _hang_up(self) -> None:
        if self._node is not None:
            node, self._node = self._node, None
            self._leaving = start_thread(node.close, name="ckpt-node-leave")

    # ---- what comes from the node's threads, in the loop

    def _came(self, epoch: NodeEpoch) -> None:
        before, self.epoch = self.epoch, epoch
        self._out = False
        self._attempt = max(self._attempt, epoch.number)
        if epoch.note.end is not None:
            self._all_ended = True
            self._on(JobEnded(epoch.note.end, epoch.note.why, time.monotonic()))
            return
        self._progress.begin()
        self.memory.see_epoch(epoch)
        self.standbys.see()
        self._rooms.new_epoch(epoch.number, era=epoch.note.era)
        self.uploads.see_epoch(epoch, before, placed=self.placed)
        if self._job.board is not None:
            self._job.board.has_remote_ranks = self.placed and bool(self.others)
            if (
                self._node is not None
            ):  # before anything starts: what is there may be from an earlier membership
                self._tell_time(self._job.board, self._node)
        self._on(EpochChanged(epoch.number, self.placed, epoch.note.why, time.monotonic()))
        self._stand_by()

    def _stand_by(self) -> None:
        """Where this node holds no rank: once an epoch, for a trainer that ran ahead in vain shall
        not do so over and over."""
        epoch = self.epoch
        if (
            epoch is not None
            and not self.placed
            and not self._out
            and self._ran_ahead < epoch.number
        ):
            self._ran_ahead = epoch.number
            self._job.say("supervisor", StartPrepared())

    def _see_members(self, epoch: NodeEpoch) -> None:
        """Other standbys came to an epoch, or this one did: nothing begins or ends by that."""
        before = self.epoch
        if before is not None and before.number > epoch.number:
            return
        self.epoch = epoch
        if before is None or before.me != epoch.me:
            self._out = False  # it joined anew
        if before is None or (before.number, before.me) != (epoch.number, epoch.me):
            self.memory.see_epoch(epoch)
            self.standbys.see()
        self.memory.see_members(epoch)
        self._stand_by()

    def _lost(self, why: str) -> None:
        self._out = True
        number = self.epoch.number + 1 if self.epoch is not None else 1
        self._job.emit(
            Event(
                "out",
                f"this node is out of its job's membership, and joins anew: {why}",
                alarm=True,
            )
        )
        self._on(EpochChanged(number, False, why, time.monotonic()))

    def _fail(self, text: str) -> None:
        self._on(JobEnded(1, text, time.monotonic()))

    def _up(self, node: str) -> None:
        self.uploads.connected(node)

    def _down(self, node: str, why: str) -> None:
        """Without the node of rank 0 the ranks here can't agree on anything, and what they said may
        be lost."""
        self.memory.disconnected(node)
        epoch = self.epoch
        if epoch is None or not self.placed or self.root or node != epoch.record.rank0_node:
            return
        self._cut(why)

    def _cut(self, why: str) -> None:
        epoch = self.epoch
        assert epoch is not None, "an epoch"
        text = f"the line to the node of rank 0 is broken: {why}"
        self._on(Rank0Unreachable(epoch.number, text, time.monotonic(), self._job.completed()))

    def _word(self, node: str, word: MeshMessage) -> None:
        board = self._job.board
        match word:
            case (
                said.MeshPost()
                | said.MeshPeek()
                | said.MeshCount()
                | said.MeshForget()
                | said.MeshReply()
            ):
                self._rooms.take(node, word)
            case said.NodeProgress() if self.standbys.take(node, word):
                pass
            case said.NodeProgress():
                self._progress.take(node, word)
            case said.LivenessCall() | said.LivenessAnswer():
                if self.placed:
                    self._roll.take(node, word)
            case said.NodeSubmissions() | said.MeshEpochOpened():
                self.uploads.take(node, word)
            case said.AskNodeInventory() | said.NodeInventory() | said.MeshSources():
                self.memory.take(node, word)
            case said.MeshDecided():
                if board is not None and self.epoch is not None and word.attempt == board.attempt:
                    board.decide(word.boundary, word.flags)

    # ---- small parts

    def _holds(self, holdings: StateInventory) -> None:
        if self._node is not None:
            self._node.put_inventory(holdings)

    def _ranks_here(self) -> range:
        assert self.epoch is not None, "an epoch"
        return self.epoch.record.ranks[self.me]

    def _post(self, call: Callable[[], object]) -> None:
        """Have it done by the loop, unless this launch has left meanwhile: the next one must hear
        nothing of it."""
        self._job.post(lambda: call() if self._leaving is None else None)

    def _tell(self, event: Event) -> None:
        self._job.post(lambda: self._job.emit(event))

    def _join(self) -> Node:
        job, post = self._job, self._post
        told = NodeObserver(
            on_epoch=lambda epoch: post(lambda: self._came(epoch)),
            on_standbys=lambda epoch: post(lambda: self._see_members(epoch)),
            on_membership_lost=lambda why: post(lambda: self._lost(why)),
            on_message=lambda node, word: post(lambda: self._word(node, word)),
            on_connected=lambda node: post(lambda: self._up(node)),
            on_disconnected=lambda node, why: post(lambda: self._down(node, why)),
            on_act_until=self._acts,
        )
        return join(
            self._spec,
            self._secret,
            host=self._host,
            ranks=job.ranks,
            peer_port=self.memory.port,
            here=KeeperFacts(lambda: job.policy, lambda: self._attempt, job.completed),
            told=told,
            emit=self._tell,
        )
