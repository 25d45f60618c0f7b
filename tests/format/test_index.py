from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.errors import IntegrityError
from ckpt.format import keys
from ckpt.format.index import SnapshotIndex
from ckpt.format.manifest import Manifest, PartRef
from ckpt.format.part import Part, StoredShard, decode_part, encode_part, merge_parts
from ckpt.format.part_rules import cover_problem
from ckpt.values import Box, ChunkLocation, Codec, Leaf, LeafKind, SnapshotId

PAIR = SnapshotId(1, 5)
WORLD = 2


def writer(rank: int) -> str:
    return keys.writer_name(f"node{rank}", "0123456789abcdef")


def leaf(
    name: str, shape: tuple[int, ...], *, rank: int | None = None, dtype: str = "uint8"
) -> Leaf:
    return Leaf(name=name, kind=LeafKind.TENSOR, dtype=dtype, shape=shape, rank=rank)


def alias(name: str, of: str, shape: tuple[int, ...] = (4,), rank: int | None = None) -> Leaf:
    return replace(leaf(name, shape, rank=rank), alias_of=of)


def shard(
    found: Leaf, offsets: tuple[int, ...], sizes: tuple[int, ...], mark: int = 0
) -> StoredShard:
    box = Box(offsets, sizes)
    size = box.elements
    place = ChunkLocation(
        keys.pack_key(SnapshotId(1, 1), writer(0), mark), 0, size, size, Codec.RAW
    )
    return StoredShard(
        leaf=found,
        box=box,
        size_bytes=size,
        digests=(bytes([mark]) * 16,) if size else (),
        locations=(place,) if size else (),
    )


def part(rank: int, shards: list[StoredShard], aliases: tuple[Leaf, ...] = ()) -> Part:
    made = Part(
        snapshot=PAIR,
        writer=writer(rank),
        rank=rank,
        world_size=WORLD,
        shards=tuple(shards),
        aliases=aliases,
    )
    return decode_part(encode_part(made))


def manifest() -> Manifest:
    parts = tuple(
        PartRef(key=keys.part_key(PAIR, writer(rank)), digest="0" * 32, size_bytes=1, rank=rank)
        for rank in range(WORLD)
    )
    return Manifest(
        job="j",
        snapshot=PAIR,
        world_size=WORLD,
        parts=parts,
        size_bytes=1,
        new_bytes=1,
        created_unix_s=0.0,
    )


def index(*parts: Part) -> SnapshotIndex:
    return SnapshotIndex(manifest(), parts)


W = leaf("w", (4,))


def test_leaves_and_shards_are_found_by_name_and_rank() -> None:
    own = [leaf("rng", (2,), rank=rank) for rank in range(WORLD)]
    found = index(
        part(0, [shard(W, (0,), (3,), 1), shard(own[0], (0,), (2,), 2)], (alias("tied", "w"),)),
        part(1, [shard(W, (3,), (1,), 3), shard(own[1], (0,), (2,), 4)], (alias("tied", "w"),)),
    )
    assert [(one.name, one.rank) for one in found.leaves()] == [
        ("rng", 0),
        ("rng", 1),
        ("tied", None),
        ("w", None),
    ]
    assert (
        found.leaf("rng", 1) == own[1]
        and found.leaf("rng", None) is None
        and found.leaf("rng", 2) is None
    )
    assert [one.box.offsets for one in found.shards("w")] == [(0,), (3,)]
    assert found.shards("tied") == found.shards("w") and found.target("tied") == W
    assert found.shards("rng", 0)[0].leaf == own[0] and found.shards("none") == ()
    assert found.ranks == (0, 1) and len(found.parts) == 2
    assert set(found.locations()) == {bytes([mark]) * 16 for mark in (1, 2, 3, 4)}
    assert found.packs() == {
        keys.pack_key(SnapshotId(1, 1), writer(0), mark) for mark in (1, 2, 3, 4)
    }


@pytest.mark.parametrize(
    ("shards", "why"),
    [
        ([((0,), (3,))], "gap"),
        ([((0,), (3,)), ((2,), (2,))], "overlap"),
        ([((0,), (2,)), ((0,), (2,))], "overlap"),
        ([((0,), (4,)), ((0,), (4,))], "overlap"),
    ],
)
def test_shards_that_do_not_cover_their_leaf_once_are_refused(
    shards: list[tuple[tuple[int], tuple[int]]], why: str
) -> None:
    with pytest.raises(IntegrityError, match=why):
        index(part(0, [shard(W, *box) for box in shards]), part(1, []))


def test_an_empty_leaf_and_empty_shards_are_fine() -> None:
    nothing = leaf("nothing", (0, 3))
    found = index(
        part(0, [shard(nothing, (0, 0), (0, 3)), shard(W, (0,), (4,))]),
        part(1, [shard(nothing, (0, 0), (0, 3)), shard(W, (4,), (0,))]),
    )
    assert found.leaf("nothing") == nothing and len(found.shards("nothing")) == 2


