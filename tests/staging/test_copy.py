"""What is staged is bit for bit what the live tensors held, whatever their layout, dtype or
owner."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.errors import InternalError, UsageError
from ckpt.format.canonical import digest
from ckpt.staging.copy import CopyPlan, CopySource
from ckpt.staging.layout import lay_out
from ckpt.staging.slot import Slot, SlotPool, read_slot
from ckpt.values import (
    CHUNK_BYTES,
    DTYPE_BYTES,
    PAGE_BYTES,
    Box,
    Leaf,
    LeafKind,
    SnapshotId,
    StagedIndex,
    StagedShard,
)


@pytest.fixture(scope="module")
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as made:
        yield made


def source(name: str, tensor: torch.Tensor, *, owned: Box | None = None) -> CopySource:
    shape = tuple(tensor.shape)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return CopySource(
        Leaf(name=name, kind=LeafKind.TENSOR, dtype=dtype, shape=shape),
        Box.whole(shape),
        tensor,
        owned,
    )


def obj(name: str, data: bytes) -> CopySource:
    leaf = Leaf(name=name, kind=LeafKind.OBJECT, dtype="uint8", shape=(len(data),))
    return CopySource(leaf, Box.whole(leaf.shape), data)


def raw(tensor: torch.Tensor) -> bytes:
    """The tensor's logical elements in row-major order, lazy conjugation and negation done."""
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return bytes(dense.flatten().view(torch.uint8).numpy()) if dense.numel() else b""


def staged_bytes(slot: Slot, shard: StagedShard) -> bytes:
    data = bytes(slot.data[shard.offset_bytes : shard.offset_bytes + shard.size_bytes])
    pieces = [data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]
    assert shard.digests == tuple(digest(piece) for piece in pieces)
    return data


def begun(data_bytes: int) -> tuple[SlotPool, Slot]:
    pool = SlotPool(count=1, data_bytes=data_bytes, prefault=False)
    slot = pool.acquire()
    assert slot is not None
    slot.begin()
    return pool, slot


def stage(sources: Sequence[CopySource], executor: ThreadPoolExecutor | None = None) -> list[bytes]:
    plan = CopyPlan.build(sources)
    pool, slot = begun(plan.data_bytes)
    shards = plan.run(slot, executor=executor)
    slot.seal(StagedIndex(snapshot=SnapshotId(0, 0), rank=0, world_size=1, shards=shards))
    assert read_slot(slot.memory) is not None
    found = [staged_bytes(slot, shard) for shard in shards]
    pool.close()
    return found


@pytest.mark.parametrize("name", [name for name in DTYPE_BYTES if hasattr(torch, name)])
def test_every_bit_pattern_of_every_dtype_is_kept(name: str) -> None:
    dtype = getattr(torch, name)
    pattern = torch.arange(256, dtype=torch.uint8).repeat(16 * 8)
    if name == "bool":
        pattern = pattern % 2
    tensor = pattern.view(dtype)
    strided = tensor.view(-1, 16).t()
    plain, turned = stage([source("a", tensor), source("b", strided)])
    assert plain == bytes(pattern.numpy())
    itemsize = DTYPE_BYTES[name]
    expected = pattern.view(-1, 16, itemsize).transpose(0, 1).contiguous()
    assert turned == bytes(expected.flatten().numpy())


def test_lazy_conj_and_neg_are_stored_as_the_numbers_they_mean() -> None:
    base = torch.randn(9, 7, dtype=torch.complex64)
    conj, neg = base.conj(), torch._neg_view(base.real.clone())
    assert stage([source("c", conj), source("n", neg)]) == [raw(conj), raw(neg)]


def test_odd_layouts_are_stored_row_major() -> None:
    base = torch.randn(6, 8, 5, 3)
    tensors = [
        base.to(memory_format=torch.channels_last),
        base[::2, :, 1:4],
        base.select(1, 3),
        base[0, 0, 0, 0],
        torch.randn(1, 5).expand(4, 5),
        torch.empty(0, 3),
        torch.nn.Parameter(torch.randn(4, 4)),
    ]
    assert stage([source(f"t{i}", tensor) for i, tensor in enumerate(tensors)]) == [
        raw(t) for t in tensors
    ]


