"""What a run saves when it is asked, what it tells, and how it stands a failing store."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import pytest
import torch

import ckpt
from ckpt.backends.memory import MemoryBackend
from ckpt.testing.faults import Fault, FaultyBackend, Harm

AT_ONCE = ckpt.RestartPolicy(end_wait="never")
"""The end of a training raises what its store says, and waits for nothing."""


def _steps(store) -> list[int]:
    return [info.step for info in ckpt.Checkpointer(store).snapshots()]


def _counting(
    store,
    body: Callable[[ckpt.Run, int], None] = lambda run, step: None,
    *,
    total: int = 10,
    **options,
):
    """A training that counts its steps in tracked state; returns the state at its end."""
    state = {"n": 0, "t": torch.zeros(3)}

    @ckpt.resilient(store=store, **{"every": 5, **options})
    def train(run: ckpt.Run) -> dict[str, object]:
        run.track(state=state)
        for step in run.steps(total):
            assert state["n"] == step
            state["n"] += 1
            state["t"] += 1
            body(run, step)
        return state

    return train()


# --- run.save ---------------------------------------------------------------------------------------------------------


def test_requested_snapshot_is_taken_at_the_next_boundary_with_its_tag() -> None:
    store = MemoryBackend()

    def ask(run: ckpt.Run, step: int) -> None:
        if step in (2, 6):
            run.save(tag="best")
        if step == 7:
            run.save()

    _counting(store, ask, every=100)
    assert _steps(store) == [3, 7, 8, 10]
    assert {info.step: info.tags for info in ckpt.Checkpointer(store).snapshots()}[7] == ("best",)


def test_requests_before_one_boundary_become_one_snapshot_with_all_tags() -> None:
    store = MemoryBackend()

    def ask(run: ckpt.Run, step: int) -> None:
        if step == 4:
            for tag in ("a", "b", "a"):
                run.save(tag=tag)

    _counting(store, ask)
    assert _steps(store) == [5, 10]
    assert sorted(ckpt.Checkpointer(store).snapshots()[0].tags) == ["a", "b"]


def test_request_after_the_loop_tags_its_last_snapshot() -> None:
    store = MemoryBackend()

    @ckpt.resilient(store=store, every=5)
    def train(run: ckpt.Run) -> None:
        run.track(x={"v": 1})
        for _ in run.steps(7):
            pass
        run.save(tag="final")

    train()
    assert [(info.step, info.tags) for info in ckpt.Checkpointer(store).snapshots()] == [
        (5, ()),
        (7, ("final",)),
    ]


def test_request_from_another_thread() -> None:
    store = MemoryBackend()

    def ask(run: ckpt.Run, step: int) -> None:
        if step == 3:
            thread = threading.Thread(target=run.save, kwargs={"tag": "thread"})
            thread.start()
            thread.join(10)

    _counting(store, ask, every=100)
    assert _steps(store) == [4, 10]


@pytest.mark.parametrize("tag", ["", " x", "a\tb", 5])
def test_tag_that_can_not_be_is_refused_where_it_is_asked(tag: object) -> None:
    with pytest.raises(ckpt.UsageError, match="a tag is"):
        _counting(MemoryBackend(), lambda run, step: run.save(tag=tag))


# --- time -------------------------------------------------------------------------------------------------------------


def test_schedule_by_time_snapshots_once_its_time_is_over() -> None:
    store = MemoryBackend()

    def wait(run: ckpt.Run, step: int) -> None:
        if step == 3:
            threading.Event().wait(0.06)

    _counting(store, wait, every="50ms", total=6)
    steps = _steps(store)
    assert steps[-1] == 6
    assert any(step in (4, 5) for step in steps)
    long = MemoryBackend()
    _counting(long, every="1h")
    assert _steps(long) == [10]


# --- pauses, logs -----------------------------------------------------------------------------------------------------


def test_no_boundary_may_lie_in_a_pause_and_pauses_do_not_nest() -> None:
    def nested(run: ckpt.Run, step: int) -> None:
        with run.paused(), run.paused():
            pass

    with pytest.raises(ckpt.UsageError, match="pauses don't nest"):
        _counting(MemoryBackend(), nested)

    @ckpt.resilient(store=MemoryBackend())
    def train(run: ckpt.Run) -> None:
        run.track(x={"v": 1})
        with run.paused():
            run.completed(1)

    with pytest.raises(ckpt.UsageError, match="end the pause first"):
        train()


def test_pause_in_a_body_is_free_and_ends_after_an_exception() -> None:
    def evaluate(run: ckpt.Run, step: int) -> None:
        try:
            with run.paused():
                raise ZeroDivisionError
        except ZeroDivisionError:
            pass

    assert _counting(MemoryBackend(), evaluate)["n"] == 10


def test_latest_logged_values_travel_with_the_next_snapshot() -> None:
    store = MemoryBackend()

    def log(run: ckpt.Run, step: int) -> None:
        run.log(loss=torch.tensor([1.0 / (step + 1)]), step=step, name="run", nan=float("nan"))
        if step == 0:
            run.log(once=True, nothing=None, scalar=torch.tensor(7))

    _counting(store, log)
    facts = [dict(info.metadata) for info in ckpt.Checkpointer(store).snapshots()]
    assert [round(fact["loss"], 5) for fact in facts] == [0.2, 0.1]
    assert [fact["step"] for fact in facts] == [4, 9]
    assert all(
        fact["once"] is True and fact["nothing"] is None and fact["scalar"] == 7 for fact in facts
    )
    assert all(fact["nan"] != fact["nan"] for fact in facts)


@pytest.mark.parametrize("value", [torch.ones(2), [1.0], object(), b"x", 2**70])
def test_what_can_not_be_logged_is_refused_by_name(value: object) -> None:
    with pytest.raises(ckpt.UsageError, match="bad"):
        _counting(MemoryBackend(), lambda run, step: run.log(bad=value))


# --- stores that fail -------------------------------------------------------------------------------------------------


def test_dead_store_raises_alarms_while_training_goes_on_and_the_end_tells(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = FaultyBackend(
        MemoryBackend(), [Fault(harm=Harm.LOST_REQUEST, op="put", key="packs/", times=None)]
    )
    ran: list[int] = []
    with caplog.at_level(logging.WARNING, "ckpt"), pytest.raises(ckpt.UnavailableError):
        _counting(store, lambda run, step: ran.append(step), every=2, restart=AT_ONCE)
    assert ran == list(range(10))
    told = [one for one in caplog.messages if "the snapshot of epoch 1" in one]
    assert len(told) == 1, "an alarm that comes again is told once a minute"


def test_store_that_comes_back_is_used_again_and_nothing_is_raised() -> None:
    inner = MemoryBackend()
    store = FaultyBackend(inner, [Fault(harm=Harm.FULL, op="put", key="packs/", times=1)])
    assert _counting(store)["n"] == 10
    assert _steps(inner) == [10]


def test_slow_store_skips_due_snapshots_and_never_the_last(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = threading.Event()

    class Gated(MemoryBackend):
        def put(self, key, data, *, create_only: bool = False) -> None:
            if key.startswith("packs/"):
                assert gate.wait(30)
            super().put(key, data, create_only=create_only)

    store = Gated()

    def open_late(run: ckpt.Run, step: int) -> None:
        if step == 18:
            gate.set()

    with caplog.at_level(logging.WARNING, "ckpt"):
        _counting(store, open_late, every=2, total=20, slots=2)
    steps = _steps(store)
    assert steps[:2] == [2, 4]
    assert steps[-1] == 20
    assert sum("is skipped" in record.message for record in caplog.records) == 1


def test_staleness_budget_stops_training_with_the_remedy() -> None:
    store = FaultyBackend(
        MemoryBackend(), [Fault(harm=Harm.DENIED, op="put", key="packs/", times=None)]
    )
    began_s = time.monotonic()
    with pytest.raises(ckpt.UnavailableError, match="max_stale_s") as caught:
        _counting(
            store,
            lambda run, step: threading.Event().wait(0.01),
            every=1,
            max_stale="100ms",
            total=100_000,
        )
    assert isinstance(caught.value.__cause__, ckpt.StoreDeniedError)
    assert time.monotonic() - began_s < 60


def test_budget_is_not_exceeded_while_snapshots_become_durable() -> None:
    assert _counting(MemoryBackend(), every=1, max_stale="30s")["n"] == 10


def test_newer_attempt_fences_a_run_in_its_loop() -> None:
    store = MemoryBackend()
    taken_over = []

    def take_over(run: ckpt.Run, step: int) -> None:
        if step == 4:
            with ckpt.Checkpointer(store, job="memory:memory") as other:
                other.save({"state": {"n": 99, "t": torch.zeros(3)}}, step=100)
            taken_over.append(step)
        if step > 4:
            threading.Event().wait(0.005)

    with pytest.raises(ckpt.FencedError):
        _counting(store, take_over, every=1, total=2000)
    assert taken_over == [4]
    assert ckpt.Checkpointer(store).latest().step == 100


def test_store_that_can_not_be_opened_stops_before_the_first_step() -> None:
    store = FaultyBackend(MemoryBackend(), [Fault(harm=Harm.DENIED, times=None)])
    with pytest.raises(ckpt.StoreDeniedError):
        _counting(store, lambda run, step: pytest.fail("a step ran"))


# --- what a run tells -------------------------------------------------------------------------------------------------


def test_facts_of_a_run() -> None:
    store = MemoryBackend()
    told = []

    @ckpt.resilient(store=store, every=5)
    def train(run: ckpt.Run) -> None:
        run.track(x={"v": 1})
        told.append(
            (
                run.rank,
                run.local_rank,
                run.world_size,
                run.membership_epoch,
                run.restored and run.restored.step,
            )
        )
        assert run.device.type in ("cpu", "cuda")
        for _ in run.steps(5):
            pass

    train()
    train()
    assert told == [(0, 0, 1, 1, None), (0, 0, 1, 2, 5)]


def test_tracking_nothing_twice_or_a_reserved_name_is_refused() -> None:
    def start(*calls: dict[str, object]) -> None:
        @ckpt.resilient(store=MemoryBackend())
        def train(run: ckpt.Run) -> None:
            for call in calls:
                run.track(**call)

        train()

    with pytest.raises(ckpt.UsageError, match="nothing to track"):
        start({})
    with pytest.raises(ckpt.UsageError, match="name=a"):
        start({"a": {"v": 1}}, {"a": {"v": 1}})
    with pytest.raises(ckpt.UsageError, match="name=rng"):
        start({"rng": {"v": 1}})
    with pytest.raises(ckpt.UsageError, match="bad"):
        start({"bad": object()})


def test_tracking_after_a_completed_step_is_refused() -> None:
    with pytest.raises(ckpt.UsageError, match="track everything before the first step"):
        _counting(
            MemoryBackend(), lambda run, step: run.track(late={"v": 1}) if step == 3 else None
        )


def test_stored_item_that_nobody_tracks_raises_an_alarm(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryBackend()
    with ckpt.Checkpointer(store) as c:
        c.save({"state": {"n": 3, "t": torch.zeros(3)}, "ema": {"v": 1}, "gan": {"v": 2}}, step=3)
    with caplog.at_level(logging.WARNING, "ckpt"):
        _counting(store, missing="keep")
    assert any(
        "are not tracked" in record.message and "ema, gan" in record.message
        for record in caplog.records
    )
