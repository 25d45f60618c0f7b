"""Whom and what the reason names where shares of ranks make no snapshot."""

from __future__ import annotations

from dataclasses import replace

from ckpt.save.receipts import shares_problem
from ckpt.values import Box, Leaf, LeafKind, SnapshotId, StagedIndex, StagedShard


def index(
    rank: int, box: Box, *, dtype: str = "uint8", origin: str = "x", world: int = 2
) -> StagedIndex:
    leaf = Leaf(name="model/w", kind=LeafKind.TENSOR, dtype=dtype, shape=(4,), rank=None)
    shard = StagedShard(leaf=leaf, box=box, offset_bytes=0, size_bytes=box.elements)
    return StagedIndex(
        snapshot=SnapshotId(1, 2), rank=rank, world_size=world, shards=(shard,), origin=origin
    )


def test_an_epoch_that_two_keepers_opened_under_one_number_is_no_snapshot() -> None:
    """Halves of two trainings: numbers and shapes fit, values do not."""
    one, other = index(0, Box((0,), (2,))), index(1, Box((2,), (2,)))
    assert shares_problem([one, other]) is None
    why = shares_problem([one, replace(other, origin="y")])
    assert why == "the ranks hold an epoch of the same number that was opened twice."


def test_the_leaf_that_does_not_fit_is_named() -> None:
    one = index(0, Box((0,), (2,)))
    assert (shares_problem([one, index(1, Box((2,), (2,)), dtype="int8")]) or "").endswith(
        "leaf='model/w'"
    )
    assert (shares_problem([one, index(1, Box((3,), (1,)))]) or "").endswith("leaf='model/w'")


def test_every_rank_is_there_once_and_knows_how_many_there_are() -> None:
    one, other = index(0, Box((0,), (2,))), index(1, Box((2,), (2,)))
    for wrong in ([one, one], [one, replace(other, world_size=3)], [one, replace(other, rank=2)]):
        assert "other ranks or of a world of another size. ranks=2" in (shares_problem(wrong) or "")
