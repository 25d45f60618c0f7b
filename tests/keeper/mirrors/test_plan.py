"""Which pairs are complete over all nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.cluster.mesh.messages import InventoryEntry, MeshSources
from ckpt.keeper.mirrors.plan import (
    SNAPSHOTS_MAX,
    WORLD_MAX,
    MemorySnapshot,
    SourceRange,
    complete_snapshots,
    from_message,
    merge_ranges,
    missing_ranks,
    to_message,
)
from ckpt.values import SnapshotId

P1, P2 = SnapshotId(1, 10), SnapshotId(1, 20)


def held(
    snapshot: SnapshotId,
    rank: int,
    *,
    size: int = 2,
    origin: str = "o",
    mirror: bool = False,
    ranks: int = 1,
) -> InventoryEntry:
    return InventoryEntry(
        snapshot=snapshot, origin=origin, world_size=size, rank=rank, ranks=ranks, mirror=mirror
    )


def test_pair_is_complete_where_every_rank_is_somewhere_newest_first() -> None:
    found = complete_snapshots({"a": [held(P1, 0), held(P2, 0)], "b": [held(P1, 1), held(P2, 1)]})
    assert [pair.snapshot for pair in found] == [P2, P1]
    assert found[0].sources == (("a",), ("b",))


def test_share_that_nobody_has_leaves_a_pair_incomplete_and_is_named() -> None:
    there = {"a": [held(P1, 0, size=3), held(P2, 0, size=3)], "b": [held(P2, 2, size=3)]}
    assert complete_snapshots(there) == []
    assert missing_ranks(there) == {P2: (range(1, 2),), P1: (range(1, 3),)}


def test_slots_come_before_mirrors() -> None:
    found = complete_snapshots(
        {"a": [held(P1, 0), held(P1, 1, mirror=True)], "b": [held(P1, 1), held(P1, 0, mirror=True)]}
    )
    assert found[0].sources == (("a", "b"), ("b", "a"))


def test_mirrors_complete_what_a_lost_node_had() -> None:
    assert complete_snapshots({"a": [held(P1, 0), held(P1, 1, mirror=True)]})[0].sources == (
        ("a",),
        ("a",),
    )


def test_equal_numbers_of_two_openings_or_worlds_make_no_pair() -> None:
    assert (
        complete_snapshots({"a": [held(P1, 0, origin="x")], "b": [held(P1, 1, origin="y")]}) == []
    )
    assert complete_snapshots({"a": [held(P1, 0, size=2)], "b": [held(P1, 1, size=3)]}) == []


def test_rank_beyond_its_world_counts_for_nothing() -> None:
    assert complete_snapshots({"a": [held(P1, 0, size=1), held(P1, 7, size=1)]})[0].sources == (
        ("a",),
    )


def test_node_that_has_a_share_in_a_slot_and_as_a_mirror_is_named_once() -> None:
    assert complete_snapshots({"a": [held(P1, 0, size=1), held(P1, 0, size=1, mirror=True)]})[
        0
    ].sources == (("a",),)


@pytest.mark.parametrize(
    ("rank", "ranks", "size"), [(-1, 2, 2), (0, 0, 2), (0, 3, 2), (0, -1, 2), (0, 1, WORLD_MAX + 1)]
)
def test_what_can_not_be_counts_for_nothing(rank: int, ranks: int, size: int) -> None:
    there = {"a": [held(P1, 0), held(P1, 1)], "b": [held(P1, rank, ranks=ranks, size=size)]}
    assert complete_snapshots(there)[0].sources == (("a",), ("a",))


ids = st.builds(SnapshotId, st.integers(1, 2), st.integers(0, 12))


@st.composite
def holding(draw: st.DrawFn) -> InventoryEntry:
    size = draw(st.integers(1, 6))
    rank = draw(st.integers(0, size - 1))
    ranks = draw(st.integers(1, size - rank))
    return held(
        draw(ids),
        rank,
        size=size,
        origin=draw(st.sampled_from("xy")),
        mirror=draw(st.booleans()),
        ranks=ranks,
    )


holdings = st.lists(holding(), max_size=20)
nodes = st.dictionaries(st.sampled_from("abc"), holdings)


def said(
    there: Mapping[str, Sequence[InventoryEntry]],
) -> dict[tuple[SnapshotId, str, int], dict[int, list[tuple[bool, str]]]]:
    """Rank by rank: who has it, and how."""
    found: dict[tuple[SnapshotId, str, int], dict[int, list[tuple[bool, str]]]] = {}
    for node, some in there.items():
        for one in some:
            for rank in range(one.rank, one.rank + one.ranks):
                ranks = found.setdefault((one.snapshot, one.origin, one.world_size), {})
                ranks.setdefault(rank, []).append((one.mirror, node))
    return found


@pytest.mark.slow
@settings(deadline=None)
@given(nodes)
def test_what_is_complete_is_held_by_those_that_it_names(
    there: dict[str, list[InventoryEntry]],
) -> None:
    found = complete_snapshots(there)
    all_ranks = {key: ranks for key, ranks in said(there).items() if len(ranks) == key[2]}
    assert [(one.snapshot, one.origin, one.world_size) for one in found] == sorted(
        all_ranks, reverse=True
    )[:SNAPSHOTS_MAX]
    for pair in found:
        ranks = all_ranks[pair.snapshot, pair.origin, pair.world_size]
        for rank, named in enumerate(pair.sources):
            assert list(named) == list(dict.fromkeys(node for _, node in sorted(ranks[rank])))
        assert all(one.nodes != other.nodes for one, other in pairwise(pair.spans)), (
            "no span could be longer"
        )


@pytest.mark.slow
@settings(deadline=None)
@given(nodes)
def test_spans_say_what_ranks_say(there: dict[str, list[InventoryEntry]]) -> None:
    short = {node: merge_ranges(some) for node, some in there.items()}
    assert complete_snapshots(short) == complete_snapshots(there)
    assert missing_ranks(short) == missing_ranks(there)
    for node, some in short.items():
        assert len(some) <= len(there[node])
        assert {
            key: {rank: set(who) for rank, who in ranks.items()}
            for key, ranks in said({node: some}).items()
        } == {
            key: {rank: set(who) for rank, who in ranks.items()}
            for key, ranks in said({node: there[node]}).items()
        }
        kinds = [(one.snapshot, one.origin, one.world_size, one.mirror) for one in some]
        for kind in set(kinds):
            its = sorted(
                (one.rank, one.rank + one.ranks)
                for one, its in zip(some, kinds, strict=True)
                if its == kind
            )
            assert all(end < start for (_, end), (start, _) in pairwise(its)), (
                "joined as far as can be"
            )


@pytest.mark.slow
@settings(deadline=None)
@given(nodes)
def test_ranks_that_nobody_has_are_lost(there: dict[str, list[InventoryEntry]]) -> None:
    for pair, missing in missing_ranks(there).items():
        assert all(missing), "no empty range"
        sizes = {one.world_size for some in there.values() for one in some if one.snapshot == pair}
        assert max(ranks.stop for ranks in missing) <= max(sizes)


@pytest.mark.slow
@settings(deadline=None)
@given(nodes)
def test_plan_comes_over_a_line_as_it_was(there: dict[str, list[InventoryEntry]]) -> None:
    pairs = complete_snapshots(there)
    word = msgspec.msgpack.decode(msgspec.msgpack.encode(to_message(7, pairs)), type=MeshSources)
    assert word.attempt == 7
    first: dict[SnapshotId, MemorySnapshot] = {}
    for pair in pairs:
        first.setdefault(pair.snapshot, pair)
    assert from_message(word) == {snapshot: pair.spans for snapshot, pair in first.items()}


@pytest.mark.parametrize(
    "spans",
    [
        ((2, ()),),
        ((1, (0,)),),
        ((3, (0,)),),
        ((0, (0,)), (2, (1,))),
        ((-1, (0,)), (3, (0,))),
        ((2, (2,)),),
        ((2, (-1,)),),
        (),
    ],
)
def test_pair_that_a_word_contradicts_itself_about_is_none(
    spans: tuple[tuple[int, tuple[int, ...]], ...],
) -> None:
    sound = (P2, 2, ((2, (0, 1)),))
    word = MeshSources(attempt=1, nodes=("a", "b"), pairs=((P1, 2, spans), sound))
    assert from_message(word) == {P2: (SourceRange(2, ("a", "b")),)}
