"""Retention policies: what each rule keeps, laws of their composition, and policies as text."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt.errors import UsageError
from ckpt.maintenance.retention import (
    Best,
    Every,
    For,
    KeepPolicy,
    Last,
    Tagged,
    duration_s,
    duration_text,
    keep_best,
    keep_every,
    keep_for,
    keep_last,
    keep_tagged,
    parse_policy,
)
from ckpt.values import SnapshotId, SnapshotInfo

LONG = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
NOW = 1_000_000.0
DAY = 86400


def info(
    step: int,
    *,
    epoch: int = 1,
    age_s: float = 0.0,
    tags: tuple[str, ...] = (),
    problem: str | None = None,
    **metadata: float | int | str | bool | None,
) -> SnapshotInfo:
    return SnapshotInfo(
        epoch=epoch,
        step=step,
        world_size=1,
        size_bytes=1,
        new_bytes=1,
        created_unix_s=NOW - age_s,
        tags=tags,
        metadata=metadata,
        problem=problem,
    )


def kept(
    policy: KeepPolicy,
    infos: list[SnapshotInfo],
    line: list[SnapshotId] | None = None,
    *,
    now: float = NOW,
) -> set[int]:
    line = sorted((one.id for one in infos), reverse=True) if line is None else line
    return {pair.step for pair in policy.reasons(infos, line=line, ages_s=ages(infos, now))}


def ages(infos: list[SnapshotInfo], now: float = NOW) -> dict[SnapshotId, float]:
    return {one.id: now - one.created_unix_s for one in infos}


metrics = st.text(min_size=1, max_size=5).filter(
    lambda name: name.isprintable() and not set(name) & {":", ","}
)
spelled = st.one_of(
    st.builds(Last, st.integers(1, 10**15 - 1)),
    st.builds(Every, st.integers(1, 10**15 - 1)),
    st.just(Tagged()),
    st.builds(Best, metrics, st.integers(1, 10**15 - 1), st.sampled_from(["min", "max"])),
    st.builds(For, st.integers(1, 10**15 - 1)),
)
"""All that can be said."""
rules = st.one_of(
    st.builds(Last, st.integers(1, 6)),
    st.builds(Every, st.integers(1, 7)),
    st.just(Tagged()),
    st.builds(
        Best,
        st.sampled_from(["loss", "val/acc"]),
        st.integers(1, 4),
        st.sampled_from(["min", "max"]),
    ),
    st.builds(For, st.integers(1, 9 * DAY)),
)
policies = st.builds(
    lambda found: KeepPolicy(tuple(found)), st.lists(rules, min_size=1, max_size=4)
)
numbers = st.none() | st.booleans() | st.text(max_size=2) | st.integers(-5, 5) | st.floats(width=16)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[SnapshotInfo], list[SnapshotId]]:
    pairs = draw(st.sets(st.tuples(st.integers(1, 3), st.integers(0, 20)), max_size=12))
    infos = [
        info(
            step,
            epoch=epoch,
            age_s=draw(st.floats(-DAY, 10 * DAY)),
            tags=draw(st.sampled_from([(), ("best",)])),
            problem=draw(st.sampled_from([None, None, None, "gone"])),
            **draw(st.dictionaries(st.sampled_from(["loss", "val/acc"]), numbers)),
        )
        for epoch, step in pairs
    ]
    line = sorted(
        draw(st.sets(st.sampled_from([one.id for one in infos]))) if infos else (), reverse=True
    )
    return infos, line


def test_last_counts_the_newest_line_alone() -> None:
    infos = [info(10), info(20), info(30), info(99, epoch=2)]
    line = [SnapshotId(1, 30), SnapshotId(1, 20), SnapshotId(1, 10)]
    assert kept(keep_last(2), infos, line) == {20, 30}


def test_last_counts_all_where_the_line_holds_nothing() -> None:
    assert kept(keep_last(2), [info(10), info(20), info(5, epoch=2)], []) == {20, 5}


def test_last_does_not_count_damaged_ones() -> None:
    assert kept(keep_last(2), [info(10), info(20), info(30, problem="manifest gone")]) == {10, 20}


def test_every_keeps_multiples_on_the_line_and_off_it() -> None:
    assert kept(keep_every(1000), [info(0), info(999), info(1000), info(3000, epoch=4)], []) == {
        0,
        1000,
        3000,
    }


def test_best_keeps_the_least_or_the_greatest() -> None:
    infos = [info(1, loss=0.3), info(2, loss=0.1), info(3, loss=0.2), info(4, loss=1)]
    assert kept(keep_best("loss", 2), infos) == {2, 3}
    assert kept(keep_best("loss", 1, "max"), infos) == {4}


@pytest.mark.parametrize("mode", ["min", "max"])
def test_best_never_counts_nan_missing_text_or_truth(mode) -> None:
    infos = [
        info(1, loss=math.nan),
        info(2),
        info(3, loss="0"),
        info(4, loss=True),
        info(5, loss=None),
    ]
    assert kept(keep_best("loss", 9, mode), infos) == set()
    infos.append(info(6, loss=math.inf))
    assert kept(keep_best("loss", 9, mode), infos) == {6}


def test_best_of_equal_ones_is_the_oldest_alone() -> None:
    infos = [info(7, loss=1.0), info(3, epoch=2, loss=1), info(9, loss=1.0), info(10, loss=2.0)]
    assert kept(keep_best("loss", 1), infos) == {7}
    assert kept(keep_best("loss", 2), infos) == {7, 10}
    assert kept(keep_best("loss", 2, "max"), infos) == {7, 10}


def test_value_that_is_logged_now_and_then_keeps_the_snapshots_right_behind_it() -> None:
    infos = [info(step, val={0: 0.9, 1: 0.3, 2: 0.5, 3: 0.4}[step // 10]) for step in range(40)]
    assert kept(keep_best("val", 3), infos) == {10, 20, 30}


def test_for_keeps_what_was_made_within_the_time_and_what_a_fast_clock_made() -> None:
    infos = [info(1, age_s=7 * DAY + 1), info(2, age_s=7 * DAY), info(3), info(4, age_s=-5.0)]
    assert kept(keep_for("7d"), infos) == {2, 3, 4}
    assert kept(keep_for(1), infos) == {3, 4}


def test_reasons_are_the_rules_as_they_are_written() -> None:
    policy = keep_last(1) | keep_every(10) | keep_best("loss")
    found = policy.reasons([info(10, loss=1.0)], line=[SnapshotId(1, 10)], ages_s={})
    assert found == {SnapshotId(1, 10): ("last=1", "every=10", "best=loss:1")}


@pytest.mark.slow
@LONG
@given(policies, policies, worlds(), st.floats(NOW - DAY, NOW + 10 * DAY))
def test_union_keeps_what_any_keeps(a: KeepPolicy, b: KeepPolicy, world, now: float) -> None:
    infos, line = world
    pairs = [
        set(policy.reasons(infos, line=line, ages_s=ages(infos, now))) for policy in (a, b, a | b)
    ]
    assert pairs[2] == pairs[0] | pairs[1]


@LONG
@given(policies, policies, policies)
def test_union_has_no_order_and_no_repetition(a: KeepPolicy, b: KeepPolicy, c: KeepPolicy) -> None:
    assert a | b == b | a
    assert (a | b) | c == a | (b | c)
    assert a | a == a
    assert str(a | b) == str(b | a)


@pytest.mark.slow
@LONG
@given(policies, worlds())
def test_applying_a_policy_to_what_it_kept_keeps_all_of_it(policy: KeepPolicy, world) -> None:
    infos, line = world
    first = policy.reasons(infos, line=line, ages_s=ages(infos))
    left = [one for one in infos if one.id in first]
    # The newest stays in any case, so a line with snapshots keeps one; without that, `last` would
    # turn to the rest.
    if line and not any(pair in first for pair in line):
        return
    again = policy.reasons(left, line=[pair for pair in line if pair in first], ages_s=ages(left))
    assert set(again) == set(first)


@pytest.mark.slow
@LONG
@given(worlds(), st.integers(1, 5), st.integers(1, 5))
def test_a_wider_rule_keeps_no_less(world, n: int, more: int) -> None:
    infos, line = world
    for narrow, wide in (
        (keep_last(n), keep_last(n + more)),
        (keep_every(n * more), keep_every(n)),
        (keep_best("loss", n), keep_best("loss", n + more)),
        (keep_best("loss", n, "max"), keep_best("loss", n + more, "max")),
        (keep_for(n * DAY), keep_for((n + more) * DAY)),
    ):
        few, many = (
            set(one.reasons(infos, line=line, ages_s=ages(infos))) for one in (narrow, wide)
        )
        assert few <= many


@pytest.mark.slow
@LONG
@given(worlds(), st.permutations(range(12)), policies)
def test_the_order_of_the_snapshots_does_not_matter(
    world, order: list[int], policy: KeepPolicy
) -> None:
    infos, line = world
    shuffled = [infos[place] for place in order if place < len(infos)]
    assert policy.reasons(infos, line=line, ages_s=ages(infos)) == policy.reasons(
        shuffled, line=line, ages_s=ages(shuffled)
    )


@LONG
@given(st.builds(lambda found: KeepPolicy(tuple(found)), st.lists(spelled, min_size=1, max_size=6)))
def test_text_of_a_policy_reads_back_as_the_same(policy: KeepPolicy) -> None:
    assert parse_policy(str(policy)) == policy
    assert str(parse_policy(str(policy))) == str(policy)


def test_text_says_what_the_functions_say() -> None:
    text = "last=5,every=1000, tagged ,best=loss:3,best=acc:3:max,for=7d"
    policy = (
        keep_last(5)
        | keep_every(1000)
        | keep_tagged()
        | keep_best("loss", 3)
        | keep_best("acc", 3, "max")
    )
    assert parse_policy(text) == policy | keep_for("7d")
    assert str(parse_policy(text)) == "last=5,every=1000,tagged,best=acc:3:max,best=loss:3,for=1w"
    assert parse_policy("best=val/loss") == keep_best("val/loss", 1)
    assert parse_policy("best=loss:2:min") == keep_best("loss", 2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "known: last=N"),
        ("last", "known: last=N"),
        ("newest=3", "known: last=N"),
        ("last=5,", "known: last=N"),
        ("last=0", "from 1 on"),
        ("last=-1", "whole number"),
        ("last=١", "whole number"),
        ("last=" + "9" * 5000, "whole number"),
        ("for=" + "9" * 5000 + "d", "w, d, h, m, s"),
        ("for=999999999999999w", "15 digits"),
        ("every=x", "whole number"),
        ("tagged=yes", "known: last=N"),
        ("best=", "metric"),
        ("best=loss:1:most", "best=METRIC:N:max"),
        ("best=loss:x", "whole number"),
        ("for=7", "w, d, h, m, s"),
        ("for=7y", "w, d, h, m, s"),
        ("for=", "w, d, h, m, s"),
        ("for=0d", "from 1 on"),
    ],
)
def test_text_that_is_no_policy_is_refused_and_says_what_is_known(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_policy(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda: keep_last(0),
        lambda: keep_every(0),
        lambda: keep_best("", 1),
        lambda: keep_best("a,b"),
        lambda: keep_best("a:b"),
        lambda: keep_best("a", 1, "most"),
        lambda: keep_for(0),
        lambda: KeepPolicy(()),
        lambda: keep_last(True),
        lambda: keep_last(1.5),
        lambda: keep_every(10**5000),
    ],
)
def test_rule_that_says_nothing_is_refused(make) -> None:
    with pytest.raises(UsageError):
        make()


@LONG
@given(st.integers(1, 10**9))
def test_lengths_of_time_read_back(seconds: int) -> None:
    assert duration_s(duration_text(seconds)) == seconds


def test_lengths_of_time_have_units() -> None:
    assert [duration_s(text) for text in ("90s", "24h", "7d", "2w", "5m", "0")] == [
        90,
        86400,
        604800,
        1209600,
        300,
        0,
    ]
