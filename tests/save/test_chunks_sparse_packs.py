"""Which known chunks are written anew so that nearly empty packs can go."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt.save.chunks import (
    BUDGET_BYTES_MIN,
    GAP_BYTES_MAX,
    LIVE_MIN,
    SparsePack,
    default_budget_bytes,
    new_chunks,
    plan_packs,
    plan_repacking,
    raw_offsets,
)
from ckpt.values import (
    PAGE_BYTES,
    Box,
    ChunkLocation,
    Codec,
    Digest,
    Leaf,
    LeafKind,
    SnapshotId,
    StagedIndex,
    StagedShard,
)

LONG = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
PAGES = 20
PACK_BYTES = PAGES * PAGE_BYTES
STRIDE = 2 + GAP_BYTES_MAX // PAGE_BYTES
"""In pages: chunks so far apart are separate."""


def name(pack: str, n: int) -> Digest:
    return f"{pack}{n:03d}".encode().ljust(16, b".")


def chunk(pack: str, page: int, pages: int = 1) -> ChunkLocation:
    size = pages * PAGE_BYTES
    return ChunkLocation(pack, page * PAGE_BYTES, size, size, Codec.RAW)


def whole(pack: str, chunks: int, *, pages: int = 1) -> dict[Digest, ChunkLocation]:
    """A pack full of chunks."""
    return {name(pack, n): chunk(pack, n * pages, pages) for n in range(chunks)}


def test_pack_of_which_less_than_half_is_needed_is_given_up() -> None:
    known = whole("a", PAGES) | whole("b", PAGES)
    wanted = {name("a", n) for n in range(9)} | {name("b", n) for n in range(10)}
    found = plan_repacking(known, wanted, {"a": PACK_BYTES, "b": PACK_BYTES}, budget_bytes=1 << 30)
    assert found.given_up == (SparsePack("a", PACK_BYTES, 9 * PAGE_BYTES),)
    assert found.rewritten_bytes == 9 * PAGE_BYTES
    assert wanted & set(found.stored_chunks) == {name("b", n) for n in range(10)}


def test_sparsest_goes_first_and_the_budget_is_kept() -> None:
    known = {digest: place for pack in "abc" for digest, place in whole(pack, PAGES).items()}
    wanted = (
        {name("a", n) for n in range(6)}
        | {name("b", n) for n in range(3)}
        | {name("c", n) for n in range(8)}
    )
    sizes = dict.fromkeys("abc", PACK_BYTES)
    for budget, given_up in (
        (2, ""),
        (3, "b"),
        (8, "b"),
        (9, "ba"),
        (11, "ba"),
        (16, "ba"),
        (17, "bac"),
    ):
        found = plan_repacking(known, wanted, sizes, budget_bytes=budget * PAGE_BYTES)
        assert "".join(one.pack for one in found.given_up) == given_up, budget


def test_one_that_does_not_fit_lets_a_smaller_one_go() -> None:
    known = whole("a", 40) | whole("b", PAGES)
    wanted = {name("a", n) for n in range(8)} | {name("b", n) for n in range(5)}
    found = plan_repacking(
        known, wanted, {"a": 40 * PAGE_BYTES, "b": PACK_BYTES}, budget_bytes=5 * PAGE_BYTES
    )
    assert [one.pack for one in found.given_up] == ["b"]


def test_pack_of_unknown_size_is_not_judged() -> None:
    known = whole("a", PAGES)
    found = plan_repacking(known, {name("a", 0)}, {}, budget_bytes=1 << 30)
    assert found.stored_chunks is known
    assert found.given_up == ()


def test_short_gaps_count_as_needed_and_long_ones_do_not() -> None:
    near = {name("a", n): chunk("a", 5 * n) for n in range(4)}
    far = {name("b", n): chunk("b", STRIDE * n) for n in range(4)}
    sizes = {"a": 16 * PAGE_BYTES, "b": (3 * STRIDE + 1) * PAGE_BYTES}
    found = plan_repacking(near | far, {*near, *far}, sizes, budget_bytes=1 << 30)
    assert [(one.pack, one.live_bytes) for one in found.given_up] == [("b", 4 * PAGE_BYTES)]


def test_default_budget_is_a_tenth_of_the_state_but_a_pack_at_least() -> None:
    assert default_budget_bytes(0) == BUDGET_BYTES_MIN
    assert default_budget_bytes(100 << 30) == 10 << 30


sizes_of_shards = st.lists(st.sampled_from([1, 100, 4096, 5000, 70_000]), min_size=1, max_size=30)


@LONG
@given(sizes_of_shards, st.integers(0, 2**32), st.booleans())
def test_pack_just_written_never_looks_sparse(sizes: list[int], seed: int, few: bool) -> None:
    """Chunks between known ones, as a save with few changes writes them, with the gaps that it
    leaves."""
    dice = random.Random(seed)
    shards = []
    at = 0
    for number, size in enumerate(sizes):
        leaf = Leaf(name=f"w{number}", kind=LeafKind.TENSOR, dtype="uint8", shape=(size,))
        shards.append(
            StagedShard(
                leaf=leaf,
                box=Box.whole((size,)),
                offset_bytes=at,
                size_bytes=size,
                digests=(name("d", number),),
            )
        )
        at += -(-size // PAGE_BYTES) * PAGE_BYTES
    staged = StagedIndex(snapshot=SnapshotId(1, 1), rank=0, world_size=1, shards=tuple(shards))
    before = {name("d", n) for n in range(len(sizes)) if dice.random() < (0.8 if few else 0.2)}
    known: dict[Digest, ChunkLocation] = {}
    pack_bytes: dict[str, int] = {}
    for n, pack in enumerate(
        plan_packs(new_chunks(staged, before), data_bytes=at, pack_bytes_max=64 << 10)
    ):
        pack_bytes[str(n)] = pack.size_bytes
        for one, offset in zip(pack.chunks, raw_offsets(pack), strict=True):
            known[one.digest] = ChunkLocation(
                str(n), offset, one.raw_bytes, one.raw_bytes, Codec.RAW
            )
    assert plan_repacking(known, set(known), pack_bytes, budget_bytes=1 << 40).given_up == ()


@st.composite
def stores(draw: st.DrawFn) -> tuple[dict[Digest, ChunkLocation], dict[str, int], list[Digest]]:
    known: dict[Digest, ChunkLocation] = {}
    sizes: dict[str, int] = {}
    for pack in draw(st.sets(st.sampled_from("abcdef"))):
        pages = draw(st.lists(st.integers(0, PAGES - 1), max_size=8, unique=True))
        known |= {name(pack, page): chunk(pack, page) for page in pages}
        if draw(st.booleans()):
            sizes[pack] = PACK_BYTES
    wanted = draw(st.lists(st.sampled_from(sorted(known)), unique=True)) if known else []
    return known, sizes, [*wanted, b"new".ljust(16)]


@pytest.mark.slow
@LONG
@given(stores(), st.integers(0, 30), st.randoms())
def test_what_is_given_up_is_whole_packs_within_the_budget_whatever_the_order(
    store, pages: int, dice
) -> None:
    known, sizes, wanted = store
    budget = pages * PAGE_BYTES
    found = plan_repacking(known, wanted, sizes, budget_bytes=budget)
    assert found.rewritten_bytes == sum(one.live_bytes for one in found.given_up) <= budget
    gone = {one.pack for one in found.given_up}
    assert all(one.live_bytes < LIVE_MIN * one.size_bytes for one in found.given_up)
    assert {
        place.pack for digest, place in found.stored_chunks.items() if digest in set(wanted)
    } & gone == set()
    assert {digest: known[digest] for digest in found.stored_chunks} == dict(found.stored_chunks)
    assert all(known[digest].pack in gone for digest in set(known) - set(found.stored_chunks))
    shuffled = list(known)
    dice.shuffle(shuffled)
    dice.shuffle(wanted)
    assert (
        plan_repacking(
            {digest: known[digest] for digest in shuffled}, wanted, sizes, budget_bytes=budget
        )
        == found
    )
    assert (
        plan_repacking(
            found.stored_chunks, wanted, sizes, budget_bytes=budget - found.rewritten_bytes
        ).given_up
        == ()
    )


@pytest.mark.parametrize("live_min", [0.0, 1.0])
def test_threshold_is_the_callers(live_min: float) -> None:
    known = whole("a", PAGES)
    found = plan_repacking(
        known, {name("a", 0)}, {"a": PACK_BYTES}, budget_bytes=1 << 30, live_min=live_min
    )
    assert bool(found.given_up) is bool(live_min)


def test_oldest_full_packs_are_written_anew_with_what_sparse_ones_leave_of_the_budget() -> None:
    known = {digest: place for pack in "abcd" for digest, place in whole(pack, PAGES).items()}
    wanted = {digest for digest in known if known[digest].pack != "d"} | {name("d", 0)}
    ages_s = {pack: hours * 3600.0 for pack, hours in zip("abcd", (7, 9, 5, 1), strict=True)}
    sizes = dict.fromkeys("abcd", PACK_BYTES)
    for budget, given_up in ((0, ""), (1, "d"), (PAGES, "d"), (PAGES + 1, "db"), (1000, "dba")):
        found = plan_repacking(
            known, wanted, sizes, budget_bytes=budget * PAGE_BYTES, ages_s=ages_s
        )
        assert "".join(one.pack for one in found.given_up) == given_up, budget
        assert not {known[digest].pack for digest in found.stored_chunks} & set(given_up) - {"d"}
