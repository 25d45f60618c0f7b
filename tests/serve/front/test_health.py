"""A replica that fails gets nothing for a while; all that fail at once are asked all the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.serve.front.health import (
    EJECTED_S,
    EJECTED_S_MAX,
    FAILURES_MAX,
    HealthSignal,
    ReplicaHealth,
    after,
    ejection_s,
    suspects,
    usable_replicas,
)

GOOD = ReplicaHealth()
SIGNALS: list[HealthSignal] = ["answered", "failed", "refused", "probe-answered", "probe-failed"]
HISTORY = st.lists(st.tuples(st.sampled_from(SIGNALS), st.floats(0, 5)), max_size=40)


def fold(
    *signals: HealthSignal, health: ReplicaHealth = GOOD, now_s: float = 10.0
) -> ReplicaHealth:
    for signal in signals:
        health = after(health, signal, now_s=now_s)
    return health


@pytest.mark.parametrize("signal", ["refused", "probe-failed"])
def test_what_is_dead_is_so_at_once_and_until_a_probe_is_answered(signal: HealthSignal) -> None:
    dead = fold(signal)
    assert dead.dead
    assert not dead.usable(1e9)
    # The answer of a request that was sent before proves nothing about now.
    assert not fold("answered", health=dead).usable(1e9)
    assert fold("probe-answered", health=dead).usable(10.0)


def test_failures_in_a_row_eject_for_a_while() -> None:
    almost = fold(*["failed"] * (FAILURES_MAX - 1))
    assert almost.usable(10.0)
    assert fold("answered", "failed", health=almost).usable(10.0)
    ejected = fold("failed", health=almost)
    assert not ejected.usable(10.0)
    assert not ejected.usable(10.0 + EJECTED_S - 0.01)
    assert ejected.usable(10.0 + EJECTED_S)


def test_probe_that_is_answered_ends_no_ejection() -> None:
    """A process that answers probes and fails requests is the reason for ejections."""
    ejected = fold(*["failed"] * FAILURES_MAX)
    assert not fold("probe-answered", health=ejected).usable(10.0)


def test_each_ejection_in_a_row_is_twice_as_long_up_to_a_limit() -> None:
    lengths = [ejection_s(number) for number in range(1, 9)]
    assert lengths == [1.0, 2.0, 4.0, 8.0, 16.0, EJECTED_S_MAX, EJECTED_S_MAX, EJECTED_S_MAX]
    assert ejection_s(10_000) == EJECTED_S_MAX
    again = fold(*["failed"] * FAILURES_MAX)
    again = fold(*["failed"] * FAILURES_MAX, health=again, now_s=again.ejected_until_s)
    assert again.ejections == 2
    assert again.ejected_until_s == pytest.approx(10.0 + EJECTED_S + 2 * EJECTED_S)


def test_failures_of_what_was_under_way_do_not_lengthen_an_ejection() -> None:
    ejected = fold(*["failed"] * FAILURES_MAX)
    assert fold(*["failed"] * 20, health=ejected) == ejected
    # Nor do they count once it is over: one failure more is one.
    late = fold(*["failed"] * 20, "probe-answered", health=ejected)
    assert fold("failed", health=late, now_s=ejected.ejected_until_s).usable(1e9)
    assert fold("failed", health=late, now_s=ejected.ejected_until_s).ejections == 1


def test_ejection_is_forgotten_after_as_long_a_time_of_answers() -> None:
    ejected = fold(*["failed"] * FAILURES_MAX)
    soon = fold("answered", health=ejected, now_s=ejected.ejected_until_s + EJECTED_S / 2)
    assert soon.ejections == 1
    late = fold("answered", health=soon, now_s=ejected.ejected_until_s + EJECTED_S)
    assert late.ejections == 0


def test_half_may_be_ejected_and_no_more() -> None:
    ejected = fold(*["failed"] * FAILURES_MAX)
    dead = fold("refused")
    four = {"a": GOOD, "b": GOOD, "c": ejected, "d": ejected}
    assert usable_replicas(four, now_s=10.0) == ("a", "b")
    assert usable_replicas({**four, "b": ejected}, now_s=10.0) == ("a", "b", "c", "d")
    # The dead count neither way, and get nothing even then.
    assert usable_replicas({**four, "b": dead}, now_s=10.0) == ("a", "c", "d")
    assert usable_replicas({"a": ejected}, now_s=10.0) == ("a",)
    assert usable_replicas({"a": GOOD, "b": dead}, now_s=10.0) == ("a",)
    assert usable_replicas({"a": dead, "b": dead}, now_s=10.0) == ("a", "b")
    assert usable_replicas({}, now_s=10.0) == ()


def test_front_that_reaches_nobody_suspects_nobody() -> None:
    dead = fold("refused")
    assert suspects({"a": dead, "b": dead}, now_s=10.0) == frozenset()
    assert suspects({"a": dead, "b": GOOD}, now_s=10.0) == {"a"}
    assert suspects({}, now_s=10.0) == frozenset()


@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=2), HISTORY, max_size=6))
def test_any_history_leaves_somebody_to_ask(
    histories: dict[str, list[tuple[HealthSignal, float]]],
) -> None:
    healths: dict[str, ReplicaHealth] = {}
    now_s = last_s = 0.0
    for name, history in histories.items():
        health, now_s = GOOD, 0.0
        for signal, passed_s in history:
            now_s += passed_s
            health = after(health, signal, now_s=now_s)
            assert health.ejected_until_s <= now_s + EJECTED_S_MAX
            assert health.failures < FAILURES_MAX
        healths[name] = health
        last_s = max(last_s, now_s)
    chosen = usable_replicas(healths, now_s=last_s)
    assert set(chosen) <= set(healths)
    assert bool(chosen) == bool(healths)
    assert not set(chosen) & suspects(healths, now_s=last_s)
    alive = {name for name, health in healths.items() if not health.dead}
    assert not alive or (set(chosen) <= alive and 2 * len(chosen) >= len(alive))
