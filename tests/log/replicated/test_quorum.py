"""Every way in which few stores may hold, miss, hide or have spoilt few records, against what could
be there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations_with_replacement, product

import pytest

from ckpt.log.quorum import (
    Beaten,
    PositionReading,
    Split,
    Taken,
    Unclear,
    Undecided,
    Vacant,
    Won,
    contest,
    decide,
    is_placeholder,
    placeholder_id,
    winner,
)

Place = tuple[tuple[str, str], ...]
"""What each store really holds: at the first key and at the second, empty for nothing."""

SIZES = [
    (stores, quorum) for stores in range(1, 6) for quorum in range(stores // 2 + 1, stores + 1)
]


def counts(place: Place, quorum: int) -> set[str]:
    """Which records count, by the definition."""
    found = Counter(record for record, _ in place if record)
    settled = Counter(second for _, second in place if second)
    return {
        digest for one in (found, settled) for digest, number in one.items() if number >= quorum
    }


def lawful(place: Place, quorum: int) -> bool:
    """Whether writers who keep to the rules can have left this: what is settled has the place, for
    everybody."""
    settled = {second for _, second in place if second}
    if not settled:
        return True
    found = Counter(record for record, _ in place if record)
    if len(settled) > 1:
        return False
    (only,) = settled
    if found[only] >= quorum:
        return True
    split = sum(found.values()) == len(place) and max(found.values()) < quorum
    return split and winner(found) == only


def completions(seen: Sequence[PositionReading], quorum: int) -> Iterator[Place]:
    """All that may really be there: a silent store may hold anything, and damage was one thing or
    the other."""
    digests = {"a", "b", "z"} | {one.record for one in seen} | {one.settled for one in seen}
    choices = []
    for one in seen:
        if one.sure:
            choices.append([(one.record, one.settled)])
            continue
        firsts = [one.record] if one.record else sorted(digests | {""})
        seconds = [one.settled] if one.settled else sorted(digests | {""})
        found = list(product(firsts, seconds))
        if one.damaged:  # something was there where now nothing can be read
            found = [pair for pair in found if pair != (one.record, one.settled)]
        choices.append(found)
    for place in product(*choices):
        if lawful(place, quorum):
            yield place


STATES = [
    PositionReading(),
    PositionReading("a"),
    PositionReading("b"),
    PositionReading("c"),
    PositionReading(answered=False),
    PositionReading(damaged=True),
    PositionReading("a", "a"),
    PositionReading("b", "a"),
    PositionReading("", "a"),
    PositionReading("a", damaged=True),
]


@pytest.mark.parametrize(("stores", "quorum"), [size for size in SIZES if size[0] <= 3])
def test_what_is_taken_is_the_only_one_that_may_count(stores: int, quorum: int) -> None:
    # Which store is which makes no difference.
    for seen in combinations_with_replacement(STATES, stores):
        outcomes = [counts(place, quorum) for place in completions(seen, quorum)]
        if not outcomes:
            continue  # nobody can have left this
        assert all(len(found) <= 1 for found in outcomes), "at most one record counts"
        may = set().union(*outcomes)
        must = set.intersection(*outcomes)
        enough = sum(one.answered for one in seen) >= stores - quorum + 1
        match decide(seen, quorum):
            case Taken(digest, copies):
                assert digest in may, seen
                assert not enough or may == {digest}, (seen, quorum)
                assert copies == max(
                    sum(digest == getattr(one, key) for one in seen)
                    for key in ("record", "settled")
                ) or (0 < copies <= stores)
            case Vacant():
                assert not must, seen
                assert not enough or not may, (seen, quorum)
            case Unclear(digests):
                # Which of its keys is damaged isn't told, so that some of what could be concluded
                # isn't.
                assert not must or any(one.damaged for one in seen), (seen, quorum)
                assert set(digests) <= {one.record for one in seen} | {one.settled for one in seen}


@pytest.mark.parametrize(("stores", "quorum"), [size for size in SIZES if size[0] >= 4])
def test_votes_alone_are_counted_with_those_that_are_not_known(stores: int, quorum: int) -> None:
    for seen in combinations_with_replacement(
        [
            PositionReading(),
            PositionReading("a"),
            PositionReading("b"),
            PositionReading("c"),
            PositionReading(answered=False),
        ],
        stores,
    ):
        votes = Counter(one.record for one in seen if one.record)
        silent = sum(not one.answered for one in seen)
        possible = {digest for digest, number in votes.items() if number + silent >= quorum}
        match decide(seen, quorum):
            case Taken(digest, copies, settled):
                assert ({digest}, votes[digest], False) == (possible, copies, settled)
            case Vacant():
                assert not possible
            case Unclear(digests):
                assert set(digests) == possible and len(possible) > 1


@pytest.mark.parametrize(("stores", "quorum"), [size for size in SIZES if size[0] <= 4])
def test_a_record_that_is_followed_is_taken_wherever_it_stands_and_nothing_else_is(
    stores: int, quorum: int
) -> None:
    for seen in combinations_with_replacement(STATES, stores):
        held = {one.record for one in seen} | {one.settled for one in seen}
        decided = decide(seen, quorum, {"b"})
        if "b" in held:
            assert isinstance(decided, Taken) and decided.digest == "b"
        else:
            assert decided == Vacant()


@pytest.mark.parametrize(("stores", "quorum"), SIZES)
def test_all_writers_who_can_tell_find_the_same_outcome_of_a_vote(stores: int, quorum: int) -> None:
    for votes in combinations_with_replacement("abcd", stores):
        outcomes = set()
        full = Counter(votes)
        for known in product((True, False), repeat=stores):
            held = [vote if yes else None for vote, yes in zip(votes, known, strict=True)]
            for mine in "abcd":
                match contest(mine, held, quorum):
                    case Won(sure):
                        outcomes.add(mine)
                        assert full[mine] >= quorum
                        assert sure == all(vote == mine for vote in held)
                    case Beaten(digest):
                        outcomes.add(digest)
                        assert digest != mine and full[digest] >= quorum
                    case Split(digest):
                        outcomes.add(digest)
                        assert all(known), "a split is only known by who knows all votes"
                        assert max(full.values()) < quorum
                    case Undecided():
                        known_votes = Counter(vote for vote in held if vote is not None)
                        assert max(known_votes.values(), default=0) < quorum and not all(known)
        assert len(outcomes) == 1, (votes, outcomes)
        assert contest("a", list(votes), quorum) != Undecided(), (
            "who knows all votes knows the outcome"
        )


def test_a_vote_that_is_won_for_sure_stays_so_whichever_stores_are_lost() -> None:
    for stores, quorum in SIZES:
        won = contest("a", ["a"] * stores, quorum)
        assert won == Won(sure=True)
        for lost in range(quorum):
            seen = [PositionReading("a")] * (stores - lost) + [
                PositionReading(answered=False)
            ] * lost
            assert decide(seen, quorum) == Taken("a", stores - lost, settled=False)
        for other in range(stores - quorum + 1):
            # Settled on W of them: any W - 1 may go, whatever the others hold.
            held = (
                [PositionReading("a", "a")] * quorum
                + [PositionReading("b")] * other
                + [PositionReading()] * (stores - quorum - other)
            )
            for kept in combinations_of(held, stores - quorum + 1):
                left = list(kept) + [PositionReading(answered=False)] * (quorum - 1)
                found = decide(left, quorum)
                assert isinstance(found, Taken) and found.digest == "a", left


def combinations_of(
    held: Sequence[PositionReading], size: int
) -> Iterator[tuple[PositionReading, ...]]:
    """Each choice of so many, once."""
    yield from {tuple(sorted(kept, key=repr)) for kept in _subsets(tuple(held), size)}


def _subsets(held: tuple[PositionReading, ...], size: int) -> Iterator[tuple[PositionReading, ...]]:
    if size == 0:
        yield ()
    elif len(held) >= size:
        for kept in _subsets(held[1:], size - 1):
            yield (held[0], *kept)
        yield from _subsets(held[1:], size)


def test_the_winner_of_a_split_is_the_most_frequent_of_equals_the_smallest() -> None:
    assert winner({}) is None
    assert winner({"b": 2, "a": 1}) == "b"
    assert winner({"b": 1, "c": 1, "a": 1}) == "a"


def test_a_stand_in_is_known_as_one() -> None:
    assert [is_placeholder(placeholder_id(number)) for number in range(99)] == [True] * 99
    assert len({placeholder_id(number) for number in range(99)}) == 99
    assert all(len(placeholder_id(number)) == 32 for number in (0, 98))
    assert not is_placeholder("0" * 31 + "1")
