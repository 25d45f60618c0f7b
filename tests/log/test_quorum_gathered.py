"""The log out of what several stores hold: which records are taken, of whom it depends, what is not
known and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from ckpt.format.records import BY_STORES, Body, Commit, Open, Record, Stores, make_record
from ckpt.log.fold import empty, fold
from ckpt.log.quorum import (
    LastRecord,
    MergedLog,
    NoAnswer,
    PositionReading,
    StoreRecords,
    merge_stores,
    placeholder_id,
)
from ckpt.log.state import LogState, StoreSet
from ckpt.values import SnapshotId

IDS = tuple(f"{n:032x}" for n in range(6))
URLS = tuple(f"u{n}" for n in range(6))
FILE = "sqlite:" + "5" * 32
LATE = NoAnswer("no answer")


def stores(*numbers: int, quorum: int = 2, by: str = BY_STORES) -> Stores:
    return Stores(tuple(IDS[n] for n in numbers), quorum, by)


def commit(step: int) -> Commit:
    return Commit(SnapshotId(1, step), "a" * 32, None)


def follow(records: list[Record], *bodies: Body, by: str = "") -> list[Record]:
    """``records`` and then these; ``by`` tells apart what different writers made of the same
    bodies."""
    found = list(records)
    for body in bodies:
        seq = len(found)
        epoch = int(
            any(isinstance(one, Open) for one in (body, *(record.body for record in found)))
        )
        prev = found[-1].digest if found else ""
        found.append(
            make_record(body, job="run-a", seq=seq, epoch=epoch, write_id=f"w{seq}{by}", prev=prev)
        )
    return found


LOG = follow([], stores(0, 1, 2), Open(1, None), commit(1), commit(2))
"""Three stores, two of which must hold a record; then an epoch and two snapshots."""


def held(
    number: int, *records: Record, settled: tuple[Record, ...] = (), damaged: tuple[int, ...] = ()
) -> StoreRecords:
    return StoreRecords(
        IDS[number],
        {one.seq: one for one in records},
        {one.seq: one for one in settled},
        frozenset(damaged),
    )


def read(
    *found: StoreRecords | NoAnswer,
    state: LogState | None = None,
    known: Mapping[int, str] | None = None,
) -> MergedLog:
    return merge_stores(state or empty("run-a"), found, URLS[: len(found)], known=known or {})


def upto(count: int, log: list[Record] = LOG) -> LogState:
    return fold(empty("run-a"), log[:count])


def test_what_all_stores_hold_is_the_log_and_sure() -> None:
    found = read(*(held(n, *LOG) for n in range(3)))
    assert found.state == upto(4) and found.full == {0, 1, 2}
    assert found.tail == LastRecord(LOG[3], 3, False, StoreSet(IDS[:3], 2)) and found.tail.is_final
    assert found.underreplicated == () and found.before is None


def test_nothing_new_is_nothing_new() -> None:
    found = read(*(held(n) for n in range(3)), state=upto(4))
    assert found == MergedLog(upto(4), frozenset({0, 1, 2}), None, ())
    assert read(StoreRecords(""), StoreRecords("")) == MergedLog(
        empty("run-a"), frozenset(), None, ()
    )


def test_a_state_is_read_on_from_where_it_ends() -> None:
    found = read(*(held(n, *LOG[2:]) for n in range(3)), state=upto(2))
    assert found.state == upto(4) and found.tail is not None and found.tail.record == LOG[3]


def test_a_last_record_on_some_of_the_voters_counts_and_may_yet_turn_out_not_to() -> None:
    found = read(held(0, *LOG), held(1, *LOG), held(2, *LOG[:3]))
    assert found.state == upto(4) and found.before == upto(3) and found.underreplicated == ()
    assert found.tail is not None and (found.tail.copies, found.tail.is_final) == (2, False)


def test_a_last_record_that_may_be_on_silent_stores_is_taken_and_told_as_thin() -> None:
    found = read(held(0, *LOG), held(1, *LOG[:3]), LATE)
    assert found.state == upto(4) and found.before == upto(3) and found.underreplicated == (3,)
    assert found.full == {0, 1} and found.state.stale_reason == ""


def test_a_last_record_on_too_few_stores_is_not_taken_and_leaves_no_hole() -> None:
    found = read(held(0, *LOG), held(1, *LOG[:3]), held(2, *LOG[:3]))
    assert found.state == upto(3) and found.before is None and found.underreplicated == ()
    assert found.tail is not None and found.tail.record == LOG[2] and found.tail.is_final


def test_a_record_that_was_seen_to_count_is_taken_of_the_one_store_that_was_not_rolled_back() -> (
    None
):
    rolled_back = held(0, *LOG), held(1, *LOG[:3]), held(2, *LOG[:3])
    found = read(*rolled_back, known={3: LOG[3].digest})
    assert found.state == upto(4) and found.underreplicated == (3,)
    other = follow(LOG[:3], commit(3))[3]
    forgotten = read(*rolled_back, known={3: other.digest})
    assert forgotten == read(*rolled_back), "what no store holds any more decides nothing"
    anew = [held(number, *LOG[:3], other) for number in range(3)]
    assert read(*anew, known={3: LOG[3].digest}) == read(*anew), "nor what took its place"


def test_a_last_record_that_is_followed_is_sure_although_what_follows_it_is_not_taken() -> None:
    found = read(held(0, *LOG), held(1, *LOG[:3]), held(2, *LOG[:2]))
    assert found.state == upto(3) and found.before is None
    assert found.tail is not None and (
        found.tail.record,
        found.tail.copies,
        found.tail.is_final,
    ) == (LOG[2], 2, True)


def test_a_record_that_is_followed_is_taken_of_whatever_is_left_of_it() -> None:
    found = read(held(0, *LOG), held(1, *LOG[:2], LOG[3]), held(2, *LOG[:2], LOG[3]))
    assert found.state == upto(4) and found.underreplicated == (2,) and found.before is None
    beside = read(
        held(0, *LOG), held(1, *LOG[:2], LOG[3]), held(2, *LOG[:2], LOG[3]), held(5, LOG[2])
    )
    assert beside.state == upto(4) and beside.underreplicated == (2,), (
        "a store that does not count is no copy"
    )
    elsewhere = read(
        held(0, *LOG[:2], LOG[3]), held(1, *LOG[:2], LOG[3]), held(2, *LOG[:2]), held(5, LOG[2])
    )
    assert elsewhere.state == upto(4), "also where only a store has it that does not count"
    assert elsewhere.full == {0, 1, 2} and elsewhere.underreplicated == (2,)


def test_a_place_without_any_record_before_others_is_a_hole_that_says_who_is_silent() -> None:
    for later in (
        held(0, *LOG[:2], LOG[3]),
        held(0, *LOG[:2], settled=(LOG[3],)),
        held(0, *LOG[:2], damaged=(3,)),
    ):
        found = read(later, held(1, *LOG[:2]), LATE)
        hole = found.state.hole
        assert hole is not None and hole.seq == 2 and found.state.without_hole() == upto(2)
        assert hole.reason == "no store has a readable record there. silent=[u2: no answer]"
        assert found.state.stale_reason == hole.reason


def test_damage_at_the_end_is_no_hole_where_too_little_is_damaged_to_have_counted() -> None:
    found = read(held(0, *LOG[:2], damaged=(2,)), held(1, *LOG[:2]), held(2, *LOG[:2]))
    assert found.state == upto(2)


def test_damage_where_a_record_may_have_counted_is_a_hole() -> None:
    found = read(
        held(0, *LOG[:2], damaged=(2,)), held(1, *LOG[:2], damaged=(2,)), held(2, *LOG[:2])
    )
    assert found.state.hole is not None and found.state.hole.seq == 2
    assert found.state.hole.reason.startswith("stores hold damage there, and too few answered")


def test_two_records_of_which_none_was_told_are_as_good_as_none() -> None:
    """Neither is on all stores nor settled: the next writer lets the stores that answer decide."""
    other = follow(LOG[:3], commit(2), by="x")[3]
    found = read(held(0, *LOG), held(1, *LOG[:3], other), LATE)
    assert found.state == upto(3) and not found.state.stale_reason


def test_two_records_that_may_both_count_are_a_hole() -> None:
    """What a sequencer outside the stores gave out is told once W stores hold it."""
    log = follow([], stores(0, 1, 2, by=FILE), Open(1, None), commit(1), commit(2))
    other = follow(log[:3], commit(2), by="x")[3]
    found = read(held(0, *log), held(1, *log[:3], other), LATE)
    assert found.state.hole is not None and found.state.hole.seq == 3
    assert found.state.hole.reason.startswith("stores hold different records there")
    assert found.state.hole.reason.endswith("silent=[u2: no answer]")
    split = read(held(0, *log), held(1, *log[:3], other), held(2, *log[:3]))
    assert split.state == upto(3, log), "with all seen, neither can count"
    decided = read(held(0, *log), held(1, *log[:3], other, settled=(other,)), LATE)
    assert decided.tail is not None and decided.tail.record == other and decided.tail.settled
    assert decided.underreplicated == (3,) and not decided.tail.is_final


def test_a_record_at_its_second_key_on_enough_stores_is_sure() -> None:
    found = read(
        held(0, *LOG, settled=(LOG[3],)), held(1, *LOG, settled=(LOG[3],)), held(2, *LOG[:3])
    )
    assert (
        found.tail is not None
        and found.tail.settled
        and found.tail.is_final
        and found.before is None
    )


def test_with_too_few_answers_the_newest_is_not_known() -> None:
    found = read(held(0, *LOG), LATE, NoAnswer("dead"))
    assert found.full == {0} and found.state.short == found.state.stale_reason
    assert found.state.short == (
        "too few of the log's stores answered to know what is newest. answered=1 stores=3 needed=2 "
        "silent=[u1: no answer; u2: dead]"
    )
    assert found.state.find(SnapshotId(1, 2)) is not None
    enough = read(held(0, *LOG), held(1, *LOG), LATE)
    assert enough.full == {0, 1} and enough.state.short == ""
    foreign = read(held(0, *LOG), replace(held(1, *LOG), store_id=""), held(4, *LOG))
    assert foreign.full == {0} and "answered=1" in foreign.state.short


def test_where_a_file_gives_out_places_enough_copies_are_sure() -> None:
    log = follow([], stores(0, 1, 2, by=FILE), Open(1, None), commit(1))
    found = read(held(0, *log), held(1, *log), held(2, *log[:2]))
    assert found.tail is not None and found.tail.is_final and found.before is None
    thin = read(held(0, *log), held(1, *log[:2]), LATE)
    assert thin.tail is not None and not thin.tail.is_final and thin.before == upto(2, log)


def test_a_stand_in_has_no_vote_and_no_copy_is_waited_for() -> None:
    log = follow([], Stores((IDS[0], IDS[1], placeholder_id(2)), 2), Open(1, None))
    found = read(held(0, *log), held(1, *log))
    assert found.tail is not None and (found.tail.copies, found.tail.is_final) == (2, True)
    one = read(held(0, *log), held(1, log[0]))
    assert one.state == upto(1, log), "a stand-in is never silent: it holds nothing"


def test_a_new_set_of_stores_holds_from_the_next_record_on() -> None:
    log = follow([], stores(0, 1, 2), Open(1, None), stores(0, 1, 3), commit(1))
    found = read(held(0, *log), held(1, *log[:3]), held(2, *log[:3]), held(3, *log))
    assert found.state == upto(4, log) and found.full == {0, 1, 3}
    assert found.tail is not None and found.tail.members == StoreSet(stores(0, 1, 3).ids, 2)
    before = read(held(0, *log[:3]), held(1, *log[:3]), held(2, *log[:3]), held(3))
    assert before.tail is not None and before.tail.members == StoreSet(IDS[:3], 2), (
        "the old set decides who comes next"
    )
    assert before.full == {0, 1, 3} and before.state == upto(3, log)


def test_a_change_of_stores_is_the_old_sets_to_decide_until_it_is_followed() -> None:
    log = follow([], stores(0, 1, 2), Open(1, None), stores(3, 4, 5), commit(1))
    old = [held(n, *log[:2]) for n in range(3)]
    alone = read(*old, *(held(n, *log[:3], settled=(log[2],)) for n in (3, 4, 5)))
    assert alone.state == upto(2, log) and alone.full == {0, 1, 2}
    followed = read(*old, *(held(n, *log) for n in (3, 4, 5)))
    assert followed.state == upto(4, log) and followed.full == {3, 4, 5}
    lost = read(LATE, LATE, LATE, *(held(n, *log) for n in (3, 4, 5)))
    assert lost.state == upto(4, log) and lost.full == {3, 4, 5} and lost.state.stale_reason == ""


def test_a_change_that_few_of_the_old_set_hold_leaves_it_to_the_old_set_what_is_newest() -> None:
    log = follow([], stores(0, 1, 2), Open(1, None), stores(3, quorum=1))
    found = read(held(0, *log), LATE, LATE, held(3, *log))
    assert found.state.stores == StoreSet((IDS[3],), 1) and found.full == {3}
    assert found.before == upto(2, log) and "answered=1 stores=3 needed=2" in found.state.short


def test_a_change_to_stores_that_are_silent_leaves_the_newest_unknown_although_the_old_set_answers() -> (
    None
):
    log = follow([], stores(0, 1, 2), Open(1, None), stores(3, 4, 5))
    found = read(held(0, *log), held(1, *log[:2]), LATE, LATE, LATE, LATE)
    assert found.state.stores == StoreSet(IDS[3:], 2) and found.before == upto(2, log)
    assert "answered=0 stores=3 needed=2" in found.state.short


def test_before_the_stores_are_named_the_log_is_in_one_store_and_what_is_there_counts() -> None:
    log = follow([], Open(1, None), commit(1))
    alone = read(held(0, *log))
    assert (
        alone.state == upto(2, log)
        and alone.full == {0}
        and alone.tail is not None
        and alone.tail.is_final
    )
    beside = read(StoreRecords(""), held(0, *log))
    assert beside.state == upto(2, log) and beside.full == {1} and beside.state.short == ""
    unknown = read(LATE, held(0, *log), StoreRecords("", elsewhere="e" * 32), StoreRecords(""))
    assert unknown.full == {1} and unknown.state.find(SnapshotId(1, 1)) is not None
    assert unknown.state.short == (
        "the stores of the log are not known, and other stores may hold it. of_another_log=['u2'] "
        "silent=[u0: no answer]"
    )
    assert (
        "of_another_log=['u0'] silent=[]"
        in read(StoreRecords("", elsewhere="e" * 32), held(0, *log)).state.short
    )
    assert "of_another_log=[] silent=[u1" in read(held(0, *log), LATE).state.short


def test_damage_at_the_first_place_is_not_an_empty_log() -> None:
    found = read(held(0, damaged=(0,)), StoreRecords(""))
    assert found.state.hole is not None and found.state.hole.seq == 0
    assert found.state.hole.reason.startswith("stores hold damage there")


def test_records_in_a_store_that_has_no_id_count_for_nothing() -> None:
    log = follow([], Open(1, None))
    found = read(StoreRecords("", {0: log[0]}), held(1))
    assert found.state == empty("run-a") and found.full == {1}


def test_a_log_of_one_store_goes_on_in_the_stores_that_it_names() -> None:
    log = follow([], Open(1, None), commit(1), stores(0, 1, 2), commit(2))
    found = read(held(0, *log), held(1, log[3]), held(2))
    assert found.state == upto(4, log) and found.full == {0, 1, 2} and found.underreplicated == ()
    few = read(held(0, *log), held(1), held(2))
    assert few.state == upto(3, log)


def test_the_first_record_counts_on_the_stores_that_it_names_itself() -> None:
    found = read(held(0, LOG[0]), held(1, LOG[0]), held(2))
    assert found.state == upto(1) and found.tail is not None and found.tail.copies == 2
    assert read(held(0, LOG[0]), held(1), held(2)).state.next_seq == 0
    thin = read(held(0, LOG[0]), held(1), LATE)
    assert replace(thin.state, short="") == upto(1) and thin.before == empty("run-a")
    assert "silent=[u2: no answer]" in thin.state.short, (
        "it may not count, and then nobody knows where the log lies"
    )
    assert read(held(3, LOG[0]), held(4, LOG[0]), held(0), held(1)).state.next_seq == 0, (
        "on stores that it does not name"
    )


def test_of_two_first_records_the_one_that_counts_is_taken_and_two_that_may_are_a_hole() -> None:
    mine, other = LOG[0], follow([], stores(0, 1, 2), by="x")[0]
    clear = read(held(0, mine), held(1, mine), held(2, other))
    assert clear.state == upto(1) and clear.tail is not None and clear.tail.record == mine
    for order in ((mine, other), (other, mine)):
        unclear = read(held(0, order[0]), held(1, order[1]), LATE)
        assert (
            unclear.state.hole is not None and unclear.state.hole.seq == 0 and unclear.tail is None
        )
        assert unclear.state.hole.reason.startswith("stores hold different records there")
    apart = follow([], stores(3, 4, 5), by="x")[0]
    one = read(held(0, mine), held(1, apart), LATE, held(3), held(4), held(5))
    assert one.state.hole is not None and one.state.next_seq == 0, (
        "the silent store decides, whatever the others name"
    )
    both = read(
        held(0, mine), held(1, mine), held(2, mine), held(3, apart), held(4, apart), held(5, apart)
    )
    assert both.state.hole is not None and both.state.next_seq == 0, "each counts on its own stores"


@pytest.mark.parametrize(
    ("one", "last"),
    [
        (StoreRecords(""), -1),
        (held(0, LOG[0]), 0),
        (held(0, LOG[0], LOG[2]), 2),
        (held(0, LOG[0], settled=(LOG[3],)), 3),
        (held(0, LOG[0], settled=(LOG[1],), damaged=(2, 1)), 2),
    ],
)
def test_the_last_place_of_a_store_is_that_of_anything_it_holds(
    one: StoreRecords, last: int
) -> None:
    assert one.last() == last


def test_a_store_lists_all_that_it_holds_at_a_place_those_of_later_rounds_last() -> None:
    first, settled, later = (follow(LOG[:2], commit(step), by="x")[2] for step in (1, 2, 3))
    one = StoreRecords(IDS[0], {2: first}, {2: settled}, later={2: (3, later)})
    assert list(one.all_at(2)) == [first, settled, later] and one.last() == 2
    assert one.at(2) == PositionReading(first.digest, settled.digest, later.digest, 3)
    assert list(one.all_at(1)) == list(one.all_at(3)) == []
    assert StoreRecords(IDS[0], later={7: (1, later)}).last() == 7


def test_two_records_that_are_both_followed_are_two_histories_of_which_none_is_taken() -> None:
    other = follow(LOG[:2], commit(7), commit(8), by="x")
    found = read(held(0, *LOG), held(1, *other), held(2, *LOG[:2]))
    assert found.state.without_hole() == upto(2) and found.state.hole is not None
    assert (found.state.hole.seq, found.state.hole.reason) == (
        2,
        "two histories go on there: stores of the log were declared lost that were not, or were "
        "rolled back. "
        "stores=['u0', 'u1', 'u2'] name only those of the history that is to go on",
    )


def test_a_divided_vote_was_told_to_nobody_from_the_first_place_after_the_set_on() -> None:
    """About position 0 the makers of a log may disagree on who votes; after it they do not."""
    other = follow(LOG[:1], Open(1, None), by="x")[1]
    found = read(held(0, *LOG[:2]), held(1, LOG[0], other), LATE)
    assert found.state == upto(1) and not found.state.stale_reason


def test_what_a_store_holds_at_a_place() -> None:
    one = held(0, LOG[0], LOG[1], settled=(LOG[1],), damaged=(2, 0))
    assert one.at(0) == PositionReading(LOG[0].digest, "", damaged=True)
    assert one.at(1) == PositionReading(LOG[1].digest, LOG[1].digest)
    assert one.at(2) == PositionReading(damaged=True) and one.at(3) == PositionReading()
