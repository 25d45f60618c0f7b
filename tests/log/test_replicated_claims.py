"""Claims on real stores in memory: what a writer is told, and what lies where afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import msgspec
import pytest

from ckpt.backends.base import Backend, Buffer, Capabilities
from ckpt.backends.checked import read_alone
from ckpt.backends.memory import MemoryBackend
from ckpt.errors import FencedError, NotFoundError, UsageError
from ckpt.format import keys
from ckpt.format.records import Closed, Commit, make_record
from ckpt.format.store import JobRecord
from ckpt.log.quorum import NoAnswer
from ckpt.log.replicas import Enough, LogReplicas
from ckpt.log.replicated import (
    ROUNDS_MAX,
    CopyingSequencer,
    QuorumSequencer,
    settle_anyway,
    silent_stores,
)
from ckpt.log.sequencers import Appended, KeyTaken, StoreSequencer, WriteUnknown
from ckpt.testing.faults import CountingBackend, Fault, FaultyBackend, Harm
from ckpt.values import SnapshotId

T = TypeVar("T")

SEQ = 5
KEY, SETTLED = keys.log_key(SEQ), keys.settled_key(SEQ)


def record(step: int, *, seq: int = SEQ) -> bytes:
    body = Commit(SnapshotId(1, step), "a" * 32, None)
    return make_record(
        body, job="run-a", seq=seq, epoch=1, write_id=f"w{step}", prev="b" * 32
    ).encode()


def digest_order() -> list[bytes]:
    """Two records, that first which wins a split."""
    return sorted((record(1), record(2)), key=lambda data: msgspec.json.decode(data)["digest"])


FIRST, SECOND = digest_order()
"""Of a split between equals the first wins: its digest is smaller."""
CLOSED = Closed(job="run-a", seq=SEQ, closed_round=0).encode()
OTHER = record(3, seq=SEQ + 1)
NEWER = FIRST.replace(b'"v":1', b'"v":9')


class Plain(MemoryBackend):
    """A store that can't create a key only once, and says so."""

    def capabilities(self) -> Capabilities:
        return Capabilities(create_only=False, read_bytes_best=1, concurrency_best=1)

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        if create_only:
            raise UsageError("this store does not create a key only once")
        super().put(key, data)


class OneByOne:
    """Lanes without threads: each store is asked in turn, and all are waited for."""

    def ask(self, calls: Mapping[int, Callable[[], T]], enough: Enough[T]) -> dict[int, T]:
        return {number: call() for number, call in calls.items()}


class Stores:
    """Stores of one log, each with its ``ckpt.json``; the numbers in ``silent`` answer nothing
    about records."""

    def __init__(self, *kinds: type[MemoryBackend], silent: Sequence[int] = ()) -> None:
        self.inner = [kind(f"s{number}") for number, kind in enumerate(kinds)]
        self.ids = {number: f"{number:032x}" for number in range(len(kinds))}
        for number, store in enumerate(self.inner):
            store.put(
                keys.JOB_KEY,
                [JobRecord(job="run-a", store_id=self.ids[number], log_id="f" * 32).encode()],
            )
        dead = Fault(harm=Harm.LOST_REQUEST, key=keys.LOG, times=None)
        stores: list[Backend] = [
            FaultyBackend(one, [dead]) if number in silent else one
            for number, one in enumerate(self.inner)
        ]
        self.copies = LogReplicas(stores, OneByOne())

    def give(self, number: int, data: bytes, *, key: str = KEY) -> None:
        self.inner[number].put(key, [data])

    def at(self, key: str = KEY) -> list[bytes | None]:
        return [_held(store, key) for store in self.inner]

    def claim(
        self, data: bytes, *, quorum: int, absent: int = 0
    ) -> Appended | KeyTaken | WriteUnknown:
        return QuorumSequencer(self.copies, self.ids, quorum, absent=absent).append(SEQ, data)

    def claim_filed(
        self, file: MemoryBackend, data: bytes, *, quorum: int, absent: int = 0
    ) -> Appended | KeyTaken | WriteUnknown:
        return CopyingSequencer(
            StoreSequencer(file), self.copies, self.ids, quorum, absent=absent
        ).append(SEQ, data)


def _held(store: Backend, key: str) -> bytes | None:
    try:
        return read_alone(store, key, bytes_max=1 << 20)
    except NotFoundError:
        return None


THREE = (MemoryBackend,) * 3


