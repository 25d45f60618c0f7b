"""Which pairs are complete over all nodes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ckpt.fleet.words import Holding
from ckpt.keeper.held import PAIRS_MAX, complete, lost
from ckpt.values import SnapshotId

P1, P2 = SnapshotId(1, 10), SnapshotId(1, 20)


def held(snapshot: SnapshotId, rank: int, *, size: int = 2, origin: str = "o", mirror: bool = False) -> Holding:
    return Holding(snapshot=snapshot, origin=origin, world_size=size, rank=rank, mirror=mirror)


def test_pair_is_complete_where_every_rank_is_somewhere_newest_first() -> None:
    found = complete({"a": [held(P1, 0), held(P2, 0)], "b": [held(P1, 1), held(P2, 1)]})
    assert [pair.snapshot for pair in found] == [P2, P1]
    assert found[0].sources == (("a",), ("b",))


def test_share_that_nobody_has_leaves_a_pair_incomplete_and_is_named() -> None:
    there = {"a": [held(P1, 0, size=3), held(P2, 0, size=3)], "b": [held(P2, 2, size=3)]}
    assert complete(there) == []
    assert lost(there) == {P2: (1,), P1: (1, 2)}


def test_slots_come_before_mirrors() -> None:
    found = complete({"a": [held(P1, 0), held(P1, 1, mirror=True)], "b": [held(P1, 1), held(P1, 0, mirror=True)]})
    assert found[0].sources == (("a", "b"), ("b", "a"))


def test_mirrors_complete_what_a_lost_node_had() -> None:
    assert complete({"a": [held(P1, 0), held(P1, 1, mirror=True)]})[0].sources == (("a",), ("a",))


def test_equal_numbers_of_two_openings_or_worlds_make_no_pair() -> None:
    assert complete({"a": [held(P1, 0, origin="x")], "b": [held(P1, 1, origin="y")]}) == []
    assert complete({"a": [held(P1, 0, size=2)], "b": [held(P1, 1, size=3)]}) == []


def test_rank_beyond_its_world_counts_for_nothing() -> None:
    assert complete({"a": [held(P1, 0, size=1), held(P1, 7, size=1)]})[0].sources == (("a",),)


ids = st.builds(SnapshotId, st.integers(1, 2), st.integers(0, 12))
holdings = st.lists(
    st.builds(
        lambda snapshot, size, rank, origin, mirror: held(snapshot, rank % size, size=size, origin=origin, mirror=mirror),
        ids, st.integers(1, 3), st.integers(0, 2), st.sampled_from("xy"), st.booleans(),
    ),
    max_size=20,
)  # fmt: skip


@given(st.dictionaries(st.sampled_from("abc"), holdings))
def test_what_is_complete_is_held_by_those_that_it_names(there: dict[str, list[Holding]]) -> None:
    found = complete(there)
    assert len(found) <= PAIRS_MAX
    assert [pair.snapshot for pair in found] == sorted((pair.snapshot for pair in found), reverse=True)
    for pair in found:
        assert len(pair.sources) == pair.world_size
        for rank, nodes in enumerate(pair.sources):
            assert nodes
            for node in nodes:
                wanted = (pair.snapshot, pair.origin, pair.world_size, rank)
                assert any((one.snapshot, one.origin, one.world_size, one.rank) == wanted for one in there[node])
