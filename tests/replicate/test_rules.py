"""The small rules: quorums, circuits, speeds, who is fed how, what is known to be missing."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_read_race import quorums

from ckpt.backends.replicated import ledger as ledgers
from ckpt.backends.replicated import policy as speeds
from ckpt.backends.replicated.ledger import Need, Proof, Why
from ckpt.backends.replicated.policy import (
    Candidate,
    Circuit,
    Pace,
    Phase,
    Quorum,
    Sign,
    Speed,
    backoff_s,
    commonest,
    counting_only,
    hastened,
    nearest,
    probe_due,
    quorum_of,
    step,
)
from ckpt.backends.replicated.put_race import How, Taker, feed
from ckpt.errors import StoreDeniedError, StoreFullError, UnavailableError, UsageError
from ckpt.format.canonical import digest

PACE = Pace()
Q3 = Quorum(3, 2, frozenset(range(3)))

# Quorums.


@pytest.mark.parametrize("stores", range(1, 8))
def test_majority_is_the_default_and_two_quorums_always_meet(stores: int) -> None:
    assert quorum_of(stores, None).write == stores // 2 + 1
    for write in range(-1, stores + 2):
        if 1 <= write <= stores and 2 * write > stores:
            assert quorum_of(stores, write).write == write
        else:
            with pytest.raises(UsageError):
                quorum_of(stores, write)


def test_what_is_acknowledged_is_never_called_absent() -> None:
    for stores in range(1, 6):
        for quorum in quorums(stores):
            subsets = [frozenset(c) for n in range(stores + 1) for c in itertools.combinations(range(stores), n)]
            for holders in subsets:
                if quorum.acknowledged(holders):
                    assert not any(quorum.absent(others) for others in subsets if not others & holders)


def test_counting_places_exist() -> None:
    assert counting_only(Q3, [0, 2]).counting == frozenset({0, 2})
    with pytest.raises(UsageError, match=r"places=\[-1, 3\]"):
        counting_only(Q3, [3, -1, 0])


def test_commonest_error_is_the_earliest_of_equals() -> None:
    assert commonest([]) is UnavailableError
    assert commonest([StoreFullError("a"), StoreDeniedError("b")]) is StoreFullError
    assert commonest([StoreFullError("a"), StoreDeniedError("b"), StoreDeniedError("c")]) is StoreDeniedError


# Circuits.


def test_circuit_opens_after_failures_in_a_row_and_at_once_on_refusal_and_stall() -> None:
    circuit = Circuit()
    for _ in range(PACE.failures_max - 1):
        circuit = step(circuit, Sign.FAILED, 10.0, pace=PACE, jitter=0.5)
        assert circuit.usable
    assert step(circuit, Sign.ANSWERED, 10.0, pace=PACE, jitter=0.5) == Circuit()
    assert step(circuit, Sign.FAILED, 10.0, pace=PACE, jitter=0.5).phase is Phase.OPEN
    for sign in (Sign.REFUSED, Sign.STALLED):
        assert step(Circuit(), sign, 10.0, pace=PACE, jitter=0.5) == Circuit(Phase.OPEN, 0, 1, 11.0)


def test_probes_are_sent_ever_more_seldom_until_one_is_answered() -> None:
    circuit, now_s, pauses = Circuit(), 0.0, []
    circuit = step(circuit, Sign.STALLED, now_s, pace=PACE, jitter=0.5)
    for _ in range(9):
        assert not probe_due(circuit, circuit.next_s - 0.01)
        pauses.append(circuit.next_s - now_s)
        now_s = circuit.next_s
        assert probe_due(circuit, now_s)
        circuit = step(circuit, Sign.PROBED, now_s, pace=PACE, jitter=0.5)
        assert circuit.phase is Phase.HALF_OPEN
        circuit = step(circuit, Sign.FAILED, now_s, pace=PACE, jitter=0.5)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert step(circuit, Sign.ANSWERED, now_s, pace=PACE, jitter=0.5) == Circuit()
    assert probe_due(hastened(circuit, now_s), now_s)
    assert hastened(Circuit(), now_s) == Circuit()


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(Sign), st.floats(0, 5), st.floats(0, 0.999))))
def test_circuit_is_never_stuck(signs: list[tuple[Sign, float, float]]) -> None:
    circuit, now_s = Circuit(), 0.0
    for sign, later_s, jitter in signs:
        now_s += later_s
        before = circuit
        circuit = step(circuit, sign, now_s, pace=PACE, jitter=jitter)
        assert circuit.usable or circuit.next_s <= now_s + 1.5 * PACE.probe_s_max
        assert circuit.failures < PACE.failures_max
        if circuit.usable and not before.usable:
            assert sign is Sign.ANSWERED
        if before.usable and not circuit.usable:
            assert sign in (Sign.FAILED, Sign.REFUSED, Sign.STALLED)


@settings(deadline=None)
@given(st.integers(1, 200), st.floats(0, 0.999))
def test_pauses_double_within_their_limit_and_are_spread(tries: int, jitter: float) -> None:
    assert 0.05 <= backoff_s(0.1, 5.0, tries, jitter) <= 7.5
    assert backoff_s(0.1, 5.0, tries + 1, jitter) >= backoff_s(0.1, 5.0, tries, jitter)


# Speeds.


def test_latency_and_bandwidth_are_learned_apart() -> None:
    speed, dice = Speed(), random.Random(1)
    assert speeds.expected_s(speed, 1) is None
    assert speeds.hedge_s(speed, 1, PACE) == PACE.hedge_s_first
    for _ in range(100):
        noise = dice.uniform(0.9, 1.1)
        speed = speeds.measured(speed, 100, 0.030 * noise)
        speed = speeds.measured(speed, 4 << 20, (0.030 + (4 << 20) / 100e6) * noise)
    assert speeds.expected_s(speed, 100) == pytest.approx(0.030, rel=0.1)
    assert speeds.expected_s(speed, 64 << 20) == pytest.approx(0.030 + (64 << 20) / 100e6, rel=0.15)
    usual_s = speeds.expected_s(speed, 4 << 20)
    assert usual_s is not None
    assert usual_s < speeds.hedge_s(speed, 4 << 20, PACE) < 1.5 * usual_s
    assert speeds.hedge_s(speed, 0, PACE) == PACE.hedge_s_min
    assert speeds.hedge_s(speed, 1 << 40, PACE) == PACE.hedge_s_max


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1 << 40), st.floats(0, 1e6)), max_size=80), st.integers(0, 1 << 40))
def test_any_measurements_give_finite_positive_expectations(calls: list[tuple[int, float]], size: int) -> None:
    speed = Speed()
    for size_bytes, took_s in calls:
        speed = speeds.measured(speed, size_bytes, took_s)
        waited = speeds.at_least(speed, size_bytes, took_s)
        after_s = speeds.expected_s(waited, size_bytes)
        assert after_s is not None
        assert after_s >= 0
    usual_s = speeds.expected_s(speed, size)
    assert usual_s is None or 0 <= usual_s < float("inf")
    assert PACE.hedge_s_min <= speeds.hedge_s(speed, size, PACE) <= PACE.hedge_s_max
    assert len(speed.ratios) <= speeds.RATIOS_MAX


def test_call_that_was_given_up_makes_a_store_slow() -> None:
    quick = speeds.measured(Speed(), 1 << 20, 0.01)
    slow_s = quick
    for _ in range(5):
        slow_s = speeds.at_least(slow_s, 1 << 20, 1.0)
    expected_s = speeds.expected_s(slow_s, 1 << 20)
    assert expected_s is not None
    assert expected_s > 0.015
    assert speeds.at_least(slow_s, 1 << 20, 0.0001) == slow_s


def test_order_is_well_then_preferred_then_quick_and_unknown_ones_are_tried() -> None:
    def one(place: int, expected_s: float | None, usable: bool = True, idle_s: float = 0.0) -> Candidate:
        return Candidate(place, usable, expected_s, idle_s)

    assert nearest([one(0, 0.3), one(1, 0.1), one(2, 0.2)], prefer=()) == (1, 2, 0)
    assert nearest([one(0, 0.3), one(1, None), one(2, 0.2)], prefer=()) == (1, 2, 0)
    assert nearest([one(0, 0.3), one(1, 0.1), one(2, 0.2)], prefer=(2, 0)) == (2, 0, 1)
    assert nearest([one(0, 0.3), one(1, 0.1, usable=False), one(2, 0.2)], prefer=(1,)) == (2, 0, 1)
    assert nearest([one(0, 0.3, idle_s=600.0), one(1, 0.1), one(2, 0.2)], prefer=()) == (0, 1, 2)
    assert nearest([one(0, 0.3, idle_s=1e9), one(1, 0.1, idle_s=1e300)], prefer=()) in ((0, 1), (1, 0))


# Who is fed how.

TIMES = (None, 0.1, 1.0, 60.0)
TAKERS = [
    Taker(usable=usable, room=room, borrows=borrows, expected_s=expected_s)
    for usable in (True, False) for room in (True, False) for borrows in (True, False) for expected_s in TIMES
]  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(TAKERS), min_size=3, max_size=3), st.booleans(), st.sampled_from(quorums(3)))
def test_every_store_is_fed_so_that_it_cannot_read_reused_memory(
    takers: list[Taker], immutable: bool, quorum: Quorum
) -> None:
    for taker, how in zip(takers, feed(takers, quorum, immutable=immutable, pace=PACE), strict=True):
        assert (how is How.LATER) == (not taker.usable or not taker.room)
        if how is How.AS_IS:
            assert immutable
        if how is How.LENT:
            assert taker.borrows
            assert not immutable


def test_store_slower_than_the_grace_is_not_lent_to() -> None:
    def lender(expected_s: float | None) -> Taker:
        return Taker(usable=True, room=True, borrows=True, expected_s=expected_s)

    quick = [lender(1.0), lender(1.1), lender(1.9)]
    assert feed(quick, Q3, immutable=False, pace=PACE) == (How.LENT,) * 3
    slow = [lender(1.0), lender(1.1), lender(2.3)]
    assert feed(slow, Q3, immutable=False, pace=PACE) == (How.LENT, How.LENT, How.SPARED)
    assert feed([lender(1.0), lender(9.0), lender(None)], Q3, immutable=False, pace=PACE)[2] is How.LENT


# What is known to be missing.

MISSING = Need(Why.MISSING)
DAMAGED = Need(Why.DAMAGED, Proof(0, 1, digest(b"x")))


def test_ledger_notes_settles_and_overflows() -> None:
    ledger = ledgers.empty(2)
    for key in "abcd":
        ledger = ledgers.noted(ledger, 1, key, MISSING, keys_max=3)
    assert list(ledger.needs[1]) == ["a", "b", "c"]
    assert ledger.scrub == (False, True)
    assert ledger.needs[0] == {}
    ledger = ledgers.settled(ledger, 1, "b")
    assert list(ledger.needs[1]) == ["a", "c"]
    assert ledgers.settled(ledger, 0, "a") == ledger
    assert ledgers.scrubbed(ledger, 1).scrub == (False, False)
    assert ledgers.left(ledger, 0, "z").scrub == (True, True)
    assert ledgers.dropped(ledgers.noted(ledger, 0, "a", MISSING, keys_max=3), "a").needs == ({}, {"c": MISSING})


def test_proof_is_not_forgotten_and_known_keys_always_fit() -> None:
    ledger = ledgers.noted(ledgers.empty(1), 0, "a", DAMAGED, keys_max=1)
    assert ledgers.noted(ledger, 0, "a", MISSING, keys_max=1) == ledger
    other = Need(Why.MISSING, DAMAGED.proof)
    assert ledgers.noted(ledger, 0, "a", other, keys_max=1).needs[0]["a"] == other
    assert not ledgers.noted(ledger, 0, "a", other, keys_max=1).scrub[0]


def test_needs_that_could_not_be_met_wait_and_the_others_come_first() -> None:
    ledger = ledgers.empty(1)
    assert ledgers.next_need(ledger, 0) is None
    for key in "ab":
        ledger = ledgers.noted(ledger, 0, key, MISSING, keys_max=9)
    assert ledgers.next_need(ledger, 0) == ("a", MISSING)
    ledger = ledgers.put_off(ledger, 0, "a", 100.0, pace=PACE, jitter=0.5)
    assert ledgers.next_need(ledger, 0) == ("b", MISSING)
    assert ledger.needs[0]["a"].due_s == 101.0
    ledger = ledgers.put_off(ledger, 0, "a", 100.0, pace=PACE, jitter=0.5)
    assert ledger.needs[0]["a"].due_s == 102.0
    assert ledgers.put_off(ledger, 0, "gone", 0.0, pace=PACE, jitter=0.5) == ledger
    assert all(need.due_s == 0.0 for need in ledgers.hastened(ledger).needs[0].values())
