"""What a place holds and how a claim stands, by what each store was seen to hold: the rules, case
by case."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from ckpt.format import keys
from ckpt.log.quorum import (
    Beaten,
    Divided,
    NextRound,
    Position,
    PositionReading,
    Settled,
    Split,
    Taken,
    Unclear,
    Undecided,
    Vacant,
    Won,
    conclude,
    contest,
    contest_among_survivors,
    decide,
    is_placeholder,
    placeholder_id,
    winner,
)

A, B, C = "a" * 32, "b" * 32, "c" * 32
NONE, SILENT, ROT = (
    PositionReading(),
    PositionReading(answered=False),
    PositionReading(damaged=True),
)
HAS_A, HAS_B, HAS_C = PositionReading(A), PositionReading(B), PositionReading(C)
SETTLED_A, BOTH_A = PositionReading(settled=A), PositionReading(A, A)
ROT_SETTLED_A = PositionReading(settled=A, damaged=True)


@pytest.mark.parametrize(
    ("seen", "quorum", "found"),
    [
        ([], 1, Vacant()),
        ([NONE, NONE, NONE], 2, Vacant()),
        ([SILENT, SILENT, SILENT], 2, Vacant()),
        ([HAS_A], 1, Taken(A, 1, False)),
        ([HAS_A, HAS_A, HAS_A], 2, Taken(A, 3, False)),
        ([HAS_A, HAS_A, NONE], 2, Taken(A, 2, False)),
        ([HAS_A, HAS_A, HAS_B], 2, Taken(A, 2, False)),
        ([HAS_A, NONE, NONE], 2, Vacant()),
        ([HAS_A, SILENT, NONE], 2, Taken(A, 1, False)),
        ([HAS_A, ROT, NONE], 2, Taken(A, 1, False)),
        ([HAS_A, HAS_B, NONE], 2, Vacant()),
        ([HAS_A, HAS_B, HAS_C], 2, Vacant()),
        ([HAS_B, HAS_A, SILENT], 2, Unclear((A, B))),
        ([HAS_A, SILENT, SILENT], 2, Taken(A, 1, False)),
        # Damage may have been any record: with enough of it, one that was acknowledged.
        ([ROT, ROT, NONE], 2, Unclear(())),
        ([ROT, SILENT, NONE], 2, Unclear(())),
        ([ROT, SILENT, HAS_A], 2, Unclear((A,))),
        ([ROT, HAS_A, HAS_A], 2, Taken(A, 2, False)),
        ([ROT, ROT, HAS_A, HAS_A, HAS_A], 3, Taken(A, 3, False)),
        ([ROT, NONE, NONE], 2, Vacant()),
        ([ROT], 1, Unclear(())),
        ([ROT, ROT, SILENT, HAS_B, HAS_A], 3, Unclear((A, B))),
        # Damage at the other key than the record's makes one store neither two copies nor none.
        ([PositionReading(A, damaged=True), NONE, NONE], 2, Vacant()),
        (
            [PositionReading(A, damaged=True), PositionReading(A, damaged=True), NONE],
            2,
            Taken(A, 2, False),
        ),
        ([PositionReading(settled=A, damaged=True), NONE, NONE], 2, Vacant()),
        # The second key: W of them, or one whose writer is not done.
        ([BOTH_A, BOTH_A, HAS_B], 2, Taken(A, 2, True)),
        ([SETTLED_A, SETTLED_A, NONE], 2, Taken(A, 2, True)),
        ([BOTH_A, HAS_B, SILENT], 2, Taken(A, 1, True)),
        ([BOTH_A, HAS_B, NONE], 2, Vacant()),
        ([BOTH_A, HAS_A, HAS_B, HAS_B, SILENT], 3, Taken(A, 2, False)),
        ([BOTH_A, HAS_A, HAS_A, NONE, NONE], 3, Taken(A, 3, False)),
        ([BOTH_A, HAS_B, HAS_B, SILENT, NONE], 3, Vacant()),
        ([SETTLED_A, PositionReading(settled=B), SILENT], 2, Unclear((A, B))),
    ],
)
def test_a_record_counts_that_is_or_may_be_on_enough_stores(
    seen: list[PositionReading], quorum: int, found: Position
) -> None:
    for order in (
        set(itertools.permutations(range(len(seen)))) if len(seen) < 4 else [range(len(seen))]
    ):
        assert decide([seen[at] for at in order], quorum) == found


@pytest.mark.parametrize(
    ("seen", "followed", "found"),
    [
        ([HAS_A, HAS_B, NONE], {B}, Taken(B, 1, False)),
        ([HAS_A, HAS_A, HAS_B], {B}, Taken(B, 1, False)),
        ([HAS_A, HAS_A, NONE], {B}, Vacant()),
        ([HAS_A, HAS_A, SILENT], {B, C}, Vacant()),
        ([NONE, SILENT, ROT], {B}, Vacant()),
        ([BOTH_A, HAS_A, HAS_A], {A}, Taken(A, 3, True)),
        ([SETTLED_A, SETTLED_A, HAS_A], {A}, Taken(A, 2, True)),
        ([SETTLED_A, NONE, HAS_B], {A}, Taken(A, 1, True)),
        ([HAS_B, HAS_A, NONE], {B, A}, Unclear((A, B), forked=True)),
        ([SETTLED_A, HAS_B, NONE], {B, A}, Unclear((A, B), forked=True)),
        ([PositionReading(C, "", B, 1), HAS_A, NONE], {A, B}, Unclear((A, B), forked=True)),
        ([PositionReading(A, "", B, 1), HAS_A, NONE], {B, C}, Taken(B, 0, True)),
        ([HAS_B, HAS_B, NONE], {B, A}, Taken(B, 2, False)),
    ],
)
def test_a_record_that_was_followed_counts_whatever_is_left_of_it(
    seen: list[PositionReading], followed: set[str], found: Position
) -> None:
    assert decide(seen, 2, followed) == found == decide(seen, 2, sorted(followed, reverse=True))


def test_a_store_is_sure_of_what_it_holds_where_it_answers_and_nothing_is_damaged() -> None:
    assert NONE.sure and HAS_A.sure and not SILENT.sure and not ROT.sure
    assert not PositionReading(answered=False, damaged=True).sure


@pytest.mark.parametrize(
    ("held", "quorum", "found"),
    [
        ([A], 1, Won(True)),
        ([A, A, A], 2, Won(True)),
        ([A, A, None], 2, Won(False)),
        ([A, A, B], 2, Won(False)),
        ([A, None, None], 2, Undecided()),
        ([None, None, None], 2, Undecided()),
        ([], 1, Undecided()),
        ([B, B, A], 2, Beaten(B)),
        ([B, B, None], 2, Beaten(B)),
        ([C, B, B, B, A], 3, Beaten(B)),
        ([A, B, None], 2, Divided(A)),
        ([A, B], 2, Split(A)),
        ([B, C], 2, Split(B)),
        ([A, None], 2, Undecided()),
        ([A, B, C], 2, Split(A)),
        ([A, B, B, C], 3, Split(B)),
        ([A, B, B, C, C], 3, Split(B)),
        ([A, A, B, B, None], 3, Divided(A)),
        ([A, B, C, "d" * 32, None], 3, Divided(A)),
        ([A, B, C, None, None], 3, Divided(A)),
        ([A, B, None, None, None], 3, Undecided()),
        ([C, B, B, None], 3, Divided(B)),
    ],
)
def test_a_claim_is_won_lost_split_or_open(
    held: list[str | None], quorum: int, found: object
) -> None:
    assert contest(A, held, quorum) == found


@pytest.mark.parametrize(
    ("held", "quorum", "found"),
    [
        ([A, A, None], 2, Settled(A)),
        ([A, A, ""], 2, Settled(A)),
        (["", "", None], 2, NextRound("")),
        ([A, "", None], 2, NextRound(A)),
        ([A, None, None], 2, Undecided()),
        (["", None, None], 2, Undecided()),
        ([], 1, Undecided()),
        ([A, "", "", None, None], 3, NextRound(A)),
        ([A, A, "", None, None], 3, NextRound(A)),
        ([A, A, A, "", ""], 3, Settled(A)),
    ],
)
def test_a_round_settled_a_record_leaves_one_to_the_next_or_none(
    held: list[str | None], quorum: int, found: object
) -> None:
    assert conclude(held, quorum) == found


@pytest.mark.parametrize(
    ("seen", "found"),
    [
        ([HAS_A, HAS_B, SILENT], Vacant()),
        ([HAS_A, HAS_A, HAS_B], Taken(A, 2, False)),
        ([HAS_A, NONE, SILENT], Taken(A, 1, False)),
        ([HAS_A, PositionReading(B, damaged=True), SILENT], Unclear((A, B))),
        ([HAS_A, PositionReading(B, B), SILENT], Taken(B, 1, True)),
    ],
)
def test_a_divided_vote_was_told_to_nobody(seen: list[PositionReading], found: Position) -> None:
    assert decide(seen, 2, voted=True) == found


@pytest.mark.parametrize(
    ("seen", "found"),
    [
        ([PositionReading(A, A), PositionReading(B, "", B, 1), NONE], Taken(B, 0, True)),
        ([PositionReading(A, A), PositionReading(B, B, B, 1), HAS_B], Taken(B, 1, True)),
        ([PositionReading(A, B, A, 1), PositionReading(B, B, B, 2), HAS_A], Taken(B, 2, True)),
        ([PositionReading(A, "", A, 1), ROT, SILENT], Unclear((A,))),
        ([PositionReading(A, A), ROT, SILENT], Unclear((A,))),
        ([PositionReading(A, A), ROT, NONE], Taken(A, 1, True)),
        # Enough damage may hide a round after the last that is seen, unless what that one settled
        # is at W settled keys of the first.
        ([PositionReading(A, "", A, 1), ROT, NONE], Taken(A, 0, True)),
        ([PositionReading(A, "", A, 1), SILENT, SILENT], Taken(A, 0, True)),
        ([PositionReading(A, A), SILENT, SILENT], Taken(A, 1, True)),
        ([ROT_SETTLED_A, ROT_SETTLED_A, NONE], Taken(A, 2, True)),
        ([replace(ROT_SETTLED_A, later=A, later_round=1)] * 2 + [NONE], Taken(A, 2, True)),
        ([SETTLED_A, PositionReading(settled=B, damaged=True), SILENT], Unclear((A, B))),
    ],
)
def test_what_the_last_round_settled_goes_before_what_earlier_ones_did(
    seen: list[PositionReading], found: Position
) -> None:
    assert decide(seen, 2, voted=True) == found


def test_what_only_a_later_round_holds_is_found_where_it_is_followed() -> None:
    assert decide([PositionReading(A, "", B, 1), HAS_A, HAS_A], 2, {B}) == Taken(B, 0, True)


@pytest.mark.parametrize(
    ("votes", "first", "found"),
    [
        ([], False, Undecided()),
        ([None], False, Undecided()),
        ([A, None], False, Undecided()),
        ([A, None], True, Undecided()),
        ([A], True, Divided(A)),
        ([A, A], True, Divided(A)),
        ([A], False, Beaten(A)),
        ([A, A], False, Beaten(A)),
        ([A, B], False, Divided(A)),
        ([B, A, B], False, Divided(B)),
    ],
)
def test_the_survivors_of_lost_stores_decide_together_and_not_in_the_first_round(
    votes: list[str | None], first: bool, found: object
) -> None:
    assert contest_among_survivors(votes, first=first) == found


def test_a_claim_that_has_no_valid_record_wins_nothing() -> None:
    assert contest("", [None, None], 1) == Undecided()


def test_of_records_that_split_the_stores_all_find_the_same_winner() -> None:
    assert winner({}) is None
    for counts, found in (({A: 1, B: 2}, B), ({B: 1, A: 1}, A), ({C: 2, B: 2, A: 1}, B)):
        for order in itertools.permutations(counts):
            assert winner({digest: counts[digest] for digest in order}) == found


def test_no_two_claims_on_one_place_both_win_whatever_each_of_them_saw() -> None:
    """Every way to split five stores among three records, every view that leaves some unknown: one
    winner at most."""
    for quorum in (3, 4, 5):
        for votes in itertools.product((A, B, C), repeat=5):
            winners = set()
            for known in itertools.product((True, False), repeat=5):
                held = [vote if seen else None for vote, seen in zip(votes, known, strict=True)]
                for mine in (A, B, C):
                    match contest(mine, held, quorum):
                        case Won():
                            winners.add(mine)
                        case Beaten(digest) | Split(digest):
                            winners.add(digest)
                        case Divided() | Undecided():
                            pass
            assert len(winners) <= 1, (votes, winners)


def test_a_stand_in_looks_like_an_id_and_is_no_stores_id() -> None:
    """It is stored in the log: other releases must know it again."""
    assert placeholder_id(1) == "6e6f2073746f72652079657400000001"
    ids = [placeholder_id(number) for number in range(20)]
    assert len(set(ids)) == 20 and all(
        keys.is_digest_hex(one) and is_placeholder(one) for one in ids
    )
    assert (
        not is_placeholder(A)
        and not is_placeholder("0" * 20 + placeholder_id(0)[:12])
        and not is_placeholder("")
    )
