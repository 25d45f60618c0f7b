"""Each new chunk lies in one pack, once, where the plan says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.save.chunks import GAP_BYTES_MAX, Chunk, PackPlan, new_chunks, plan_packs, raw_offsets
from ckpt.values import (
    CHUNK_BYTES,
    PAGE_BYTES,
    Box,
    Leaf,
    LeafKind,
    SnapshotId,
    StagedIndex,
    StagedShard,
)


def shard(name: str, offset: int, size: int, *digests: bytes, dtype: str = "uint8") -> StagedShard:
    leaf = Leaf(name=name, kind=LeafKind.TENSOR, dtype=dtype, shape=(size,))
    return StagedShard(
        leaf=leaf, box=Box.whole((size,)), offset_bytes=offset, size_bytes=size, digests=digests
    )


def staged(*shards: StagedShard) -> StagedIndex:
    return StagedIndex(snapshot=SnapshotId(0, 0), rank=0, world_size=1, shards=shards)


def test_known_and_repeated_chunks_are_references() -> None:
    found = new_chunks(
        staged(
            shard("b", 2 * CHUNK_BYTES, CHUNK_BYTES, b"known"),
            shard("c", 3 * CHUNK_BYTES, 9, b"twice"),
            shard("a.weight", 0, CHUNK_BYTES + 9, b"first", b"twice", dtype="float16"),
            shard("empty", 0, 0),
        ),
        {b"known"},
    )
    assert [(c.digest, c.offset_bytes, c.raw_bytes, c.itemsize_bytes) for c in found] == [
        (b"first", 0, CHUNK_BYTES, 2),
        (b"twice", 3 * CHUNK_BYTES, 9, 1),
    ]
    assert found[0].kind == "float16/weight"


chunks = st.lists(
    st.tuples(st.integers(0, 5 * PAGE_BYTES), st.integers(1, 3 * PAGE_BYTES)), max_size=20
)


@pytest.mark.slow
@given(
    chunks,
    st.integers(PAGE_BYTES, 20 * PAGE_BYTES),
    st.integers(PAGE_BYTES, 20 * PAGE_BYTES) | st.none(),
)
def test_packs_hold_each_chunk_where_they_say(
    spans: list[tuple[int, int]], most: int, first: int | None
) -> None:
    given_chunks: list[Chunk] = []
    at = 0
    for number, (gap, size) in enumerate(spans):
        at += gap
        given_chunks.append(Chunk(number.to_bytes(16, "big"), at, size, 1, "w", "k"))
        at += size
    slot = bytes(i * 7 % 251 for i in range(at))
    packs = plan_packs(
        given_chunks, data_bytes=len(slot), pack_bytes_max=most, first_bytes_max=first
    )
    assert [chunk for pack in packs for chunk in pack.chunks] == given_chunks
    for number, pack in enumerate(packs):
        check(pack, slot)
        limit = min(most, first) if number == 0 and first is not None else most
        assert pack.size_bytes <= limit or len(pack.chunks) == 1
    limit = min(most, first or most)
    padded = sum(chunk.raw_bytes + 2 * PAGE_BYTES + GAP_BYTES_MAX for chunk in given_chunks)
    assert len(packs) <= 1 + 2 * padded // limit


def check(pack: PackPlan, slot: bytes) -> None:
    body = b"".join(slot[extent.start : extent.stop] for extent in pack.extents)
    assert len(body) == pack.size_bytes
    for chunk, offset in zip(pack.chunks, raw_offsets(pack), strict=True):
        expected = slot[chunk.offset_bytes : chunk.offset_bytes + chunk.raw_bytes]
        assert body[offset : offset + chunk.raw_bytes] == expected
    for extent in pack.extents:
        assert extent.start % PAGE_BYTES == 0
        assert extent.stop % PAGE_BYTES == 0 or extent.stop == len(slot)
    for before, after in zip(pack.extents, pack.extents[1:], strict=False):
        assert after.start > before.stop + GAP_BYTES_MAX


def test_neighbours_make_one_extent_and_far_ones_two() -> None:
    near = [Chunk(b"a", 0, 100, 1, "w", "k"), Chunk(b"b", 128, 100, 1, "w", "k")]
    far = Chunk(b"c", 20 * PAGE_BYTES, 5, 1, "w", "k")
    (pack,) = plan_packs([*near, far], data_bytes=21 * PAGE_BYTES)
    assert [(extent.start, extent.stop) for extent in pack.extents] == [
        (0, PAGE_BYTES),
        (20 * PAGE_BYTES, 21 * PAGE_BYTES),
    ]
    assert raw_offsets(pack) == [0, 128, PAGE_BYTES]
