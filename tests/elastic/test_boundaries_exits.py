"""How loops over a generator are left: every way that Python code has."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator

import pytest

from ckpt.elastic.boundaries import consumer_frame, left_by_break

Steps = Callable[[], Iterator[int]]


class Watch:
    """Makes generators and keeps how the last one was left: "break", "torn", or "ended"."""

    def __init__(self) -> None:
        self.left: list[str] = []

    def steps(self, total: int = 10) -> Iterator[int]:
        """As a run's loop."""
        for step in range(total):
            asking = consumer_frame(sys._getframe(1))
            try:
                yield step
            except GeneratorExit:
                self.left.append(
                    "break" if left_by_break(sys._getframe(1), consumer=asking) else "torn"
                )
                raise
        self.left.append("ended")


@pytest.fixture
def watch() -> Watch:
    """A fresh watch."""
    return Watch()


def _progress(steps: Iterator[int]) -> Iterator[int]:
    """As a progress bar does."""
    try:
        for step in steps:  # noqa: UP028  a real bar does something here
            yield step
    finally:
        pass


class Bar:
    """A progress bar that is an object whose ``__iter__`` is a generator."""

    def __init__(self, steps: Iterator[int]) -> None:
        self.steps = steps

    def __iter__(self) -> Iterator[int]:
        for step in self.steps:  # noqa: UP028
            yield step


def test_loop_that_runs_to_its_end_is_not_left(watch: Watch) -> None:
    for _ in watch.steps(3):
        pass
    assert watch.left == ["ended"]


def test_break(watch: Watch) -> None:
    for step in watch.steps():
        if step == 3:
            break
    assert watch.left == ["break"]


def test_break_as_the_first_word(watch: Watch) -> None:
    for _ in watch.steps():
        break
    assert watch.left == ["break"]


def test_return_from_the_loop(watch: Watch) -> None:
    def train() -> int | None:
        for step in watch.steps():
            if step == 3:
                return step
        return None

    assert train() == 3
    assert watch.left == ["break"]


def test_return_of_nothing(watch: Watch) -> None:
    def train() -> None:
        for step in watch.steps():
            if step == 3:
                return

    train()
    assert watch.left == ["break"]


@pytest.mark.parametrize(
    "wrap", [_progress, Bar, lambda steps: _progress(_progress(steps)), enumerate, iter]
)
def test_break_through_wrappers(watch: Watch, wrap) -> None:
    for n, _ in enumerate(wrap(watch.steps())):
        if n == 3:
            break
    assert watch.left == ["break"]


def test_break_from_zip(watch: Watch) -> None:
    for step, _ in zip(watch.steps(), range(100), strict=False):
        if step == 3:
            break
    assert watch.left == ["break"]


@pytest.mark.parametrize("wrap", [_progress, Bar, enumerate, iter])
def test_exception_through_wrappers(watch: Watch, wrap) -> None:
    def train() -> None:
        for n, _ in enumerate(wrap(watch.steps())):
            if n == 3:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    gc.collect(1)
    assert watch.left == ["torn"]


def test_exception_that_leaves_the_function(watch: Watch) -> None:
    def train() -> None:
        for step in watch.steps():
            if step == 3:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    gc.collect(1)
    assert watch.left == ["torn"]


def test_exception_that_the_function_catches_around_its_loop(watch: Watch) -> None:
    def train() -> str:
        try:
            for step in watch.steps():
                if step == 3:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            return "caught"
        return "ended"

    assert train() == "caught"
    assert watch.left == ["torn"]


def test_exception_suppressed_around_the_loop(watch: Watch) -> None:
    with contextlib.suppress(ZeroDivisionError):
        for step in watch.steps():
            if step == 3:
                raise ZeroDivisionError
    assert watch.left == ["torn"]


def test_keyboard_interrupt(watch: Watch) -> None:
    with pytest.raises(KeyboardInterrupt):
        for step in watch.steps():
            if step == 3:
                raise KeyboardInterrupt
    gc.collect(1)
    assert watch.left == ["torn"]


def test_exception_caught_inside_the_body_leaves_nothing(watch: Watch) -> None:
    for step in watch.steps(5):
        try:
            if step == 3:
                raise ZeroDivisionError
        except ZeroDivisionError:
            continue
    assert watch.left == ["ended"]


def test_break_in_an_except_clause_inside_the_body(watch: Watch) -> None:
    for step in watch.steps():
        try:
            if step == 3:
                raise ZeroDivisionError
        except ZeroDivisionError:
            break
    assert watch.left == ["break"]


def test_return_in_an_except_clause_inside_the_body(watch: Watch) -> None:
    def train() -> None:
        for step in watch.steps():
            try:
                if step == 3:
                    raise ZeroDivisionError
            except ZeroDivisionError as error:
                assert error is not None
                return

    train()
    assert watch.left == ["break"]


def test_break_out_of_a_with_statement_inside_the_body(watch: Watch) -> None:
    for step in watch.steps():
        with contextlib.nullcontext():
            if step == 3:
                break
    assert watch.left == ["break"]


