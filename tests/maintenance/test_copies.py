"""What copies are worth, and what is written from which: pure decisions, over all that can be."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from ckpt.maintenance.copies import (
    ChunkRef,
    CopyCheck,
    CopyLost,
    CopyRepair,
    CopyStatus,
    CopyUnknown,
    NothingToRepair,
    Pack,
    decide_pack,
    decide_whole,
    sorted_chunks,
)
from ckpt.values import ChunkLocation, Codec

KEY = "packs/a-0000000000000000-00000000.pack"


def place(number: int) -> ChunkRef:
    return bytes([number]) * 16, ChunkLocation(KEY, number * 10, 10, 10, Codec.RAW)


PACK = Pack(KEY, tuple(place(number) for number in range(3)))


def test_whole_object_is_copied_from_any_right_copy_to_what_is_missing_or_damaged_and_nowhere_else() -> (
    None
):
    for whats in product(CopyStatus, repeat=3):
        for writable in ({0, 1, 2}, {0}, set()):
            copies = [CopyCheck(what) for what in whats]
            bad = {
                n
                for n, what in enumerate(whats)
                if what in (CopyStatus.MISSING, CopyStatus.DAMAGED)
            } & writable
            match decide_whole(copies, writable=writable):
                case CopyRepair(source, targets, patches):
                    assert whats[source] is CopyStatus.OK
                    assert set(targets) == bad
                    assert not patches
                case NothingToRepair():
                    assert CopyStatus.OK in whats
                    assert not bad
                case CopyLost():
                    assert not {CopyStatus.OK, CopyStatus.UNREADABLE} & set(whats)
                case CopyUnknown():
                    assert CopyStatus.OK not in whats
                    assert CopyStatus.UNREADABLE in whats


def pack_copies() -> st.SearchStrategy[CopyCheck]:
    damaged = st.sets(st.integers(0, 2), min_size=1).map(
        lambda bad: CopyCheck(
            CopyStatus.DAMAGED, bad_chunks=frozenset(place(number) for number in bad)
        )
    )
    others = st.sampled_from(
        [
            CopyCheck(CopyStatus.OK),
            CopyCheck(CopyStatus.MISSING, all_bad=True),
            CopyCheck(CopyStatus.UNREADABLE, all_bad=True),
        ],
    )
    return st.one_of(others, damaged)


@given(st.lists(pack_copies(), min_size=1, max_size=4), st.sets(st.integers(0, 3)))
def test_pack_that_is_written_has_every_chunk_from_a_copy_that_has_it_right(
    copies: list[CopyCheck], writable: set[int]
) -> None:
    bad = {
        n
        for n, copy in enumerate(copies)
        if copy.status in (CopyStatus.MISSING, CopyStatus.DAMAGED)
    } & writable
    silent = any(copy.status is CopyStatus.UNREADABLE for copy in copies)
    nowhere = [one for one in PACK.chunks if not any(copy.has(one) for copy in copies)]
    match decide_pack(PACK, copies, writable=writable):
        case CopyRepair(source, targets, patches):
            assert set(targets) == bad
            taken = dict(patches)
            for one in PACK.chunks:
                assert copies[taken.get(one, source)].has(one)
            assert not (patches and any(copy.status is CopyStatus.OK for copy in copies))
        case NothingToRepair():
            assert not bad
            assert not nowhere
        case CopyLost(places):
            assert list(places) == nowhere != []
            assert not silent
        case CopyUnknown(places):
            assert list(places) == nowhere != []
            assert silent


def test_pack_is_put_together_from_the_copy_with_least_damage() -> None:
    worse = CopyCheck(CopyStatus.DAMAGED, bad_chunks=frozenset((place(0), place(1))))
    better = CopyCheck(CopyStatus.DAMAGED, bad_chunks=frozenset((place(2),)))
    found = decide_pack(PACK, [worse, better], writable={0, 1})
    assert found == CopyRepair(1, (0, 1), ((place(2), 0),))


def test_places_are_in_order_of_offset_whatever_order_they_came_in() -> None:
    assert sorted_chunks(reversed(PACK.chunks)) == PACK.chunks
    assert PACK.end_bytes == PACK.stored_bytes == 30
