"""Planning against numpy: any layout of stored boxes, any wanted boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.errors import IntegrityError, NotFoundError, UsageError
from ckpt.format.canonical import digest
from ckpt.format.part import StoredShard
from ckpt.restore.plan import GAP_BYTES_MAX, ReadPlan, Want, plan_reads, plan_verify, split_flat
from ckpt.values import Box, ChunkLocation, Codec, Leaf, LeafKind

GRID = 16
DTYPES = {
    "uint8": np.uint8,
    "int16": np.int16,
    "float32": np.float32,
    "float64": np.float64,
    "complex128": np.complex128,
}


class Store:
    """Leaves cut into shards, chunks in one pack, all in memory."""

    def __init__(self, gap_bytes: int = 0) -> None:
        self.pack = bytearray()
        self.found: dict[tuple[str, int | None], tuple[StoredShard, ...]] = {}
        self.known: dict[bytes, ChunkLocation] = {}
        self.gap_bytes = gap_bytes

    def add(
        self,
        name: str,
        values: np.ndarray,
        boxes: Sequence[Box],
        *,
        dtype: str,
        rank: int | None = None,
    ) -> None:
        leaf = Leaf(name=name, kind=LeafKind.TENSOR, dtype=dtype, shape=values.shape, rank=rank)
        self.found[name, rank] = tuple(self.shard(leaf, values, box) for box in boxes)

    def shard(self, leaf: Leaf, values: np.ndarray, box: Box) -> StoredShard:
        raw = np.ascontiguousarray(values[slices(box)]).tobytes()
        chunks = [raw[i : i + GRID] for i in range(0, len(raw), GRID)]
        for chunk in chunks:
            if digest(chunk) not in self.known:
                self.known[digest(chunk)] = ChunkLocation(
                    "packs/p", len(self.pack), len(chunk), len(chunk), Codec.RAW
                )
                self.pack += chunk + bytes(self.gap_bytes)
        digests = tuple(digest(chunk) for chunk in chunks)
        places = tuple(self.known[one] for one in digests)
        return StoredShard(
            leaf=leaf, box=box, size_bytes=len(raw), digests=digests, locations=places
        )

    def leaves(self) -> list[Leaf]:
        return [shards[0].leaf for shards in self.found.values() if shards]

    def leaf(self, name: str, rank: int | None) -> Leaf | None:
        shards = self.found.get((name, rank))
        return shards[0].leaf if shards else None

    def shards(self, name: str, rank: int | None) -> tuple[StoredShard, ...]:
        return self.found.get((name, rank), ())


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))


def carry_out(plan: ReadPlan, store: Store) -> list[bytearray]:
    """The plan done as naively as can be: element by element."""
    outputs = [bytearray(b"\xee" * size) for size in plan.output_bytes]
    for read in plan.reads:
        for chunk in read.chunks:
            at = chunk.location
            assert read.offset_bytes <= at.offset_bytes
            assert at.offset_bytes + at.stored_bytes <= read.offset_bytes + read.size_bytes
            raw = store.pack[at.offset_bytes : at.offset_bytes + at.raw_bytes]
            for copy in chunk.copies:
                for place in np.ndindex(*copy.shape):
                    low = copy.source_offset_bytes + sum(
                        map(math.prod, zip(place, copy.source_strides_bytes, strict=True))
                    )
                    to = copy.target_offset_bytes + sum(
                        map(math.prod, zip(place, copy.target_strides_bytes, strict=True))
                    )
                    size = copy.itemsize_bytes
                    outputs[copy.output][to : to + size] = raw[low : low + size]
    return outputs


@st.composite
def cuts(
    draw: st.DrawFn, shape: tuple[int, ...], box: Box | None = None, depth: int = 3
) -> list[Box]:
    """Boxes that cover ``shape`` exactly once, by cutting again and again."""
    box = Box.whole(shape) if box is None else box
    splittable = [d for d, size in enumerate(box.sizes) if size > 1]
    if not depth or not splittable or not draw(st.booleans()):
        return [box]
    dim = draw(st.sampled_from(splittable))
    at = draw(st.integers(1, box.sizes[dim] - 1))
    low = Box(box.offsets, (*box.sizes[:dim], at, *box.sizes[dim + 1 :]))
    offsets = (*box.offsets[:dim], box.offsets[dim] + at, *box.offsets[dim + 1 :])
    high = Box(offsets, (*box.sizes[:dim], box.sizes[dim] - at, *box.sizes[dim + 1 :]))
    return draw(cuts(shape, low, depth - 1)) + draw(cuts(shape, high, depth - 1))


@st.composite
def inner_box(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offsets = tuple(draw(st.integers(0, size)) for size in shape)
    sizes = tuple(
        draw(st.integers(0, size - offset)) for size, offset in zip(shape, offsets, strict=True)
    )
    return Box(offsets, sizes)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_layout_to_any_boxes_gives_what_numpy_gives(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 6), max_size=4)))
    dtype = data.draw(st.sampled_from(sorted(DTYPES)))
    values = np.frombuffer(
        np.random.default_rng(1).bytes(math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize),
        DTYPES[dtype],
    )
    values = values.reshape(shape)
    store = Store(gap_bytes=data.draw(st.sampled_from((0, 3))))
    store.add("w", values, data.draw(cuts(shape)), dtype=dtype)
    boxes = data.draw(st.lists(inner_box(shape), max_size=3))
    coalesce = data.draw(st.sampled_from((0, 40, 1 << 20)))

    plan = plan_reads(
        store, [Want("w", None, box) for box in boxes], coalesce_bytes=coalesce, chunk_bytes=GRID
    )

    got = carry_out(plan, store)
    assert [bytes(one) for one in got] == [
        np.ascontiguousarray(values[slices(box)]).tobytes() for box in boxes
    ]
    seen = [chunk.digest for read in plan.reads for chunk in read.chunks]
    assert len(seen) == len(set(seen))


@given(st.data())
def test_split_flat_covers_the_range_in_order(data: st.DataObject) -> None:
    sizes = tuple(data.draw(st.lists(st.integers(1, 5), max_size=4)))
    total = math.prod(sizes)
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    numbers = np.arange(total).reshape(sizes)
    boxes = split_flat(sizes, start, stop)
    assert [int(n) for box in boxes for n in numbers[slices(box)].ravel()] == list(
        range(start, stop)
    )
    assert len(boxes) <= max(1, 2 * len(sizes) - 1)


def rows(*pairs: tuple[int, int], columns: int) -> list[Box]:
    return [Box((low, 0), (high - low, columns)) for low, high in pairs]


def test_row_range_of_a_row_shard_is_one_run_per_chunk() -> None:
    store = Store()
    store.add(
        "w",
        np.arange(64, dtype=np.float32).reshape(16, 4),
        rows((0, 8), (8, 16), columns=4),
        dtype="float32",
    )
    plan = plan_reads(
        store, [Want("w", None, Box((6, 0), (4, 4)))], coalesce_bytes=0, chunk_bytes=GRID
    )
    assert all(
        copy.contiguous for read in plan.reads for chunk in read.chunks for copy in chunk.copies
    )
    assert plan.read_bytes == 4 * 16


def test_chunk_that_several_wants_and_leaves_need_is_read_once() -> None:
    store = Store()
    zeros = np.zeros((4, 4), np.float32)
    store.add("a", zeros, [Box.whole((4, 4))], dtype="float32")
    store.add("b", zeros, [Box.whole((4, 4))], dtype="float32")
    wants = [Want("a", None, Box.whole((4, 4))), Want("b", None, Box.whole((4, 4)))]
    plan = plan_reads(store, wants, coalesce_bytes=0, chunk_bytes=GRID)
    assert plan.read_bytes == 16
    assert len(plan.reads[0].chunks[0].copies) == 8


def test_neighbours_are_joined_up_to_the_limit() -> None:
    store = Store()
    store.add("w", np.arange(64, dtype=np.uint8), [Box.whole((64,))], dtype="uint8")
    want = [Want("w", None, Box.whole((64,)))]
    assert [
        r.size_bytes for r in plan_reads(store, want, coalesce_bytes=32, chunk_bytes=GRID).reads
    ] == [32, 32]
    assert [
        r.size_bytes for r in plan_reads(store, want, coalesce_bytes=0, chunk_bytes=GRID).reads
    ] == [16] * 4


def test_distant_chunks_of_one_pack_stay_apart() -> None:
    store = Store(gap_bytes=GAP_BYTES_MAX + 1)
    store.add("w", np.arange(32, dtype=np.uint8), [Box.whole((32,))], dtype="uint8")
    plan = plan_reads(
        store, [Want("w", None, Box.whole((32,)))], coalesce_bytes=1 << 30, chunk_bytes=GRID
    )
    assert len(plan.reads) == 2


def test_gap_between_shards_is_refused() -> None:
    store = Store()
    store.add("w", np.zeros((8, 4), np.float32), rows((0, 3), (5, 8), columns=4), dtype="float32")
    plan_reads(store, [Want("w", None, Box((0, 0), (3, 4)))], coalesce_bytes=0, chunk_bytes=GRID)
    with pytest.raises(IntegrityError, match="do not cover"):
        plan_reads(
            store, [Want("w", None, Box((2, 0), (2, 4)))], coalesce_bytes=0, chunk_bytes=GRID
        )


def test_unknown_leaf_names_close_ones() -> None:
    store = Store()
    store.add("model/layers.0.weight", np.zeros(4, np.uint8), [Box.whole((4,))], dtype="uint8")
    with pytest.raises(NotFoundError, match=r"close names: model/layers\.0\.weight"):
        plan_reads(store, [Want("model/layer.0.weight", None, Box.whole((4,)))], coalesce_bytes=0)


def test_leaf_of_another_rank_says_whose_it_is() -> None:
    store = Store()
    store.add("rng", np.zeros(4, np.uint8), [Box.whole((4,))], dtype="uint8", rank=1)
    with pytest.raises(NotFoundError, match=r"held by ranks \[1\]"):
        plan_reads(store, [Want("rng", None, Box.whole((4,)))], coalesce_bytes=0)


@pytest.mark.parametrize(
    "box", [Box((0,), (5,)), Box((-1,), (2,)), Box((0, 0), (1, 1)), Box((), ())]
)
def test_box_outside_the_leaf_is_refused(box: Box) -> None:
    store = Store()
    store.add("w", np.zeros(4, np.uint8), [Box.whole((4,))], dtype="uint8")
    with pytest.raises(UsageError, match="is not inside the leaf"):
        plan_reads(store, [Want("w", None, box)], coalesce_bytes=0)


def test_verify_plan_reads_each_stored_place_once() -> None:
    store = Store()
    store.add("a", np.zeros(64, np.uint8), [Box.whole((64,))], dtype="uint8")
    store.add("b", np.arange(48, dtype=np.uint8), [Box.whole((48,))], dtype="uint8")
    plan = plan_verify([s for one in store.found.values() for s in one], coalesce_bytes=0)
    assert plan.read_bytes == len(store.pack) == 64
    assert plan.output_bytes == ()