def test_parts_that_disagree_on_a_leaf_are_refused() -> None:
    with pytest.raises(IntegrityError, match="disagree"):
        index(
            part(0, [shard(W, (0,), (2,))]),
            part(1, [shard(leaf("w", (4,), dtype="int8"), (2,), (2,))]),
        )
    with pytest.raises(IntegrityError, match="disagree"):
        index(part(0, [shard(W, (0,), (4,))]), part(1, [], (alias("w", "v"),)))


@pytest.mark.parametrize(
    "aliases",
    [
        (alias("a", "gone"),),
        (alias("a", "b"), alias("b", "a")),
        (alias("a", "b"), alias("b", "c"), alias("c", "b")),
        (alias("a", "w", (5,)),),
        (alias("a", "w", rank=0),),
    ],
)
def test_an_alias_that_leads_nowhere_or_differs_is_refused(aliases: tuple[Leaf, ...]) -> None:
    with pytest.raises(IntegrityError, match="alias"):
        index(part(0, [shard(W, (0,), (4,))], aliases), part(1, []))


def test_an_alias_of_an_alias_resolves() -> None:
    found = index(part(0, [shard(W, (0,), (4,))], (alias("a", "b"), alias("b", "w"))), part(1, []))
    assert found.target("a") == W


def test_parts_must_be_those_that_the_manifest_names() -> None:
    good = [part(0, [shard(W, (0,), (4,))]), part(1, [])]
    for wrong in (
        good[:1],
        [good[1], good[0]],
        [good[0], replace(good[1], snapshot=SnapshotId(1, 6))],
        [good[0], replace(good[1], writer=writer(7))],
        [good[0], replace(good[1], world_size=3)],
    ):
        with pytest.raises(IntegrityError):
            SnapshotIndex(manifest(), wrong)


boxes = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)).map(
    lambda t: Box((min(t[0], 3), min(t[1], 3)), (min(t[2], 4 - t[0]), min(t[3], 4 - t[1])))
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.lists(boxes, max_size=5))
def test_cover_agrees_with_counting_every_element(found: list[Box]) -> None:
    count = dict.fromkeys(product(range(4), range(4)), 0)
    for box in found:
        for cell in product(
            *(range(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
        ):
            count[cell] += 1
    assert (cover_problem((4, 4), found) is None) == all(times == 1 for times in count.values())


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 6), max_size=3),
    st.lists(st.integers(0, 6), max_size=3),
    st.integers(0, 9),
)
def test_a_grid_of_cuts_covers_and_no_longer_does_when_one_box_goes(
    rows: list[int], cols: list[int], n: int
) -> None:
    def cuts(at: list[int]) -> list[tuple[int, int]]:
        edges = sorted({0, 6, *at})
        return [(low, high - low) for low, high in pairwise(edges)]

    grid = [Box((r, c), (h, w)) for r, h in cuts(rows) for c, w in cuts(cols)]
    assert cover_problem((6, 6), grid) is None
    assert (
        cover_problem((6, 6), [box for place, box in enumerate(grid) if place != n % len(grid)])
        is not None
    )


def test_a_scalar_is_covered_once() -> None:
    assert cover_problem((), [Box((), ())]) is None
    assert cover_problem((), []) is not None
    assert cover_problem((), [Box((), ()), Box((), ())]) is not None


def test_many_rows_or_columns_are_quick() -> None:
    many = 20_000
    assert cover_problem((many, 4), [Box((n, 0), (1, 4)) for n in range(many)]) is None
    assert cover_problem((4, many), [Box((0, n), (4, 1)) for n in range(many)]) is None


def test_one_part_of_both_ranks_is_read_as_two_are_and_only_where_the_manifest_says_so() -> None:
    own = [leaf("rng", (2,), rank=rank) for rank in range(WORLD)]
    parts = [
        part(0, [shard(W, (0,), (3,), 1), shard(own[0], (0,), (2,), 2)], (alias("tied", "w"),)),
        part(1, [shard(W, (3,), (1,), 3), shard(own[1], (0,), (2,), 4)], (alias("tied", "w"),)),
    ]
    two, node = index(*parts), merge_parts(parts, writer=writer(0))
    ref = replace(manifest().parts[0], ranks=WORLD)
    one = SnapshotIndex(replace(manifest(), parts=(ref,)), [node])
    assert one.leaves() == two.leaves() and one.ranks == two.ranks
    assert one.locations() == two.locations() and one.packs() == two.packs()
    for found in two.leaves():
        assert one.shards(found.name, found.rank) == two.shards(found.name, found.rank)
    for parts_read in ([parts[0]], [replace(node, rank=1, ranks=1)]):
        with pytest.raises(IntegrityError):
            SnapshotIndex(replace(manifest(), parts=(ref,)), parts_read)
