"""The last places of a log in every state that few stores may be in, gathered as a reader who hears
some of them does."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations_with_replacement, product

import pytest

from ckpt.format.records import Open, Record, Stores, make_record
from ckpt.log.fold import empty, fold
from ckpt.log.quorum import MergedLog, NoAnswer, StoreRecords, merge_stores
from ckpt.log.state import LogState

IDS = tuple(f"{n:032x}" for n in range(1, 6))
SIZES = [
    (stores, quorum) for stores in range(1, 4) for quorum in range(stores // 2 + 1, stores + 1)
]
State = tuple[str, str, str]
"""Of one store: what it holds at the contested place (a name, "damage", "nothing"), at its second
key, at the place after."""


def record(seq: int, prev: str, name: str) -> Record:
    return make_record(
        Open(seq, None), job="j", seq=seq, epoch=seq, write_id=f"{name}{seq}", prev=prev
    )


def first(stores: int, quorum: int) -> Record:
    body = Stores(IDS[:stores], quorum)
    return make_record(body, job="j", seq=0, epoch=0, write_id="first", prev="")


def held(store: int, state: State, start: Record, after: str) -> StoreRecords:
    place, second, next_place = state
    rivals = {name: record(1, start.digest, name) for name in "ab"}
    records = {0: start} | ({1: rivals[place]} if place in rivals else {})
    if next_place:
        records[2] = record(2, rivals[after].digest, "next")
    settled = {1: rivals[second]} if second else {}
    return StoreRecords(IDS[store], records, settled, frozenset({1} if place == "damage" else ()))


def worlds(stores: int) -> Iterator[tuple[State | None, ...]]:
    """Each way in which the stores may be, None for silent; which one is which makes no
    difference."""
    states = [*product(("nothing", "a", "b", "damage"), ("", "a"), ("", "next")), None]
    for world in combinations_with_replacement(states, stores):
        if any(world):
            yield world


def read(world: tuple[State | None, ...], start: Record, after: str) -> MergedLog:
    found = [
        NoAnswer("late") if one is None else held(n, one, start, after)
        for n, one in enumerate(world)
    ]
    return merge_stores(empty("j"), found, [f"u{n}" for n in range(len(world))])


@pytest.mark.parametrize("after", ["a", "b"])
@pytest.mark.parametrize(("stores", "quorum"), SIZES)
def test_no_fold_passes_a_hole_or_contradicts_what_follows(
    stores: int, quorum: int, after: str
) -> None:
    start = first(stores, quorum)
    for world in worlds(stores):
        got = read(world, start, after)
        state = got.state
        known = [one for one in world if one is not None]
        heard = len(known)
        followed = any(one[2] for one in known)
        seen = {name for one in known for name in one[:2]} & {"a", "b"}
        if state.next_seq == 0:
            assert state.stale_reason, world
            continue
        assert bool(state.short) == (heard < stores - quorum + 1) or state.short, world
        if state.next_seq >= 2:
            taken = (state.write_id_at(1) or "")[0]
            assert taken in seen, "what is taken stands somewhere"
            assert not followed or taken == after, "what follows a record says which one counts"
        if followed and after not in seen:
            assert state.next_seq == 1 and state.hole is not None and state.hole.seq == 1, (
                "nothing is read past a hole"
            )
        assert (state.next_seq == 3) == (
            followed and after in seen and _last_may_count(world, stores, quorum)
        ), world
        check_tail(got)


def _last_may_count(world: tuple[State | None, ...], stores: int, quorum: int) -> bool:
    """Whether the record after the contested place may be on W stores."""
    return sum(one is None or bool(one[2]) for one in world) >= quorum


def check_tail(got: MergedLog) -> None:
    """What may come to nothing is told, with the state before it."""
    state, tail = got.state, got.tail
    assert (
        tail is not None
        and tail.record.seq == state.next_seq - 1
        and tail.record.digest == state.head_digest
    )
    assert (got.before is None) == tail.is_final
    if got.before is not None:
        rest = fold(got.before, [tail.record])
        assert rest == LogState(
            **{name: getattr(state, name) for name in LogState.__slots__}
            | {"hole": None, "short": ""}
        )
    assert (tail.record.seq in got.underreplicated) == (tail.copies < tail.members.write_quorum)


@pytest.mark.parametrize(("stores", "quorum"), SIZES)
def test_two_readers_who_hear_enough_of_the_same_stores_agree_but_for_a_last_record_that_is_not_sure(
    stores: int, quorum: int
) -> None:
    start = first(stores, quorum)
    enough = stores - quorum + 1
    for world in worlds(stores):
        if None in world or not _lawful(world, quorum):
            continue
        seen = []
        for heard in product((True, False), repeat=stores):
            if sum(heard) >= enough:
                seen.append(
                    read(
                        tuple(one if yes else None for one, yes in zip(world, heard, strict=True)),
                        start,
                        "a",
                    )
                )
        sure = [got.state for got in seen if got.before is None and not got.state.stale_reason]
        assert len({state.head_digest for state in sure if state.next_seq > 1}) <= 1, world
        for got in seen:
            for state in sure:
                whole = got.before or got.state
                shorter = min(whole.next_seq, state.next_seq)
                assert (
                    shorter <= 1
                    or whole.head_digest == state.head_digest
                    or whole.next_seq != state.next_seq
                )


def _lawful(world: tuple[State | None, ...], quorum: int) -> bool:
    """Whether writers can have left this: "a" has the place where it is settled, or where something
    follows it."""
    known = [one for one in world if one is not None]
    votes = [one[0] for one in known]
    settled = sum(bool(one[1]) for one in known)
    a_wins = votes.count("a") >= quorum or (
        "nothing" not in votes
        and votes.count("b") < quorum
        and votes.count("a") >= votes.count("b")
    )
    if "damage" in votes or (settled and not a_wins):
        return False
    counts = votes.count("a") >= quorum or settled >= quorum
    return counts or not any(one[2] for one in known)
