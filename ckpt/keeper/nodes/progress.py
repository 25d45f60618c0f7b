"""What nodes regularly tell each other: progress of their ranks, mirrors of standbys, liveness. In
the keeper's loop.

All nodes send their progress to rank 0's node; that one sends each of them what all others have in
common.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from msgspec.structs import replace

from ckpt.cluster.membership.leases import default_margin_s
from ckpt.cluster.membership.member import boottime_s
from ckpt.cluster.membership.records import StateInventory
from ckpt.cluster.mesh.messages import LivenessAnswer, LivenessCall, NodeProgress
from ckpt.ipc.board import RankBoard
from ckpt.ipc.messages import NodeReport
from ckpt.keeper.mirrors.memory import ClusterMemory
from ckpt.keeper.mirrors.plan import MirrorReport, MirrorRound, next_round
from ckpt.keeper.nodes.epoch_view import EpochView
from ckpt.keeper.nodes.liveness import (
    CALLS_PER_TTL,
    LivenessRound,
    answer_call,
    answers_received,
    next_call,
)
from ckpt.keeper.slots import RankMemory
from ckpt.values import SnapshotId

# ---- what ranks have in common: steps that all have completed, snapshots that all hold

NO_ROUND = MirrorRound()


def progress_of(ranks: Sequence[RankBoard], attempt: int, report: MirrorReport) -> NodeProgress:
    """The progress of some ranks of this node. Steps are read before snapshots.

    A rank that completes a step in between then seems to hold more than it has completed, never
    less.
    """
    steps = [-1 if rank.completed is None else rank.completed for rank in ranks]
    sealed = [rank.sealed_snapshots() for rank in ranks]
    return NodeProgress(
        attempt=attempt,
        sealed=_common_snapshots(sealed),
        completed=min(steps, default=-1),
        mirrored=report.mirrored,
        missed=report.missed,
    )


def common_progress(
    reports: Sequence[NodeProgress | None], attempt: int, now: MirrorRound = NO_ROUND
) -> NodeProgress:
    """The progress of several nodes as one, in the round ``now``; nothing if one has not reported
    yet (None)."""
    known = [report for report in reports if report is not None]
    if len(known) < len(reports) or not known:
        return NodeProgress(
            attempt=attempt, sealed=(), completed=-1, mirrored=now.kept, named=now.named
        )
    return NodeProgress(
        attempt=attempt,
        sealed=_common_snapshots([frozenset(report.sealed) for report in known]),
        completed=min(report.completed for report in known),
        mirrored=now.kept,
        named=now.named,
    )


def common_progress_without_each(
    own: NodeProgress, others: Mapping[str, NodeProgress | None], attempt: int, now: MirrorRound
) -> dict[str, NodeProgress]:
    """For each of ``others`` the common progress of ``own`` and all the rest.

    One pass for all nodes: ``common_progress`` for each would cost the square of their number.
    """
    nothing = common_progress([None], attempt, now)
    silent = {node for node, report in others.items() if report is None}
    known = [own, *(report for report in others.values() if report is not None)]
    holders = Counter(snapshot for report in known for snapshot in frozenset(report.sealed))
    # Only what all but one hold can be common to all without one.
    nearly = {snapshot: count for snapshot, count in holders.items() if count >= len(known) - 1}
    least, *rest = sorted(report.completed for report in known)[:2]
    result = {}
    # Most nodes hold the same, and are told the same: one message, which is encoded once.
    told: dict[tuple[bool, bool, frozenset[SnapshotId]], NodeProgress] = {}
    for node, report in others.items():
        if silent and silent != {node}:
            result[node] = nothing
            continue
        held = nearly.keys() & report.sealed if report is not None else frozenset()
        slowest = report is not None and report.completed == least
        kind = (report is not None, slowest, frozenset(held))
        if kind not in told:
            needed = len(known) - (report is not None)
            sealed = sorted(
                (
                    snapshot
                    for snapshot, count in nearly.items()
                    if count - (snapshot in held) == needed
                ),
                reverse=True,
            )
            told[kind] = replace(
                nothing, sealed=tuple(sealed), completed=rest[0] if slowest else least
            )
        result[node] = told[kind]
    return result


def _common_snapshots(sealed: Sequence[frozenset[SnapshotId]]) -> tuple[SnapshotId, ...]:
    return tuple(sorted(frozenset.intersection(*sealed), reverse=True)) if sealed else ()


PROGRESS_S = 0.02
"""How often nodes report progress that has changed."""

PROGRESS_LATEST_S = 1.0
"""How often they report progress that has not changed."""

REPORTS_PER_S_MAX = 1250
"""How many reports a second rank 0's node takes, and answers, from all nodes together: 26
microseconds of its keeper's core each. Beyond 25 nodes each reports more seldom."""


def report_every_s(nodes: int) -> float:
    """How often a node of so many reports what has changed, at most."""
    return max(PROGRESS_S, nodes / REPORTS_PER_S_MAX)


