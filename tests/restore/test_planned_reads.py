"""What a plan says of its reads: which chunks share a request, what each copy moves, whom errors
name."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from ckpt.errors import IntegrityError, NotFoundError, UsageError
from ckpt.format.canonical import digest
from ckpt.format.part import StoredShard
from ckpt.restore import plan as plan_room
from ckpt.restore.plan import (
    CLOSE_NAMES_MAX,
    GAP_BYTES_MAX,
    ChunkCopy,
    ChunkRead,
    ReadPlan,
    Want,
    join_reads,
    plan_reads,
    plan_verify,
    split_flat,
)
from ckpt.values import Box, ChunkLocation, Codec, Leaf, LeafKind

LIMIT = 1 << 30


def chunk(offset: int, size: int, *, pack: str = "p") -> ChunkRead:
    place = ChunkLocation(pack, offset, size, size, Codec.RAW)
    return ChunkRead(digest(f"{pack}{offset}".encode()), place, "w", None, ())


def joined(*chunks: ChunkRead, limit: int = LIMIT) -> list[tuple[str, int, int, list[int]]]:
    """Each request's pack, offset and size, and the offsets of its chunks."""
    return [
        (
            read.pack,
            read.offset_bytes,
            read.size_bytes,
            [one.location.offset_bytes for one in read.chunks],
        )
        for read in join_reads(chunks, limit)
    ]


def test_requests_go_by_pack_and_offset_whatever_order_chunks_come_in() -> None:
    found = joined(
        chunk(20, 5, pack="b"),
        chunk(30, 5, pack="a"),
        chunk(10, 10, pack="b"),
        chunk(5, 5, pack="a"),
    )
    assert found == [("a", 5, 30, [5, 30]), ("b", 10, 15, [10, 20])]


def test_neighbours_in_different_packs_are_different_requests() -> None:
    assert joined(chunk(0, 10, pack="a"), chunk(10, 10, pack="b")) == [
        ("a", 0, 10, [0]),
        ("b", 10, 10, [10]),
    ]


@pytest.mark.parametrize(
    ("gap", "requests"), [(0, 1), (1, 1), (GAP_BYTES_MAX, 1), (GAP_BYTES_MAX + 1, 2)]
)
def test_a_gap_is_read_over_up_to_its_limit(gap: int, requests: int) -> None:
    found = joined(chunk(1000, 10), chunk(1010 + gap, 10), chunk(1020 + gap, 10))
    assert len(found) == requests
    assert found[-1][1] + found[-1][2] == 1030 + gap and sum(len(one[3]) for one in found) == 3


def test_chunks_that_overlap_are_read_apart() -> None:
    assert joined(chunk(0, 10), chunk(9, 10)) == [("p", 0, 10, [0]), ("p", 9, 10, [9])]


def test_a_request_may_be_as_large_as_the_limit_and_a_single_chunk_larger() -> None:
    three = (chunk(100, 10), chunk(110, 10), chunk(120, 10))
    assert [one[2] for one in joined(*three, limit=30)] == [30]
    assert [one[2] for one in joined(*three, limit=29)] == [20, 10]
    assert [one[2] for one in joined(*three, limit=0)] == [10, 10, 10]
    assert joined() == []


def copy(source: tuple[int, ...], target: tuple[int, ...]) -> ChunkCopy:
    return ChunkCopy(0, (3,) * len(source), 0, source, 0, target, 4)


def test_a_copy_is_contiguous_where_both_sides_are_one_run() -> None:
    assert copy((4,), (4,)).contiguous
    assert not copy((8,), (4,)).contiguous and not copy((4,), (8,)).contiguous
    assert not copy((12, 4), (12, 4)).contiguous
    assert copy((12, 4), (24, 4)).size_bytes == 36 and copy((4,), (4,)).size_bytes == 12