def test_return_out_of_nested_withs_and_finallys(watch: Watch) -> None:
    done = []

    def train() -> int | None:
        with contextlib.nullcontext():
            for step in watch.steps():
                try:
                    with contextlib.nullcontext(), contextlib.nullcontext():
                        if step == 3:
                            return step
                finally:
                    done.append(step)
        return None

    assert train() == 3
    assert watch.left == ["break"]
    assert done == [0, 1, 2, 3]


def test_break_of_an_inner_loop_leaves_the_outer_one_alone(watch: Watch) -> None:
    for _ in watch.steps(3):
        for n in range(5):
            if n == 2:
                break
    assert watch.left == ["ended"]


def test_return_out_of_nested_loops_over_generators(watch: Watch) -> None:
    inner = Watch()

    def train() -> None:
        for epoch in watch.steps():
            for batch in inner.steps():
                if (epoch, batch) == (1, 2):
                    return

    train()
    assert inner.left == ["ended", "break"]
    assert watch.left == ["break"]


def test_for_else_runs_only_without_break(watch: Watch) -> None:
    reached = []
    for step in watch.steps():
        if step == 3:
            break
    else:
        reached.append("else")
    assert watch.left == ["break"]
    assert reached == []


def test_zip_whose_other_iterator_runs_dry_is_torn_and_costs_a_step_at_most(watch: Watch) -> None:
    for _ in zip(watch.steps(), range(3), strict=False):
        pass
    assert watch.left == ["torn"]


def test_zip_whose_data_come_first_takes_no_step_that_it_has_no_data_for(watch: Watch) -> None:
    taken = [step for _, step in zip(range(3), watch.steps(), strict=False)]
    gc.collect(1)
    assert taken == [0, 1, 2]
    assert watch.left != ["break"]


def test_iterator_that_is_kept_is_left_only_when_it_is_dropped(watch: Watch) -> None:
    steps = watch.steps()
    for step in steps:
        if step == 3:
            break
    assert watch.left == []
    assert next(steps) == 4
    steps.close()
    assert len(watch.left) == 1


def test_comprehension_that_raises_is_torn(watch: Watch) -> None:
    def fail(step: int) -> int:
        return 1 // (3 - step)

    with pytest.raises(ZeroDivisionError):
        [fail(step) for step in watch.steps()]
    gc.collect(1)
    assert watch.left == ["torn"]


class Next:
    """An iterator written as a class."""

    def __init__(self, steps: Iterator[int]) -> None:
        self.steps = steps

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        return next(self.steps)


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_iterator_written_as_a_class(watch: Watch, error: type[Exception] | None) -> None:
    with contextlib.suppress(ZeroDivisionError):
        for step in Next(watch.steps()):
            if step == 3:
                if error is not None:
                    raise error
                break
    assert watch.left == ["torn" if error else "break"]


@pytest.mark.parametrize("keep", [lambda steps: steps, _progress, Bar, Next])
def test_exception_whose_traceback_outlives_the_loop(watch: Watch, keep) -> None:
    """The generator is then dropped by whoever drops the traceback, wherever that stands."""

    def train() -> None:
        steps = keep(watch.steps())
        for step in steps:
            if step == 3:
                raise ZeroDivisionError

    def drop() -> None:
        with contextlib.suppress(ZeroDivisionError):
            train()

    drop()
    gc.collect(1)
    assert watch.left == ["torn"]


@pytest.mark.parametrize("catch", [contextlib.suppress, pytest.raises])
def test_comprehension_in_a_context_that_catches(watch: Watch, catch) -> None:
    with catch(ZeroDivisionError):
        [1 // (3 - step) for step in watch.steps()]
    gc.collect(1)
    assert watch.left == ["torn"]


def test_loop_whose_bar_is_kept_in_a_variable_is_in_doubt_and_so_not_complete(watch: Watch) -> None:
    def train() -> None:
        bar = Bar(watch.steps())
        for step in bar:
            if step == 3:
                break

    train()
    assert watch.left == ["torn"]


def test_break_in_a_trace_of_every_line(watch: Watch) -> None:
    """Debuggers and coverage change how a frame runs, not where it stands."""

    def train() -> None:
        for step in watch.steps():
            if step == 3:
                break

    before = sys.gettrace()
    sys.settrace(lambda frame, event, arg: sys.gettrace())
    try:
        train()
    finally:
        sys.settrace(before)
    assert watch.left == ["break"]


def test_break_at_module_level_of_a_script(watch: Watch) -> None:
    exec(  # noqa: S102
        compile("for step in watch.steps():\n    if step == 3: break", "script", "exec"),
        {"watch": watch},
    )
    assert watch.left == ["break"]


def test_break_in_an_async_function(watch: Watch) -> None:
    async def train() -> None:
        for step in watch.steps():
            if step == 3:
                break

    with pytest.raises(StopIteration):
        train().send(None)
    assert watch.left == ["break"]