def pass_on_every_s(nodes: int) -> float:
    """How often rank 0's node tells all what they have in common, at most.

    Sooner than its own report where nodes are few. It works on all reports at once: for each report
    that arrives it would be the square of the nodes.
    """
    return max(PROGRESS_S / 4, nodes / REPORTS_PER_S_MAX)


class ProgressExchange:
    """Exchanges the progress of ranks, on nodes that have ranks, and shows that of others on the
    board."""

    def __init__(self, ranks: RankMemory, view: EpochView, memory: ClusterMemory) -> None:
        self._ranks = ranks
        self._view = view
        self._memory = memory
        self._received: dict[str, NodeProgress] = {}
        self._sent: NodeProgress | None = None
        self._sent_s = 0.0
        self._sent_to: dict[str, tuple[NodeProgress, float]] = {}
        self._news = False
        """On rank 0's node: whether another node's progress has arrived since it was last sent to
        all."""
        self._due_s = 0.0

    def begin(self) -> None:
        """A new epoch: progress in the last one does not count."""
        self._received.clear()
        self._sent = None
        self._sent_to.clear()

    def tick(self, now_s: float) -> float:
        """Send what is due; returns the seconds until the next call is needed."""
        if now_s >= self._due_s:
            self._due_s = now_s + PROGRESS_S
            self._send(now_s)
        return self._due_s - now_s

    def receive(self, node: str, progress: NodeProgress) -> None:
        """Another node's progress. On rank 0's node only kept: it is worked on with all others that
        have arrived by the time they are passed on."""
        self._received[node] = progress
        if self._view.has_rank0:
            every_s = pass_on_every_s(len(self._view.others) + 1)
            self._news, self._due_s = True, min(self._due_s, self._sent_s + every_s)
        else:
            self._show()

    def _send(self, now_s: float) -> None:
        board, epoch, view = self._ranks.board, self._view.epoch, self._view
        assert board is not None and epoch is not None, "placed"
        nodes = len(view.others) + 1
        every_s = (pass_on_every_s if view.has_rank0 else report_every_s)(nodes)
        if now_s < self._sent_s + every_s:
            self._due_s = min(self._due_s, self._sent_s + every_s)
            return
        ranks = [board.rank(rank) for rank in range(self._ranks.ranks)]
        own = progress_of(ranks, epoch.number, self._memory.mirror_report)
        latest_s = max(PROGRESS_LATEST_S, every_s)
        if own == self._sent and now_s - self._sent_s < latest_s and not self._news:
            return
        self._news = False
        self._sent, self._sent_s = own, now_s
        if not view.has_rank0:
            view.send(epoch.record.rank0_node, own)
            return
        self._show()
        known = {
            node: progress
            for node, progress in self._received.items()
            if progress.attempt == epoch.number
        }
        reports = [
            MirrorReport(progress.mirrored, progress.missed)
            if (progress := known.get(node))
            else None
            for node in view.others
        ]
        self._memory.set_round(
            next_round(
                self._memory.round, [self._memory.mirror_report, *reports], board.newest_complete()
            )
        )
        others = {node: known.get(node) for node in view.others}
        for node, progress in common_progress_without_each(
            own, others, epoch.number, self._memory.round
        ).items():
            before, at_s = self._sent_to.get(node, (None, 0.0))
            # Per node: only those whose view changed get a message, so the cost follows the
            # changes.
            if progress != before or now_s >= at_s + latest_s:
                self._sent_to[node] = (progress, now_s)
                view.send(node, progress)

    def _show(self) -> None:
        """Put what other nodes hold onto the board, where the slot rule and rank 0 read it."""
        board, epoch, view = self._ranks.board, self._view.epoch, self._view
        if board is None or epoch is None or not view.placed:
            return
        senders = view.others if view.has_rank0 else (epoch.record.rank0_node,)
        known = [self._received.get(node) for node in senders]
        current = [
            progress if progress and progress.attempt == epoch.number else None
            for progress in known
        ]
        common = common_progress(current, epoch.number)
        board.remote_ranks.publish_remote(
            common.sealed, common.completed if common.completed >= 0 else None
        )
        if not view.has_rank0 and current[0] is not None:
            self._memory.set_round(MirrorRound(current[0].named, current[0].mirrored))


# ---- standbys: which snapshot all nodes keep as mirrors, and which one a standby has

INVENTORY_S = 0.25
"""How often a standby checks what it has; each check reads the headers of all of it."""

REPORT_S = 1.0
"""How often it reports what has not changed."""


