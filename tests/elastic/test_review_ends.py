"""What counts as a boundary: loops left in the middle, several steps at once, items tracked
late."""

import pytest
import torch
from torch import nn

import ckpt
from ckpt.backends.memory import MemoryBackend
from ckpt.elastic.schedule import EverySteps, is_due


class StopError(Exception):
    pass


def train_with(store: MemoryBackend, loop) -> None:
    """Run ``loop(run, body)`` over one tracked model that counts its bodies."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    count = {"bodies": torch.zeros(())}

    def body() -> None:
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        count["bodies"] += 1

    @ckpt.resilient(store=store, every=1000)
    def train(run: ckpt.Run) -> None:
        run.track(model=model, optimizer=optimizer, count=count)
        loop(run, body)

    train()


def last(store: MemoryBackend) -> tuple[int, float] | None:
    c = ckpt.Checkpointer(store)
    info = c.latest()
    return None if info is None else (info.step, c.read("count/bodies").item())


def test_a_caught_exception_leaves_no_snapshot_of_half_a_step() -> None:
    def loop(run, body) -> None:
        try:
            for step in run.steps(100):
                body()
                if step == 4:
                    raise StopError
        except StopError:
            pass

    store = MemoryBackend()
    train_with(store, loop)
    assert last(store) is None


def test_a_suspended_loop_leaves_no_snapshot_of_half_a_step() -> None:
    def loop(run, body) -> None:
        steps = run.steps(100)
        for _ in range(6):
            next(steps)
            body()

    store = MemoryBackend()
    train_with(store, loop)
    assert last(store) is None


def test_a_loop_that_ends_with_its_data_has_its_last_snapshot() -> None:
    def loop(run, body) -> None:
        for _ in zip(run.steps(100), range(5), strict=False):
            body()

    store = MemoryBackend()
    train_with(store, loop)
    assert last(store) == (5, 5.0)


def test_a_loop_that_is_left_by_break_has_its_last_snapshot() -> None:
    def loop(run, body) -> None:
        for step in run.steps(100):
            body()
            if step == 4:
                break

    store = MemoryBackend()
    train_with(store, loop)
    assert last(store) == (5, 5.0)


def test_a_step_tried_again_after_an_exception_is_a_boundary() -> None:
    def loop(run, body) -> None:
        for attempt in range(2):
            try:
                for step in run.steps(5):
                    if step == 3 and not attempt:
                        raise StopError
                    body()
            except StopError:
                continue

    store = MemoryBackend()
    train_with(store, loop)
    assert last(store) == (5, 5.0)


def test_several_steps_at_once_take_the_snapshots_that_they_pass() -> None:
    store = MemoryBackend()

    @ckpt.resilient(store=store, every=50, slots=8)
    def train(run: ckpt.Run) -> None:
        run.track(m={"w": torch.ones(2)})
        for steps in range(7, 211, 7):
            run.completed(steps)

    train()
    assert [info.step for info in ckpt.Checkpointer(store).snapshots()] == [56, 105, 154, 203, 210]


def test_due_counts_what_lies_between_two_boundaries() -> None:
    every = EverySteps(50)
    assert [n for n in range(1, 151) if is_due(every, n)] == [50, 100, 150]
    assert is_due(every, 56, since=49)
    assert not is_due(every, 56, since=50)
    assert is_due(every, 500, since=1)


def test_an_item_tracked_after_the_first_step_is_refused() -> None:
    @ckpt.resilient(store=MemoryBackend(), every=2)
    def train(run: ckpt.Run) -> None:
        run.track(m={"w": torch.ones(2)})
        for step in run.steps(4):
            if step == 2:
                run.track(late={"x": 1})

    with pytest.raises(ckpt.UsageError, match="before the first step"):
        train()
