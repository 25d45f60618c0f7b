"""The loop: resumed trainings equal uninterrupted ones; snapshots only where they are points."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import ckpt
from ckpt.backends.memory import MemoryBackend


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


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crashes", [(7,), (0,), (4,), (5,), (19,), (3, 8, 8, 13), (12, 11, 19)])
def test_crashed_training_ends_as_an_uninterrupted_one(
    training, equal, crash, crashes: tuple[int, ...]
) -> None:
    whole = training()
    whole.start(MemoryBackend())
    broken, store = training(), MemoryBackend()
    for at in crashes:
        with pytest.raises(crash):
            broken.start(store, crash_at=at)
    assert broken.start(store) == "done"
    assert broken.losses == whole.losses
    assert equal(broken.state, whole.state)
    assert broken.began_at[-1] in (0, 5, 10, 15)


@pytest.mark.parametrize("crashes", [(7,), (14, 17), (11, 12)])
def test_accumulating_training_is_resumed_at_a_step_of_its_optimizer(
    training, equal, crash, crashes
) -> None:
    whole = training(accumulate=4, every=5)
    whole.start(MemoryBackend())
    broken, store = training(accumulate=4, every=5), MemoryBackend()
    for at in crashes:
        with pytest.raises(crash):
            broken.start(store, crash_at=at)
    assert broken.start(store) == "done"
    assert broken.losses == whole.losses
    assert equal(broken.state, whole.state)
    assert set(_steps(store)) == {8, 12, 16, 20}


def test_more_steps_after_a_normal_end_equal_one_long_run(training, equal) -> None:
    whole = training(total=30)
    whole.start(MemoryBackend())
    parts, store = training(total=12), MemoryBackend()
    parts.start(store)
    parts.total = 30
    parts.start(store)
    assert parts.began_at == [0, 12]
    assert parts.losses == whole.losses
    assert equal(parts.state, whole.state)


def test_start_after_the_end_runs_no_step(training) -> None:
    store = MemoryBackend()
    done = training(total=5)
    done.start(store)
    first = dict(done.losses)
    done.losses.clear()
    assert done.start(store) == "done"
    assert done.losses == {}
    assert len(first) == 5


def test_untouched_seed_is_used_where_nothing_was_restored() -> None:
    got = []

    @ckpt.resilient(store=MemoryBackend(), every=5)
    def train(run: ckpt.Run) -> None:
        run.track(x={"v": 1})
        for _ in run.steps(2):
            got.append(torch.rand(1).item())

    torch.manual_seed(7)
    train()
    torch.manual_seed(7)
    assert got == [torch.rand(1).item(), torch.rand(1).item()]


def test_dict_that_is_filled_later_in_place_is_tracked_and_comes_back() -> None:
    store = MemoryBackend()

    def start() -> dict[str, object]:
        best: dict[str, object] = {}

        @ckpt.resilient(store=store, every=2)
        def train(run: ckpt.Run) -> None:
            run.track(best=best)
            for step in run.steps(4):
                best[f"at{step}"] = torch.full((2,), float(step))

        train()
        return best

    first = start()
    again = start()
    assert list(again) == ["at0", "at1", "at2", "at3"]
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_items_tracked_in_two_calls_come_from_one_snapshot_after_damage() -> None:
    store = MemoryBackend()
    a, b = {"v": torch.zeros(100)}, {"v": torch.zeros(100)}

    def start(total: int, seen: list) -> None:
        @ckpt.resilient(store=store, every=1)
        def train(run: ckpt.Run) -> None:
            run.track(a=a)
            run.track(b=b)
            seen.append(
                (
                    run.completed_steps,
                    a["v"][0].item(),
                    b["v"][0].item(),
                    run.restored and run.restored.step,
                )
            )
            for step in run.steps(total):
                a["v"].fill_(step + 1)
                b["v"].fill_(-step - 1)

        train()

    seen: list[tuple] = []
    start(3, seen)
    _damage(store, 3, "b/v")
    start(4, seen)
    assert seen == [(0, 0.0, 0.0, None), (2, 2.0, -2.0, 2)]
    assert ckpt.Checkpointer(store).latest().step == 4
    assert torch.equal(ckpt.Checkpointer(store).read("b/v"), torch.full((100,), -4.0))


def _damage(store: MemoryBackend, step: int, leaf: str) -> None:
    index = ckpt.Checkpointer(store)._index(step, None, None)
    place = next(shard.locations[0] for shard in index.parts[0].shards if shard.leaf.name == leaf)
    body, when = store._objects[place.pack]
    changed = bytearray(body)
    changed[place.offset_bytes + place.stored_bytes // 2] ^= 1
    store._objects[place.pack] = (bytes(changed), when)


def test_step_count_that_was_read_too_early_is_never_that_of_another_state() -> None:
    store = MemoryBackend()
    a, b = {"v": torch.zeros(100)}, {"v": torch.zeros(100)}

    def start(total: int) -> int:
        @ckpt.resilient(store=store, every=1)
        def train(run: ckpt.Run) -> int:
            run.track(a=a)
            began = run.completed_steps
            run.track(b=b)
            assert b["v"][0].item() == -began
            for step in range(began, total):
                a["v"].fill_(step + 1)
                b["v"].fill_(-step - 1)
                run.completed(step + 1)
            return began

        return train()

    assert start(2) == 0
    b["v"].zero_()
    assert start(3) == 2
    _damage(store, 3, "b/v")
    with pytest.raises(ckpt.UsageError, match="track everything before completed_steps"):
        start(5)


# --- how loops end ----------------------------------------------------------------------------------------------------


def test_break_completes_its_body_and_is_snapshotted() -> None:
    store = MemoryBackend()
    state = {"n": 0}

    @ckpt.resilient(store=store, every=100)
    def train(run: ckpt.Run) -> int:
        run.track(state=state)
        for step in run.steps(50):
            state["n"] += 1
            if step == 6:
                break
        return run.completed_steps

    assert train() == 7
    assert _steps(store) == [7]
    state["n"] = 0
    assert train() == 14 or state["n"] == 50  # the condition of the break is not met again
    assert state["n"] == 50


def test_return_from_the_loop_completes_its_body() -> None:
    store = MemoryBackend()
    state = {"n": 0}

    @ckpt.resilient(store=store, every=100)
    def train(run: ckpt.Run) -> str:
        run.track(state=state)
        for step in run.steps(50):
            state["n"] += 1
            if step == 6:
                return "early"
        return "late"

    assert train() == "early"
    assert _steps(store) == [7]
    assert ckpt.Checkpointer(store).restore({"state": state}).step == 7
    assert state["n"] == 7


def test_exception_completes_no_body_but_what_was_staged_becomes_durable(crash) -> None:
    store = MemoryBackend()

    def die(run: ckpt.Run, step: int) -> None:
        if step == 7:
            raise crash

    with pytest.raises(crash):
        _counting(store, die)
    assert _steps(store) == [5]
    assert _counting(store)["n"] == 10


def test_exception_that_the_function_swallows_leaves_no_half_done_step() -> None:
    store = MemoryBackend()
    state = {"a": 0, "b": 0}

    @ckpt.resilient(store=store, every=3)
    def train(run: ckpt.Run) -> str:
        run.track(state=state)
        try:
            for step in run.steps(50):
                state["a"] += 1
                if step == 7:
                    raise ZeroDivisionError
                state["b"] += 1
        except ZeroDivisionError:
            return "swallowed"
        return "ended"

    assert train() == "swallowed"
    assert _steps(store) == [3, 6]
    ckpt.Checkpointer(store).restore({"state": state})
    assert state == {"a": 6, "b": 6}


def test_loop_is_called_again_with_a_larger_total() -> None:
    store = MemoryBackend()
    seen: list[int] = []

    @ckpt.resilient(store=store, every=100)
    def train(run: ckpt.Run) -> None:
        run.track(x={"v": 1})
        for total in (3, 5, 5, 2, 8):
            seen.extend(run.steps(total))

    train()
    assert seen == list(range(8))
    assert _steps(store) == [3, 5, 8]


def test_loop_of_no_steps_takes_no_snapshot() -> None:
    store = MemoryBackend()
    _counting(store, total=0)
    assert _steps(store) == []


def test_total_below_zero_is_refused() -> None:
    with pytest.raises(ckpt.UsageError, match="total=-1"):
        _counting(MemoryBackend(), total=-1)


@pytest.mark.parametrize(
    ("every", "total", "wanted"),
    [(5, 12, [5, 10, 12]), (5, 10, [5, 10]), (1, 3, [1, 2, 3]), (9, 4, [4])],
)
def test_snapshots_are_taken_when_due_and_once_at_the_end(
    every: int, total: int, wanted: list[int]
) -> None:
    store = MemoryBackend()
    _counting(store, total=total, every=every, slots=20)
    assert _steps(store) == wanted


# --- loops of one's own -----------------------------------------------------------------------------------------------


def test_loop_of_ones_own_resumes_where_it_stopped(crash) -> None:
    store = MemoryBackend()
    state = {"n": 0}

    @ckpt.resilient(store=store, every=4)
    def train(run: ckpt.Run, die_at: int | None) -> None:
        run.track(state=state)
        step = run.completed_steps
        assert state["n"] == step
        while step < 10:
            if step == die_at:
                raise crash
            state["n"] += 1
            step += 1
            run.completed(step)

    with pytest.raises(crash):
        train(7)
    state["n"] = -1
    train(None)
    assert state["n"] == 10
    assert _steps(store) == [4, 8, 10]


def test_loop_that_counts_several_steps_at_once_is_snapshotted_where_it_passed_a_due_one() -> None:
    store = MemoryBackend()

    @ckpt.resilient(store=store, every=5, slots=20)
    def train(run: ckpt.Run) -> None:
        run.track(x={"v": 1})
        for step in (3, 6, 9, 12, 30):
            run.completed(step)

    train()
    assert _steps(store) == [6, 12, 30]


def test_completed_steps_only_grow() -> None:
    @ckpt.resilient(store=MemoryBackend())
    def train(run: ckpt.Run, steps: int) -> None:
        run.track(x={"v": 1})
        run.completed(5)
        run.completed(steps)

    for steps in (5, 4, 0, -1):
        with pytest.raises(ckpt.UsageError, match=f"completed=5 reported={steps}"):
            train(steps)


# --- accumulation -----------------------------------------------------------------------------------------------------


def test_what_is_due_inside_an_accumulation_is_taken_at_the_next_point() -> None:
    store = MemoryBackend()
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)

    @ckpt.resilient(store=store, every=5, slots=20)
    def train(run: ckpt.Run) -> None:
        run.track(p=parameter, optimizer=optimizer)
        for step in run.steps(22):
            parameter.grad = torch.ones(2)
            if (step + 1) % 3 == 0:
                optimizer.step()
            if step == 12:
                run.save(tag="asked")

    train()
    assert _steps(store) == [6, 12, 15, 21]
    tagged = [info.step for info in ckpt.Checkpointer(store).snapshots() if "asked" in info.tags]
    assert tagged == [15]
