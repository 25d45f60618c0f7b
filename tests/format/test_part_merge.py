"""The parts of a node's ranks become one, in which nothing is lost or doubled."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.errors import UsageError
from ckpt.format import keys
from ckpt.format.part import Part, StoredShard, decode_part, encode_part, merge_parts
from ckpt.values import Box, ChunkLocation, Codec, Leaf, LeafKind, SnapshotId

PAIR = SnapshotId(3, 40)
WRITER = keys.writer_name("node-a", "0123456789abcdef")
TIED = Leaf(name="model/tied", kind=LeafKind.TENSOR, dtype="uint8", shape=(64,), alias_of="model/w")


def part(rank: int, *, world: int = 8) -> Part:
    """A row of a tensor that all share, an object of its own, and an alias."""
    whole = Leaf(name="model/w", kind=LeafKind.TENSOR, dtype="uint8", shape=(64,))
    own = Leaf(name="rng", kind=LeafKind.OBJECT, dtype="uint8", shape=(rank + 1,), rank=rank)
    writer = keys.writer_name("node-a", f"{rank:016x}")
    shards = []
    for leaf, box in ((whole, Box((rank * 8,), (8,))), (own, Box.whole(own.shape))):
        place = ChunkLocation(
            keys.pack_key(PAIR, writer, 0),
            4096 * len(shards),
            box.elements,
            box.elements,
            Codec.RAW,
        )
        digest = bytes([rank, len(shards)]) * 8
        shards.append(
            StoredShard(
                leaf=leaf, box=box, size_bytes=box.elements, digests=(digest,), locations=(place,)
            )
        )
    return Part(
        snapshot=PAIR,
        writer=writer,
        rank=rank,
        world_size=world,
        shards=tuple(shards),
        aliases=(TIED,),
    )


@settings(deadline=None)
@given(st.integers(0, 5), st.integers(1, 3), st.data())
def test_merged_part_is_stored_whole_whatever_was_merged_first(
    first: int, count: int, data: st.DataObject
) -> None:
    parts = [part(rank) for rank in range(first, first + count)]
    whole = merge_parts(parts, writer=WRITER)
    assert (whole.rank, whole.ranks, whole.writer) == (first, count, WRITER)
    assert whole.shards == tuple(shard for one in parts for shard in one.shards)
    assert whole.aliases == (TIED,)
    assert decode_part(encode_part(whole)) == whole
    if count > 1:
        cut = data.draw(st.integers(1, count - 1))
        halves = [merge_parts(some, writer=parts[0].writer) for some in (parts[:cut], parts[cut:])]
        assert merge_parts(halves, writer=WRITER) == whole


def test_shared_leaf_is_written_once_for_all_ranks() -> None:
    parts = [part(rank) for rank in range(8)]
    together = len(encode_part(merge_parts(parts, writer=WRITER)))
    assert together < sum(len(encode_part(one)) for one in parts) / 2


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [part(0), part(2)],
        [part(1), part(0)],
        [part(0), part(0)],
        [part(0), part(1, world=9)],
        [part(0), replace(part(1), snapshot=SnapshotId(3, 41))],
    ],
)
def test_parts_that_make_none_together_are_refused(parts: list[Part]) -> None:
    with pytest.raises(UsageError):
        merge_parts(parts, writer=WRITER)
