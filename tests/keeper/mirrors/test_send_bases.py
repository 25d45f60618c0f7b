"""What peers have is remembered as long as it is sure."""

from __future__ import annotations

from ckpt.cluster.peermem.http import StoredContent
from ckpt.keeper.mirrors.plan import StagedShare
from ckpt.keeper.mirrors.send import BASES_MAX, BEHIND_MAX, MirrorBase, MirrorBases
from ckpt.values import SnapshotId, StagedIndex


def base(step: int, *, behind: int = 0) -> MirrorBase:
    index = StagedIndex(snapshot=SnapshotId(1, step), rank=0, world_size=1, shards=())
    return MirrorBase(
        StoredContent(key=f"k/{step}", size_bytes=1, version=step, boot="b"),
        StagedShare(index, 0, 1),
        behind,
    )


def test_newest_is_first_and_few_are_kept() -> None:
    bases = MirrorBases()
    bases.begin(1, ["b"])
    made = [base(step) for step in range(BASES_MAX + 2)]
    for one in made:
        bases.add("b", 0, one)
    assert bases.of("b", 0) == tuple(reversed(made))[:BASES_MAX]
    assert bases.of("b", 1) == bases.of("c", 0) == ()


def test_another_content_of_a_key_takes_the_place_of_the_first() -> None:
    bases = MirrorBases()
    bases.begin(1, ["b"])
    one, again = base(1), base(1, behind=1)
    for made in (one, again):
        bases.add("b", 0, made)
    assert bases.of("b", 0) == (again,)


def test_another_epoch_and_nodes_that_get_nothing_are_forgotten() -> None:
    bases = MirrorBases()
    bases.begin(1, ["b", "c"])
    for node in ("b", "c"):
        bases.add(node, 0, base(1))
    bases.begin(1, ["b"])
    bases.begin(1, ["b", "c"])
    assert (len(bases.of("b", 0)), len(bases.of("c", 0))) == (1, 0)
    bases.begin(2, ["b"])
    assert bases.of("b", 0) == ()


def test_what_is_gone_and_nodes_with_which_something_went_wrong_are_forgotten() -> None:
    bases = MirrorBases()
    bases.begin(1, ["b", "c"])
    old, new = base(1), base(2)
    for one in (old, new):
        bases.add("b", 0, one)
    bases.add("c", 0, new)
    bases.drop("b", 0, new)
    assert bases.of("b", 0) == (old,)
    bases.retain({"b"})
    assert (bases.of("b", 0), bases.of("c", 0)) == ((old,), ())


def test_after_so_many_shares_one_goes_whole_though_an_older_base_is_there() -> None:
    bases = MirrorBases()
    bases.begin(1, ["b"])
    bases.add("b", 0, base(1, behind=BEHIND_MAX - 1))
    assert bases.of("b", 0)
    bases.add("b", 0, base(2, behind=BEHIND_MAX))
    assert bases.of("b", 0) == ()
    bases.add("b", 0, base(3))
    assert bases.of("b", 0)[0] == base(3)