def test_large_tensors_are_shared_between_threads(executor: ThreadPoolExecutor) -> None:
    tensors = [
        torch.randn(11 << 20),
        torch.randn(3),
        torch.randn(3 << 20).view(-1, 1024).t(),
        torch.randn(CHUNK_BYTES // 4),
    ]
    assert stage([source(f"t{i}", t) for i, t in enumerate(tensors)], executor) == [
        raw(t) for t in tensors
    ]


def test_owned_part_alone_is_staged() -> None:
    tensor = torch.arange(60.0).view(1, 12, 5)
    leaf = Leaf(name="w", kind=LeafKind.TENSOR, dtype="float32", shape=(4, 12, 5))
    box, part = Box((2, 0, 0), (1, 12, 5)), Box((2, 4, 0), (1, 6, 5))
    plan = CopyPlan.build([CopySource(leaf, box, tensor, part)])
    pool, slot = begun(plan.data_bytes)
    (shard,) = plan.run(slot)
    assert shard.box == part
    assert staged_bytes(slot, shard) == raw(tensor[:, 4:10])
    pool.close()


def test_live_values_are_taken_at_each_run() -> None:
    tensor = torch.zeros(1000)
    plan = CopyPlan.build([source("w", tensor), obj("o", b"abc")])
    pool, slot = begun(plan.data_bytes)
    first = plan.run(slot)
    tensor += 1
    second = plan.run(slot, objects=[obj("o", b"longer than before")])
    assert staged_bytes(slot, second[0]) == raw(tensor)
    assert first[0].digests != second[0].digests
    assert staged_bytes(slot, second[1]) == b"longer than before"
    assert second[1].leaf.shape == (18,)
    pool.close()


def test_objects_of_any_length_lie_behind_the_tensors() -> None:
    datas = [b"", b"x", b"y" * PAGE_BYTES, b"z" * (CHUNK_BYTES + 5)]
    found = stage(
        [source("w", torch.randn(7)), *(obj(f"o{i}", data) for i, data in enumerate(datas))]
    )
    assert found[1:] == datas


def test_object_that_outgrew_the_slot_is_refused_before_a_byte_is_written() -> None:
    plan = CopyPlan.build([source("w", torch.ones(7)), obj("o", b"abc")])
    pool, slot = begun(plan.data_bytes)
    large = obj("o", b"x" * 2 * plan.data_bytes)
    with pytest.raises(UsageError, match="too small"):
        plan.run(slot, objects=[large])
    assert not any(slot.data)
    assert plan.needed_bytes([b"x" * 2 * plan.data_bytes]) > len(slot.data)
    pool.close()


def test_tensor_that_moved_is_our_bug() -> None:
    tensor = torch.ones(1000)
    plan = CopyPlan.build([source("model/w", tensor)])
    pool, slot = begun(plan.data_bytes)
    tensor.untyped_storage().resize_(0)
    with pytest.raises(InternalError, match=r"moved.*model/w"):
        plan.run(slot)
    pool.close()


def test_slot_that_was_not_begun_is_refused() -> None:
    plan = CopyPlan.build([source("w", torch.ones(3))])
    pool, slot = begun(plan.data_bytes)
    slot.release()
    with pytest.raises(InternalError, match="not begun"):
        plan.run(slot)
    pool.close()


def test_box_or_dtype_that_is_not_the_tensors_is_refused() -> None:
    good = source("w", torch.ones(3, 2))
    with pytest.raises(UsageError, match="does not fill its box"):
        CopyPlan.build([CopySource(good.leaf, Box((0, 0), (2, 2)), torch.ones(3, 2))])
    with pytest.raises(UsageError, match="dtype"):
        CopyPlan.build([CopySource(good.leaf, good.box, torch.ones(3, 2, dtype=torch.float64))])
    with pytest.raises(UsageError, match="outside its leaf"):
        CopyPlan.build([CopySource(good.leaf, Box((1, 0), (3, 2)), torch.ones(3, 2))])


def test_freed_slot_is_not_kept_by_the_plan() -> None:
    plan = CopyPlan.build([source("w", torch.randn(64, 64).t())])
    pool, slot = begun(plan.data_bytes)
    plan.run(slot)
    assert len(plan._views) == 1
    pool.close()
    del slot
    assert len(plan._views) == 0


def test_header_room_suffices_for_long_names() -> None:
    sources = [source("model/" + "n" * 4000 + str(i), torch.ones(1)) for i in range(50)]
    plan = CopyPlan.build(sources)
    pool = SlotPool(
        count=1, data_bytes=plan.data_bytes, header_bytes=plan.header_bytes, prefault=False
    )
    slot = pool.acquire()
    assert slot is not None
    slot.begin()
    slot.seal(StagedIndex(snapshot=SnapshotId(0, 0), rank=0, world_size=1, shards=plan.run(slot)))
    pool.close()


@settings(max_examples=60)
@given(st.lists(st.integers(0, 3 * PAGE_BYTES), max_size=30), st.integers(0, 2 * PAGE_BYTES))
def test_layout_has_no_overlap_and_aligns(sizes: list[int], start: int) -> None:
    offsets, end = lay_out(sizes, start=start)
    spans = sorted((at, at + size) for at, size in zip(offsets, sizes, strict=True) if size)
    assert all(high <= low for (_, high), (low, _) in itertools.pairwise(spans))
    assert all(low >= start and high <= end for low, high in spans)
    for at, size in zip(offsets, sizes, strict=True):
        assert not size or at % (PAGE_BYTES if size >= PAGE_BYTES else 64) == 0


def test_tensor_at_address_zero_is_refused_rather_than_taken_for_copied() -> None:
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(0)
    with pytest.raises(UsageError, match=r"without memory of its own. leaf='x'"):
        CopyPlan.build([source("x", tensor)])
