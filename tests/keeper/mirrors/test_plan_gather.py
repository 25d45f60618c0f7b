"""Asking all nodes what they hold."""

from __future__ import annotations

from ckpt.cluster.mesh import messages as said
from ckpt.cluster.mesh.messages import InventoryEntry
from ckpt.keeper.mirrors.plan import WAIT_S, InventoryQuery
from ckpt.values import SnapshotId

MINE = InventoryEntry(snapshot=SnapshotId(1, 1), origin="o", world_size=2, rank=0)
THEIRS = InventoryEntry(snapshot=SnapshotId(1, 1), origin="o", world_size=2, rank=1)


class Told:
    """A gather whose lines to some nodes are down."""

    def __init__(self, *down: str) -> None:
        self.asked: dict[str, int] = {}
        self.answers: list[dict] = []  # type: ignore[type-arg]

        def say(node: str, word: said.MeshMessage) -> bool:
            assert isinstance(word, said.AskNodeInventory)
            self.asked[node] = word.call
            return node not in down

        self.gather = InventoryQuery(say)

    def ask(self, *nodes: str) -> None:
        self.gather.ask(nodes, ("me", [MINE]), 100.0, self.answers.append)

    def answer(self, node: str) -> None:
        self.gather.answered(
            node, said.NodeInventory(call=self.asked[node], holdings=(THEIRS,)), 100.1
        )


def test_alone_it_is_answered_at_once() -> None:
    told = Told()
    told.ask()
    assert told.answers == [{"me": [MINE]}]


def test_answered_when_all_have_spoken_or_are_lost() -> None:
    told = Told("down")
    told.ask("a", "b", "down")
    told.answer("a")
    assert told.answers == []
    told.gather.disconnected("b", 100.2)
    assert told.answers == [{"me": [MINE], "a": (THEIRS,)}]


def test_node_that_says_nothing_is_waited_for_so_long_and_no_longer() -> None:
    told = Told()
    told.ask("a", "mute")
    told.answer("a")
    assert told.gather.tick(100.0 + WAIT_S - 0.5) == 0.5
    assert told.answers == []
    told.gather.tick(100.0 + WAIT_S)
    assert len(told.answers) == 1
    told.answer("mute")  # too late, and no harm
    assert len(told.answers) == 1


def test_answers_belong_to_their_questions() -> None:
    told = Told()
    told.ask("a")
    first = dict(told.asked)
    told.ask("a")
    told.gather.answered("a", said.NodeInventory(call=first["a"], holdings=()), 100.1)
    assert told.answers == [{"me": [MINE], "a": ()}]
    told.gather.answered("stranger", said.NodeInventory(call=told.asked["a"], holdings=()), 100.1)
    assert len(told.answers) == 1
    told.answer("a")
    assert len(told.answers) == 2
