"""What a folded state answers: lines and their ends, names that it remembers, and which snapshot
somebody means."""

from __future__ import annotations

import pytest

from ckpt.errors import NewerSnapshotError, NotFoundError, UsageError
from ckpt.format.records import BY_STORES, Body, Commit, Drop, Open, Record, Tag, make_record
from ckpt.log import fold as working
from ckpt.log.fold import empty, fold
from ckpt.log.select import ResumeChoice, candidates, require_newest, select
from ckpt.log.state import (
    RECENT_MAX,
    Hole,
    LineageSegment,
    LogState,
    OpenedEpoch,
    StoreSet,
    lineage_segments,
    whole_epoch,
)
from ckpt.values import SnapshotId

A = "a" * 32


def pair(epoch: int, step: int) -> SnapshotId:
    return SnapshotId(epoch, step)


def commit(epoch: int, step: int) -> tuple[int, Body]:
    return epoch, Commit(pair(epoch, step), A, None)


def chain(*entries: tuple[int, Body]) -> list[Record]:
    records: list[Record] = []
    for seq, (epoch, body) in enumerate(entries):
        prev = records[-1].digest if records else ""
        records.append(
            make_record(body, job="run-a", seq=seq, epoch=epoch, write_id=f"w{seq}", prev=prev)
        )
    return records


def folded(*entries: tuple[int, Body]) -> LogState:
    return fold(empty("run-a"), chain(*entries))


OPEN1: tuple[int, Body] = (1, Open(1, None))


def state() -> LogState:
    """Epoch 1 took 10, 20, 30; epoch 2 went on from 20 with 25; epoch 3 afresh with 5; epoch 4 from
    2/25 with 40."""
    return folded(
        OPEN1,
        commit(1, 10),
        commit(1, 20),
        commit(1, 30),
        (2, Open(2, pair(1, 20))),
        commit(2, 25),
        (3, Open(3, None)),
        commit(3, 5),
        (4, Open(4, pair(2, 25))),
        commit(4, 40),
        (4, Tag("x", pair(3, 5))),
    )


def test_a_line_goes_down_through_what_each_epoch_resumed() -> None:
    assert (
        state().lineage
        == (pair(4, 40), pair(2, 25), pair(1, 20), pair(1, 10))
        == candidates(state())
    )
    assert state().lineage_from(pair(3, 5)) == (pair(3, 5),)
    assert state().lineage_from(pair(2, 24)) == (pair(1, 20), pair(1, 10))
    assert state().lineage_from(pair(9, 1)) == (), "an epoch that was never opened has no line"
    opens = {1: OpenedEpoch(1, 0, None), 2: OpenedEpoch(2, 4, pair(1, 20))}
    assert list(lineage_segments(opens, whole_epoch(2))) == [
        LineageSegment(2, None),
        LineageSegment(1, 20),
    ]
    assert list(lineage_segments(opens, pair(2, 7))) == [
        LineageSegment(2, 7),
        LineageSegment(1, 20),
    ]


def test_an_empty_state_has_no_epoch_line_or_newest() -> None:
    nothing = empty("run-a")
    assert (nothing.job, nothing.next_seq, nothing.head_digest, nothing.epoch) == (
        "run-a",
        0,
        "",
        0,
    )
    assert (
        nothing.lineage == ()
        and nothing.newest() is None
        and nothing.stale_reason == ""
        and nothing.voids_total == 0
    )
    assert nothing.stores is None and nothing.floor is None and nothing.tags == {}
    assert folded(OPEN1).epoch == 1 and folded(OPEN1).newest() is None


def test_a_state_is_unsure_of_the_newest_where_the_log_goes_on_or_too_few_answered() -> None:
    hole = LogState(job="run-a", hole=Hole(3, "rot"), short="two are silent")
    assert hole.stale_reason == "rot"
    assert LogState(job="run-a", short="two are silent").stale_reason == "two are silent"
    assert hole.without_hole() == LogState(job="run-a")


