"""A finished training whose store is full: its end is tried again, and it is never done again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pytest
import torch

import ckpt
from ckpt.backends.base import Backend
from ckpt.backends.memory import MemoryBackend
from ckpt.elastic.failure import ends_process
from ckpt.ipc.messages import Policy
from ckpt.session.saving import end_pauses
from ckpt.testing.faults import Fault, FaultyBackend, Harm


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow each other at once."""
    monkeypatch.setattr("ckpt.session.saving.END_PAUSES_S", (0.01,))
    monkeypatch.setattr("ckpt.session.saving.END_PAUSE_S", 0.01)


def _train(
    store: Backend,
    *,
    end_wait: str = "1h",
    in_body: Callable[[ckpt.Run, int], object] = lambda run, step: None,
) -> list[int]:
    bodies: list[int] = []
    state = {"x": torch.zeros(1000)}

    @ckpt.resilient(store=store, every=1, restart=ckpt.RestartPolicy(end_wait=end_wait))
    def train(run: ckpt.Run) -> None:
        run.track(state=state)
        for step in run.steps(4):
            state["x"] += 1.5
            bodies.append(step)
            in_body(run, step)
        state["x"] += 100  # not part of the last step

    train()
    return bodies


def _full(times: int) -> tuple[Backend, Backend]:
    inner = MemoryBackend()
    return inner, FaultyBackend(inner, [Fault(harm=Harm.FULL, op="put", key="packs/", times=times)])


def test_end_is_tried_again_until_the_store_takes_it(caplog) -> None:
    caplog.set_level(logging.WARNING, logger="ckpt")
    inner, store = _full(12)
    assert _train(store) == [0, 1, 2, 3]
    with ckpt.Checkpointer(inner) as checkpointer:
        assert checkpointer.latest().step == 4
        assert torch.equal(checkpointer.read("state/x"), torch.full((1000,), 6.0))
        assert checkpointer.verify().ok
    failed = [one for one in caplog.messages if "is not durable: " in one]
    ends = [one for one in caplog.messages if "the training is finished" in one]
    assert len(failed) == 1, failed
    assert len(ends) == 1, ends
    assert "its end at step 4 is in memory only (durable is nothing)" in ends[0]
    assert "make room" in ends[0]


def test_tag_that_was_asked_for_the_end_comes_with_it() -> None:
    inner, store = _full(9)
    _train(store, in_body=lambda run, step: run.save("final") if step == 3 else None)
    [newest, *_] = ckpt.Checkpointer(inner).snapshots()[::-1]
    assert (newest.step, newest.tags) == (4, ("final",))


@pytest.mark.parametrize("end_wait", ["never", "20ms"])
def test_end_that_is_given_up_says_that_the_training_is_finished(end_wait: str) -> None:
    _, store = _full(10_000)
    with pytest.raises(ckpt.StoreFullError, match="the training is finished with 4 steps"):
        _train(store, end_wait=end_wait)


def test_stop_ends_the_tries() -> None:
    _, store = _full(10_000)
    runs: list[ckpt.Run] = []

    def stop_later(run: ckpt.Run, step: int) -> None:
        if step == 3:
            runs.append(run)
            threading.Timer(0.2, lambda: run.stop(1.0)).start()

    with pytest.raises(ckpt.StoreFullError, match="the training is finished"):
        _train(store, in_body=stop_later)
    assert len(runs) == 1


def test_pauses_are_equal_on_all_ranks_and_about_as_long_as_asked(monkeypatch) -> None:
    monkeypatch.undo()
    assert list(end_pauses(0.0)) == []
    assert list(end_pauses(20.0)) == [1.0, 5.0, 15.0]
    assert 3600 <= sum(end_pauses(3600.0)) < 3661


def test_error_behind_the_function_restarts_nothing() -> None:
    class Trainer:
        attempt = 1

    def ends(**more: bool) -> bool:
        full = ckpt.StoreFullError("full")
        return ends_process(full, Trainer(), Policy(), outermost=True, **more)

    assert ends()
    assert not ends(returned=True)