def test_a_place_that_nobody_has_is_claimed_at_all_stores() -> None:
    world = Stores(*THREE)
    assert world.claim(FIRST, quorum=2) == Appended() == world.claim(FIRST, quorum=2)
    assert world.at() == [FIRST] * 3 and world.at(SETTLED) == [None] * 3


@pytest.mark.parametrize("held", [FIRST, b"rot", record(3, seq=SEQ + 1), NEWER])
def test_a_place_won_with_a_store_that_holds_something_else_is_settled_too(held: bytes) -> None:
    """W votes of which W - 1 are lost could not be told from another's single one."""
    world = Stores(*THREE)
    world.give(1, held)
    assert world.claim(SECOND, quorum=2) == Appended()
    assert world.at() == [SECOND, held, SECOND] and world.at(SETTLED) == [SECOND] * 3


def test_a_place_won_while_a_store_is_away_is_settled_too() -> None:
    world = Stores(*THREE, silent=[2])
    assert world.claim(SECOND, quorum=2) == Appended()
    assert world.at(SETTLED) == [SECOND, SECOND, None]
    absent = Stores(*THREE[:2])
    assert (
        absent.claim(SECOND, quorum=2, absent=1) == Appended()
        and absent.at(SETTLED) == [SECOND] * 2
    )


def test_a_place_that_another_has_is_lost_and_its_record_told() -> None:
    world = Stores(*THREE)
    world.give(0, SECOND)
    world.give(2, SECOND)
    assert world.claim(FIRST, quorum=2) == KeyTaken(SECOND)
    assert world.at(SETTLED) == [None] * 3


@pytest.mark.parametrize(("mine", "found"), [(FIRST, Appended()), (SECOND, KeyTaken(FIRST))])
def test_a_split_place_is_settled_for_the_same_winner_whoever_finds_it(
    mine: bytes, found: Appended | KeyTaken
) -> None:
    world = Stores(*THREE[:2])
    world.give(0, SECOND)
    world.give(1, FIRST)
    assert world.claim(mine, quorum=2) == found
    assert world.at() == [SECOND, FIRST] and world.at(SETTLED) == [FIRST, FIRST]
    assert world.at(keys.round_keys(SEQ, 1)[0]) == [None, None], "no further round is needed"


@pytest.mark.parametrize("mine", [FIRST, SECOND, record(4)])
def test_a_vote_divided_while_one_is_not_known_is_decided_by_a_further_round(mine: bytes) -> None:
    for world, absent in (
        (Stores(*THREE, silent=[2]), 0),
        (Stores(*THREE[:2]), 1),
    ):
        world.give(0, SECOND)
        world.give(1, FIRST)
        found = world.claim(mine, quorum=2, absent=absent)
        assert found == (Appended() if mine == FIRST else KeyTaken(FIRST))
        vote, settled = keys.round_keys(SEQ, 1)
        for key in (SETTLED, vote, settled):
            assert world.at(key)[:2] == [FIRST, FIRST]


def test_what_a_closed_round_had_settled_is_what_the_next_one_votes_for() -> None:
    """The silent store may hold another vote for it, so its writer may finish it."""
    world = Stores(*THREE, silent=[2])
    world.give(0, SECOND)
    world.give(1, FIRST)
    world.give(0, SECOND, key=SETTLED)
    assert world.claim(FIRST, quorum=2) == KeyTaken(SECOND)
    assert world.at(SETTLED)[:2] == [SECOND, SECOND]
    assert world.at(keys.round_keys(SEQ, 1)[1])[:2] == [SECOND, SECOND]


def test_a_divided_vote_waits_where_too_few_stores_create_only_once() -> None:
    world = Stores(*THREE[:2], Plain)
    world.give(0, SECOND)
    world.give(1, FIRST)
    assert world.claim(FIRST, quorum=2) == Appended(), "the two that do are enough"
    world = Stores(MemoryBackend, MemoryBackend, Plain, silent=[1])
    world.give(0, SECOND)
    found = world.claim(FIRST, quorum=2)
    assert isinstance(found, WriteUnknown) and found.reason.startswith("too few stores answered.")
    assert world.at(SETTLED) == [None] * 3


def test_the_makers_of_a_log_hold_no_further_rounds() -> None:
    """They may differ about which stores have a vote."""
    world = Stores(*THREE, silent=[2])
    world.give(0, SECOND)
    world.give(1, FIRST)
    found = QuorumSequencer(world.copies, world.ids, 2, absent=0, rounds=False).append(SEQ, FIRST)
    assert isinstance(found, WriteUnknown) and found.reason.startswith("too few stores answered.")
    assert world.at(SETTLED) == [None] * 3
    split = Stores(*THREE[:2])
    split.give(0, SECOND)
    split.give(1, FIRST)
    split.give(0, SECOND, key=SETTLED)
    found = QuorumSequencer(split.copies, split.ids, 2, absent=0, rounds=False).append(SEQ, FIRST)
    assert isinstance(found, WriteUnknown) and split.at(keys.round_keys(SEQ, 1)[0]) == [None] * 2