def test_records_are_found_by_their_write_id_and_place_among_the_last_only() -> None:
    entries = (OPEN1, *(commit(1, step) for step in range(1, 8)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(working, "RECENT_MAX", 3)
        found = folded(*entries)
    assert found.recent == ("w5", "w6", "w7")
    assert [found.seq_of(f"w{seq}") for seq in (4, 5, 7, 8)] == [None, 5, 7, None]
    assert [found.write_id_at(seq) for seq in (-1, 4, 5, 7, 8)] == [None, None, "w5", "w7", None]


def test_a_write_is_known_again_while_it_is_among_the_last_1024_records() -> None:
    """A repeat within reach is void, and one beyond it is a record like any other. All readers must
    agree on the reach."""
    assert RECENT_MAX == 1024, "docs/format.md names it"
    tags = [(1, Tag("x", pair(1, 1)))] * RECENT_MAX
    for first, void in ((RECENT_MAX - 1, True), (RECENT_MAX, False)):
        records = chain(OPEN1, commit(1, 1), *tags[:first])
        again = make_record(
            Tag("y", pair(1, 1)),
            job="run-a",
            seq=len(records),
            epoch=1,
            write_id="w1",
            prev=records[-1].digest,
        )
        found = fold(empty("run-a"), [*records, again])
        assert bool(found.voids) == void and len(found.recent) == RECENT_MAX


def test_a_write_id_that_was_recorded_twice_is_known_while_one_of_the_two_is_among_the_last() -> (
    None
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(working, "RECENT_MAX", 3)
        records = chain(OPEN1)
        for write_id in ("twice", "x", "twice", "y", "z", "twice", "u", "v", "w", "twice"):
            seq, step = len(records), len(records)
            body = Commit(pair(1, step), A, None)
            records.append(
                make_record(
                    body, job="run-a", seq=seq, epoch=1, write_id=write_id, prev=records[-1].digest
                )
            )
        found = fold(empty("run-a"), records)
    assert [(void.seq, void.code) for void in found.voids] == [(3, "repeat"), (6, "repeat")]
    assert found.find(pair(1, 10)) is not None


def test_a_void_is_told_of_its_own_place_only() -> None:
    found = folded(OPEN1, commit(1, 1), commit(1, 1), commit(1, 2))
    void = found.void_at(2)
    assert void is not None and void.code == "repeat" and found.voids_total == 1
    assert found.void_at(1) is None and found.void_at(3) is None


def test_tags_are_listed_by_name_whatever_order_they_came_in() -> None:
    found = folded(
        OPEN1, commit(1, 1), commit(1, 2), (1, Tag("z", pair(1, 1))), (1, Tag("a", pair(1, 2)))
    )
    assert [(tag.name, tag.snapshot) for tag in found.tagged] == [
        ("a", pair(1, 2)),
        ("z", pair(1, 1)),
    ]


def test_the_newest_on_the_line_is_kept_and_off_the_line_what_is_greatest() -> None:
    """Beyond what was resumed nothing is kept; with an empty line, the greatest there is."""
    off = folded(
        OPEN1,
        commit(1, 10),
        commit(1, 20),
        (2, Open(2, pair(1, 15))),
        (0, Drop((pair(1, 20),), None)),
    )
    assert off.lineage == (pair(1, 10),) and not off.voids
    exact = folded(
        OPEN1,
        commit(1, 10),
        commit(1, 20),
        (2, Open(2, pair(1, 20))),
        (0, Drop((pair(1, 20),), None)),
    )
    assert [void.code for void in exact.voids] == ["newest-kept"]
    fresh = folded(OPEN1, commit(1, 10), (2, Open(2, None)), commit(2, 3), (3, Open(3, None)))
    assert [
        fold(fresh, _drop(fresh, one)).lineage_from(one) for one in (pair(1, 10), pair(2, 3))
    ] == [
        (),
        (pair(2, 3),),
    ]


def test_a_dropped_snapshot_is_not_what_a_later_line_keeps() -> None:
    """2/25 is dropped while no line has it; epoch 4 goes on from it, from memory, and 1/20 is what
    can be restored."""
    entries = (
        OPEN1,
        commit(1, 20),
        (2, Open(2, pair(1, 20))),
        commit(2, 25),
        (3, Open(3, pair(1, 20))),
        commit(3, 21),
        (0, Drop((pair(2, 25),), None)),
        (4, Open(4, pair(2, 25))),
    )
    found = folded(*entries, (0, Drop((pair(1, 20),), None)))
    assert [void.code for void in found.voids] == ["newest-kept"] and found.newest() == pair(1, 20)
    assert not folded(*entries, (0, Drop((pair(3, 21),), None))).voids
    assert [void.code for void in folded(*entries, (0, Drop((), pair(2, 0)))).voids] == [
        "floor-too-high"
    ]


def _drop(found: LogState, snapshot: SnapshotId) -> list[Record]:
    body = Drop((snapshot,), None)
    return [
        make_record(
            body, job="run-a", seq=found.next_seq, epoch=0, write_id="d", prev=found.head_digest
        )
    ]


def test_so_many_stores_must_answer_that_one_of_them_has_what_was_acknowledged() -> None:
    for count, quorum, needed in ((1, 1, 1), (3, 2, 2), (4, 3, 2), (5, 3, 3), (5, 5, 1)):
        members = StoreSet(tuple(f"{n:032x}" for n in range(count)), quorum, BY_STORES)
        assert members.answers_min == needed


def test_the_step_alone_means_the_newest_of_it_on_the_line() -> None:
    found = folded(
        OPEN1, commit(1, 10), commit(1, 20), (2, Open(2, pair(1, 20))), commit(2, 10), commit(2, 20)
    )
    assert select(found) == pair(2, 20)
    assert select(found, step=10) == pair(2, 10)
    assert select(found, step=10, epoch=1) == pair(1, 10)
    assert select(found, epoch=1) == pair(1, 20)


def test_step_and_epoch_0_are_a_step_and_an_epoch() -> None:
    found = folded(OPEN1, commit(1, 0), commit(1, 7))
    assert select(found, step=0) == pair(1, 0)
    assert select(found, step=0, epoch=1) == pair(1, 0)
    with pytest.raises(NotFoundError, match=r"epoch=0 step=None nearest_steps=none"):
        select(found, epoch=0)
    with pytest.raises(UsageError, match="tag='x' leave out"):
        select(found, tag="x", step=0)
    with pytest.raises(UsageError, match="tag='x' leave out"):
        select(found, tag="x", epoch=0)


def test_what_is_not_there_is_told_with_the_five_nearest_and_with_what_lies_elsewhere() -> None:
    steps = (10, 20, 30, 40, 50, 60, 70)
    found = folded(OPEN1, *(commit(1, step) for step in steps), (2, Open(2, pair(1, 60))))
    with pytest.raises(
        NotFoundError, match=r"step=45 nearest_steps=20, 30, 40, 50, 60 off_lineage=1 name one"
    ):
        select(found, step=45)
    with pytest.raises(NotFoundError, match=r"step=0 nearest_steps=10, 20, 30, 40, 50 off"):
        select(found, step=0)
    with pytest.raises(NotFoundError, match=r"epoch=1 step=65 nearest_steps=30, 40, 50, 60, 70$"):
        select(found, step=65, epoch=1)
    with pytest.raises(NotFoundError, match=r"job='run-a' off_lineage=0$"):
        select(folded(OPEN1))
    with pytest.raises(NotFoundError, match=r"nearest_steps=10 off_lineage=0$"):
        select(folded(OPEN1, commit(1, 10)), step=9)


def test_at_most_twenty_tags_are_named_in_order() -> None:
    names = [f"t{n:02d}" for n in range(21)]
    found = folded(OPEN1, commit(1, 1), *((1, Tag(name, pair(1, 1))) for name in reversed(names)))
    with pytest.raises(NotFoundError, match=f"tag='x' tags={', '.join(map(repr, names[:20]))}$"):
        select(found, tag="x")
    with pytest.raises(NotFoundError, match=r"tag='x' tags=none$"):
        select(folded(OPEN1), tag="x")


@pytest.mark.parametrize(
    "resume",
    [
        None,
        pair(1, 10),
        pair(1, 20),
        pair(2, 25),
        pair(2, 26),
        pair(4, 39),
        pair(4, 40),
        pair(4, 41),
    ],
)
@pytest.mark.parametrize("newest_then", [None, pair(1, 20), pair(2, 25), pair(4, 40), pair(4, 50)])
def test_what_was_committed_since_a_choice_must_not_be_left_behind(
    resume: SnapshotId | None, newest_then: SnapshotId | None
) -> None:
    """The newest is 4/40."""
    chosen = ResumeChoice(newest_then)
    if newest_then == pair(4, 40) or resume in (pair(4, 40), pair(4, 41)):
        require_newest(state(), resume, chosen)
    else:
        with pytest.raises(NewerSnapshotError) as raised:
            require_newest(state(), resume, chosen)
        assert str(raised.value) == (
            "a newer snapshot was committed while training was about to resume. newest=epoch 4 "
            "step 40 "
            f"resume={resume} choose again"
        )
    require_newest(state(), resume, None)  # nobody says that it is the newest
    for nothing in (empty("run-a"), folded(OPEN1)):
        require_newest(nothing, resume, chosen)
