"""Who holds whose mirror: all small jobs, and what holds for any."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.cluster.membership.mirrors import MirrorPlacement, RankHolder, place_mirrors
from ckpt.errors import UsageError


def job(domains: Sequence[str], groups: Sequence[str] = ()) -> list[RankHolder]:
    """Nodes n00, n01, ... in these domains."""
    return [
        RankHolder(f"n{number:02d}", domain, groups[number] if groups else "")
        for number, domain in enumerate(domains)
    ]


def suffice(holders: Sequence[RankHolder], mirrors: int) -> bool:
    greatest = max(Counter(holder.domain for holder in holders).values())
    return greatest <= len(holders) // (mirrors + 1)


def check(holders: Sequence[RankHolder], mirrors: int, placed: MirrorPlacement) -> None:
    count = min(mirrors, len(holders) - 1)
    domains = {holder.node: holder.domain for holder in holders}
    assert set(placed) == set(domains)
    apart = suffice(holders, count)
    for node, peers in placed.items():
        assert len(peers) == count
        assert len({node, *peers}) == count + 1  # so any ``count`` losses leave a copy
        assert set(peers) <= set(domains)
        if apart:
            assert len({domains[one] for one in (node, *peers)}) == count + 1
    loads = Counter(peer for peers in placed.values() for peer in peers)
    assert max(loads[node] for node in domains) - min(loads[node] for node in domains) <= 1


def moves(before: MirrorPlacement, placed: MirrorPlacement) -> int:
    """How many mirrors are made anew."""
    return sum(len(set(peers) - set(before.get(node, ()))) for node, peers in placed.items())


def partitions(total: int, most: int) -> list[list[int]]:
    if total == 0:
        return [[]]
    return [
        [first, *rest]
        for first in range(min(total, most), 0, -1)
        for rest in partitions(total - first, first)
    ]


@pytest.mark.parametrize("mirrors", [1, 2, 3])
def test_every_shape_of_domains(mirrors: int) -> None:
    """All ways to spread up to ten nodes over domains; then each node is lost, and then one
    comes."""
    for count in range(1, 11 if mirrors < 3 else 10):
        for shape in partitions(count, count):
            holders = job([f"d{number}" for number, size in enumerate(shape) for _ in range(size)])
            placed = place_mirrors(holders, mirrors)
            check(holders, mirrors, placed)
            assert place_mirrors(holders, mirrors, before=placed) == placed
            for lost in holders:
                left = [holder for holder in holders if holder != lost]
                if left:
                    check(left, mirrors, place_mirrors(left, mirrors, before=placed))
            more = [*holders, RankHolder("new", "d0")]
            check(more, mirrors, place_mirrors(more, mirrors, before=placed))


@pytest.mark.parametrize(("nodes", "mirrors"), [(4, 1), (6, 2), (12, 2), (12, 3), (8, 1)])
def test_groups_hold_each_other_where_they_come_out_even(nodes: int, mirrors: int) -> None:
    placed = place_mirrors(job([f"d{number}" for number in range(nodes)]), mirrors)
    sets = Counter(frozenset((node, *peers)) for node, peers in placed.items())
    assert set(sets.values()) == {mirrors + 1}
    assert len(sets) == nodes // (mirrors + 1)


def test_otherwise_there_are_groups_and_one_ring() -> None:
    placed = place_mirrors(job([f"d{number}" for number in range(9)]), 1)
    pairs = [node for node, (peer,) in placed.items() if placed[peer] == (node,)]
    ring = [node for node in placed if node not in pairs]
    assert (len(pairs), len(ring)) == (6, 3)


def test_fewer_nodes_than_mirrors_hold_all() -> None:
    assert place_mirrors(job(["a", "a"]), 5) == {"n00": ("n01",), "n01": ("n00",)}
    assert place_mirrors(job(["a"]), 5) == {"n00": ()}
    assert place_mirrors(job("ab"), 0) == {"n00": (), "n01": ()}
    assert place_mirrors([], 1) == {}


def test_what_can_not_be_placed_is_refused() -> None:
    with pytest.raises(UsageError):
        place_mirrors([RankHolder("a", "x"), RankHolder("a", "y")], 1)
    with pytest.raises(UsageError):
        place_mirrors(job("ab"), -1)


def test_a_node_that_takes_over_moves_nothing_else() -> None:
    holders = job("aabbccdd")
    placed = place_mirrors(holders, 1)
    after = [RankHolder("new", "a"), *holders[1:]]
    name = {"n00": "new"}
    was = {
        name.get(node, node): tuple(name.get(peer, peer) for peer in peers)
        for node, peers in placed.items()
    }
    assert place_mirrors(after, 1, before=was) == dict(sorted(was.items()))


def test_after_a_loss_only_what_must_move_moves() -> None:
    """One pair's half is lost: its other half needs a peer, and so does whoever that one then
    displaces."""
    for nodes in range(4, 20, 2):
        holders = job([f"d{number}" for number in range(nodes)])
        placed = place_mirrors(holders, 1)
        assert moves(placed, place_mirrors(holders[1:], 1, before=placed)) == 2


@st.composite
def jobs(draw: st.DrawFn) -> tuple[list[RankHolder], int]:
    count = draw(st.integers(1, 40))
    kinds = draw(st.integers(1, 12))
    domains = [f"d{draw(st.integers(0, kinds))}" for _ in range(count)]
    groups = [f"g{draw(st.integers(0, 3))}" for _ in range(count)]
    return job(domains, groups if draw(st.booleans()) else ()), draw(st.integers(1, 4))


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(jobs(), st.data())
def test_what_holds_for_any_job_also_after_losses(
    case: tuple[list[RankHolder], int], data: st.DataObject
) -> None:
    holders, mirrors = case
    placed = place_mirrors(holders, mirrors)
    check(holders, mirrors, placed)
    assert placed == place_mirrors(holders[::-1], mirrors)
    lost = data.draw(
        st.sets(st.sampled_from([holder.node for holder in holders]), max_size=len(holders) - 1)
    )
    left = [holder for holder in holders if holder.node not in lost]
    after = place_mirrors(left, mirrors, before=placed)
    check(left, mirrors, after)
    assert place_mirrors(left, mirrors, before=after) == after


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.integers(2, 5), st.integers(1, 2))
def test_no_node_has_all_its_copies_inside_its_parallel_group(
    per_group: int, count: int, mirrors: int
) -> None:
    """Groups of neighbours, as pipelines are, every node its own domain."""
    nodes = per_group * count
    holders = job(
        [f"d{number:02d}" for number in range(nodes)],
        [f"g{number // per_group}" for number in range(nodes)],
    )
    group = {holder.node: holder.group for holder in holders}
    for node, peers in place_mirrors(holders, mirrors).items():
        assert any(group[peer] != group[node] for peer in peers)


def test_any_losses_up_to_the_number_of_mirrors_leave_a_copy_of_everything() -> None:
    for nodes, mirrors in itertools.product(range(2, 8), (1, 2, 3)):
        placed = place_mirrors(job([f"d{number}" for number in range(nodes)]), mirrors)
        for lost in itertools.combinations(placed, min(mirrors, nodes - 1)):
            for node, peers in placed.items():
                assert {node, *peers} - set(lost)


@pytest.mark.slow
def test_a_job_of_many_nodes_is_placed_and_repaired_quickly_enough() -> None:
    holders = [
        RankHolder(f"n{number:05d}", f"rack{number // 16:04d}", f"p{number // 64}")
        for number in range(4_000)
    ]
    placed = place_mirrors(holders, 1)
    check(holders, 1, placed)
    left = holders[:100] + holders[116:]  # a rack is lost
    after = place_mirrors(left, 1, before=placed)
    check(left, 1, after)
    assert moves(placed, after) <= 3 * 16
