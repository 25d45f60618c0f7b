"""Each small example is interrupted in its middle, by an exception and by SIGKILL, and must end as
if it never had been."""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import accumulate
import early_stop
import gan
import nested
import own_loop
import plain_checkpointer
import pytest
import torch
from kit.template import run

import ckpt

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")

EXAMPLES = Path(gan.__file__).parent
RUN_S_MAX = 120

Report = Callable[..., None]
Train = Callable[[Report], object]

TRAIN: dict[str, Train] = {
    "gan": lambda report: gan.train(90, report=report),
    "accumulate": lambda report: accumulate.train(118, report=report),
    "early_stop": lambda report: early_stop.train(report=report),
    "nested": lambda report: nested.search(report=report),
    "own_loop": lambda report: own_loop.train(3, report=report),
    "plain_checkpointer": lambda report: plain_checkpointer.train(70, report=report),
}
CUT_AFTER = {
    "gan": 70,
    "accumulate": 90,
    "early_stop": 47,
    "nested": 95,
    "own_loop": 40,
    "plain_checkpointer": 55,
}
"""How many reports come before the interruption: behind a snapshot, and between two."""

DRIVER = """
import os, signal, sys, time, torch
import {example}, ckpt
torch.set_num_threads(1)
import test_small_examples as cases

reports = 0
def report(*facts):
    global reports
    reports += 1
    if reports > cases.CUT_AFTER["{example}"]:
        deadline_s = time.monotonic() + 60
        while ckpt.Checkpointer(cases.store_of("{example}")).latest() is None:
            assert time.monotonic() < deadline_s, "no snapshot became durable"
        os.kill(os.getpid(), signal.SIGKILL)
cases.TRAIN["{example}"](report)
"""


class InterruptionError(Exception):
    """Stands for whatever ends a training in its middle."""


def store_of(example: str) -> str:
    return {"nested": "runs/search-trial-1"}.get(example) or str(sys.modules[example].STORE)


class Reports:
    """What an example reports: the last value for each step, exact; raises after ``cut_after``
    reports."""

    def __init__(self, cut_after: int | None = None) -> None:
        self.values: dict[tuple[object, ...], float] = {}
        self._left = cut_after

    def __call__(self, *facts: object) -> None:
        *step, loss = facts
        assert isinstance(loss, float)
        if self._left is not None:
            if self._left == 0:
                raise InterruptionError
            self._left -= 1
        self.values[tuple(step)] = loss


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums have one order whatever the machine has to do, and threads of tests that run side by
    side don't wait for cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=sorted(TRAIN))
def example(request: pytest.FixtureRequest) -> Iterator[str]:
    yield str(request.param)


def undisturbed(example: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Reports:
    folder.mkdir()
    monkeypatch.chdir(folder)
    reports = Reports()
    TRAIN[example](reports)
    return reports


@pytest.mark.slow
def test_example_interrupted_by_an_exception_goes_on_bit_for_bit(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = undisturbed(example, tmp_path / "calm", monkeypatch)
    monkeypatch.chdir(tmp_path)
    before = Reports(cut_after=CUT_AFTER[example])
    with pytest.raises(InterruptionError):
        TRAIN[example](before)
    after = Reports()
    TRAIN[example](after)

    assert len(after.values) < len(calm.values), "it started anew"
    assert after.values.keys() | before.values.keys() == calm.values.keys()
    assert before.values.items() <= calm.values.items()
    assert after.values.items() <= calm.values.items()


@pytest.mark.slow
def test_example_killed_goes_on_bit_for_bit(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = undisturbed(example, tmp_path / "calm", monkeypatch)
    monkeypatch.chdir(tmp_path)
    paths = f"import sys; sys.path[:0] = [{str(EXAMPLES)!r}, {str(Path(__file__).parent)!r}]"
    killed = run(
        [sys.executable, "-c", paths + DRIVER.format(example=example)],
        capture_output=True,
        text=True,
        timeout=RUN_S_MAX,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    after = Reports()
    TRAIN[example](after)
    assert len(after.values) < len(calm.values), "it started anew"
    assert after.values.items() <= calm.values.items()


@pytest.mark.slow
@pytest.mark.parametrize("cut_after", [27, 28, 30, 56])
def test_own_loop_goes_on_bit_for_bit_wherever_it_is_cut(
    cut_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch is 28 steps and a snapshot is due every 7: cut before, at and behind the end of an
    epoch."""
    calm = undisturbed("own_loop", tmp_path / "calm", monkeypatch)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InterruptionError):
        TRAIN["own_loop"](Reports(cut_after=cut_after))
    after = Reports()
    TRAIN["own_loop"](after)
    assert after.values.items() <= calm.values.items()
    assert max(after.values) == max(calm.values)


@pytest.mark.slow
def test_accumulation_takes_snapshots_behind_optimizer_steps_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, logger="ckpt")

    def report(step: int, loss: float) -> None:
        deadline_s = time.monotonic() + RUN_S_MAX
        # Steps of microseconds: without a pause the store would be behind, and the next one
        # skipped. This process must have heard of the commit: the slot is free from then on.
        while step == 60 and "is durable" not in caplog.text:
            assert time.monotonic() < deadline_s, f"no snapshot became durable. loss={loss}"
            time.sleep(0.01)

    accumulate.train(118, report=report)
    steps = [info.step for info in ckpt.Checkpointer(accumulate.STORE).snapshots()]
    assert steps == [52, 100], "50 is due and taken at 52; 118 is in the middle of an accumulation"


@pytest.mark.slow
def test_early_stop_started_again_stays_stopped_and_keeps_its_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reports = Reports()
    stopped_at = early_stop.train(report=reports)
    assert stopped_at == len(reports.values) < 1000
    again = Reports()
    assert early_stop.train(report=again) == stopped_at
    assert again.values == {}
    model, info = early_stop.best_model()
    assert 0 < info.step < stopped_at
    inputs, targets = early_stop.make_data(seed=2)
    assert (model(inputs) - targets).pow(2).mean().item() == info.metadata["validation"]


@pytest.mark.slow
def test_nested_search_done_once_trains_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    losses = nested.search(report=Reports())
    assert list(losses) == list(nested.RATES)
    again = Reports()
    assert nested.search(report=again) == losses
    assert again.values == {}
