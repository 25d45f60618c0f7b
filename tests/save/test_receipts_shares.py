"""Shares of ranks make one snapshot exactly where every element of every leaf is there once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.save.receipts import shares_problem
from ckpt.values import Box, Leaf, LeafKind, SnapshotId, StagedIndex, StagedShard

PAIR = SnapshotId(1, 2)


def _leaf(name: str, shape: tuple[int, ...], rank: int | None = None) -> Leaf:
    return Leaf(name=name, kind=LeafKind.TENSOR, dtype="uint8", shape=shape, rank=rank)


def _shard(leaf: Leaf, box: Box) -> StagedShard:
    return StagedShard(leaf=leaf, box=box, offset_bytes=0, size_bytes=box.elements)


def _indexes(shards: Sequence[Sequence[StagedShard]]) -> list[StagedIndex]:
    return [
        StagedIndex(snapshot=PAIR, rank=rank, world_size=len(shards), shards=tuple(own))
        for rank, own in enumerate(shards)
    ]


def _boxes(shape: tuple[int, int]) -> Iterator[Box]:
    spans = [
        [(at, size) for at in range(length) for size in range(length - at + 1)] for length in shape
    ]
    for (row, rows), (column, columns) in itertools.product(*spans):
        yield Box((row, column), (rows, columns))


def test_two_boxes_fit_exactly_where_each_element_is_there_once() -> None:
    shape = (2, 3)
    leaf = _leaf("w", shape)
    fits = 0
    for boxes in itertools.product(_boxes(shape), repeat=2):
        counts = dict.fromkeys(itertools.product(range(2), range(3)), 0)
        for box in boxes:
            for cell in itertools.product(
                *(range(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
            ):
                counts[cell] += 1
        once = set(counts.values()) == {1}
        found = shares_problem(_indexes([[_shard(leaf, box)] for box in boxes]))
        assert (found is None) == once, (boxes, found)
        fits += once
    assert fits > 10


@given(cuts=st.lists(st.integers(0, 12), min_size=1, max_size=5), lost=st.integers(0, 5))
def test_cut_rows_fit_until_one_share_is_lost_or_held_twice(cuts: list[int], lost: int) -> None:
    edges = [0, *sorted(cuts), 12]
    leaf = _leaf("w", (12, 2))
    shards = [[_shard(leaf, Box((a, 0), (b - a, 2)))] for a, b in itertools.pairwise(edges)]
    assert shares_problem(_indexes(shards)) is None
    some = lost % len(shards)
    if shards[some][0].size_bytes:
        twice = [*shards[:some], shards[some] * 2, *shards[some + 1 :]]
        assert "overlap" in (shares_problem(_indexes(twice)) or "")
        if len(shards) > 1 and shards[some][0].size_bytes < 24:
            assert "gap" in (
                shares_problem(_indexes([*shards[:some], [], *shards[some + 1 :]])) or ""
            )


def test_leaves_of_single_ranks_and_without_elements_fit() -> None:
    own = [_leaf("rng", (4,), rank) for rank in range(2)]
    empty = _leaf("none", (0, 3))
    shards = [[_shard(leaf, Box.whole((4,))), _shard(empty, Box.whole((0, 3)))] for leaf in own]
    assert shares_problem(_indexes(shards)) is None


def _two() -> list[StagedIndex]:
    leaf = _leaf("w", (2,))
    return _indexes([[_shard(leaf, Box((rank,), (1,)))] for rank in range(2)])


@pytest.mark.parametrize(
    ("indexes", "why"),
    [
        ([], "different snapshots. snapshots=none"),
        (
            [_two()[0], replace(_two()[1], snapshot=SnapshotId(1, 3))],
            "different snapshots. snapshots=epoch 1 step 2, ep",
        ),
        (
            [replace(_two()[0], snapshot=SnapshotId(1, step)) for step in (9, 5, 7, 2)],
            "snapshots=epoch 1 step 2, epoch 1 step 5, epoch 1 step 7, epoch 1 step 9",
        ),
        ([_two()[1], _two()[0]], "other ranks"),
        (_two()[:1], "another size"),
        (
            [_two()[0], replace(_two()[1], shards=(_shard(_leaf("w", (3,)), Box((1,), (1,))),))],
            "disagree on a leaf",
        ),
    ],
)
def test_slots_that_are_no_snapshot_say_why(indexes: list[StagedIndex], why: str) -> None:
    assert why in (shares_problem(indexes) or "")