class OneLeaf:
    """A float32 leaf "w" in one shard or several, each chunk of the grid in a pack of its own."""

    def __init__(
        self,
        shape: tuple[int, ...],
        *boxes: Box,
        grid: int = 16,
        ranks: tuple[int | None, ...] = (None,),
    ):
        self.shape = shape
        self.grid = grid
        self.held = {
            rank: Leaf(name="w", kind=LeafKind.TENSOR, dtype="float32", shape=shape, rank=rank)
            for rank in ranks
        }
        self.boxes = boxes or (Box.whole(shape),)

    def leaves(self) -> list[Leaf]:
        return list(self.held.values())

    def leaf(self, name: str, rank: int | None) -> Leaf | None:
        return self.held.get(rank) if name == "w" else None

    def shards(self, name: str, rank: int | None) -> tuple[StoredShard, ...]:
        return tuple(
            self.shard(self.held[rank], number, box) for number, box in enumerate(self.boxes)
        )

    def shard(self, leaf: Leaf, number: int, box: Box) -> StoredShard:
        size = box.elements * 4
        starts = range(0, size, self.grid)
        digests = tuple(digest(f"{number}/{at}".encode()) for at in starts)
        places = tuple(
            ChunkLocation(
                f"{number:02d}/{at:04d}",
                7,
                min(self.grid, size - at),
                min(self.grid, size - at),
                Codec.RAW,
            )
            for at in starts
        )
        return StoredShard(leaf=leaf, box=box, size_bytes=size, digests=digests, locations=places)


def planned(index: OneLeaf, *boxes: Box) -> ReadPlan:
    wants = [Want("w", None, box) for box in boxes]
    return plan_reads(index, wants, coalesce_bytes=0, chunk_bytes=index.grid)


def packs(plan: ReadPlan) -> list[str]:
    return [read.pack for read in plan.reads]


def copies(plan: ReadPlan) -> list[ChunkCopy]:
    return [one for read in plan.reads for found in read.chunks for one in found.copies]


def test_outputs_are_as_large_as_what_is_wanted() -> None:
    plan = planned(OneLeaf((4, 4)), Box((0, 1), (3, 2)), Box.whole((4, 4)), Box((0, 0), (0, 4)))
    assert plan.output_bytes == (24, 64, 0)


def test_only_chunks_that_hold_something_wanted_are_read() -> None:
    index = OneLeaf((4, 4))
    assert packs(planned(index, Box((1, 0), (2, 4)))) == ["00/0016", "00/0032"]
    assert packs(planned(index, Box((1, 3), (2, 1)))) == ["00/0016", "00/0032"]
    assert packs(planned(index, Box((0, 0), (0, 4)))) == []
    wide = OneLeaf((4, 16))
    assert packs(planned(wide, Box((1, 2), (2, 3)))) == ["00/0064", "00/0080", "00/0128", "00/0144"]
    assert packs(planned(wide, Box((0, 5), (4, 1)))) == ["00/0016", "00/0080", "00/0144", "00/0208"]
    column = copies(planned(wide, Box((0, 5), (4, 1))))
    assert [(one.shape, one.size_bytes, one.target_offset_bytes) for one in column] == [
        ((1,), 4, 4 * n) for n in range(4)
    ]


