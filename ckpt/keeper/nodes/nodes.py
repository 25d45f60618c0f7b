"""This keeper's side of a job with several nodes: epochs of the membership, attempts, and messages
of other nodes.

``Node`` (in ``ckpt.cluster.node``) has the threads and talks to the membership; what it reports is
posted to the keeper's loop and handled here. Uploads over several nodes are the matter of
``uploads``, memory of ``mirrors.memory``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from importlib import import_module

from ckpt.cluster.membership.leases import LeaseState
from ckpt.cluster.membership.records import StateInventory
from ckpt.cluster.mesh import messages as mesh
from ckpt.cluster.mesh.messages import MeshMessage
from ckpt.cluster.node.epochs import NodeEpoch, NodeObserver
from ckpt.cluster.node.node import Node
from ckpt.cluster.secret import job_secret
from ckpt.errors import CkptError, UnavailableError, UsageError
from ckpt.events import Event
from ckpt.ipc.board import Board
from ckpt.ipc.cluster_spec import NodesSpec, host_towards
from ckpt.ipc.messages import PrintLine, RankPlacement, Source, Start, StartPrepared
from ckpt.keeper.attempts.events import (
    EpochChanged,
    JobEnded,
    Rank0Unreachable,
    RequestEpoch,
)
from ckpt.keeper.attempts.failures import REFUSED, with_global_rank
from ckpt.keeper.cluster_view import ClusterStatus
from ckpt.keeper.job_state import JobState
from ckpt.keeper.mailbox import KeeperMailbox, LocalMailbox
from ckpt.keeper.mirrors.memory import ClusterMemory
from ckpt.keeper.nodes.epoch_view import EpochView
from ckpt.keeper.nodes.join import check_spec, join
from ckpt.keeper.nodes.progress import LivenessExchange, ProgressExchange, Standbys
from ckpt.keeper.nodes.remote_mailbox import attempt_mailbox
from ckpt.keeper.nodes.uploads import ClusterUploads
from ckpt.threads import start_thread
from ckpt.values import MembershipEpoch, SnapshotId

TICK_S = 0.005
"""How often what is due is looked for, at most, however many messages arrive."""

LOOK_S = 1.0
"""How often the clock is checked if nothing is due."""
TOLD_KINDS = ("line-refused", "node-refused", "nodes-awaited")
TOLD_MAX = 20
"""Lines that a program is told at most, whoever knocks at its ports."""
AWAITED_FIRST_S = 10.0
AWAITED_NEXT_S = 60.0
"""When a program is told for which nodes it waits: first, and again."""


@dataclass(slots=True)
class Awaited:
    """For whom this launch waits now, since when, and when that is told next."""

    text: str = ""
    since_s: float = 0.0
    next_s: float = 0.0


class Nodes:
    """The cluster side of one launch; see ``ClusterView``. ``on`` takes the roster's events. In the
    keeper's loop.

    Raises UsageError if the specification can't work. It has more attributes than usual: one part
    per kind of message (mailboxes, progress, liveness, standbys, uploads, memory), and the
    progress of the launch.
    """

    def __init__(
        self,
        state: JobState,
        spec: NodesSpec,
        *,
        on: Callable[[EpochChanged | JobEnded | Rank0Unreachable], object],
    ) -> None:
        check_spec(spec)
        self._state = state
        self._on = on
        self.view = EpochView()
        host, secret = spec.host or host_towards(spec.where), job_secret(spec)
        self._join = partial(join, spec, secret, host=host)
        self._join_s = spec.join_s
        state.uploads.on_superseded = lambda text: self._post(lambda: self._cut(text))
        self._liveness = LivenessExchange(self.view, ttl_s=spec.ttl_s)
        self.memory = ClusterMemory(state, self.view, spec, secret, host=host, emit=self._emit)
        self.uploads = ClusterUploads(
            state, self.view, on_other_store=self._other_store, fetch=self.memory.fetch
        )
        self._progress = ProgressExchange(state.memory, self.view, self.memory)
        self.standbys = Standbys(self.view, self.memory, put_inventory=self._put_inventory)
        self._attempt = 0
        """The greatest attempt that this node knows of: the next epoch's number must be greater."""
        self._line = ""
        """The line of membership epochs that this node has seen last."""
        self._tick_due_s = 0.0
        self._prepared_in = 0
        """The last epoch in which the supervisors here were told to start the prepared trainers."""
        self._ended_at_s: float | None = None
        self._all_ended = False
        self._leaving: Future[None] | None = None
        self._told = 0
        """How many lines the program was told."""
        self._awaited = Awaited()

    # ---- what the keeper asks

    @property
    def busy(self) -> bool:
        if self._ended_at_s is None or self._all_ended:
            return False
        return time.monotonic() - self._ended_at_s < self._state.launch.policy.linger_s

    @property
    def placement(self) -> RankPlacement | None:
        return self.view.placement

    @property
    def generation(self) -> int:
        return self.view.epoch.note.era if self.view.epoch is not None else 0

    @property
    def epoch_reason(self) -> str:
        return self.view.epoch.note.why if self.view.epoch is not None else ""

    @property
    def resumed_from(self) -> SnapshotId | None:
        return self.uploads.resume

    def request_epoch(self, asked: RequestEpoch, attempt: int) -> None:
        self._attempt = max(self._attempt, attempt)
        if self.view.node is None:
            # It takes long to import, and the first attempt here needs it: the others shall not
            # wait for that.
            import_module("ckpt.keeper.uploads.uploads")
            try:
                self.view.node = self._joined()
            except (CkptError, OSError) as error:
                # Posted, not called: the roster, which asks right now, must not get an event in the
                # middle of a step.
                self._post(partial(self._fail, f"this node can't meet the job's others: {error}"))
                return
        failure = asked.failure
        if failure is not None:
            first = self.view.local_ranks.start if self.view.placed else 0
            failure = with_global_rank(failure, first)
            self.view.node.report_failure(
                mesh.NodeFailed(
                    attempt=attempt,
                    rank=failure.rank,
                    kind=failure.kind,
                    text=failure.text,
                    status=failure.status,
                    fingerprint=failure.fingerprint,
                    step=failure.step,
                    final=failure.final,
                    completed=asked.completed,
                    calls=asked.calls,
                    moved=asked.moved,
                    passing=failure.passing,
                )
            )

    def begin(self, attempt: int, own: LocalMailbox) -> KeeperMailbox:
        self.uploads.begin(attempt)
        view = self.view
        assert view.epoch is not None, "an epoch with ranks here"
        if (
            not view.has_rank0
            and view.node is not None
            and not view.node.is_connected(view.epoch.record.rank0_node)
        ):
            # Posted: the roster knows only after this call that the attempt runs, and would ignore
            # the event.
            self._post(lambda: self._report_unreachable("it broke before the attempt began"))
        return view.mailbox(attempt_mailbox(attempt), own)

    def start_message(self, attempt: int) -> Start:
        epoch = self.view.epoch
        assert epoch is not None and epoch.meeting is not None, "an epoch with ranks here"
        return Start(attempt=attempt, port=epoch.meeting.port, seating=self.view.placement)

    def report_ended(self, attempt: int) -> None:
        self._ended_at_s = time.monotonic()
        if self.view.node is not None:
            self.view.node.report_ended(attempt)

    def decided(self, boundary: int, flags: int) -> None:
        board = self._state.memory.board
        if board is not None:
            self.view.send_to_others(
                mesh.MeshDecided(attempt=board.attempt, boundary=boundary, flags=flags)
            )

    def gather(self, answer: Callable[[Mapping[SnapshotId, str]], object]) -> None:
        def gathered(held: Mapping[SnapshotId, str]) -> None:
            # What nodes hold was made for that log: in another one it would be as if nothing were
            # there.
            self._state.uploads.need().expect_log(self.view.log_id)
            size = self.view.epoch.record.world_size if self.view.epoch is not None else 0
            self.uploads.gathered(
                {pair: held[pair] for pair in held if self.memory.world_size(pair) == size}
            )
            answer(held)

        self.memory.gather(gathered)

    def sources(self, snapshot: SnapshotId) -> tuple[tuple[Source, ...], int]:
        return self.memory.sources(snapshot), self.view.number

    def log_epoch_opened(self, resume: SnapshotId | None) -> None:
        self.uploads.open(resume)

    def status(self) -> ClusterStatus:
        node = self.view.node
        connections = node.refused if node is not None else 0
        refused = {**self.memory.refused, **({"line": connections} if connections else {})}
        return ClusterStatus(self.standbys.report(), self.memory.sent_bytes, refused)

    def tick(self, now_s: float) -> float:
        board, node, view = self._state.memory.board, self.view.node, self.view
        if board is None or node is None:
            return LOOK_S
        if now_s < self._tick_due_s:  # the loop turns for each word that comes
            return self._tick_due_s - now_s
        self._tick_due_s = now_s + TICK_S
        self._extend_act_until(board, node)
        self._check_awaited(node.awaited, now_s)
        wait_s = min(LOOK_S, self.memory.tick(now_s, placed=view.placed))
        self.standbys.tick(now_s)
        self.uploads.tick(now_s)
        if not view.placed or not (view.others or (view.epoch is not None and view.epoch.standbys)):
            return wait_s
        self._liveness.tick(now_s)
        return max(0.0, min(self._progress.tick(now_s), wait_s))

    def leave(self) -> None:
        # Connections stay until the keeper ends: what is in flight to the store needs the others,
        # also if all of them leave. If the job ended everywhere the membership is over already.
        if not self._all_ended and self.view.node is not None:
            self.view.node.depart()

    def close(self) -> None:
        self._disconnect()
        if self._leaving is not None:
            self._leaving.result()
        self.memory.close()

    def _disconnect(self) -> None:
        node, self.view.node = self.view.node, None
        if node is not None:
            self._leaving = start_thread(node.close, name="ckpt-node-leave")

    def _check_awaited(self, text: str, now_s: float) -> None:
        """Name the nodes that are waited for; end a launch that holds no ranks in time."""
        awaited = self._awaited
        if not text or self._all_ended:
            self._awaited = Awaited()
            return
        if not awaited.text:
            awaited = self._awaited = Awaited(text, now_s, now_s + AWAITED_FIRST_S)
        awaited.text = text
        waited_s = now_s - awaited.since_s
        if waited_s >= self._join_s and not self.view.placed:
            text = f"no ranks for this node within {waited_s:.0f} s; it waited for {text}"
            self._awaited = Awaited()
            self._fail(text, UnavailableError.exit_code)
        elif now_s >= awaited.next_s:
            awaited.next_s = now_s + AWAITED_NEXT_S
            text = f"waiting for {waited_s:.0f} s for {text}"
            self._tell(Event("nodes-awaited", text, alarm=True))

    # ---- until when this node may act

    def _extend_act_until(self, board: Board, node: Node) -> None:
        """Publish until when this node may act. Supervisors read it from the board even if this
        process hangs.

        Normally that is the end of the lease. While the membership's server does not answer, the
        answers of all nodes of the epoch prolong it, because they show that no newer epoch has
        begun anywhere.
        """
        status = node.lease_status
        until_s = status.act_until_s
        if status.state is not LeaseState.LOST and self.view.placed:
            until_s = max(until_s, self._liveness.until_s())
        board.extend_act_until(int(until_s * 1e9))

    def _lease_prolonged(self, until_s: float) -> None:
        """In the lease's own thread: so trainers are not stopped if the loop stands still, for a
        disk say."""
        if (board := self._state.memory.board) is not None:
            board.extend_act_until(int(until_s * 1e9))

    # ---- what the node's threads report, in the loop

    def _epoch_opened(self, epoch: NodeEpoch) -> None:
        view, before = self.view, self.view.epoch
        view.epoch, view.out = epoch, False
        self._attempt = max(self._attempt, epoch.number)
        self._line = epoch.note.line or self._line
        if epoch.note.end is not None:
            self._all_ended = True
            note = epoch.note
            self._on(JobEnded(epoch.note.end, note.why, time.monotonic(), note.futile))
            return
        self._progress.begin()
        self.memory.see_epoch(epoch)
        self.standbys.see_epoch()
        view.mailboxes.new_epoch(epoch.number, generation=epoch.note.era)
        self.uploads.see_epoch(epoch, before, placed=view.placed)
        board = self._state.memory.board
        if board is not None:
            board.has_remote_ranks = view.placed and bool(view.others)
            if (
                view.node is not None
            ):  # before any trainer starts: the board's value may be from an earlier membership
                self._extend_act_until(board, view.node)
        self._on(EpochChanged(epoch.number, view.placed, epoch.note.why, time.monotonic()))
        self._start_prepared()

    def _start_prepared(self) -> None:
        """On a standby, start the prepared trainers, once per epoch: a failing one is not started
        in a loop."""
        epoch = self.view.epoch
        if (
            epoch is not None
            and not self.view.placed
            and not self.view.out
            and self._prepared_in < epoch.number
        ):
            self._prepared_in = epoch.number
            self._state.clients.broadcast("supervisor", StartPrepared())

    def _standbys_changed(self, epoch: NodeEpoch) -> None:
        """The epoch has other standbys, or this node became one: no attempt begins or ends by
        that."""
        view, before = self.view, self.view.epoch
        if before is not None and before.number > epoch.number:
            return
        view.epoch = epoch
        if before is None or before.me != epoch.me:
            view.out = False  # it joined anew, under another id
        if before is None or (before.number, before.me) != (epoch.number, epoch.me):
            self.memory.see_epoch(epoch)
            self.standbys.see_epoch()
        self.memory.see_members(epoch)
        self._start_prepared()

    def _membership_lost(self, reason: str) -> None:
        """An epoch without a place for this node ends the attempt; the real next epoch has the same
        number at least."""
        self.view.out = True
        self._state.uploads.end_term()
        number = self.view.epoch.number + 1 if self.view.epoch is not None else 1
        text = f"this node lost its membership in the job, and joins anew: {reason}"
        self._state.emit(Event("out", text, alarm=True))
        self._on(EpochChanged(number, False, reason, time.monotonic()))

    def _fail(self, text: str, status: int = 1, *, futile: bool = False) -> None:
        self._on(JobEnded(status, text, time.monotonic(), futile))

    def _other_store(self, reason: str) -> None:
        """The stores here are not those of rank 0's node. A job that has begun goes on without this
        node; one that has not would have to begin anew, with all nodes."""
        node, epoch = self.view.node, self.view.epoch
        if self._all_ended or node is None:
            return
        if epoch is None or not self.view.placed or epoch.note.completed >= 0:
            self._refused(reason)
            return
        node.report_failure(
            mesh.NodeFailed(
                attempt=epoch.number,
                rank=self.view.local_ranks.start,
                kind=REFUSED,
                text=f"the node {self.view.me} can't take part: {reason}",
                status=UsageError.exit_code,
                final=True,
            )
        )

    def _refused(self, reason: str) -> None:
        """What the nodes were started with can't work: the same again would end the same."""
        self._fail(f"this node can't take part: {reason}", UsageError.exit_code, futile=True)

    def _connected(self, node: str) -> None:
        self.memory.connected(node)
        self.uploads.connected(node)

    def _disconnected(self, node: str, reason: str) -> None:
        self.memory.disconnected(node)
        epoch = self.view.epoch
        if (
            epoch is not None
            and self.view.placed
            and not self.view.has_rank0
            and node == epoch.record.rank0_node
        ):
            self._report_unreachable(reason)

    def _report_unreachable(self, reason: str) -> None:
        """Without rank 0's node the ranks here can't agree on anything, and messages to it may be
        lost."""
        self._cut(f"the connection to the node of rank 0 is broken: {reason}")

    def _cut(self, text: str) -> None:
        """What this node's attempt went by may have changed elsewhere: it ends, and the membership
        tells who is who."""
        epoch = self.view.epoch
        assert epoch is not None, "an epoch"
        completed = self._state.memory.completed()
        self._on(Rank0Unreachable(epoch.number, text, time.monotonic(), completed))

    def _receive(self, node: str, message: MeshMessage) -> None:
        board = self._state.memory.board
        match message:
            case (
                mesh.MeshPost()
                | mesh.MeshPeek()
                | mesh.MeshCount()
                | mesh.MeshForget()
                | mesh.MeshReply()
            ):
                self.view.mailboxes.receive(node, message)
            case mesh.NodeProgress():
                if not self.standbys.receive(node, message):
                    self._progress.receive(node, message)
            case mesh.LivenessCall() | mesh.LivenessAnswer():
                if self.view.placed:
                    self._liveness.receive(node, message)
            case mesh.NodeSubmissions() | mesh.MeshEpochOpened():
                self.uploads.receive(node, message)
            case mesh.AskNodeInventory() | mesh.NodeInventory() | mesh.MeshSources():
                self.memory.receive(node, message)
            case mesh.MeshDecided():
                if (
                    board is not None
                    and self.view.epoch is not None
                    and message.attempt == board.attempt
                ):
                    board.decide(message.boundary, message.flags)

    # ---- small parts

    def _put_inventory(self, inventory: StateInventory) -> None:
        if self.view.node is not None:
            self.view.node.put_inventory(inventory)

    def _post(self, call: Callable[[], object]) -> None:
        """Have the loop make ``call``, unless this launch has left by then: the next launch must
        not get its events."""
        self._state.post(lambda: call() if self._leaving is None else None)

    def _emit(self, event: Event) -> None:
        self._state.post(lambda: self._tell(event))

    def _tell(self, event: Event) -> None:
        """Report an event of the nodes; to the program too if nodes do not find each other: nothing
        else would be seen of it there."""
        self._state.emit(event)
        if event.kind in TOLD_KINDS and self._told < TOLD_MAX:
            self._told += 1
            line = PrintLine(text=event.text, alarm=True)
            self._state.clients.broadcast("supervisor", line, rank=0)

    def _joined(self) -> Node:
        post = self._post
        observer = NodeObserver(
            on_epoch=lambda epoch: post(lambda: self._epoch_opened(epoch)),
            on_standbys=lambda epoch: post(lambda: self._standbys_changed(epoch)),
            on_membership_lost=lambda reason: post(lambda: self._membership_lost(reason)),
            on_message=lambda node, message: post(lambda: self._receive(node, message)),
            on_connected=lambda node: post(lambda: self._connected(node)),
            on_disconnected=lambda node, reason: post(lambda: self._disconnected(node, reason)),
            on_act_until=self._lease_prolonged,
            on_refused=lambda reason: post(lambda: self._refused(reason)),
        )
        return self._join(
            state=self._state,
            seen=lambda: MembershipEpoch(self._line, self._attempt),
            peer_port=self.memory.port,
            observer=observer,
            emit=self._emit,
        )
