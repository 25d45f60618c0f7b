"""One pair for all nodes: named, kept by all, then the next."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ckpt.keeper.mirrors.plan import MirrorReport, MirrorRound, next_round, retained_mirrors
from ckpt.values import SnapshotId

P1, P2, P3 = SnapshotId(1, 1), SnapshotId(1, 2), SnapshotId(1, 3)


def test_newest_pair_is_named_first_and_nothing_before_there_is_one() -> None:
    assert next_round(MirrorRound(), [MirrorReport(), None], None) == MirrorRound()
    assert next_round(MirrorRound(), [MirrorReport(), None], P1) == MirrorRound(named=P1)


def test_next_pair_is_named_only_when_all_have_the_last_one() -> None:
    now = MirrorRound(named=P1)
    assert next_round(now, [MirrorReport(mirrored=P1), MirrorReport()], P2) == now
    assert next_round(now, [MirrorReport(mirrored=P1), None], P2) == now
    assert next_round(
        now, [MirrorReport(mirrored=P1), MirrorReport(mirrored=P1)], P2
    ) == MirrorRound(named=P2, kept=P1)
    assert next_round(now, [MirrorReport(mirrored=P1)] * 2, P1) == MirrorRound(named=P1, kept=P1)


def test_pair_that_a_node_could_not_keep_is_passed_over_and_what_all_have_stays() -> None:
    now = MirrorRound(named=P2, kept=P1)
    assert next_round(
        now, [MirrorReport(mirrored=P2), MirrorReport(mirrored=P1, missed=P2)], P3
    ) == MirrorRound(named=P3, kept=P1)
    assert (
        next_round(now, [MirrorReport(mirrored=P2), MirrorReport(mirrored=P1, missed=P2)], P2)
        == now
    )  # until there is a newer one


def test_what_was_there_when_the_epoch_began_stays_until_something_is_kept() -> None:
    assert retained_mirrors(MirrorRound(named=P3), frozenset({P1, P2})) == {P1, P2, P3}
    assert retained_mirrors(MirrorRound(named=P3, kept=P2), frozenset({P1})) == {P2, P3}
    assert retained_mirrors(MirrorRound(), frozenset({P1})) == {P1}


class Node:
    """What one node has kept of the rounds it was told of, some words later than they were said."""

    def __init__(self, before: frozenset[SnapshotId]) -> None:
        self.before = before
        self.round = MirrorRound()
        self.word = MirrorReport()
        self.has = set(before)

    def hear(self, now: MirrorRound) -> None:
        self.round = now
        self.has &= retained_mirrors(now, self.before)

    def keep(self, *, can: bool) -> None:
        named = self.round.named
        if named is None or named in (self.word.mirrored, self.word.missed):
            return
        if can:
            self.has.add(named)
            self.word = MirrorReport(named, self.word.missed)
        else:
            self.word = MirrorReport(self.word.mirrored, named)


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from(["hear", "keep", "miss", "step", "lead"])),
        max_size=200,
    )
)
def test_some_pair_is_on_all_nodes_at_every_moment(happens: list[tuple[int, str]]) -> None:
    old = SnapshotId(1, 0)
    nodes = [Node(frozenset({old})) for _ in range(3)]
    heard: list[MirrorReport | None] = [None] * 3
    now, step = MirrorRound(), 1
    for number, what in happens:
        node = nodes[number]
        match what:
            case "hear":
                node.hear(now)
            case "keep" | "miss":
                node.keep(can=what == "keep")
                heard[number] = node.word
            case "step":
                step += 1
            case "lead":
                now = next_round(now, heard, SnapshotId(1, step))
        common = set.intersection(*(one.has for one in nodes))
        assert common, "after a loss nothing would be whole"
        if now.kept is not None:
            assert now.kept in common