def test_too_few_answers_are_unknown_and_say_who_is_silent() -> None:
    world = Stores(*THREE, silent=[1, 2])
    found = world.claim(FIRST, quorum=2)
    assert isinstance(found, WriteUnknown)
    assert "too few stores answered. silent=[memory:s1: the store did not answer." in found.reason
    assert (
        "; memory:s2: " in found.reason
        and "memory:s0" not in found.reason
        and found.reason.endswith("]")
    )


def test_the_silent_are_named_in_the_users_order() -> None:
    found = {2: NoAnswer("late"), 0: b"x", 1: NoAnswer("dead")}
    assert (
        silent_stores(Stores(*THREE).copies, found) == "silent=[memory:s1: dead; memory:s2: late]"
    )


def test_a_split_that_can_be_settled_on_too_few_stores_is_unknown() -> None:
    world = Stores(*THREE[:2])
    world.give(0, SECOND)
    world.give(1, FIRST)
    denied = Fault(harm=Harm.LOST_REQUEST, key=SETTLED, times=None)
    copies = LogReplicas([world.inner[0], FaultyBackend(world.inner[1], [denied])], OneByOne())
    found = QuorumSequencer(copies, world.ids, 2, absent=0).append(SEQ, FIRST)
    assert (
        isinstance(found, WriteUnknown)
        and "on too few stores yet. silent=[memory:s1" in found.reason
    )
    again = world.claim(FIRST, quorum=2)
    assert again == Appended() and world.at(SETTLED) == [FIRST, FIRST]


def _claim_at(
    world: Stores, faults: Mapping[int, Sequence[Fault]], data: bytes
) -> Appended | KeyTaken | WriteUnknown:
    """Claim at two of the three stores, some of which fail."""
    stores = [FaultyBackend(one, faults.get(n, ())) for n, one in enumerate(world.inner)]
    return QuorumSequencer(LogReplicas(stores, OneByOne()), world.ids, 2, absent=0).append(
        SEQ, data
    )


def _lost(key: str, *, skip: int = 0) -> Fault:
    return Fault(harm=Harm.LOST_REQUEST, op="put", key=key, skip=skip, times=None)


VOTE_1, SETTLED_1 = keys.round_keys(SEQ, 1)


def test_a_winner_that_is_on_too_few_stores_is_put_to_no_further_round() -> None:
    world = Stores(*THREE[:2])
    world.give(0, SECOND)
    world.give(1, FIRST)
    stores = [world.inner[0], FaultyBackend(world.inner[1], [_lost(SETTLED)])]
    copies = LogReplicas(stores, OneByOne())
    found = QuorumSequencer(copies, world.ids, 2, absent=0).append(SEQ, FIRST)
    assert isinstance(found, WriteUnknown) and found.reason.startswith(
        "the record that counts is known, but on too few stores yet. silent=[memory:s1"
    )
    assert world.at(VOTE_1) == [None, None]


@pytest.mark.parametrize(("mine", "found"), [(FIRST, Appended()), (SECOND, KeyTaken(FIRST))])
def test_a_further_round_that_all_stores_agree_in_is_settled_at_the_keys_of_the_first(
    mine: bytes, found: Appended | KeyTaken
) -> None:
    """Readers without rounds find there what counts."""
    world = Stores(*THREE)
    world.give(0, SECOND)
    world.give(1, FIRST)
    assert _claim_at(world, {2: [_lost(KEY)]}, mine) == found
    assert world.at(VOTE_1) == world.at(SETTLED_1) == [FIRST] * 3
    assert world.at(SETTLED) == [FIRST] * 3


def test_a_further_round_whose_votes_differ_settles_nothing_though_all_are_known() -> None:
    """Whoever was told that some of the stores are lost does not know their votes."""
    world = Stores(*THREE)
    third = record(4)
    for number, data in enumerate((SECOND, FIRST, third)):
        world.give(number, data, key=VOTE_1)
    world.give(0, SECOND)
    world.give(1, FIRST)
    winner = min((FIRST, SECOND, third), key=lambda data: str(msgspec.json.decode(data)["digest"]))
    found = _claim_at(world, {2: [_lost(KEY)]}, FIRST)
    assert found == (Appended() if winner == FIRST else KeyTaken(winner))
    closed = Closed(job="run-a", seq=SEQ, closed_round=1).encode()
    assert world.at(SETTLED_1) == [closed] * 3
    assert world.at(SETTLED) == [winner] * 3 == world.at(keys.round_keys(SEQ, 2)[1])


