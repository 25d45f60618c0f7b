"""Asking all nodes what they hold in memory, for the node of rank 0. In its keeper's loop."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ckpt.cluster.mesh import messages as said
from ckpt.cluster.mesh.messages import Holding

WAIT_S = 3.0
"""How long a node may take to say what it holds; one that says nothing has nothing."""

Answer = Callable[[dict[str, Sequence[Holding]]], object]


@dataclass(slots=True, eq=False)
class _Asking:
    waits_for: set[str]
    until_s: float
    answer: Answer
    held: dict[str, Sequence[Holding]] = field(default_factory=dict)


class Gather:
    """Questions to all nodes, each answered once all have spoken or WAIT_S have passed."""

    def __init__(self, say: Callable[[str, said.Word], bool]) -> None:
        self._say = say
        self._calls = itertools.count(1)
        self._asking: dict[int, _Asking] = {}

    def ask(self, nodes: Sequence[str], own: tuple[str, Sequence[Holding]], now_s: float, answer: Answer) -> None:
        """Ask ``nodes``, and have ``answer`` told what they and this node hold."""
        call = next(self._calls)
        asked = {node for node in nodes if self._say(node, said.AskHeld(call=call))}
        self._asking[call] = _Asking(asked, now_s + WAIT_S, answer, {own[0]: own[1]})
        self._settle(call, now_s)

    def heard(self, node: str, word: said.Held, now_s: float) -> None:
        """A node's answer."""
        asking = self._asking.get(word.call)
        if asking is not None and node in asking.waits_for:
            asking.waits_for.discard(node)
            asking.held[node] = word.holdings
            self._settle(word.call, now_s)

    def lost(self, node: str, now_s: float) -> None:
        """A node won't answer any more."""
        for call, asking in list(self._asking.items()):
            asking.waits_for.discard(node)
            self._settle(call, now_s)

    def tick(self, now_s: float) -> float:
        """Give up what waits too long; returns seconds until the next look."""
        for call in list(self._asking):
            self._settle(call, now_s)
        return min((one.until_s - now_s for one in self._asking.values()), default=WAIT_S)

    def _settle(self, call: int, now_s: float) -> None:
        asking = self._asking.get(call)
        if asking is not None and (not asking.waits_for or now_s >= asking.until_s):
            del self._asking[call]
            asking.answer(asking.held)
