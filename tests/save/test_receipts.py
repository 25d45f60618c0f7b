"""What ranks say together does not depend on who put it together first."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from ckpt.errors import ConflictError, InternalError, UsageError
from ckpt.format.manifest import PartRef
from ckpt.save.receipts import (
    Receipt,
    ReplicaGroup,
    check_groups,
    common_base,
    diverged,
    failed_receipt,
    merge_receipts,
    replica_groups,
    replica_samples,
)
from ckpt.values import SnapshotId

PAIR, OTHER = SnapshotId(1, 7), SnapshotId(1, 8)
BASES = (None, SnapshotId(1, 1), SnapshotId(1, 2))


def receipt(
    rank: int,
    *,
    pair: SnapshotId = PAIR,
    base: SnapshotId | None = None,
    shared: dict[str, tuple[int, str]] | None = None,
) -> Receipt:
    ref = PartRef(key=f"part{rank}", digest="0" * 32, size_bytes=1, rank=rank)
    return Receipt(
        snapshot=pair,
        rank=rank,
        refs=(ref,),
        size_bytes=rank,
        new_bytes=1,
        base=base,
        shared=replica_groups(shared),
        complete=shared is not None,
        stores=(("one", "two"),),
    )


@st.composite
def worlds(draw: st.DrawFn) -> list[Receipt]:
    """Mostly sound: what one rank says wrong is to be found wherever it stands."""
    size = draw(st.integers(1, 9))
    groups = {
        f"g{n}": draw(st.sets(st.integers(0, size - 1), min_size=1))
        for n in range(draw(st.integers(0, 3)))
    }
    found = []
    for rank in range(size):
        shared = {name: (len(members), "d") for name, members in groups.items() if rank in members}
        one = receipt(rank, shared=shared, base=draw(st.sampled_from([None, BASES[1]])))
        harm = draw(
            st.sampled_from(
                ["", "", "", "", "", "failed", "pair", "base", "digest", "missing", "unknown"]
            )
        )
        if harm == "failed":
            one = failed_receipt(PAIR, rank, UsageError("no"))
        elif harm == "pair":
            one = receipt(rank, pair=OTHER, shared=shared)
        elif harm == "base":
            one = receipt(rank, base=BASES[2], shared=shared)
        elif harm == "digest":
            one = receipt(rank, shared={name: (count, "e") for name, (count, _) in shared.items()})
        elif harm == "missing":
            one = receipt(rank, shared={})
        elif harm == "unknown":
            one = receipt(rank, shared=None)
        found.append(one)
    return found


def sound(world: list[Receipt]) -> bool:
    """Said anew, from all at once."""
    held: dict[str, list[ReplicaGroup]] = {}
    for one in world:
        for name, what in one.shared.items():
            held.setdefault(name, []).append(what)
    complete = all(one.complete for one in world)
    return (
        all(one.error is None for one in world)
        and len({one.snapshot for one in world}) == 1
        and len({one.base for one in world} - {None}) <= 1
        and all(
            len(set(many)) == 1 and (not complete or len(many) == many[0].size)
            for many in held.values()
        )
    )


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(worlds(), st.data())
def test_grouping_makes_no_difference(world: list[Receipt], data: st.DataObject) -> None:
    flat = check_groups(merge_receipts(world))
    level = world
    while len(level) > 1:  # any tree, of any depth
        cuts = sorted(data.draw(st.sets(st.integers(1, len(level) - 1), max_size=len(level) - 2)))
        ends = [*cuts, len(level)]
        level = [merge_receipts(level[a:b]) for a, b in zip([0, *cuts], ends, strict=True)]
    tree = check_groups(level[0])
    assert (flat.error is None) == (tree.error is None) == sound(world)
    assert (flat.snapshot, flat.rank, flat.ranks) == (
        min(one.snapshot for one in world),
        0,
        len(world),
    )
    if flat.error is None:
        assert tree == flat
        assert [ref.rank for ref in flat.refs] == list(range(len(world)))
        assert flat.size_bytes == sum(range(len(world))) and flat.new_bytes == len(world)


def test_first_error_in_rank_order_is_that_of_all() -> None:
    both = merge_receipts(
        [
            receipt(0),
            failed_receipt(PAIR, 1, UsageError("one")),
            failed_receipt(PAIR, 2, UsageError("two")),
        ]
    )
    assert both.error is not None and (both.error.text, both.error.rank) == ("one", 1)
    assert both.ranks == 3


def test_ranks_that_captured_different_steps_are_named() -> None:
    node = merge_receipts([receipt(0), receipt(1)])
    error = merge_receipts([node, receipt(2, pair=OTHER)]).error
    assert error is not None and error.code == ConflictError.code
    assert "captured_by_rank=0 to 1: epoch 1 step 7, 2: epoch 1 step 8" in error.text
    many = [receipt(rank, pair=SnapshotId(1, rank)) for rank in range(20)]
    error = merge_receipts(many).error
    assert error is not None and "and 12 more" in error.text


def test_ranks_that_do_not_follow_each_other_are_refused() -> None:
    with pytest.raises(InternalError, match="expected_rank=1"):
        merge_receipts([receipt(0), receipt(2)])
    with pytest.raises(InternalError):
        merge_receipts([receipt(0), receipt(0)])


def test_ranks_that_refer_to_different_snapshots_commit_nothing() -> None:
    assert common_base([None, None]) is None
    assert common_base([None, BASES[1], BASES[1]]) == BASES[1]
    with pytest.raises(ConflictError, match=r"bases=epoch 1 step 1, epoch 1 step 2"):
        common_base([BASES[2], None, BASES[1]])


def test_unknown_sets_are_compared_as_far_as_they_are_known() -> None:
    def fits(*sets: dict[str, tuple[int, str]] | None) -> bool:
        return (
            check_groups(
                merge_receipts([receipt(rank, shared=one) for rank, one in enumerate(sets)])
            ).error
            is None
        )

    assert fits({"a": (2, "x")}, None)
    assert fits(None, None)
    assert not fits({"a": (2, "x")}, {})
    assert not fits({"a": (3, "x")}, {"a": (3, "y")}, None)


def sampled(rank: int, digest: str, label: str = "m/w", group: str = "all") -> Receipt:
    samples = replica_samples({group: (label, digest)}, rank)
    return structs.replace(receipt(rank, shared={}), samples=samples)


def test_replicas_whose_samples_differ_are_named_with_what_differs() -> None:
    whole = merge_receipts([sampled(rank, "b" if rank == 2 else "a") for rank in range(5)])
    assert whole.error is None
    assert diverged(whole) == "m/w (ranks 0 with 3 more and 2)"


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=9), st.data())
def test_samples_merge_alike_in_any_grouping(digests: list[str], data: st.DataObject) -> None:
    one = [sampled(rank, digest) for rank, digest in enumerate(digests)]
    cut = data.draw(st.integers(0, len(one) - 1))
    grouped = merge_receipts([merge_receipts(one[: cut + 1]), *one[cut + 1 :]])
    assert grouped.samples == merge_receipts(one).samples
    assert bool(diverged(grouped)) == (len(set(digests)) > 1)


def test_samples_of_different_parts_or_groups_are_not_compared() -> None:
    parts = [sampled(0, "a", label="m/w"), sampled(1, "b", label="m/v")]
    assert diverged(merge_receipts(parts)) == ""
    groups = [sampled(0, "a", group="one"), sampled(1, "b", group="two")]
    assert diverged(merge_receipts(groups)) == ""
