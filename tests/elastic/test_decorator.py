"""What the decorator does around a function."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

import ckpt
from ckpt.backends.memory import MemoryBackend
from ckpt.testing.faults import CountingBackend, Fault, FaultyBackend, Harm


def test_arguments_and_result_are_passed_on() -> None:
    @ckpt.resilient(store=MemoryBackend())
    def train(run: ckpt.Run, a: int, /, b: int, *rest: int, c: int = 3, **more: int) -> tuple:
        assert isinstance(run, ckpt.Run)
        return a, b, rest, c, more

    result = train(1, 2, 3, c=4, d=5)
    assert result == (1, 2, (3,), 4, {"d": 5})


def test_function_keeps_its_name_words_and_signature() -> None:
    @ckpt.resilient(store=MemoryBackend())
    def train(run: ckpt.Run, epochs: int = 1) -> None:
        """Train it."""

    assert train.__name__ == "train"
    assert train.__doc__ == "Train it."
    assert list(inspect.signature(train).parameters) == ["run", "epochs"]


def test_function_that_tracks_nothing_touches_no_store() -> None:
    store = CountingBackend(MemoryBackend())

    @ckpt.resilient(store=store)
    def train(run: ckpt.Run) -> str:
        return "done"

    assert train() == "done"
    assert store.calls() == []


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("x"), KeyboardInterrupt(), SystemExit(3), ckpt.UsageError("mine")]
)
def test_exceptions_pass_through_and_what_was_staged_becomes_durable(error: BaseException) -> None:
    store = MemoryBackend()
    state = {"n": 0}

    @ckpt.resilient(store=store, every=2)
    def train(run: ckpt.Run) -> None:
        run.track(state=state)
        for step in run.steps(10):
            state["n"] += 1
            if step == 2:
                raise error

    with pytest.raises(type(error)) as caught:
        train()
    assert caught.value is error
    assert ckpt.Checkpointer(store).restore({"state": state}).step == 2
    assert state["n"] == 2


def test_exception_of_the_function_is_not_replaced_by_a_failing_store() -> None:
    store = FaultyBackend(
        MemoryBackend(), [Fault(harm=Harm.FULL, op="put", key="packs/", times=None)]
    )

    @ckpt.resilient(store=store, every=1)
    def train(run: ckpt.Run) -> None:
        run.track(x={"v": 1})
        for step in run.steps(10):
            if step == 3:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()


def test_each_call_is_an_attempt_of_its_own() -> None:
    store = MemoryBackend()
    epochs = []

    @ckpt.resilient(store=store)
    def train(run: ckpt.Run) -> None:
        run.track(x={"v": 1})
        epochs.append(run.membership_epoch)

    for _ in range(3):
        train()
    assert epochs == [1, 2, 3]


def test_nested_run_of_another_store_works_and_of_the_same_is_refused(tmp_path: Path) -> None:
    def make(name: str):
        @ckpt.resilient(store=str(tmp_path / name), every=1)
        def inner(run: ckpt.Run) -> str:
            run.track(x={"v": 1})
            for _ in run.steps(2):
                pass
            return name

        return inner

    @ckpt.resilient(store=str(tmp_path / "outer"), every=1)
    def outer(run: ckpt.Run, name: str) -> list[str]:
        run.track(x={"v": 1})
        return [make(name)() for _ in run.steps(2)]

    assert outer("inner") == ["inner", "inner"]
    assert ckpt.Checkpointer(str(tmp_path / "inner")).latest().step == 2
    (tmp_path / "fresh").mkdir()

    @ckpt.resilient(store=str(tmp_path / "outer2"), every=1)
    def outer2(run: ckpt.Run) -> None:
        make("outer2")()

    with pytest.raises(ckpt.UsageError, match="a run inside a run of the same store"):
        outer2()


def test_only_restores_what_it_names() -> None:
    store = MemoryBackend()
    with ckpt.Checkpointer(store) as c:
        c.save({"model": {"w": torch.ones(3)}, "head": {"w": torch.ones(3)}}, step=4)
    model, head = {"w": torch.zeros(3)}, {"w": torch.zeros(3)}

    @ckpt.resilient(store=store, only=["model"])
    def train(run: ckpt.Run) -> None:
        run.track(model=model, head=head)
        assert run.completed_steps == 4

    train()
    assert model["w"].sum() == 3
    assert head["w"].sum() == 0


def test_only_that_names_what_nobody_tracks_is_refused() -> None:
    store = MemoryBackend()
    with ckpt.Checkpointer(store) as c:
        c.save({"model": {"w": torch.ones(3)}}, step=4)

    @ckpt.resilient(store=store, only=["modle"])
    def train(run: ckpt.Run) -> None:
        run.track(model={"w": torch.zeros(3)})
        for _ in run.steps(5):
            pass

    with pytest.raises(ckpt.UsageError, match="only names what is not tracked"):
        train()


def test_missing_item_is_an_error_unless_it_may_keep_its_value() -> None:
    store = MemoryBackend()
    with ckpt.Checkpointer(store) as c:
        c.save({"model": {"w": torch.ones(3)}}, step=4)
    fresh = {"w": torch.full((3,), 7.0)}

    def start(missing: str) -> None:
        @ckpt.resilient(store=store, missing=missing)
        def train(run: ckpt.Run) -> None:
            run.track(model={"w": torch.zeros(3)}, fresh=fresh)

        train()

    with pytest.raises(ckpt.UsageError, match="fresh"):
        start("error")
    start("keep")
    assert torch.equal(fresh["w"], torch.full((3,), 7.0))


@pytest.mark.parametrize(
    "options",
    [
        {"every": 0},
        {"every": "soon"},
        {"every": None},
        {"slots": 0},
        {"compression": "max"},
        {"only": "model"},
        {"only": [1]},
        {"missing": "maybe"},
        {"max_stale": "10"},
        {"job": ""},
        {"store": None},
        {"store": 7},
    ],
)
def test_option_that_can_not_work_is_refused_where_the_function_is_decorated(options: dict) -> None:
    with pytest.raises(ckpt.UsageError):
        ckpt.resilient(**{"store": MemoryBackend(), **options})


def test_store_is_given_as_a_path_object(tmp_path: Path) -> None:
    @ckpt.resilient(store=tmp_path / "run", every=1)
    def train(run: ckpt.Run) -> None:
        run.track(x={"v": 1})
        for _ in run.steps(1):
            pass

    train()
    assert ckpt.Checkpointer(tmp_path / "run").latest().step == 1


def test_store_of_another_job_is_refused() -> None:
    store = MemoryBackend()
    with ckpt.Checkpointer(store, job="mine") as c:
        c.save({"x": {"v": 1}}, step=1)

    @ckpt.resilient(store=store, job="yours")
    def train(run: ckpt.Run) -> None:
        run.track(x={"v": 1})

    with pytest.raises(ckpt.UsageError, match="mine"):
        train()


def test_hooks_are_taken_off_after_the_call() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)

    @ckpt.resilient(store=MemoryBackend())
    def train(run: ckpt.Run, fail: bool) -> None:
        run.track(p=parameter, optimizer=optimizer)
        if fail:
            raise ZeroDivisionError

    train(False)
    with pytest.raises(ZeroDivisionError):
        train(True)
    assert len(optimizer._optimizer_step_post_hooks) == 0
