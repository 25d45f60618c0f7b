"""How far this node's ranks are, told to the others, and how far theirs are. In the loop.

All nodes tell rank 0's; that one tells each of the others what all but it have in common.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from msgspec.structs import replace

from ckpt.cluster.membership.leases import default_margin_s
from ckpt.cluster.membership.member import boottime_s
from ckpt.cluster.membership.records import StateInventory
from ckpt.cluster.mesh import messages as said
from ckpt.cluster.mesh.messages import NodeProgress
from ckpt.cluster.node.epochs import NodeEpoch
from ckpt.ipc.board import RankBoard
from ckpt.ipc.messages import NodeReport
from ckpt.keeper.cluster_view import EpochView
from ckpt.keeper.job import Job
from ckpt.keeper.mirrors import plan as rounds
from ckpt.keeper.mirrors.memory import ClusterMemory
from ckpt.keeper.mirrors.plan import MirrorReport, MirrorRound
from ckpt.keeper.nodes.liveness import (
    CALLS_PER_TTL,
    LivenessRound,
    answer_call,
    answer_received,
    next_call,
)
from ckpt.values import SnapshotId

# What ranks have in common: how far all of them are, and what all of them hold. Pure but for
# reading the board.

NO_ROUND = MirrorRound()


def progress_of(ranks: Sequence[RankBoard], attempt: int, word: MirrorReport) -> NodeProgress:
    """The standing of some ranks of this node. How far they are is read before what they hold."""
    done = [-1 if one.completed is None else one.completed for one in ranks]
    held = [one.sealed_snapshots() for one in ranks]
    return NodeProgress(
        attempt=attempt,
        sealed=_all_hold(held),
        completed=min(done, default=-1),
        mirrored=word.mirrored,
        missed=word.missed,
    )


def common_progress(
    standings: Sequence[NodeProgress | None], attempt: int, now: MirrorRound = NO_ROUND
) -> NodeProgress:
    """Of several nodes as one, in the round ``now``; where one has not told its own yet they have
    nothing."""
    known = [one for one in standings if one is not None]
    if len(known) < len(standings) or not known:
        return NodeProgress(
            attempt=attempt, sealed=(), completed=-1, mirrored=now.kept, named=now.named
        )
    return NodeProgress(
        attempt=attempt,
        sealed=_all_hold([frozenset(one.sealed) for one in known]),
        completed=min(one.completed for one in known),
        mirrored=now.kept,
        named=now.named,
    )


def common_progress_without_each(
    mine: NodeProgress, others: Mapping[str, NodeProgress | None], attempt: int, now: MirrorRound
) -> dict[str, NodeProgress]:
    """For each of ``others``, what all but it have in common with ``mine``: ``common`` of the rest,
    in one pass for all."""
    nothing = common_progress([None], attempt, now)
    silent = {node for node, one in others.items() if one is None}
    known = [mine, *(one for one in others.values() if one is not None)]
    holders = Counter(pair for one in known for pair in frozenset(one.sealed))
    nearly = {pair: count for pair, count in holders.items() if count >= len(known) - 1}
    least, *rest = sorted(one.completed for one in known)[:2]
    found = {}
    for node, own in others.items():
        if silent - {node}:
            found[node] = nothing
            continue
        held = frozenset(own.sealed if own is not None else ())
        needed = len(known) - (own is not None)
        sealed = sorted(
            (pair for pair, count in nearly.items() if count - (pair in held) == needed),
            reverse=True,
        )
        completed = rest[0] if own is not None and own.completed == least else least
        found[node] = replace(nothing, sealed=tuple(sealed), completed=completed)
    return found


def _all_hold(held: Sequence[frozenset[SnapshotId]]) -> tuple[SnapshotId, ...]:
    return tuple(sorted(frozenset.intersection(*held), reverse=True)) if held else ()


STANDING_S = 0.02
"""How often nodes tell how far their ranks are, where that changed."""

STANDING_LATEST_S = 1.0
"""And where it did not."""


class ProgressExchange:
    """See the module. On nodes that have ranks."""

    def __init__(self, job: Job, among: EpochView, memory: ClusterMemory) -> None:
        self._job = job
        self._among = among
        self._memory = memory
        self._standings: dict[str, said.NodeProgress] = {}
        self._told: said.NodeProgress | None = None
        self._told_s = 0.0
        self._told_to: dict[str, tuple[said.NodeProgress, float]] = {}
        self._news = False  # whether another node told its standing to this one, that of rank 0, since it told all
        self._due_s = 0.0

    def begin(self) -> None:
        """A new epoch: what was told in the last one counts no more."""
        self._standings.clear()
        self._told = None
        self._told_to.clear()

    def tick(self, now_s: float) -> float:
        """Tell what is to be told; returns seconds until the next look."""
        if now_s >= self._due_s:
            self._due_s = now_s + STANDING_S
            self._tell(now_s)
        return self._due_s - now_s

    def take(self, node: str, word: said.NodeProgress) -> None:
        """What another node told."""
        self._standings[node] = word
        if self._among.root:
            self._news, self._due_s = True, min(self._due_s, self._told_s + STANDING_S / 4)
        self._show()

    def _tell(self, now_s: float) -> None:
        job, epoch = self._job, self._among.epoch
        assert job.board is not None and epoch is not None, "placed"
        ranks = [job.board.rank(rank) for rank in range(job.ranks)]
        mine = progress_of(ranks, epoch.number, self._memory.mirror_report)
        if mine == self._told and now_s - self._told_s < STANDING_LATEST_S and not self._news:
            return
        self._news = False
        self._told, self._told_s = mine, now_s
        if not self._among.root:
            self._among.say(epoch.record.rank0_node, mine)
            return
        known = {node: one for node, one in self._standings.items() if one.attempt == epoch.number}
        said_words = [
            rounds.MirrorReport(one.mirrored, one.missed) if (one := known.get(node)) else None
            for node in self._among.others
        ]
        self._memory.set_round(
            rounds.next_round(
                self._memory.round,
                [self._memory.mirror_report, *said_words],
                job.board.newest_complete(),
            )
        )
        every = {node: known.get(node) for node in self._among.others}
        for node, word in common_progress_without_each(
            mine, every, epoch.number, self._memory.round
        ).items():
            before, at_s = self._told_to.get(node, (None, 0.0))
            if word != before or now_s >= at_s + STANDING_LATEST_S:
                self._told_to[node] = (word, now_s)
                self._among.say(node, word)

    def _show(self) -> None:
        """Put what other nodes hold onto the board, where the slot rule and rank 0 look."""
        board, epoch, among = self._job.board, self._among.epoch, self._among
        if board is None or epoch is None or not among.placed:
            return
        sources = among.others if among.root else (epoch.record.rank0_node,)
        known = [self._standings.get(node) for node in sources]
        found = common_progress(
            [one if one and one.attempt == epoch.number else None for one in known], epoch.number
        )
        board.remote_ranks.publish_remote(
            found.sealed, found.completed if found.completed >= 0 else None
        )
        if not among.root and known[0] is not None and known[0].attempt == epoch.number:
            self._memory.set_round(rounds.MirrorRound(known[0].named, known[0].mirrored))


# What the node of rank 0 and the standbys tell each other: which pair is kept, and which a
# standby has. In the loop.

LOOK_S = 0.25
"""How often a standby looks at what it has; each look reads the headers of all of it."""

TELL_S = 1.0
"""How often it is told where nothing changed."""


class Standbys:
    """See the module. ``holds`` is told what this node has of which ranks, while it is a
    standby."""

    def __init__(
        self, among: EpochView, memory: ClusterMemory, *, holds: Callable[[StateInventory], object]
    ) -> None:
        self._among = among
        self._memory = memory
        self._holds = holds
        self._have: dict[str, SnapshotId | None] = {}
        """What each standby said that it has."""
        self._told: said.NodeProgress | None = None
        self._told_s = self._look_s = 0.0

    def see(self) -> None:
        """Another epoch: others may be standbys."""
        self._have.clear()
        self._told = None

    def tick(self, now_s: float) -> None:
        """Tell what changed."""
        epoch = self._among.epoch
        if epoch is None:
            return
        standbys = epoch.standbys
        if self._among.root and standbys:
            self._tell(now_s, epoch, standbys, self._memory.round, None)
        elif self._among.me in standbys and now_s >= self._look_s:
            self._look_s = now_s + LOOK_S
            pair, sizes = self._memory.copied(epoch)
            self._tell(now_s, epoch, (epoch.record.rank0_node,), None, pair)
            if pair is not None:
                self._holds(StateInventory(epoch.record.world_size, sizes))

    def take(self, node: str, word: said.NodeProgress) -> bool:
        """A word from a standby, or to one: whether it was that."""
        epoch = self._among.epoch
        if epoch is None or word.attempt != epoch.number:
            return False
        standbys = epoch.standbys
        if node in standbys:
            self._have[node] = word.mirrored
            return True
        if self._among.me in standbys and node == epoch.record.rank0_node:
            self._memory.set_round(MirrorRound(word.named, word.mirrored))
            return True
        return False

    def report(self) -> tuple[NodeReport, ...]:
        """The nodes of the newest epoch, as far as this one knows: the node of rank 0 knows of
        all."""
        epoch, me = self._among.epoch, self._among.me
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

    def _tell(
        self,
        now_s: float,
        epoch: NodeEpoch,
        nodes: tuple[str, ...],
        now: MirrorRound | None,
        pair: SnapshotId | None,
    ) -> None:
        word = said.NodeProgress(
            attempt=epoch.number,
            sealed=(),
            completed=-1,
            mirrored=now.kept if now is not None else pair,
            named=now.named if now is not None else None,
        )
        if word == self._told and now_s < self._told_s + TELL_S:
            return
        self._told, self._told_s = word, now_s
        for node in nodes:
            self._among.say(node, word)


# Calling the roll of an epoch, and answering it. In the loop; what it proves is decided in
# ``roll_call``.


class LivenessExchange:
    """See the module. ``ttl_s``: of the nodes' leases."""

    def __init__(self, among: EpochView, *, ttl_s: float) -> None:
        self._among = among
        self._ttl_s = ttl_s
        self._roll = LivenessRound()
        self._due_s = 0.0

    def tick(self, now_s: float) -> None:
        """On a node with ranks, beside others: call when it is time to."""
        epoch = self._among.epoch
        if epoch is None or not self._among.root or now_s < self._due_s:
            return
        self._due_s = now_s + self._ttl_s / CALLS_PER_TTL
        self._roll = next_call(self._roll, epoch.number, self._among.others, boottime_s())
        self._among.say_to_all(
            said.LivenessCall(
                attempt=self._roll.attempt, number=self._roll.number, answered=self._roll.answered
            )
        )

    def take(self, node: str, word: said.LivenessCall | said.LivenessAnswer) -> None:
        """On a node with ranks. One that knows of a newer epoch, or was told that it is no member
        any more, answers nothing."""
        epoch = self._among.epoch
        if epoch is None or word.attempt != epoch.number:
            return
        if isinstance(word, said.LivenessAnswer):
            self._roll = answer_received(self._roll, word.attempt, word.number, node)
        elif node == epoch.record.rank0_node:
            self._roll = answer_call(
                self._roll, word.attempt, word.number, word.answered, boottime_s()
            )
            self._among.say(node, said.LivenessAnswer(attempt=word.attempt, number=word.number))

    def until_s(self) -> float:
        """Until when, of CLOCK_BOOTTIME, this node may act for that all answered; 0: not for that
        reason."""
        epoch = self._among.epoch
        if epoch is None or epoch.number != self._roll.attempt:
            return 0.0
        return self._roll.until_s(ttl_s=self._ttl_s, margin_s=default_margin_s(self._ttl_s))