def test_a_store_that_is_left_alone_closes_the_first_round_and_decides_the_second() -> None:
    world = Stores(MemoryBackend)
    world.give(0, SECOND)
    alone = QuorumSequencer(world.copies, world.ids, 1, absent=0, survivors=True)
    assert alone.append(SEQ, FIRST) == KeyTaken(SECOND)
    assert world.at(VOTE_1) == world.at(SETTLED_1) == world.at(SETTLED) == [SECOND]
    assert alone.append(SEQ, SECOND) == Appended()


@pytest.mark.parametrize("votes", [2, 3])
def test_a_further_round_that_another_writer_won_is_settled_for_it(votes: int) -> None:
    world = Stores(*THREE)
    world.give(0, SECOND)
    world.give(1, FIRST)
    for number in range(votes):
        world.give(number, SECOND, key=VOTE_1)
    assert _claim_at(world, {2: [_lost(KEY)]}, FIRST) == KeyTaken(SECOND)
    assert world.at(SETTLED) == world.at(SETTLED_1) == [SECOND] * 3


def test_what_a_further_round_settled_is_not_told_before_it_is_at_the_keys_of_the_first() -> None:
    world = Stores(*THREE)
    world.give(0, SECOND)
    world.give(1, FIRST)
    # The key of the first round is closed there, and can't be overwritten any more.
    found = _claim_at(world, {1: [_lost(SETTLED, skip=1)], 2: [_lost(keys.LOG)]}, FIRST)
    assert isinstance(found, WriteUnknown) and found.reason.startswith(
        "the record that counts is known, but on too few stores yet. silent=[memory:s1"
    )
    assert world.at(SETTLED_1) == [FIRST, FIRST, None] and world.at(SETTLED)[0] == FIRST
    assert world.claim(SECOND, quorum=2) == KeyTaken(FIRST)


def test_a_writer_that_collides_in_every_round_gives_up_and_says_so() -> None:
    world = Stores(*THREE, silent=[2])
    for number in range(ROUNDS_MAX):
        vote, _ = keys.round_keys(SEQ, number)
        world.give(0, SECOND, key=vote)
        world.give(1, FIRST, key=vote)
    found = world.claim(FIRST, quorum=2)
    assert isinstance(found, WriteUnknown) and found.reason.startswith(
        "other writers came first in every round. silent=[memory:s2"
    )
    last, beyond = (keys.round_keys(SEQ, number) for number in (ROUNDS_MAX - 1, ROUNDS_MAX))
    assert all(world.at(last[1])[:2]) and world.at(beyond[0]) == [None] * 3


@pytest.mark.parametrize(
    ("held", "after", "puts"),
    [
        ([None, None, None], [FIRST, FIRST, FIRST], [1, 1, 1]),
        ([FIRST, SECOND, None], [FIRST, SECOND, FIRST], [1, 1, 1]),
        ([FIRST, SECOND, SECOND], [FIRST, FIRST, FIRST], [1, 2, 2]),
        ([CLOSED, CLOSED, None], [FIRST, FIRST, FIRST], [2, 2, 1]),
        ([FIRST, SECOND, b"rot"], [FIRST, FIRST, b"rot"], [1, 2, 1]),
        ([FIRST, b"rot", OTHER], [FIRST, b"rot", OTHER], [1, 1, 1]),
    ],
    ids=["empty", "enough", "too few", "closed", "rot stays", "other position stays"],
)
def test_what_has_its_position_for_sure_takes_the_place_of_valid_records_where_it_must(
    held: list[bytes | None], after: list[bytes | None], puts: list[int]
) -> None:
    """What is damaged may be the record itself: a scrub repairs it."""
    world = Stores(*THREE)
    for number, data in enumerate(held):
        if data is not None:
            world.give(number, data, key=SETTLED)
    counted = [CountingBackend(one) for one in world.copies.stores]
    settle_anyway(LogReplicas(counted, OneByOne()), SEQ, FIRST, world.ids, 2)
    assert world.at(SETTLED) == after
    assert [len(one.calls("put", prefix=SETTLED)) for one in counted] == puts