class Standbys:
    """Exchanges mirror rounds between rank 0's node and the standbys.

    ``put_inventory`` publishes what this node has of which ranks, while it is a standby.
    """

    def __init__(
        self,
        view: EpochView,
        memory: ClusterMemory,
        *,
        put_inventory: Callable[[StateInventory], object],
    ) -> None:
        self._view = view
        self._memory = memory
        self._put_inventory = put_inventory
        self._have: dict[str, SnapshotId | None] = {}
        """The snapshot that each standby reported."""
        self._sent: NodeProgress | None = None
        self._sent_s = self._inventory_s = 0.0

    def see_epoch(self) -> None:
        """Another epoch: it may have other standbys."""
        self._have.clear()
        self._sent = None

    def tick(self, now_s: float) -> None:
        """Send what has changed."""
        epoch = self._view.epoch
        if epoch is None:
            return
        if self._view.has_rank0 and epoch.standbys:
            now = self._memory.round
            message = NodeProgress(
                attempt=epoch.number, sealed=(), completed=-1, mirrored=now.kept, named=now.named
            )
            self._send(now_s, epoch.standbys, message)
        elif self._view.me in epoch.standbys and now_s >= self._inventory_s:
            self._inventory_s = now_s + INVENTORY_S
            snapshot, sizes = self._memory.copied(epoch)
            message = NodeProgress(
                attempt=epoch.number, sealed=(), completed=-1, mirrored=snapshot, named=None
            )
            self._send(now_s, (epoch.record.rank0_node,), message)
            if snapshot is not None:
                self._put_inventory(StateInventory(epoch.record.world_size, sizes))

    def receive(self, node: str, message: NodeProgress) -> bool:
        """Take a message from a standby, or to this one; False if it is neither."""
        epoch = self._view.epoch
        if epoch is None or message.attempt != epoch.number:
            return False
        if node in epoch.standbys:
            self._have[node] = message.mirrored
            return True
        if self._view.me in epoch.standbys and node == epoch.record.rank0_node:
            self._memory.set_round(MirrorRound(message.named, message.mirrored))
            return True
        return False

    def report(self) -> tuple[NodeReport, ...]:
        """The nodes of the newest epoch; only rank 0's node knows what each standby has."""
        epoch, me = self._view.epoch, self._view.me
        if epoch is None:
            return ()
        kept = self._memory.round.kept
        placed = [
            NodeReport(
                node=node, here=node == me, first_rank=ranks.start, ranks=len(ranks), mirrored=kept
            )
            for node, ranks in epoch.record.ranks.items()
        ]
        have = {
            **self._have,
            **({me: self._memory.copied(epoch)[0]} if me in epoch.standbys else {}),
        }
        waiting = [
            NodeReport(node=node, here=node == me, first_rank=-1, ranks=0, mirrored=have.get(node))
            for node in epoch.standbys
        ]
        return (*placed, *waiting)

    def _send(self, now_s: float, nodes: tuple[str, ...], message: NodeProgress) -> None:
        if message == self._sent and now_s < self._sent_s + REPORT_S:
            return
        self._sent, self._sent_s = message, now_s
        for node in nodes:
            self._view.send(node, message)


# ---- liveness rounds of an epoch; what an answered call proves is decided in ``liveness``


class LivenessExchange:
    """Makes liveness calls, or answers them. ``ttl_s``: of the nodes' leases. Times are of
    CLOCK_BOOTTIME, as leases."""

    def __init__(self, view: EpochView, *, ttl_s: float) -> None:
        self._view = view
        self._ttl_s = ttl_s
        self._round = LivenessRound()
        self._due_s = self._applied_s = 0.0
        self._answers: dict[str, LivenessAnswer] = {}
        """The last answer of each node, not yet taken into the round."""

    def tick(self, now_s: float) -> None:
        """On a node that has ranks, in an epoch of several nodes: take what was answered, and make
        a call if it is time to."""
        epoch = self._view.epoch
        if epoch is None or not self._view.has_rank0:
            return
        if self._answers and now_s >= self._applied_s + PROGRESS_S:
            self._applied_s = now_s
            answers = {
                node: answer.number
                for node, answer in self._answers.items()
                if answer.attempt == epoch.number
            }
            self._answers.clear()
            self._round = answers_received(self._round, epoch.number, answers)
        if now_s < self._due_s:
            return
        self._due_s = now_s + self._ttl_s / CALLS_PER_TTL
        self._round = now = next_call(self._round, epoch.number, self._view.others, boottime_s())
        self._view.send_to_others(
            LivenessCall(attempt=now.attempt, number=now.number, answered=now.answered)
        )

    def receive(self, node: str, message: LivenessCall | LivenessAnswer) -> None:
        """On a node that has ranks. A call of an older epoch gets no answer; nor does any while
        this node is out."""
        epoch = self._view.epoch
        if epoch is None or message.attempt != epoch.number:
            return
        if isinstance(message, LivenessAnswer):
            known = self._answers.get(node)
            if known is None or known.number < message.number or known.attempt != message.attempt:
                self._answers[node] = message
        elif node == epoch.record.rank0_node:
            self._round = answer_call(
                self._round, message.attempt, message.number, message.answered, boottime_s()
            )
            self._view.send(node, LivenessAnswer(attempt=message.attempt, number=message.number))

    def until_s(self) -> float:
        """Until when, of CLOCK_BOOTTIME, this node may act because all nodes answered; 0: not for
        that reason."""
        epoch = self._view.epoch
        if epoch is None or epoch.number != self._round.attempt:
            return 0.0
        return self._round.until_s(ttl_s=self._ttl_s, margin_s=default_margin_s(self._ttl_s))
