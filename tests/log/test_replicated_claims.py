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
from ckpt.format.records import Commit, make_record
from ckpt.format.store import JobRecord
from ckpt.log.quorum import NoAnswer
from ckpt.log.replicas import Enough, LogReplicas
from ckpt.log.replicated import CopyingSequencer, QuorumSequencer, silent_stores
from ckpt.log.sequencers import Appended, KeyTaken, StoreSequencer, WriteUnknown
from ckpt.testing.faults import Fault, FaultyBackend, Harm
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
