"""How far this node's ranks are, told to the others, and how far theirs are. In the loop.

All nodes tell rank 0's; that one tells each of the others what all but it have in common.
"""

from __future__ import annotations

from ckpt.cluster.mesh import messages as said
from ckpt.keeper.cluster_view import Among
from ckpt.keeper.job import Job
from ckpt.keeper.mirrors import mirror_rounds as rounds
from ckpt.keeper.mirrors.memory import NodesMemory
from ckpt.keeper.nodes.nodes_standing import common, common_but_each, standing_of

STANDING_S = 0.02
"""How often nodes tell how far their ranks are, where that changed."""

STANDING_LATEST_S = 1.0
"""And where it did not."""


class NodesProgress:
    """See the module. On nodes that have ranks."""

    def __init__(self, job: Job, among: Among, memory: NodesMemory) -> None:
        self._job = job
        self._among = among
        self._memory = memory
        self._standings: dict[str, said.Standing] = {}
        self._told: said.Standing | None = None
        self._told_s = 0.0
        self._told_to: dict[str, tuple[said.Standing, float]] = {}
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

    def take(self, node: str, word: said.Standing) -> None:
        """What another node told."""
        self._standings[node] = word
        if self._among.root:
            self._news, self._due_s = True, min(self._due_s, self._told_s + STANDING_S / 4)
        self._show()

    def _tell(self, now_s: float) -> None:
        job, epoch = self._job, self._among.epoch
        assert job.board is not None and epoch is not None, "placed"
        ranks = [job.board.rank(rank) for rank in range(job.ranks)]
        mine = standing_of(ranks, epoch.number, self._memory.word)
        if mine == self._told and now_s - self._told_s < STANDING_LATEST_S and not self._news:
            return
        self._news = False
        self._told, self._told_s = mine, now_s
        if not self._among.root:
            self._among.say(epoch.record.root, mine)
            return
        known = {node: one for node, one in self._standings.items() if one.attempt == epoch.number}
        said_words = [
            rounds.Word(one.mirrored, one.missed) if (one := known.get(node)) else None for node in self._among.others
        ]
        self._memory.go_round(
            rounds.next_round(self._memory.round, [self._memory.word, *said_words], job.board.complete())
        )
        every = {node: known.get(node) for node in self._among.others}
        for node, word in common_but_each(mine, every, epoch.number, self._memory.round).items():
            before, at_s = self._told_to.get(node, (None, 0.0))
            if word != before or now_s >= at_s + STANDING_LATEST_S:
                self._told_to[node] = (word, now_s)
                self._among.say(node, word)

    def _show(self) -> None:
        """Put what other nodes hold onto the board, where the slot rule and rank 0 look."""
        board, epoch, among = self._job.board, self._among.epoch, self._among
        if board is None or epoch is None or not among.placed:
            return
        sources = among.others if among.root else (epoch.record.root,)
        known = [self._standings.get(node) for node in sources]
        found = common([one if one and one.attempt == epoch.number else None for one in known], epoch.number)
        board.others.show(found.sealed, found.completed if found.completed >= 0 else None)
        if not among.root and known[0] is not None and known[0].attempt == epoch.number:
            self._memory.go_round(rounds.Round(known[0].named, known[0].mirrored))
