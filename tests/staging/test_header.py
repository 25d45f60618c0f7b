"""A reader of foreign memory believes nothing: it answers None, the index, or IntegrityError."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.errors import IntegrityError
from ckpt.staging.header import MAGIC, Header, handed_in, read_slot
from ckpt.values import Box, Leaf, LeafKind, SnapshotId, StagedIndex, StagedShard

SIZE = 3 * 4096
LEAF = Leaf(name="model/w", kind=LeafKind.TENSOR, dtype="float32", shape=(2, 3))
SHARD = StagedShard(
    leaf=LEAF, box=Box((1, 0), (1, 3)), offset_bytes=64, size_bytes=12, digests=(b"d" * 16,)
)
INDEX = StagedIndex(
    snapshot=SnapshotId(3, 5), rank=0, world_size=2, shards=(SHARD,), metadata={"a": None, "b": 1.5}
)


def sealed(index: StagedIndex = INDEX) -> bytearray:
    memory = bytearray(SIZE)
    header = Header(memoryview(memory), header_bytes=8192)
    header.begin()
    header.seal(index)
    return memory


@given(st.integers(0, 64 + 400), st.integers(0, 7))
def test_flipped_bit_never_changes_what_is_read(at: int, bit: int) -> None:
    memory = sealed()
    memory[at] ^= 1 << bit
    try:
        found = read_slot(memoryview(memory))
    except IntegrityError:
        return
    assert found is None or found == (INDEX, 1)


@given(st.binary(max_size=300), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_forged_header_is_refused_without_allocating(
    body: bytes, lengths: int, index_bytes: int
) -> None:
    memory = bytearray(SIZE)
    words = memoryview(memory)[:64].cast("Q")
    words[0], words[1], words[2], words[3], words[4], words[5] = (
        MAGIC,
        1,
        3,
        8192,
        lengths,
        index_bytes,
    )
    memory[64 : 64 + len(body)] = body
    with pytest.raises(IntegrityError):
        read_slot(memoryview(memory))


@pytest.mark.parametrize(
    "bad",
    [
        replace(INDEX, rank=2),
        replace(INDEX, snapshot=SnapshotId(-1, 5)),
        replace(INDEX, shards=(replace(SHARD, offset_bytes=4090),)),
        replace(INDEX, shards=(replace(SHARD, offset_bytes=-1),)),
        replace(INDEX, shards=(replace(SHARD, size_bytes=16),)),
        replace(INDEX, shards=(replace(SHARD, digests=()),)),
        replace(INDEX, shards=(replace(SHARD, digests=(b"d" * 15,)),)),
        replace(INDEX, shards=(replace(SHARD, box=Box((2, 0), (1, 3))),)),
        replace(INDEX, shards=(replace(SHARD, box=Box((0,), (3,))),)),
        replace(INDEX, shards=(replace(SHARD, leaf=replace(LEAF, dtype="object")),)),
        replace(INDEX, aliases=(LEAF,)),
    ],
)
def test_index_that_contradicts_itself_is_refused(bad: StagedIndex) -> None:
    with pytest.raises(IntegrityError, match="contradicts itself"):
        read_slot(memoryview(sealed(bad)))


def test_short_or_foreign_memory_holds_nothing() -> None:
    assert read_slot(memoryview(b"")) is None
    assert read_slot(memoryview(bytes(SIZE))) is None
    assert read_slot(memoryview(b"\xff" * SIZE)) is None


def test_truncated_slot_is_refused() -> None:
    with pytest.raises(IntegrityError, match="lengths differ"):
        read_slot(memoryview(sealed())[: 2 * 4096])


def test_mark_of_what_was_handed_in_is_read_until_the_slot_is_begun_again() -> None:
    memory = memoryview(sealed())
    assert handed_in(memory) is None
    header = Header(memory, header_bytes=8192)
    for tags in (("best", "last"), ()):
        assert header.hand_in(tags)
        assert handed_in(memory) == tags
        assert read_slot(memory) == (INDEX, 1)
    header.begin()
    assert handed_in(memory) is None
    header.seal(INDEX)
    assert handed_in(memory) is None, "a mark belongs to one generation"


def test_mark_that_has_no_room_is_not_written() -> None:
    memory = memoryview(sealed())
    before = bytes(memory)
    assert not Header(memory, header_bytes=8192).hand_in(("t" * 8192,))
    assert bytes(memory) == before


@given(st.integers(64, 64 + 600), st.integers(0, 7))
def test_flipped_bit_never_changes_a_mark(at: int, bit: int) -> None:
    memory = memoryview(sealed())
    Header(memory, header_bytes=8192).hand_in(("best",))
    memory[at] ^= 1 << bit
    try:
        assert handed_in(memory) in (("best",), None)
    except IntegrityError:
        return
