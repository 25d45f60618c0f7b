"""Calling the roll of an epoch, and answering it. In the loop; what it proves is decided in ``roll_call``."""

from __future__ import annotations

from ckpt.cluster.membership.leases import margin_of
from ckpt.cluster.membership.member import boot_s
from ckpt.cluster.mesh import messages as said
from ckpt.keeper.cluster_view import Among
from ckpt.keeper.nodes.liveness import CALLS_PER_TTL, RollCall, answers, called, heard


class NodesRoll:
    """See the module. ``ttl_s``: of the nodes' leases."""

    def __init__(self, among: Among, *, ttl_s: float) -> None:
        self._among = among
        self._ttl_s = ttl_s
        self._roll = RollCall()
        self._due_s = 0.0

    def tick(self, now_s: float) -> None:
        """On a node with ranks, beside others: call when it is time to."""
        epoch = self._among.epoch
        if epoch is None or not self._among.root or now_s < self._due_s:
            return
        self._due_s = now_s + self._ttl_s / CALLS_PER_TTL
        self._roll = called(self._roll, epoch.number, self._among.others, boot_s())
        self._among.say_to_all(
            said.Roll(attempt=self._roll.attempt, number=self._roll.number, answered=self._roll.answered)
        )

    def take(self, node: str, word: said.Roll | said.Here) -> None:
        """On a node with ranks. One that knows of a newer epoch, or was told that it is no member any more, answers nothing."""
        epoch = self._among.epoch
        if epoch is None or word.attempt != epoch.number:
            return
        if isinstance(word, said.Here):
            self._roll = heard(self._roll, word.attempt, word.number, node)
        elif node == epoch.record.root:
            self._roll = answers(self._roll, word.attempt, word.number, word.answered, boot_s())
            self._among.say(node, said.Here(attempt=word.attempt, number=word.number))

    def until_s(self) -> float:
        """Until when, of CLOCK_BOOTTIME, this node may act for that all answered; 0: not for that reason."""
        epoch = self._among.epoch
        if epoch is None or epoch.number != self._roll.attempt:
            return 0.0
        return self._roll.until_s(ttl_s=self._ttl_s, margin_s=margin_of(self._ttl_s))
