"""A loop over a run's steps is exact however it is written, or refused at its first step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

import pytest

import ckpt
from ckpt.backends.memory import MemoryBackend

Body = Callable[[], bool]
"""Counts one step; true if the loop is to be left."""


class Bar:
    """A progress bar: holds what it is given and goes through it in a generator."""

    def __init__(self, steps: Iterable[object]) -> None:
        self.steps = steps

    def __iter__(self) -> Iterator[object]:
        steps = self.steps
        for step in steps:  # noqa: UP028  a real bar does something here
            yield step


def _run(loop: Callable[[ckpt.Run, Body], object], *, leave_at: int) -> tuple[int, list[int]]:
    """The bodies that a loop ran, and the snapshots that there are."""
    store, state = MemoryBackend(), {"n": 0}

    @ckpt.resilient(store=store, every=100)
    def train(run: ckpt.Run) -> None:
        def body() -> bool:
            state["n"] += 1
            return state["n"] == leave_at

        run.track(state=state)
        loop(run, body)

    train()
    return state["n"], [info.step for info in ckpt.Checkpointer(store).snapshots()]


def _variable(run: ckpt.Run, body: Body) -> None:
    steps = run.steps(50)
    for _ in steps:
        if body():
            break


def _bar_in_a_variable(run: ckpt.Run, body: Body) -> None:
    bar = Bar(run.steps(50))
    for _ in bar:
        if body():
            break
    assert bar


def _zip(run: ckpt.Run, body: Body) -> None:
    for _, _ in zip(run.steps(50), range(100), strict=False):
        if body():
            break


def _bar_around_zip(run: ckpt.Run, body: Body) -> None:
    for _ in Bar(zip(run.steps(50), range(100), strict=False)):
        if body():
            break


def _enumerate_around_zip(run: ckpt.Run, body: Body) -> None:
    for _, (_, _) in enumerate(zip(range(100), run.steps(50), strict=False)):
        if body():
            break


def _generator_around_map(run: ckpt.Run, body: Body) -> None:
    for _ in (step + 1 for step in map(int, run.steps(50))):
        if body():
            return


def _delegated(run: ckpt.Run, body: Body) -> None:
    def steps() -> Iterator[int]:
        yield from run.steps(50)

    for _ in steps():
        if body():
            break


@pytest.mark.parametrize(
    "loop",
    [
        _variable,
        _bar_in_a_variable,
        _zip,
        _bar_around_zip,
        _enumerate_around_zip,
        _generator_around_map,
        _delegated,
    ],
)
def test_step_that_a_break_completes_is_kept(loop) -> None:
    assert _run(loop, leave_at=7) == (7, [7])


@pytest.mark.parametrize(
    "pair",
    [
        lambda steps, few: zip(steps, few, strict=False),
        lambda steps, few: zip(few, steps, strict=False),
        lambda steps, few: zip(range(90), few, steps, strict=False),
        lambda steps, few: enumerate(zip(few, steps, strict=False)),
        lambda steps, few: Bar(zip(few, steps, strict=False)),
        lambda steps, few: map(divmod, few, map(int, (step + 1 for step in steps))),
    ],
)
def test_loop_that_a_shorter_iterator_ends_keeps_its_last_step(pair) -> None:
    def loop(run: ckpt.Run, body: Body) -> None:
        for _ in pair(run.steps(50), range(7)):
            body()

    assert _run(loop, leave_at=0) == (7, [7])


def _zip_in_a_variable(run: ckpt.Run, body: Body) -> None:
    both = zip(run.steps(50), range(100), strict=False)
    for _ in both:
        body()


def _enumerate_in_a_list(run: ckpt.Run, body: Body) -> None:
    kept = [enumerate(run.steps(50))]
    for _ in kept[0]:
        body()


def _zip_in_a_bar_in_a_variable(run: ckpt.Run, body: Body) -> None:
    bar = Bar(zip(run.steps(50), range(100), strict=False))
    for _ in bar:
        body()


def _generator_in_a_variable(run: ckpt.Run, body: Body) -> None:
    steps = (step for step in run.steps(50))
    for _ in steps:
        body()


def _iterator_in_a_variable(run: ckpt.Run, body: Body) -> None:
    steps = iter(run.steps(50))
    for _ in steps:
        body()


@pytest.mark.parametrize(
    "loop",
    [
        _zip_in_a_variable,
        _enumerate_in_a_list,
        _zip_in_a_bar_in_a_variable,
        _generator_in_a_variable,
        _iterator_in_a_variable,
    ],
)
def test_loop_whose_break_could_not_be_seen_is_refused_before_its_first_body(loop) -> None:
    bodies: list[int] = []
    with pytest.raises(ckpt.UsageError, match=r"held elsewhere.*for step in run\.steps"):
        _run(lambda run, body: loop(run, lambda: bodies.append(1) is not None), leave_at=0)
    assert bodies == []


@pytest.mark.parametrize(
    "around",
    [
        lambda steps: itertools.islice(steps, 7),
        lambda steps: itertools.takewhile(lambda step: step < 7, steps),
        lambda steps: filter(lambda step: step % 2, steps),
        lambda steps: itertools.chain(steps, range(3)),
    ],
)
def test_iterator_that_passes_over_steps_is_refused_by_name(around) -> None:
    def loop(run: ckpt.Run, body: Body) -> None:
        for _ in around(run.steps(50)):
            body()

    with pytest.raises(ckpt.UsageError, match="passes over steps"):
        _run(loop, leave_at=0)


def test_zip_with_the_steps_in_the_middle_is_refused() -> None:
    def loop(run: ckpt.Run, body: Body) -> None:
        for _ in zip(range(9), run.steps(50), range(9), strict=False):
            body()

    with pytest.raises(ckpt.UsageError, match=r"put run.steps\(\) first"):
        _run(loop, leave_at=0)


def test_exception_in_a_loop_over_a_variable_completes_no_body() -> None:
    def loop(run: ckpt.Run, body: Body) -> None:
        steps = run.steps(50)
        try:
            for _ in steps:
                if body():
                    raise ZeroDivisionError
        except ZeroDivisionError:
            return

    assert _run(loop, leave_at=7) == (7, [])


def test_steps_in_a_variable_are_looped_over_again_from_where_they_were() -> None:
    seen: list[int] = []

    def loop(run: ckpt.Run, body: Body) -> None:
        steps = run.steps(5)
        for step in steps:
            seen.append(step)
            if step == 2:
                break
        seen.extend(steps)
        assert next(iter(run.steps(5)), None) is None

    _run(loop, leave_at=0)
    assert seen == list(range(5))
