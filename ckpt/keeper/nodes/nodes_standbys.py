"""What the node of rank 0 and the standbys tell each other: which pair is kept, and which a standby has. In the loop."""

from __future__ import annotations

from collections.abc import Callable

from ckpt.cluster.membership.records import Holdings
from ckpt.cluster.mesh import messages as said
from ckpt.cluster.node.ways import Epoch
from ckpt.ipc.report import NodeReport
from ckpt.keeper.cluster_view import Among
from ckpt.keeper.mirrors.memory import NodesMemory
from ckpt.keeper.mirrors.mirror_rounds import Round
from ckpt.values import SnapshotId

LOOK_S = 0.25
"""How often a standby looks at what it has; each look reads the headers of all of it."""

TELL_S = 1.0
"""How often it is told where nothing changed."""


class Standbys:
    """See the module. ``holds`` is told what this node has of which ranks, while it is a standby."""

    def __init__(self, among: Among, memory: NodesMemory, *, holds: Callable[[Holdings], object]) -> None:
        self._among = among
        self._memory = memory
        self._holds = holds
        self._have: dict[str, SnapshotId | None] = {}
        """What each standby said that it has."""
        self._told: said.Standing | None = None
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
            self._tell(now_s, epoch, (epoch.record.root,), None, pair)
            if pair is not None:
                self._holds(Holdings(epoch.record.world_size, sizes))

    def take(self, node: str, word: said.Standing) -> bool:
        """A word from a standby, or to one: whether it was that."""
        epoch = self._among.epoch
        if epoch is None or word.attempt != epoch.number:
            return False
        standbys = epoch.standbys
        if node in standbys:
            self._have[node] = word.mirrored
            return True
        if self._among.me in standbys and node == epoch.record.root:
            self._memory.go_round(Round(word.named, word.mirrored))
            return True
        return False

    def report(self) -> tuple[NodeReport, ...]:
        """The nodes of the newest epoch, as far as this one knows: the node of rank 0 knows of all."""
        epoch, me = self._among.epoch, self._among.me
        if epoch is None:
            return ()
        kept = self._memory.round.kept
        placed = [
            NodeReport(node=node, here=node == me, first_rank=ranks.start, ranks=len(ranks), mirrored=kept)
            for node, ranks in epoch.record.ranks.items()
        ]
        have = {**self._have, **({me: self._memory.copied(epoch)[0]} if me in epoch.standbys else {})}
        waiting = [
            NodeReport(node=node, here=node == me, first_rank=-1, ranks=0, mirrored=have.get(node))
            for node in epoch.standbys
        ]
        return (*placed, *waiting)

    def _tell(
        self, now_s: float, epoch: Epoch, nodes: tuple[str, ...], now: Round | None, pair: SnapshotId | None
    ) -> None:
        word = said.Standing(
            attempt=epoch.number, sealed=(), completed=-1, mirrored=now.kept if now is not None else pair,
            named=now.named if now is not None else None,
        )  # fmt: skip
        if word == self._told and now_s < self._told_s + TELL_S:
            return
        self._told, self._told_s = word, now_s
        for node in nodes:
            self._among.say(node, word)