def test_what_is_settled_in_the_first_round_is_written_once() -> None:
    world = Stores(*THREE[:2])
    stores = [CountingBackend(one) for one in world.inner]
    copies = LogReplicas(stores, OneByOne())
    assert QuorumSequencer(copies, world.ids, 2, absent=1).append(SEQ, FIRST) == Appended()
    assert [len(store.calls("put", prefix=SETTLED)) for store in stores] == [1, 1]


def test_a_round_is_closed_only_where_a_key_is_created_only_once() -> None:
    """Elsewhere the closing could overwrite a record that was acknowledged."""
    put: list[tuple[str, bytes]] = []

    class Noted(Plain):
        def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
            super().put(key, data, create_only=create_only)
            put.append((key, b"".join(bytes(one) for one in data)))

    world = Stores(MemoryBackend, MemoryBackend, Noted)
    put.clear()
    world.give(0, SECOND)
    world.give(1, FIRST)
    assert world.claim(FIRST, quorum=2) == Appended()
    assert put and all(data == FIRST for _, data in put)


def test_a_closed_round_where_a_vote_should_be_is_no_vote() -> None:
    world = Stores(*THREE, silent=[2])
    world.give(0, CLOSED)
    found = world.claim(FIRST, quorum=2)
    assert isinstance(found, WriteUnknown) and found.reason.startswith("too few stores answered.")


def test_a_file_gives_the_place_and_the_stores_get_the_record() -> None:
    world, file = Stores(Plain, Plain, Plain), MemoryBackend("file")
    assert (
        world.claim_filed(file, FIRST, quorum=2)
        == Appended()
        == world.claim_filed(file, FIRST, quorum=2)
    )
    assert world.at() == [FIRST] * 3
    assert world.claim_filed(file, SECOND, quorum=2) == KeyTaken(FIRST)
    away = Stores(Plain, Plain, Plain, silent=[1])
    assert away.claim_filed(MemoryBackend("file"), FIRST, quorum=2) == Appended()
    assert away.at() == [FIRST, None, FIRST]


def test_a_record_that_has_its_place_in_the_file_is_copied_for_a_writer_that_died() -> None:
    world, file = Stores(Plain, Plain, Plain), MemoryBackend("file")
    file.put(KEY, [FIRST])
    assert world.claim_filed(file, SECOND, quorum=2) == KeyTaken(FIRST)
    assert world.at() == [FIRST] * 3


def test_a_file_that_does_not_answer_gives_nothing() -> None:
    world = Stores(*THREE)
    dead = FaultyBackend(MemoryBackend("file"), [Fault(harm=Harm.LOST_REQUEST, times=None)])
    found = CopyingSequencer(StoreSequencer(dead), world.copies, world.ids, 2, absent=0).append(
        SEQ, FIRST
    )
    assert isinstance(found, WriteUnknown) and world.at() == [None] * 3


@pytest.mark.parametrize(
    ("others", "silent", "quorum", "absent", "fenced"),
    [
        (2, 0, 2, 0, True),  # one is left of three: never W
        (2, 0, 2, 1, False),  # another one that counts is away, and may yet take it
        (3, 0, 2, 1, True),
        (1, 1, 2, 0, False),  # the silent one may yet take it
        (1, 0, 3, 0, True),
        (0, 2, 2, 0, False),
        (2, 1, 2, 0, True),
    ],
)
def test_what_the_file_never_gave_out_fences_once_it_leaves_too_few_stores(
    others: int, silent: int, quorum: int, absent: int, fenced: bool
) -> None:
    world = Stores(*THREE, silent=range(3 - silent, 3))
    for number in range(others):
        world.give(number, SECOND)
    if fenced:
        with pytest.raises(
            FencedError, match=f"another sequencer took over. key={KEY} stop this writer"
        ):
            world.claim_filed(MemoryBackend("file"), FIRST, quorum=quorum, absent=absent)
    else:
        found = world.claim_filed(MemoryBackend("file"), FIRST, quorum=quorum, absent=absent)
        assert isinstance(found, WriteUnknown) and found.reason.startswith(
            "the record has its position, but is on too few stores"
        )


@pytest.mark.parametrize("damage", [b"rot", record(3, seq=SEQ + 1), NEWER])
def test_damage_where_the_record_should_be_fences_nobody(damage: bytes) -> None:
    world = Stores(*THREE)
    world.give(0, damage)
    world.give(1, damage)
    assert isinstance(world.claim_filed(MemoryBackend("file"), FIRST, quorum=2), WriteUnknown)
    assert world.at() == [damage, damage, FIRST]
