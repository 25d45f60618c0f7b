"""Which copy is written over: never the only right bytes of anything. Checked against a model that
knows what is right."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.backends.replicated.ledger import (
    CopyFault,
    CopyIntact,
    LeaveToScrub,
    RepairCopy,
    RepairLater,
    RepairNeed,
    VerifiedRange,
    equal_outside,
    no_verified_source,
    plan_repair,
)
from ckpt.backends.replicated.policy import Quorum
from ckpt.format.canonical import digest

Q2, Q3 = Quorum(2, 2, frozenset(range(2))), Quorum(3, 2, frozenset(range(3)))
MISSING = RepairNeed(CopyFault.MISSING)
RANGE = VerifiedRange(100, 50, digest(b"x"))
DAMAGED = RepairNeed(CopyFault.DAMAGED, RANGE)
WHOLE = RepairNeed(CopyFault.DAMAGED, VerifiedRange(0, 200, digest(b"x"), whole=True))
SHORT = RepairNeed(CopyFault.DAMAGED, None)


def test_missing_copy_is_made_from_any_whose_length_nobody_contradicts() -> None:
    assert plan_repair(MISSING, 0, {0: None, 1: 200, 2: 200}, Q3) == RepairCopy(
        (1, 2), 200, compare=False
    )
    assert plan_repair(MISSING, 0, {0: None, 1: None, 2: 200}, Q3) == RepairCopy(
        (2,), 200, compare=False
    )
    assert isinstance(plan_repair(MISSING, 0, {0: None, 1: 200, 2: 199}, Q3), LeaveToScrub)
    assert plan_repair(MISSING, 0, {0: 200, 1: 200}, Q3) == CopyIntact()
    assert isinstance(plan_repair(MISSING, 0, {0: 150, 1: 200}, Q3), LeaveToScrub)


def test_nothing_is_done_where_too_few_answer() -> None:
    assert isinstance(plan_repair(MISSING, 0, {1: 200, 2: 200}, Q3), RepairLater)
    assert isinstance(plan_repair(MISSING, 0, {0: None}, Q3), RepairLater)
    assert isinstance(
        plan_repair(RepairNeed(CopyFault.MISSING, RANGE), 0, {0: None, 1: 120}, Q3), RepairLater
    )
    assert isinstance(
        plan_repair(RepairNeed(CopyFault.MISSING, RANGE), 0, {0: None, 1: 120, 2: 120}, Q3),
        LeaveToScrub,
    )
    assert isinstance(no_verified_source(all_answered=False), RepairLater)
    assert isinstance(no_verified_source(all_answered=True), LeaveToScrub)


def test_object_that_is_nowhere_needs_no_mending() -> None:
    assert plan_repair(MISSING, 0, {0: None, 1: None}, Q3) == CopyIntact()
    assert (
        plan_repair(MISSING, 0, {0: None, 1: None}, Quorum(3, 2, frozenset({0, 2}))) != CopyIntact()
    )
    assert (
        plan_repair(MISSING, 0, {0: None, 1: None, 2: None}, Quorum(3, 2, frozenset({0})))
        == CopyIntact()
    )


def test_damaged_copy_is_compared_first_unless_the_whole_is_proven() -> None:
    assert plan_repair(DAMAGED, 0, {0: 200, 1: 200}, Q2) == RepairCopy((1,), 200, compare=True)
    assert plan_repair(DAMAGED, 0, {0: 90, 1: 200}, Q2) == RepairCopy((1,), 200, compare=True)
    assert isinstance(plan_repair(DAMAGED, 0, {0: 201, 1: 200}, Q2), LeaveToScrub)
    assert isinstance(plan_repair(DAMAGED, 0, {0: 200, 1: 200, 2: 201}, Q3), LeaveToScrub)
    assert plan_repair(WHOLE, 0, {0: 999, 1: 200, 2: 201}, Q3) == RepairCopy(
        (1,), 200, compare=False
    )
    assert plan_repair(WHOLE, 0, {0: 999, 1: 200}, Q3) == RepairCopy(
        (1,), 200, compare=False, all_answered=False
    )
    assert isinstance(plan_repair(WHOLE, 0, {0: 999, 1: 201}, Q3), RepairLater)
    assert isinstance(plan_repair(WHOLE, 0, {0: 999, 1: 201, 2: None}, Q3), LeaveToScrub)
    assert (
        plan_repair(RepairNeed(CopyFault.MISSING, WHOLE.verified), 0, {0: 200, 1: 200}, Q3)
        == CopyIntact()
    )
    assert plan_repair(SHORT, 0, {0: 200, 1: 200}, Q2) == CopyIntact()
    assert plan_repair(SHORT, 0, {0: 100, 1: 200}, Q2) == RepairCopy((1,), 200, compare=True)


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=60), st.data())
def test_agreement_sees_every_byte_outside_the_range_and_none_inside(
    body: bytes, data: st.DataObject
) -> None:
    low = data.draw(st.integers(0, len(body)))
    high = data.draw(st.integers(low, len(body)))
    need = RepairNeed(CopyFault.DAMAGED, VerifiedRange(low, high - low, digest(b"")))
    at = data.draw(st.integers(0, len(body) - 1))
    other = bytearray(body)
    other[at] ^= 1
    piece = data.draw(st.integers(1, len(body)))
    agree = all(
        equal_outside(memoryview(body)[i : i + piece], memoryview(other)[i : i + piece], i, need)
        for i in range(0, len(body), piece)
    )
    assert agree == (low <= at < high)
    assert equal_outside(memoryview(body)[:at], memoryview(other), 0, need)
    assert equal_outside(memoryview(b""), memoryview(other), 0, SHORT)


def mend(
    target: bytes | None, others: Sequence[bytes | None], need: RepairNeed, quorum: Quorum
) -> bytes | None:
    """What the target holds after a mend as the rule says, all stores answering."""
    copies = [target, *others]
    plan = plan_repair(
        need, 0, {p: None if c is None else len(c) for p, c in enumerate(copies)}, quorum
    )
    if not isinstance(plan, RepairCopy):
        return target
    for place in plan.sources:
        source = copies[place]
        assert source is not None
        proof = need.verified
        if (
            proof is not None
            and digest(source[proof.offset_bytes : proof.end_bytes]) != proof.digest
        ):
            continue
        mine = (target or b"")[: len(source)]
        if plan.compare and not equal_outside(memoryview(mine), memoryview(source), 0, need):
            return target
        return source
    return target


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(st.integers(0, 1 << 62), st.integers(1, 2))
def test_no_right_byte_is_ever_lost_from_all_copies(seed: int, others: int) -> None:
    """Copies rot, end early or are gone, at random; a reader finds one range right in one and wrong
    in another."""
    dice = random.Random(seed)
    right = bytes(dice.randrange(256) for _ in range(24))

    def rotten() -> bytes | None:
        body = bytearray(right)
        for _ in range(dice.choice((0, 0, 1, 2))):
            body[dice.randrange(len(body))] ^= 1 << dice.randrange(8)
        kind = dice.random()
        return (
            None
            if kind < 0.15
            else bytes(body[: dice.randrange(len(body))])
            if kind < 0.3
            else bytes(body)
        )

    copies = [rotten() for _ in range(others + 1)]
    whole = dice.random() < 0.2
    low = 0 if whole else dice.randrange(len(right))
    high = len(right) if whole else dice.randrange(low + 1, len(right) + 1)
    held = [None if copy is None else copy[low:high] == right[low:high] for copy in copies]
    if held[0] or not any(held[1:]):
        return  # the reader did not fall over from the target, or found nothing
    why = CopyFault.MISSING if copies[0] is None else CopyFault.DAMAGED
    proof = VerifiedRange(low, high - low, digest(right[low:high]), whole=whole)
    need = RepairNeed(
        why, proof if whole or dice.random() < 0.9 or why is CopyFault.DAMAGED else None
    )
    after = [
        mend(
            copies[0],
            copies[1:],
            need,
            Quorum(others + 1, others // 2 + 1 if others > 1 else 2, frozenset(range(9))),
        ),
        *copies[1:],
    ]
    for at in range(len(right)):

        def has(copy: bytes | None, at: int = at) -> bool:
            return copy is not None and at < len(copy) and copy[at] == right[at]

        if any(has(copy) for copy in copies):
            assert any(has(copy) for copy in after), (seed, at)
        if need.verified is not None and has(copies[0]) and whole:
            assert has(after[0]), (seed, at)
    if after[0] != copies[0] and need.verified is not None:
        assert after[0] is not None
        assert after[0][low:high] == right[low:high]
    if copies[0] is not None:
        before_right = sum(a == b for a, b in zip(copies[0], right, strict=False))
        assert after[0] is not None
        assert sum(a == b for a, b in zip(after[0], right, strict=False)) >= before_right, seed
