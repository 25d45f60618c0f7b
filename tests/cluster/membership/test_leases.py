"""The arithmetic of leases: what each answer means, and that no holder acts when the service may
have given up on it."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ckpt.cluster.membership.leases import (
    Lease,
    LeaseGone,
    LeaseSilent,
    LeaseState,
    Renewed,
    apply_answer,
    call_timeout_s,
    granted_lease,
)
from ckpt.errors import UsageError


def lease(ttl_s: float = 6.0, margin_s: float = 0.5, sent_s: float = 100.0) -> Lease:
    return granted_lease(7, ttl_s=ttl_s, margin_s=margin_s, sent_s=sent_s)


def test_a_holder_acts_until_its_last_acknowledged_send_and_the_ttl_less_a_margin() -> None:
    held = lease()
    assert held.act_until_s == 105.5
    assert [held.state(now_s) for now_s in (100.0, 105.4, 105.5, 200.0)] == [
        LeaseState.VALID,
        LeaseState.VALID,
        LeaseState.LAPSED,
        LeaseState.LAPSED,
    ]


def test_keepalives_are_due_at_a_third_and_sooner_after_silence() -> None:
    held = lease()
    assert held.next_keepalive_s == 102.0
    assert apply_answer(held, LeaseSilent(102.0, "x")).next_keepalive_s == 102.5
    assert (
        apply_answer(
            apply_answer(held, LeaseSilent(102.0, "x")), Renewed(102.5, 6.0)
        ).next_keepalive_s
        == 104.5
    )


def test_silence_says_nothing_and_is_remembered() -> None:
    held = apply_answer(lease(), LeaseSilent(102.0, "no route"))
    assert (held.act_until_s, held.reason, held.lost_reason) == (105.5, "no route", None)


def test_an_answer_counts_from_when_it_was_asked_for() -> None:
    assert apply_answer(lease(), Renewed(102.0, 6.0)).act_until_s == 107.5


def test_a_late_answer_takes_no_time_away_and_brings_a_lapsed_lease_back() -> None:
    held = apply_answer(apply_answer(lease(), Renewed(104.0, 6.0)), Renewed(102.0, 6.0))
    assert held.act_until_s == 109.5
    lapsed = lease()
    assert lapsed.state(105.8) is LeaseState.LAPSED
    assert apply_answer(lapsed, Renewed(104.0, 6.0)).state(105.8) is LeaseState.VALID


def test_nothing_left_is_loss_though_the_answer_is_no_error() -> None:
    held = apply_answer(lease(), Renewed(102.0, 0.0))
    assert held.state(101.0) is LeaseState.LOST
    assert held.reason == "the lease has expired"


def test_what_is_lost_stays_lost() -> None:
    held = apply_answer(lease(), LeaseGone("taken out"))
    for answer in (Renewed(102.0, 6.0), LeaseSilent(102.0, "x"), LeaseGone("again")):
        held = apply_answer(held, answer)
        assert (held.state(102.0), held.reason) == (LeaseState.LOST, "taken out")


def test_less_time_than_was_granted_counts_as_less_and_more_as_no_more() -> None:
    assert apply_answer(lease(), Renewed(102.0, 4.0)).act_until_s == 105.5
    assert apply_answer(lease(), Renewed(103.0, 5.0)).act_until_s == 107.5
    assert apply_answer(lease(), Renewed(102.0, 60.0)).act_until_s == 107.5


@pytest.mark.parametrize(
    ("ttl_s", "margin_s"), [(0.0, 0.0), (float("inf"), 1.0), (6.0, 4.0), (6.0, -0.1), (-1.0, 0.0)]
)
def test_a_lease_that_leaves_no_time_to_act_is_refused(ttl_s: float, margin_s: float) -> None:
    with pytest.raises(UsageError):
        lease(ttl_s, margin_s)


def test_a_call_is_over_well_before_the_next_keepalive() -> None:
    assert 2 * call_timeout_s(6.0) <= 6.0 / 3


TTL_S = 5.0
RATE = 0.02
MARGIN_S = TTL_S / 10


class OneLease(RuleBasedStateMachine):
    """A service and a holder, whose clocks differ; requests and answers are lost and come late, in
    any order."""

    @initialize(rate=st.floats(1 - RATE, 1 + RATE), offset_s=st.floats(0, 1e6))
    def begin(self, rate: float, offset_s: float) -> None:
        self.rate, self.offset_s = rate, offset_s
        self.now_s = 0.0
        self.end_s: float | None = TTL_S
        self.requests: list[float] = []
        self.answers: list[Renewed] = []
        self.lease = granted_lease(1, ttl_s=TTL_S, margin_s=MARGIN_S, sent_s=self.clock())

    def clock(self) -> float:
        return self.offset_s + self.now_s * self.rate

    @rule(seconds=st.floats(0, 4))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        if self.end_s is not None and self.end_s <= self.now_s:
            self.end_s = None

    @rule()
    def sends(self) -> None:
        self.requests.append(self.clock())

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 99))
    def request_lands(self, which: int) -> None:
        sent_s = self.requests.pop(which % len(self.requests))
        if self.end_s is not None:
            self.end_s = self.now_s + TTL_S
        self.answers.append(Renewed(sent_s, TTL_S if self.end_s is not None else 0.0))

    @precondition(lambda self: self.answers)
    @rule(which=st.integers(0, 99))
    def answer_comes(self, which: int) -> None:
        self.lease = apply_answer(self.lease, self.answers.pop(which % len(self.answers)))

    @rule()
    def tries_in_vain(self) -> None:
        self.lease = apply_answer(self.lease, LeaseSilent(self.clock(), "x"))

    @rule()
    def service_has_a_new_leader(self) -> None:
        if self.end_s is not None:
            self.end_s = max(self.end_s, self.now_s + TTL_S)

    @invariant()
    def nobody_acts_whose_lease_expired(self) -> None:
        if self.end_s is None:
            assert self.lease.state(self.clock()) is not LeaseState.VALID


TestOneLease = OneLease.TestCase
TestOneLease.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
