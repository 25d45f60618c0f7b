"""Every element has one owner, shares are even, and no rank asks another."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.capture.owners import OwnedBox, ReplicatedBox, owned_boxes
from ckpt.errors import UsageError
from ckpt.values import CHUNK_BYTES, Box

RANKS = 6

boxes = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), max_size=4).map(
    lambda dims: Box(tuple(offset for offset, _ in dims), tuple(size for _, size in dims))
)
replicas = st.sets(st.integers(0, RANKS - 1), min_size=1).map(lambda ranks: tuple(sorted(ranks)))
replicated = st.builds(ReplicatedBox, boxes, st.sampled_from([1, 2, 4, 8, 16]), replicas)


def all_owned(leaves: list[ReplicatedBox]) -> dict[int, list[tuple[int, Box]]]:
    """Per leaf its owners; each rank is asked with only the leaves it holds."""
    found: dict[int, list[tuple[int, Box]]] = {index: [] for index in range(len(leaves))}
    for rank in range(RANKS):
        held = [index for index, leaf in enumerate(leaves) if rank in leaf.replicas]
        for one in owned_boxes([leaves[index] for index in held], rank=rank):
            found[held[one.index]].append((rank, one.box))
    return found


@pytest.mark.slow
@given(st.lists(replicated, max_size=12))
def test_every_element_is_owned_by_exactly_one_rank(leaves: list[ReplicatedBox]) -> None:
    for index, owners in all_owned(leaves).items():
        box = leaves[index].box
        count = np.zeros(box.sizes, dtype=int)
        for rank, mine in owners:
            assert rank in leaves[index].replicas
            low = [a - b for a, b in zip(mine.offsets, box.offsets, strict=True)]
            assert all(
                at >= 0 and at + n <= m for at, n, m in zip(low, mine.sizes, box.sizes, strict=True)
            )
            count[tuple(slice(at, at + n) for at, n in zip(low, mine.sizes, strict=True))] += 1
        assert (count == 1).all()
        if box.elements == 0:
            assert [rank for rank, _ in owners] == [min(leaves[index].replicas)]
        if not box.sizes:
            assert len(owners) == 1


@given(
    st.lists(st.tuples(st.integers(1, 400), st.integers(1, 300_000)), min_size=1, max_size=8),
    st.integers(1, RANKS),
)
def test_shares_differ_by_a_row_or_one_percent(shapes: list[tuple[int, int]], ranks: int) -> None:
    leaves = [ReplicatedBox(Box.whole(shape), 4, tuple(range(ranks))) for shape in shapes]
    shares = [
        sum(one.box.elements * 4 for one in owned_boxes(leaves, rank=rank)) for rank in range(ranks)
    ]
    total = sum(leaf.box.elements * 4 for leaf in leaves)
    row = max((cols if rows > 1 else 1) * 4 for rows, cols in shapes)
    assert sum(shares) == total
    assert all(abs(share - total / ranks) <= max(row, total / ranks / 100) + 1 for share in shares)


def test_cuts_fall_on_the_chunk_grid_where_it_costs_little() -> None:
    leaf = ReplicatedBox(Box.whole((1 << 18, 1024)), 4, (0, 1, 2))
    starts = [owned_boxes([leaf], rank=rank)[0].box.offsets[0] * 4096 for rank in range(3)]
    assert all(start % CHUNK_BYTES == 0 for start in starts)


def test_cuts_fall_on_leaf_ends_where_it_costs_little() -> None:
    leaves = [
        ReplicatedBox(Box.whole((1 << 20,)), 4, (0, 1)),
        ReplicatedBox(Box.whole(((1 << 20) + 5,)), 4, (0, 1)),
    ]
    assert owned_boxes(leaves, rank=0) == [OwnedBox(0, leaves[0].box)]
    assert owned_boxes(leaves, rank=1) == [OwnedBox(1, leaves[1].box)]


def test_a_small_leaf_more_moves_no_chunk() -> None:
    big = [ReplicatedBox(Box.whole((1 << 16, 1024)), 4, (0, 1)) for _ in range(3)]
    small = ReplicatedBox(Box.whole((1000,)), 4, (0, 1))
    before, after = owned_boxes(big, rank=1), owned_boxes([small, *big], rank=1)
    assert [one.box for one in before] == [one.box for one in after]


def test_the_first_dimension_longer_than_one_is_cut() -> None:
    leaf = ReplicatedBox(Box((3, 0, 0), (1, 4, 2)), 4, (1, 2))
    assert owned_boxes([leaf], rank=1) == [OwnedBox(0, Box((3, 0, 0), (1, 2, 2)))]
    assert owned_boxes([leaf], rank=2) == [OwnedBox(0, Box((3, 2, 0), (1, 2, 2)))]


def test_a_leaf_of_other_ranks_is_refused() -> None:
    with pytest.raises(UsageError, match="replicas"):
        owned_boxes([ReplicatedBox(Box.whole((4,)), 4, (1, 2))], rank=0)
