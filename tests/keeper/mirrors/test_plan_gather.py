"""Asking all nodes what they hold."""

from __future__ import annotations

from ckpt.cluster.mesh import messages as said
from ckpt.cluster.mesh.messages import InventoryEntry
from ckpt.keeper.mirrors.plan import RECONNECT_S, WAIT_S, WAIT_S_MAX, InventoryQuery
from ckpt.values import SnapshotId

MINE = InventoryEntry(snapshot=SnapshotId(1, 1), origin="o", world_size=2, rank=0)
WHOLE = InventoryEntry(snapshot=SnapshotId(1, 1), origin="o", world_size=1, rank=0)
THEIRS = InventoryEntry(snapshot=SnapshotId(1, 1), origin="o", world_size=2, rank=1)


class Told:
    """A gather whose lines to some nodes are down."""

    def __init__(self, *down: str) -> None:
        self.down = set(down)
        self.waits: list[list[str]] = []
        self.asked: dict[str, int] = {}
        self.answers: list[dict] = []  # type: ignore[type-arg]

        def say(node: str, word: said.MeshMessage) -> bool:
            assert isinstance(word, said.AskNodeInventory)
            self.asked[node] = word.call
            return node not in self.down

        self.gather = InventoryQuery(say, self.waits.append)  # type: ignore[arg-type]

    def ask(
        self, *nodes: str, mine: tuple[InventoryEntry, ...] = (WHOLE,), ranked: str = ""
    ) -> None:
        self.gather.ask(nodes, ("me", mine), 100.0, self.answers.append, ranked=ranked.split())

    def answer(self, node: str) -> None:
        self.gather.answered(
            node, said.NodeInventory(call=self.asked[node], holdings=(THEIRS,)), 100.1
        )


def test_alone_it_is_answered_at_once() -> None:
    told = Told()
    told.ask()
    assert told.answers == [{"me": (WHOLE,)}]


def test_answered_when_all_have_spoken_or_are_no_members_any_more() -> None:
    told = Told()
    told.ask("a", "b")
    told.answer("a")
    assert told.answers == []
    told.gather.keep_members(["a"], 100.2)
    assert told.answers == [{"me": (WHOLE,), "a": (THEIRS,)}]


def test_node_that_says_nothing_is_waited_for_so_long_if_all_is_there_without_it() -> None:
    told = Told()
    told.ask("mute")
    assert told.gather.tick(100.0 + WAIT_S - 0.5) == 0.5
    assert told.answers == []
    told.gather.tick(100.0 + WAIT_S)
    assert len(told.answers) == 1 and told.waits == []
    told.answer("mute")  # too late, and no harm
    assert len(told.answers) == 1


def test_node_that_may_have_what_is_missing_is_waited_for_and_named() -> None:
    told = Told()
    told.ask("slow", mine=(MINE,))
    told.gather.tick(100.0 + WAIT_S_MAX - 1.0)
    assert told.answers == [] and told.waits == [["slow"]]
    told.answer("slow")
    assert told.answers == [{"me": (MINE,), "slow": (THEIRS,)}]
    told.ask("mute", mine=(MINE,))
    told.gather.tick(100.0 + WAIT_S_MAX)
    assert len(told.answers) == 2


def test_node_whose_connection_broke_is_asked_again() -> None:
    told = Told()
    told.ask("a", mine=(MINE,), ranked="a")
    told.gather.disconnected("a", 100.1)
    assert told.answers == []
    told.asked.clear()
    told.gather.connected("a")
    told.answer("a")
    assert told.answers == [{"me": (MINE,), "a": (THEIRS,)}]


def test_node_that_was_not_connected_is_asked_once_it_is() -> None:
    told = Told("late")
    told.ask("late", mine=(MINE,), ranked="late")
    told.gather.tick(100.0 + WAIT_S + 1.0)
    assert told.answers == []
    told.down.clear()
    told.gather.connected("late")
    told.answer("late")
    assert told.answers == [{"me": (MINE,), "late": (THEIRS,)}]


def test_standby_that_nobody_reaches_holds_nobody_up() -> None:
    told = Told("stranger")
    told.ask("stranger")
    assert len(told.answers) == 1, "all is there"
    told.ask("stranger", mine=(MINE,))
    assert len(told.answers) == 1
    told.gather.tick(100.0 + RECONNECT_S)
    assert len(told.answers) == 2


def test_answers_belong_to_their_questions() -> None:
    told = Told()
    told.ask("a")
    first = dict(told.asked)
    told.ask("a")
    told.gather.answered("a", said.NodeInventory(call=first["a"], holdings=()), 100.1)
    assert told.answers == [{"me": (WHOLE,), "a": ()}]
    told.gather.answered("stranger", said.NodeInventory(call=told.asked["a"], holdings=()), 100.1)
    assert len(told.answers) == 1
    told.answer("a")
    assert len(told.answers) == 2
