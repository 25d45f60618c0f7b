"""What a front knows of replicas follows the group's records and what became of requests."""

from __future__ import annotations

import pytest

from ckpt.serve.front.health import FAILURES_MAX
from ckpt.serve.front.policies import least_loaded, round_robin
from ckpt.serve.front.targets import ReplicaTarget, ReplicaTargets
from ckpt.serve.group.records import GroupView, ReplicaRecord, RolesRecord


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def record(name: str, **fields: object) -> ReplicaRecord:
    given = {"address": f"{name}:1", "state": "ready", "generation": "1-1", "kept": ("1-1",)}
    return ReplicaRecord(name=name, **{**given, **fields})  # type: ignore[arg-type]


def view(*replicas: ReplicaRecord, serving: str) -> GroupView:
    records = {replica.name: replica for replica in replicas}
    return GroupView(1, records, RolesRecord(wanted=2, serving=tuple(serving)), 1)


def make(clock: Clock | None = None) -> ReplicaTargets:
    return ReplicaTargets(round_robin, clock=clock or Clock(), draw=lambda: 0.0)


def names(targets: list[ReplicaTarget]) -> str:
    return "".join(target.name for target in targets)


def target(targets: ReplicaTargets, name: str) -> ReplicaTarget:
    return next(one for one in targets if one.name == name)


def test_those_that_the_roles_name_get_requests_in_turn() -> None:
    targets = make()
    targets.see(view(*map(record, "abc"), serving="ab"))
    assert names(targets.usable()) == "ab"
    assert [targets.choose(targets.usable()).name for _ in range(4)] == ["a", "b", "a", "b"]


def test_view_without_anybody_takes_nobody_away() -> None:
    """Also if it comes with other replicas that do not serve yet."""
    targets = make()
    targets.see(view(*map(record, "ab"), serving="ab"))
    for emptied in (GroupView(2), view(record("c"), serving="")):
        targets.see(emptied)
        assert names(targets.usable()) == "ab"
    assert not target(targets, "a").present
    targets.see(view(record("c"), serving="c"))
    assert names(targets.usable()) == "c"
    assert names(list(targets)) == "c"


def test_promotion_is_one_that_comes_for_one_that_goes() -> None:
    targets = make()
    targets.see(view(*map(record, "ab"), serving="a"))
    targets.see(view(*map(record, "ab"), serving="ab"))
    assert targets.promotions == 0
    targets.see(view(*map(record, "bc"), serving="bc"))
    assert targets.promotions == 1


def test_one_that_left_is_remembered_until_its_requests_are_over() -> None:
    targets = make()
    targets.see(view(*map(record, "ab"), serving="ab"))
    a = target(targets, "a")
    a.begun(10)
    after = view(record("b"), serving="b")
    targets.see(after)
    assert a in list(targets)
    a.ended(10)
    targets.see(after)
    assert a not in list(targets)


def test_generation_is_asked_of_those_that_have_it() -> None:
    targets = make()
    old, new = record("a"), record("b", generation="1-2", kept=("1-2", "1-1"))
    targets.see(view(old, new, record("c", kept=("1-9",)), serving="ab"))
    assert names(targets.usable("1-1")) == "ab"
    assert names(targets.usable("1-2")) == "b"
    assert targets.usable("1-9") == []
    assert targets.generations() == ["1-1", "1-2"]


class Attempt:
    cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


def test_death_cancels_the_tries_that_can_go_elsewhere_and_suspects() -> None:
    targets = make()
    targets.see(view(*map(record, "abc"), serving="ab"))
    a, attempt = target(targets, "a"), Attempt()
    a.attempts.add(attempt)
    targets.signal(a, "failed")
    assert not attempt.cancelled
    targets.signal(a, "probe-failed")
    assert attempt.cancelled
    assert targets.suspects == {"a"}
    assert names(targets.usable()) == "b"
    later = Attempt()
    a.attempts.add(later)  # all others were dead too
    targets.signal(a, "probe-failed")
    assert later.cancelled
    targets.signal(a, "probe-answered")
    assert targets.suspects == frozenset()


def test_suspicion_of_the_ejected_ends_by_time() -> None:
    clock = Clock()
    targets = make(clock)
    targets.see(view(*map(record, "abc"), serving="abc"))
    for _ in range(FAILURES_MAX):
        targets.signal(target(targets, "a"), "failed")
    assert targets.suspects == {"a"}
    clock.now_s += 60.0
    targets.look_at_health()
    assert targets.suspects == frozenset()


def test_new_address_is_another_process() -> None:
    targets = make()
    targets.see(view(record("a"), record("b"), serving="ab"))
    targets.signal(target(targets, "a"), "refused")
    targets.see(view(record("a", address="a:2"), record("b"), serving="ab"))
    assert not target(targets, "a").health.dead


def test_rate_is_answers_per_second_and_others_stand_in_for_a_new_one() -> None:
    targets = ReplicaTargets(least_loaded, clock=Clock(), draw=lambda: 0.0)
    targets.see(view(*map(record, "ab"), serving="ab"))
    a, b = target(targets, "a"), target(targets, "b")
    assert [load.capacity for load in targets.loads([a, b])] == [1e9, 1e9]
    a.took(0.5, 4)
    assert a.rate == pytest.approx(8.0)
    assert [load.capacity for load in targets.loads([a, b])] == pytest.approx([8.0, 8.0])
    for _ in range(60):
        a.took(1.0, 2)
    assert a.rate == pytest.approx(2.0, rel=0.01)
    a.begun(100)
    assert targets.choose([a, b]) is b
    assert targets.loads([a])[0].outstanding_bytes == 100


def test_paths_are_repeatable_if_all_say_so() -> None:
    targets = make()
    assert targets.paths() == frozenset()
    both, one = record("a", repeatable=("/x", "/y")), record("b", repeatable=("/x",))
    targets.see(view(both, one, record("c"), serving="ab"))
    assert targets.paths() == {"/x"}
