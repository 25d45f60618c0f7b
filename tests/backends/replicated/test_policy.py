"""The small rules: quorums, circuits, speeds, who is fed how, what is known to be missing."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.replicated.quorums import quorums

from ckpt.backends.replicated import ledger as ledgers
from ckpt.backends.replicated import policy as speeds
from ckpt.backends.replicated.ledger import CopyFault, RepairNeed, VerifiedRange
from ckpt.backends.replicated.policy import (
    Circuit,
    CircuitEvent,
    CircuitState,
    Quorum,
    ReadCandidate,
    ReplicationLimits,
    StoreSpeed,
    advance,
    backoff_s,
    most_common_error,
    probe_due,
    probe_now,
    quorum_of,
    read_order,
    with_counting,
)
from ckpt.backends.replicated.put_race import Handover, PutTarget, plan_handover
from ckpt.errors import StoreDeniedError, StoreFullError, UnavailableError, UsageError
from ckpt.format.canonical import digest

PACE = ReplicationLimits()
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
            subsets = [
                frozenset(c)
                for n in range(stores + 1)
                for c in itertools.combinations(range(stores), n)
            ]
            for holders in subsets:
                if quorum.is_write_quorum(holders):
                    assert not any(
                        quorum.proves_absent(others) for others in subsets if not others & holders
                    )


def test_counting_places_exist() -> None:
    assert with_counting(Q3, [0, 2]).counting == frozenset({0, 2})
    with pytest.raises(UsageError, match=r"indexes=\[-1, 3\]"):
        with_counting(Q3, [3, -1, 0])


def test_commonest_error_is_the_earliest_of_equals() -> None:
    assert most_common_error([]) is UnavailableError
    assert most_common_error([StoreFullError("a"), StoreDeniedError("b")]) is StoreFullError
    assert (
        most_common_error([StoreFullError("a"), StoreDeniedError("b"), StoreDeniedError("c")])
        is StoreDeniedError
    )


# Circuits.


def test_circuit_opens_after_failures_in_a_row_and_at_once_on_refusal_and_stall() -> None:
    circuit = Circuit()
    for _ in range(PACE.failures_max - 1):
        circuit = advance(circuit, CircuitEvent.FAILED, 10.0, limits=PACE, jitter=0.5)
        assert circuit.usable
    assert advance(circuit, CircuitEvent.ANSWERED, 10.0, limits=PACE, jitter=0.5) == Circuit()
    assert (
        advance(circuit, CircuitEvent.FAILED, 10.0, limits=PACE, jitter=0.5).state
        is CircuitState.OPEN
    )
    for sign in (CircuitEvent.REFUSED, CircuitEvent.STALLED):
        assert advance(Circuit(), sign, 10.0, limits=PACE, jitter=0.5) == Circuit(
            CircuitState.OPEN, 0, 1, 11.0
        )


def test_probes_are_sent_ever_more_seldom_until_one_is_answered() -> None:
    circuit, now_s, pauses = Circuit(), 0.0, []
    circuit = advance(circuit, CircuitEvent.STALLED, now_s, limits=PACE, jitter=0.5)
    for _ in range(9):
        assert not probe_due(circuit, circuit.next_s - 0.01)
        pauses.append(circuit.next_s - now_s)
        now_s = circuit.next_s
        assert probe_due(circuit, now_s)
        circuit = advance(circuit, CircuitEvent.PROBED, now_s, limits=PACE, jitter=0.5)
        assert circuit.state is CircuitState.HALF_OPEN
        circuit = advance(circuit, CircuitEvent.FAILED, now_s, limits=PACE, jitter=0.5)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert advance(circuit, CircuitEvent.ANSWERED, now_s, limits=PACE, jitter=0.5) == Circuit()
    assert probe_due(probe_now(circuit, now_s), now_s)
    assert probe_now(Circuit(), now_s) == Circuit()


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(CircuitEvent), st.floats(0, 5), st.floats(0, 0.999))))
def test_circuit_is_never_stuck(signs: list[tuple[CircuitEvent, float, float]]) -> None:
    circuit, now_s = Circuit(), 0.0
    for sign, later_s, jitter in signs:
        now_s += later_s
        before = circuit
        circuit = advance(circuit, sign, now_s, limits=PACE, jitter=jitter)
        assert circuit.usable or circuit.next_s <= now_s + 1.5 * PACE.probe_s_max
        assert circuit.failures < PACE.failures_max
        if circuit.usable and not before.usable:
            assert sign is CircuitEvent.ANSWERED
        if before.usable and not circuit.usable:
            assert sign in (CircuitEvent.FAILED, CircuitEvent.REFUSED, CircuitEvent.STALLED)


@settings(deadline=None)
@given(st.integers(1, 200), st.floats(0, 0.999))
def test_pauses_double_within_their_limit_and_are_spread(tries: int, jitter: float) -> None:
    assert 0.05 <= backoff_s(0.1, 5.0, tries, jitter) <= 7.5
    assert backoff_s(0.1, 5.0, tries + 1, jitter) >= backoff_s(0.1, 5.0, tries, jitter)


# Speeds.


def test_latency_and_bandwidth_are_learned_apart() -> None:
    speed, dice = StoreSpeed(), random.Random(1)
    assert speeds.expected_s(speed, 1) is None
    assert speeds.hedge_s(speed, 1, PACE) == PACE.hedge_s_first
    for _ in range(100):
        noise = dice.uniform(0.9, 1.1)
        speed = speeds.with_measurement(speed, 100, 0.030 * noise)
        speed = speeds.with_measurement(speed, 4 << 20, (0.030 + (4 << 20) / 100e6) * noise)
    assert speeds.expected_s(speed, 100) == pytest.approx(0.030, rel=0.1)
    assert speeds.expected_s(speed, 64 << 20) == pytest.approx(0.030 + (64 << 20) / 100e6, rel=0.15)
    usual_s = speeds.expected_s(speed, 4 << 20)
    assert usual_s is not None
    assert usual_s < speeds.hedge_s(speed, 4 << 20, PACE) < 1.5 * usual_s
    assert speeds.hedge_s(speed, 0, PACE) == PACE.hedge_s_min
    assert speeds.hedge_s(speed, 1 << 40, PACE) == PACE.hedge_s_max


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1 << 40), st.floats(0, 1e6)), max_size=80),
    st.integers(0, 1 << 40),
)
def test_any_measurements_give_finite_positive_expectations(
    calls: list[tuple[int, float]], size: int
) -> None:
    speed = StoreSpeed()
    for size_bytes, took_s in calls:
        speed = speeds.with_measurement(speed, size_bytes, took_s)
        waited = speeds.with_lower_bound(speed, size_bytes, took_s)
        after_s = speeds.expected_s(waited, size_bytes)
        assert after_s is not None
        assert after_s >= 0
    usual_s = speeds.expected_s(speed, size)
    assert usual_s is None or 0 <= usual_s < float("inf")
    assert PACE.hedge_s_min <= speeds.hedge_s(speed, size, PACE) <= PACE.hedge_s_max
    assert len(speed.ratios) <= speeds.RATIOS_MAX


def test_call_that_was_given_up_makes_a_store_slow() -> None:
    quick = speeds.with_measurement(StoreSpeed(), 1 << 20, 0.01)
    slow_s = quick
    for _ in range(5):
        slow_s = speeds.with_lower_bound(slow_s, 1 << 20, 1.0)
    expected_s = speeds.expected_s(slow_s, 1 << 20)
    assert expected_s is not None
    assert expected_s > 0.015
    assert speeds.with_lower_bound(slow_s, 1 << 20, 0.0001) == slow_s


def test_order_is_well_then_preferred_then_quick_and_unknown_ones_are_tried() -> None:
    def one(
        place: int, expected_s: float | None, usable: bool = True, idle_s: float = 0.0
    ) -> ReadCandidate:
        return ReadCandidate(place, usable, expected_s, idle_s)

    assert read_order([one(0, 0.3), one(1, 0.1), one(2, 0.2)], prefer=()) == (1, 2, 0)
    assert read_order([one(0, 0.3), one(1, None), one(2, 0.2)], prefer=()) == (1, 2, 0)
    assert read_order([one(0, 0.3), one(1, 0.1), one(2, 0.2)], prefer=(2, 0)) == (2, 0, 1)
    assert read_order([one(0, 0.3), one(1, 0.1, usable=False), one(2, 0.2)], prefer=(1,)) == (
        2,
        0,
        1,
    )
    assert read_order([one(0, 0.3, idle_s=600.0), one(1, 0.1), one(2, 0.2)], prefer=()) == (0, 1, 2)
    assert read_order([one(0, 0.3, idle_s=1e9), one(1, 0.1, idle_s=1e300)], prefer=()) in (
        (0, 1),
        (1, 0),
    )


# Who is fed how.

TIMES = (None, 0.1, 1.0, 60.0)
TAKERS = [
    PutTarget(usable=usable, has_room=room, borrows=borrows, expected_s=expected_s)
    for usable in (True, False)
    for room in (True, False)
    for borrows in (True, False)
    for expected_s in TIMES
]


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.sampled_from(TAKERS), min_size=3, max_size=3),
    st.booleans(),
    st.sampled_from(quorums(3)),
)
def test_every_store_is_fed_so_that_it_cannot_read_reused_memory(
    takers: list[PutTarget], immutable: bool, quorum: Quorum
) -> None:
    for taker, how in zip(
        takers, plan_handover(takers, quorum, immutable=immutable, limits=PACE), strict=True
    ):
        assert (how is Handover.LATER) == (not taker.usable or not taker.has_room)
        if how is Handover.AS_IS:
            assert immutable
        if how is Handover.LENT:
            assert taker.borrows
            assert not immutable


def test_store_slower_than_the_grace_is_not_lent_to() -> None:
    def lender(expected_s: float | None) -> PutTarget:
        return PutTarget(usable=True, has_room=True, borrows=True, expected_s=expected_s)

    quick = [lender(1.0), lender(1.1), lender(1.9)]
    assert plan_handover(quick, Q3, immutable=False, limits=PACE) == (Handover.LENT,) * 3
    slow = [lender(1.0), lender(1.1), lender(2.3)]
    assert plan_handover(slow, Q3, immutable=False, limits=PACE) == (
        Handover.LENT,
        Handover.LENT,
        Handover.SPARED,
    )
    assert (
        plan_handover([lender(1.0), lender(9.0), lender(None)], Q3, immutable=False, limits=PACE)[2]
        is Handover.LENT
    )


# What is known to be missing.

MISSING = RepairNeed(CopyFault.MISSING)
DAMAGED = RepairNeed(CopyFault.DAMAGED, VerifiedRange(0, 1, digest(b"x")))


def test_ledger_notes_settles_and_overflows() -> None:
    ledger = ledgers.empty_ledger(2)
    for key in "abcd":
        ledger = ledgers.with_need(ledger, 1, key, MISSING, keys_max=3)
    assert list(ledger.needs[1]) == ["a", "b", "c"]
    assert ledger.scrub == (False, True)
    assert ledger.needs[0] == {}
    ledger = ledgers.without_need(ledger, 1, "b")
    assert list(ledger.needs[1]) == ["a", "c"]
    assert ledgers.without_need(ledger, 0, "a") == ledger
    assert ledgers.scrubbed(ledger, 1).scrub == (False, False)
    assert ledgers.left_to_scrub(ledger, 0, "z").scrub == (True, True)
    assert ledgers.without_key(
        ledgers.with_need(ledger, 0, "a", MISSING, keys_max=3), "a"
    ).needs == (
        {},
        {"c": MISSING},
    )


def test_proof_is_not_forgotten_and_known_keys_always_fit() -> None:
    ledger = ledgers.with_need(ledgers.empty_ledger(1), 0, "a", DAMAGED, keys_max=1)
    assert ledgers.with_need(ledger, 0, "a", MISSING, keys_max=1) == ledger
    other = RepairNeed(CopyFault.MISSING, DAMAGED.verified)
    assert ledgers.with_need(ledger, 0, "a", other, keys_max=1).needs[0]["a"] == other
    assert not ledgers.with_need(ledger, 0, "a", other, keys_max=1).scrub[0]


def test_needs_that_could_not_be_met_wait_and_the_others_come_first() -> None:
    ledger = ledgers.empty_ledger(1)
    assert ledgers.next_need(ledger, 0) is None
    for key in "ab":
        ledger = ledgers.with_need(ledger, 0, key, MISSING, keys_max=9)
    assert ledgers.next_need(ledger, 0) == ("a", MISSING)
    ledger = ledgers.postponed(ledger, 0, "a", 100.0, limits=PACE, jitter=0.5)
    assert ledgers.next_need(ledger, 0) == ("b", MISSING)
    assert ledger.needs[0]["a"].due_s == 101.0
    ledger = ledgers.postponed(ledger, 0, "a", 100.0, limits=PACE, jitter=0.5)
    assert ledger.needs[0]["a"].due_s == 102.0
    assert ledgers.postponed(ledger, 0, "gone", 0.0, limits=PACE, jitter=0.5) == ledger
    assert all(need.due_s == 0.0 for need in ledgers.all_due(ledger).needs[0].values())