def test_only_chunks_between_the_first_and_the_last_wanted_element_are_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A few rows of a large shard must not cost a look at each of its chunks."""
    looked: list[int] = []

    def split(sizes: tuple[int, ...], start: int, stop: int) -> tuple[Box, ...]:
        if sizes == (100, 8):
            looked.append(start // 4)
        return split_flat(sizes, start, stop)

    monkeypatch.setattr(plan_room, "split_flat", split)
    plan = planned(
        OneLeaf((104, 8), Box((0, 0), (4, 8)), Box((4, 0), (100, 8))), Box((44, 1), (3, 2))
    )
    assert looked == [80, 81, 82, 83, 84]
    assert packs(plan) == ["01/1280", "01/1312", "01/1344"]


@pytest.mark.parametrize(
    ("shape", "want"),
    [
        ((4, 3), Box((0, 0), (4, 3))),
        ((4, 3), Box((1, 0), (3, 3))),
        ((3, 3, 3), Box((1, 1, 0), (1, 2, 3))),
        ((3, 3, 4), Box((1, 1, 1), (1, 1, 3))),
        ((3, 1, 4), Box((1, 0, 0), (2, 1, 4))),
        ((5,), Box((1,), (4,))),
    ],
)
def test_what_lies_in_one_run_is_copied_in_one_piece_a_chunk_however_rows_and_chunks_meet(
    shape: tuple[int, ...], want: Box
) -> None:
    found = copies(planned(OneLeaf(shape), want))
    assert all(one.contiguous for one in found)
    values = np.arange(math.prod(shape)).reshape(shape)
    wanted = (
        values[tuple(slice(o, o + n) for o, n in zip(want.offsets, want.sizes, strict=True))]
        .ravel()
        .tolist()
    )
    chunks = range(wanted[0] // 4, wanted[-1] // 4 + 1)
    assert len(found) == len(chunks)
    assert [one.size_bytes for one in found] == [
        4 * sum(n // 4 == chunk for n in wanted) for chunk in chunks
    ]


def test_a_dimension_of_one_does_not_make_two_runs_one() -> None:
    (found,) = copies(planned(OneLeaf((2, 1, 4), grid=64), Box((0, 0, 0), (2, 1, 2))))
    assert (found.shape, found.source_strides_bytes, found.target_strides_bytes) == (
        (2, 2),
        (16, 4),
        (8, 4),
    )


def test_a_shard_that_is_one_run_goes_into_the_columns_where_it_belongs() -> None:
    index = OneLeaf((2, 4), Box((0, 0), (2, 2)), Box((0, 2), (2, 2)))
    found = copies(planned(index, Box.whole((2, 4))))
    assert [
        (one.shape, one.source_strides_bytes, one.target_strides_bytes, one.target_offset_bytes)
        for one in found
    ] == [
        ((2, 2), (8, 4), (16, 4), 0),
        ((2, 2), (8, 4), (16, 4), 8),
    ]


def test_a_run_that_ends_with_a_chunk_does_not_touch_the_next() -> None:
    plan = planned(OneLeaf((12,), Box((0,), (12,))), Box((2,), (6,)))
    assert [
        (one.source_offset_bytes, one.target_offset_bytes, one.size_bytes) for one in copies(plan)
    ] == [
        (8, 0, 8),
        (0, 8, 16),
    ]
    assert packs(plan) == ["00/0000", "00/0016"]


def test_dimensions_that_continue_each_other_on_both_sides_are_merged() -> None:
    whole_rows = planned(OneLeaf((2, 2, 8), grid=128), Box((0, 0, 0), (2, 1, 4)))
    assert [
        (one.shape, one.source_strides_bytes, one.target_strides_bytes)
        for one in copies(whole_rows)
    ] == [((2, 4), (64, 4), (16, 4))]
    inner = planned(OneLeaf((2, 4, 4), grid=128), Box((0, 1, 0), (2, 2, 4)))
    assert [
        (one.shape, one.source_strides_bytes, one.target_strides_bytes) for one in copies(inner)
    ] == [((2, 8), (64, 4), (32, 4))]
    column = planned(OneLeaf((3, 4), grid=128), Box((0, 2), (3, 1)))
    assert [
        (one.shape, one.source_offset_bytes, one.source_strides_bytes) for one in copies(column)
    ] == [((3,), 8, (16,))]
    middle = planned(OneLeaf((2, 3, 2, 2), grid=128), Box((0, 0, 0, 0), (2, 3, 1, 2)))
    assert [
        (one.shape, one.source_strides_bytes, one.target_strides_bytes) for one in copies(middle)
    ] == [((6, 2), (16, 4), (8, 4))]


def test_one_element_is_a_copy_of_one_element() -> None:
    for index in (OneLeaf(()), OneLeaf((3, 3), Box.whole((3, 3)), grid=64)):
        box = Box((1,) * len(index.shape), (1,) * len(index.shape))
        (only,) = copies(planned(index, box))
        assert (only.shape, only.contiguous, only.size_bytes) == ((1,), True, 4)
        assert only.source_offset_bytes == (16 if index.shape else 0)


def test_a_part_of_a_shard_that_is_itself_a_part_lies_where_numpy_says() -> None:
    """The wanted box straddles four shards whose corners lie anywhere; each copy is checked against
    numpy's strides."""
    boxes = (Box((0, 0), (3, 4)), Box((0, 4), (3, 3)), Box((3, 0), (4, 4)), Box((3, 4), (4, 3)))
    index, want = OneLeaf((7, 7), *boxes, grid=1 << 10), Box((1, 2), (4, 4))
    values = np.arange(49, dtype=np.float32).reshape(7, 7)
    out = np.full(16, -1, np.float32)
    plan = planned(index, want)
    assert len(plan.reads) == 4
    for number, read in enumerate(plan.reads):
        box = boxes[number]
        raw = np.ascontiguousarray(
            values[box.offsets[0] :, box.offsets[1] :][: box.sizes[0], : box.sizes[1]]
        ).ravel()
        for one in read.chunks[0].copies:
            source = np.lib.stride_tricks.as_strided(
                raw[one.source_offset_bytes // 4 :], one.shape, one.source_strides_bytes
            )
            np.lib.stride_tricks.as_strided(
                out[one.target_offset_bytes // 4 :], one.shape, one.target_strides_bytes
            )[...] = source
    assert out.reshape(4, 4).tolist() == values[1:5, 2:6].tolist()


@pytest.mark.parametrize(
    "boxes",
    [
        (Box((0, 0), (3, 4)),),
        (Box((0, 0), (3, 2)), Box((0, 2), (3, 2))),
        (Box((0, 0), (1, 4)), Box((1, 0), (2, 3)), Box((1, 3), (2, 1))),
    ],
)
def test_every_box_of_every_layout_lies_where_numpy_says_whatever_chunks_it_crosses(
    boxes: tuple[Box, ...],
) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    spans = [[(low, high) for low in range(n) for high in range(low + 1, n + 1)] for n in (3, 4)]
    for (top, bottom), (left, right) in itertools.product(*spans):
        want = Box((top, left), (bottom - top, right - left))
        out = np.full(want.elements, -1, np.float32)
        for read in planned(OneLeaf((3, 4), *boxes, grid=12), want).reads:
            for chunk_read in read.chunks:
                number, start = map(int, chunk_read.location.pack.split("/"))
                box = boxes[number]
                shard = values[box.offsets[0] :, box.offsets[1] :][: box.sizes[0], : box.sizes[1]]
                raw = np.ascontiguousarray(shard).ravel()[start // 4 : start // 4 + 3]
                for one in chunk_read.copies:
                    assert one.shape and len(one.shape) == len(one.source_strides_bytes)
                    source = np.lib.stride_tricks.as_strided(
                        raw[one.source_offset_bytes // 4 :], one.shape, one.source_strides_bytes
                    )
                    np.lib.stride_tricks.as_strided(
                        out[one.target_offset_bytes // 4 :], one.shape, one.target_strides_bytes
                    )[...] = source
        assert out.tolist() == values[top:bottom, left:right].ravel().tolist(), (want, boxes)


def test_a_plan_names_its_snapshot_and_what_was_wanted_of_it() -> None:
    index = OneLeaf((4,), Box((0,), (3,)))
    assert plan_reads(index, [], coalesce_bytes=0).snapshot == ""
    assert plan_reads(index, [], coalesce_bytes=0, snapshot="1/2").snapshot == "1/2"
    assert plan_verify([], coalesce_bytes=0).snapshot == ""
    assert plan_verify([], coalesce_bytes=0, snapshot="1/2").snapshot == "1/2"
    with pytest.raises(
        IntegrityError, match=r"leaf=w rank=None snapshot=1/2 wanted_elements=2 covered_elements=1"
    ):
        plan_reads(index, [Want("w", None, Box((2,), (2,)))], coalesce_bytes=0, snapshot="1/2")


def test_shards_that_cover_an_element_twice_are_refused() -> None:
    index = OneLeaf((4,), Box((0,), (3,)), Box((2,), (2,)))
    with pytest.raises(IntegrityError, match=r"wanted_elements=4 covered_elements=5"):
        planned(index, Box.whole((4,)))


def test_a_chunk_is_named_after_the_leaf_and_rank_that_hold_it() -> None:
    index = OneLeaf((4,), ranks=(3,))
    plan = plan_reads(index, [Want("w", 3, Box.whole((4,)))], coalesce_bytes=0, chunk_bytes=16)
    assert [(one.leaf, one.rank) for read in plan.reads for one in read.chunks] == [("w", 3)]
    checked = plan_verify(index.shards("w", 3), coalesce_bytes=0)
    assert [(one.leaf, one.rank, one.copies) for read in checked.reads for one in read.chunks] == [
        ("w", 3, ())
    ]


def test_what_is_verified_already_is_not_read_again_and_each_place_is_read_for_its_first_leaf() -> (
    None
):
    index = OneLeaf((8,), ranks=(0, 1))
    shards = [*index.shards("w", 0), *index.shards("w", 1)]
    places = list(zip(shards[0].digests, shards[0].locations, strict=True))
    plan = plan_verify(shards, coalesce_bytes=0)
    assert [(one.digest, one.location) for read in plan.reads for one in read.chunks] == places
    assert {one.rank for read in plan.reads for one in read.chunks} == {0}
    assert packs(plan_verify(shards, coalesce_bytes=0, skip=set(places[:1]))) == ["00/0016"]
    assert plan_verify(shards, coalesce_bytes=0, skip=set(places)).reads == ()


@pytest.mark.parametrize(
    ("box", "fits"),
    [
        (Box((0, 0), (4, 3)), True),
        (Box((4, 3), (0, 0)), True),
        (Box((0, 0), (5, 3)), False),
        (Box((0, 1), (4, 3)), False),
        (Box((1, 0), (-1, 3)), False),
        (Box((0, -1), (4, 1)), False),
        (Box((0,), (4,)), False),
        (Box((0,), (4, 3)), False),
        (Box((0, 0), (4,)), False),
        (Box((0, 0, 0), (1, 1, 1)), False),
    ],
)
def test_a_box_may_reach_to_the_edges_of_the_leaf_and_not_beyond(box: Box, fits: bool) -> None:
    index = OneLeaf((4, 3))
    if fits:
        assert planned(index, box).output_bytes == (math.prod(box.sizes) * 4,)
    else:
        with pytest.raises(UsageError, match=r"leaf=w shape=\[4, 3\]"):
            planned(index, box)


def test_who_holds_a_leaf_is_told_in_order_and_shared_ones_as_shared() -> None:
    with pytest.raises(NotFoundError, match=r"held by ranks \[0, 2\]\. leaf=w rank=1"):
        plan_reads(OneLeaf((4,), ranks=(2, 0)), [Want("w", 1, Box.whole((4,)))], coalesce_bytes=0)
    with pytest.raises(NotFoundError, match=r"shared by all ranks\. leaf=w rank=1"):
        plan_reads(OneLeaf((4,)), [Want("w", 1, Box.whole((4,)))], coalesce_bytes=0)


class Names(OneLeaf):
    """Leaves of these names, none of which is "w"."""

    def __init__(self, *names: str) -> None:
        super().__init__((4,))
        self.names = names

    def leaves(self) -> list[Leaf]:
        return [
            Leaf(name=name, kind=LeafKind.TENSOR, dtype="uint8", shape=(4,), rank=None)
            for name in self.names
        ]

    def leaf(self, name: str, rank: int | None) -> Leaf | None:
        return None


def test_a_leaf_that_is_not_there_is_told_with_the_closest_names_each_once_if_any_is_close() -> (
    None
):
    def told(*names: str) -> str:
        with pytest.raises(NotFoundError, match="no such leaf") as caught:
            plan_reads(Names(*names), [Want("weight.10", None, Box.whole((4,)))], coalesce_bytes=0)
        return str(caught.value)

    many = told("weight.1", "weight.100", "bias", "weight.11", "weight.12", "weight.1")
    assert many.endswith("leaf=weight.10 rank=None; close names: weight.100, weight.1, weight.12")
    assert many.count("weight.") == 1 + CLOSE_NAMES_MAX
    assert told("bias").endswith("leaf=weight.10 rank=None")


def test_split_flat_makes_the_fewest_boxes() -> None:
    assert split_flat((2, 3), 0, 6) == (Box((0, 0), (2, 3)),)
    assert split_flat((2, 3), 3, 6) == (Box((1, 0), (1, 3)),)
    assert split_flat((4, 3), 3, 9) == (Box((1, 0), (2, 3)),)
    assert split_flat((4, 3), 2, 10) == (
        Box((0, 2), (1, 1)),
        Box((1, 0), (2, 3)),
        Box((3, 0), (1, 1)),
    )
    assert split_flat((2, 3), 2, 4) == (Box((0, 2), (1, 1)), Box((1, 0), (1, 1)))
    assert split_flat((), 0, 1) == (Box((), ()),)
    assert split_flat((2, 3), 2, 2) == () == split_flat((), 0, 0)
