"""What a plan drops, and what it never drops, over logs that the real fold made."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt.format.records import Body, Commit, Drop, Open, Tag, make_record
from ckpt.log.fold import empty, fold, void_if_appended
from ckpt.log.state import LogState
from ckpt.maintenance.gc.plan import (
    CLOCK_DOUBTED,
    NEWEST,
    NEWEST_INTACT,
    NO_METRIC,
    NONE_INTACT,
    NOT_APPROVED,
    plan_gc,
    restore_order,
)
from ckpt.maintenance.retention import (
    KeepPolicy,
    keep_best,
    keep_every,
    keep_for,
    keep_last,
    keep_tagged,
)
from ckpt.values import SnapshotId, SnapshotInfo

LONG = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
NOW = 5000.0


class Log:
    """A log in memory, written by honest writers."""

    def __init__(self) -> None:
        self.state: LogState = empty("job")

    def add(self, body: Body, epoch: int) -> bool:
        """Append a record; whether it counts."""
        seq = self.state.next_seq
        record = make_record(
            body, job="job", seq=seq, epoch=epoch, write_id=f"w{seq}", prev=self.state.head_digest
        )
        counts = void_if_appended(self.state, record) is None
        self.state = fold(self.state, [record])
        return counts

    def open(self, resume: SnapshotId | None = None) -> int:
        epoch = self.state.epoch + 1
        assert self.add(Open(epoch, resume), epoch)
        return epoch

    def commit(self, pair: SnapshotId) -> bool:
        return self.add(Commit(pair, "0" * 32, None), self.state.epoch)


def infos(state: LogState, *, problem: frozenset[SnapshotId] = frozenset()) -> list[SnapshotInfo]:
    names: dict[SnapshotId, tuple[str, ...]] = {}
    for name, pair in state.tags.items():
        names[pair] = (*names.get(pair, ()), name)
    return [
        SnapshotInfo(
            epoch=entry.snapshot.epoch,
            step=entry.snapshot.step,
            world_size=1,
            size_bytes=1,
            new_bytes=1,
            created_unix_s=float(entry.seq),
            tags=names.get(entry.snapshot, ()),
            metadata={"loss": (entry.snapshot.step * 7) % 11},
            problem="gone" if entry.snapshot in problem else None,
        )
        for entry in state.snapshots
    ]


def ages(state: LogState, now_unix_s: float = NOW) -> dict[SnapshotId, float]:
    return {entry.snapshot: now_unix_s - float(entry.seq) for entry in state.snapshots}


def plan(state: LogState, policy: KeepPolicy | None, whole: SnapshotId | str | None = "newest"):
    found = (restore_order(state) or (None,))[0] if whole == "newest" else whole
    return plan_gc(state, infos(state), policy, ages_s=ages(state), intact=found)


def straight(*steps: int) -> Log:
    log = Log()
    epoch = log.open()
    for step in steps:
        assert log.commit(SnapshotId(epoch, step))
    return log


def test_plan_drops_what_no_rule_keeps_and_says_what_keeps_the_rest() -> None:
    log = straight(10, 20, 30, 40)
    assert log.add(Tag("good", SnapshotId(1, 10)), 1)
    found = plan(log.state, keep_every(20))
    assert found.drops == (SnapshotId(1, 30),)
    assert [one.reasons for one in found.decisions] == [
        ("tagged good",),
        ("every=20",),
        (),
        (NEWEST, "every=20"),
    ]
    assert found.floor == SnapshotId(1, 40)


def test_newest_stays_whatever_the_policy_says() -> None:
    assert plan(straight(10, 20, 30).state, keep_tagged()).drops == (
        SnapshotId(1, 10),
        SnapshotId(1, 20),
    )


def test_without_a_policy_nothing_is_dropped_but_the_floor_rises() -> None:
    found = plan(straight(10, 20).state, None)
    assert found.drops == ()
    assert found.floor == SnapshotId(1, 20)
    assert all(one.kept for one in found.decisions)


def test_newest_that_is_not_whole_stays_beside_the_one_that_is() -> None:
    found = plan(straight(10, 20, 30, 40).state, keep_tagged(), whole=SnapshotId(1, 20))
    assert found.drops == (SnapshotId(1, 10), SnapshotId(1, 30))
    assert [one.reasons for one in found.decisions if one.kept] == [(NEWEST_INTACT,), (NEWEST,)]
    assert found.floor == SnapshotId(1, 20), (
        "what is newer than the one that can be restored may still be wanted"
    )


def test_where_nothing_is_whole_nothing_is_dropped() -> None:
    found = plan(straight(10, 20, 30).state, keep_last(1), whole=None)
    assert found.empty
    assert [one.reasons for one in found.decisions] == [
        (NONE_INTACT,),
        (NONE_INTACT,),
        (NEWEST, "last=1"),
    ]


def test_snapshots_off_the_line_are_judged_by_all_rules_but_last() -> None:
    log = straight(10, 20, 30)
    log.open(SnapshotId(1, 20))
    assert log.commit(SnapshotId(2, 25))
    found = plan(log.state, keep_last(2))
    assert found.drops == (SnapshotId(1, 10), SnapshotId(1, 30))
    assert [one.on_line for one in found.decisions] == [True, True, False, True]
    assert plan(log.state, keep_last(1) | keep_every(30)).drops == (
        SnapshotId(1, 10),
        SnapshotId(1, 20),
    )


def test_job_that_was_started_afresh_keeps_the_greatest_until_its_first_commit() -> None:
    log = straight(10, 20)
    log.open(None)
    found = plan(log.state, keep_tagged())
    assert found.drops == (SnapshotId(1, 10),)
    assert log.add(Drop(found.drops, found.floor), 2)


def test_floor_never_sinks_and_is_set_once() -> None:
    log = straight(10, 20)
    first = plan(log.state, None)
    assert log.add(Drop(first.drops, first.floor), 1)
    assert plan(log.state, None).floor is None
    assert plan(log.state, None).empty
    assert log.commit(SnapshotId(1, 30))
    assert plan(log.state, None).floor == SnapshotId(1, 30)


def test_plan_that_was_approved_in_part_drops_that_part_alone() -> None:
    found = plan(straight(10, 20, 30, 40).state, keep_last(1))
    some = found.restricted_to([SnapshotId(1, 10), SnapshotId(1, 40), SnapshotId(9, 9)])
    assert some.drops == (SnapshotId(1, 10),) and some.floor == found.floor
    assert [one.reasons for one in some.decisions] == [
        (),
        (NOT_APPROVED,),
        (NOT_APPROVED,),
        (NEWEST, "last=1"),
    ]
    assert found.restricted_to(found.drops) == found


def test_plan_is_empty_that_neither_drops_nor_raises_the_floor() -> None:
    found = plan(straight(10, 20).state, keep_last(1))
    nothing = found.restricted_to(())
    assert found.drops and found.floor is not None and nothing.floor is not None
    assert not found.empty and not nothing.empty and not replace(found, floor=None).empty
    assert replace(nothing, floor=None).empty


def test_rule_of_tags_names_the_tags_and_not_itself() -> None:
    log = straight(10, 20)
    assert log.add(Tag("good", SnapshotId(1, 10)), 1)
    [first, last] = plan(log.state, keep_tagged()).decisions
    assert (first.reasons, last.reasons) == (("tagged good",), (NEWEST,))


def test_what_would_go_stays_while_a_rule_cannot_be_applied_and_the_rest_keeps_its_reasons() -> (
    None
):
    log = straight(10, 20, 30)
    assert log.add(Tag("good", SnapshotId(1, 10)), 1)
    found = plan(log.state, keep_best("acc"))
    reasons = [one.reasons for one in found.decisions]
    assert reasons == [("tagged good",), (NO_METRIC,), (NEWEST,)] and found.drops == ()
    [problem] = found.problems
    assert "metric='acc' metrics='loss'; log it" in problem
    days = {10: 368, 20: 367, 30: 366}
    ages_s = {pair: days[pair.step] * 86400.0 for pair in log.state.lineage}
    doubted = plan_gc(
        log.state,
        infos(log.state),
        keep_for("7d"),
        ages_s=ages_s,
        intact=restore_order(log.state)[0],
        problems=["told before"],
    )
    reasons = [one.reasons for one in doubted.decisions]
    assert reasons == [("tagged good",), (CLOCK_DOUBTED,), (NEWEST,)] and doubted.drops == ()
    assert doubted.problems[0] == "told before" and len(doubted.problems) == 2


def test_rule_that_cannot_be_applied_is_no_problem_where_nothing_would_go() -> None:
    state = straight(10).state
    old = {SnapshotId(1, 10): 999 * 86400.0}
    for policy in (keep_best("acc"), keep_for("7d")):
        found = plan_gc(state, infos(state), policy, ages_s=old, intact=SnapshotId(1, 10))
        assert found.problems == () and found.drops == ()


def test_store_without_snapshots_has_nothing_to_plan() -> None:
    log = Log()
    assert plan(log.state, keep_last(1)).empty
    log.open()
    assert plan(log.state, keep_last(1)).empty


def some_log(seed: int) -> Log:
    """Epochs that resume anywhere, late commits of older ones, tags and drops."""
    dice = random.Random(seed)
    log = Log()
    log.open()
    for _ in range(dice.randrange(30)):
        held = [entry.snapshot for entry in log.state.snapshots]
        match dice.random():
            case x if x < 0.15:
                log.open(dice.choice([*held, None]))
            case x if x < 0.7:
                log.commit(SnapshotId(dice.randint(1, log.state.epoch), dice.randrange(60)))
            case x if x < 0.85 and held:
                log.add(Tag(dice.choice("ab"), dice.choice(held)), log.state.epoch)
            case _ if held:
                log.add(Drop(tuple(sorted(dice.sample(held, 1))), None), log.state.epoch)
    return log


RULES = (keep_last(2), keep_every(5), keep_tagged(), keep_best("loss", 2), keep_for(20))


@LONG
@given(
    st.integers(0, 2**32),
    st.lists(st.sampled_from(RULES), min_size=1, max_size=3),
    st.integers(0, 3),
)
def test_log_counts_what_a_plan_records_and_a_second_plan_has_nothing_left(
    seed: int, rules: list[KeepPolicy], older: int
) -> None:
    log = some_log(seed)
    policy = rules[0]
    for rule in rules[1:]:
        policy |= rule
    best = restore_order(log.state)
    whole = best[min(older, len(best) - 1)] if best else None
    found = plan(log.state, policy, whole)
    before = log.state
    held = {entry.snapshot for entry in before.snapshots}
    assert before.newest() not in found.drops
    assert whole not in found.drops
    assert not set(before.tags.values()) & set(found.drops)
    assert set(found.drops) == {one.info.id for one in found.decisions if not one.reasons}
    if not found.empty:
        assert log.add(Drop(found.drops, found.floor), before.epoch), log.state.voids[-1:]
    assert {entry.snapshot for entry in log.state.snapshots} == held - set(found.drops)
    assert log.state.newest() == before.newest()
    assert restore_order(log.state)[:1] == best[:1]
    if whole is None or older == 0:
        assert plan(log.state, policy).empty


RULE = st.one_of(
    st.builds(keep_last, st.integers(1, 4)),
    st.builds(keep_every, st.integers(1, 9)),
    st.just(keep_tagged()),
    st.builds(
        keep_best,
        st.sampled_from(["loss", "none"]),
        st.integers(1, 3),
        st.sampled_from(["min", "max"]),
    ),
    st.builds(keep_for, st.integers(1, 6000)),
)


@pytest.mark.slow
@LONG
@given(
    st.integers(0, 2**32),
    st.none() | st.lists(RULE, min_size=1, max_size=4),
    st.integers(0, 4),
    st.floats(0, 1e9),
)
def test_newest_committed_snapshot_is_never_dropped_whatever_the_policy_clock_and_damage(
    seed: int, rules: list[KeepPolicy] | None, older: int, now_unix_s: float
) -> None:
    state = some_log(seed).state
    best = restore_order(state)
    whole = best[older] if older < len(best) else None
    damaged = frozenset(best[:older])
    policy = KeepPolicy(tuple(rule for one in rules for rule in one.rules)) if rules else None
    found = plan_gc(
        state, infos(state, problem=damaged), policy, ages_s=ages(state, now_unix_s), intact=whole
    )
    assert not set(best[:1]) & set(found.drops)
    assert state.newest() not in found.drops
    assert whole not in found.drops
    assert whole is not None or not found.drops


@pytest.mark.parametrize("seed", range(50))
def test_damaged_snapshots_are_dropped_unless_a_rule_names_them(seed: int) -> None:
    state = some_log(seed).state
    best = restore_order(state)
    if len(best) < 3:
        return
    damaged = frozenset(best[1:2])
    found = plan_gc(state, infos(state, problem=damaged), keep_last(2), ages_s={}, intact=best[0])
    by_pair = {one.info.id: one for one in found.decisions}
    assert by_pair[best[2]].kept, "a damaged one does not take the place of one that can be read"
    assert by_pair[best[1]].kept == bool(by_pair[best[1]].info.tags)


@pytest.mark.parametrize(
    ("ages_days", "doubted"),
    [
        ((10, 9, 8, 7), False),
        ((368, 367, 366, 365), True),
        ((367, 366, 365, 0), True),
        ((367, 366, 8, 2), False),
        ((370, 8, 6.9, 0), False),
    ],
    ids=["saves", "clock ahead", "clock ahead, saved", "pause over", "saved for the rule's time"],
)
def test_clock_that_was_set_forward_drops_nothing_by_age(
    ages_days: tuple[float, ...], doubted: bool
) -> None:
    state = straight(10, 20, 30, 40).state
    ages_s = {
        entry.snapshot: days * 86400.0
        for entry, days in zip(state.snapshots, ages_days, strict=True)
    }
    found = plan_gc(
        state, infos(state), keep_for("7d"), ages_s=ages_s, intact=restore_order(state)[0]
    )
    assert bool(found.drops) != doubted
    assert bool(found.problems) == doubted


def test_job_that_runs_for_an_hour_each_week_is_no_clock_set_forward() -> None:
    state = straight(*range(10, 90, 10)).state
    ages = [days * 86400.0 for days in (21.1, 21.0, 14.1, 14.0, 7.1, 7.0, 0.1, 0.0)]
    ages_s = {entry.snapshot: age for entry, age in zip(state.snapshots, ages, strict=True)}
    found = plan_gc(
        state, infos(state), keep_for("3d"), ages_s=ages_s, intact=restore_order(state)[0]
    )
    assert [pair.step for pair in found.drops] == [10, 20, 30, 40, 50, 60] and not found.problems
