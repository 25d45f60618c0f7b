"""Each way of protecting nothing is told at the function's end, with what to change."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn

import ckpt
from ckpt.backends.memory import MemoryBackend
from ckpt.elastic.boundaries import NEVER_STEPPED_AFTER


@pytest.fixture
def told(caplog) -> Callable[[Callable[[ckpt.Run], None]], list[str]]:
    """Run a function decorated over an empty store; returns the alarms that it raised."""
    caplog.set_level(logging.WARNING, logger="ckpt")

    def run(function: Callable[[ckpt.Run], None], store=None) -> list[str]:
        caplog.clear()
        ckpt.resilient(store=store or MemoryBackend(), every=5)(function)()
        return [record.getMessage() for record in caplog.records if record.name == "ckpt"]

    return run


def _optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)


def test_tracked_but_no_step_completed(told) -> None:
    def train(run: ckpt.Run) -> None:
        run.track(x={"v": 1})
        for _ in range(10):
            pass

    [text] = told(train)
    assert "no step was completed" in text
    assert "run.completed(step + 1)" in text


def test_tracked_optimizer_that_never_stepped(told) -> None:
    def train(run: ckpt.Run) -> None:
        run.track(optimizer=_optimizer())
        for _ in run.steps(10):
            pass

    [text] = told(train)
    assert "no tracked optimizer has stepped" in text
    assert "boundaries=10" in text


def test_optimizer_that_never_stepped_is_told_during_training_too(told, caplog) -> None:
    seen: list[tuple[int, int]] = []

    def train(run: ckpt.Run) -> None:
        run.track(nested={"optimizer": [_optimizer()]})
        for step in run.steps(NEVER_STEPPED_AFTER + 20):
            seen.append((step, len(caplog.records)))

    assert len(told(train)) == 2
    assert [count for step, count in seen if step < NEVER_STEPPED_AFTER] == [0] * (
        NEVER_STEPPED_AFTER
    )
    assert [count for step, count in seen if step >= NEVER_STEPPED_AFTER] == [1] * 20


def test_nothing_tracked(told) -> None:
    def train(run: ckpt.Run) -> None:
        for _ in run.steps(3):
            pass

    [text] = told(train)
    assert "random number generators alone" in text
    assert "run.track" in text


def test_run_that_is_not_used_at_all(told) -> None:
    [text] = told(lambda run: None)
    assert "tracked nothing and completed no step" in text


@pytest.mark.parametrize(
    ("steps", "named"),
    [(4, "state after step 1 was saved"), (0, "state at the function's end was saved")],
)
def test_save_before_the_loop(told, steps: int, named: str) -> None:
    def train(run: ckpt.Run) -> None:
        run.track(x={"v": 1})
        run.save("best")
        for _ in run.steps(steps):
            pass

    [text] = told(train)
    assert "run.save('best') came before the first step" in text
    assert named in text


def test_loop_that_protects_what_it_does_is_told_nothing_nor_its_next_start(told) -> None:
    store = MemoryBackend()

    def train(run: ckpt.Run) -> None:
        optimizer = _optimizer()
        run.track(optimizer=optimizer)
        for step in run.steps(10):
            optimizer.step()
            if step == 4:
                run.save("best")

    assert told(train, store) == []
    assert told(train, store) == []


def test_loop_of_ones_own_with_nothing_left_to_do_is_told_nothing(told) -> None:
    store = MemoryBackend()

    def train(run: ckpt.Run) -> None:
        run.track(x={"v": 1})
        for step in range(run.completed_steps, 3):
            run.completed(step + 1)

    assert told(train, store) == []
    assert told(train, store) == []


def test_only_the_first_rank_tells(told, monkeypatch) -> None:
    monkeypatch.setattr("ckpt.elastic.run.world_of_process", lambda: (1, 2))
    assert told(lambda run: None) == []
