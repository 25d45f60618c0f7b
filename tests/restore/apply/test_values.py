"""Schedulers, loaders, generators and containers: captured, restored in place, nothing else
changed."""

from __future__ import annotations

import enum
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from ckpt.capture.leaves import World
from ckpt.capture.plan import CapturePlan, capture
from ckpt.capture.streams import RngState
from ckpt.errors import UsageError
from ckpt.restore.apply.apply import apply

WORLD = World(0, 1)
Store = Callable[..., object]

# torchdata's own loader calls it.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")


def save(store: Store, **items: object) -> object:
    return store(capture(items, world=WORLD))


def load(snapshot: object, **items: object) -> None:
    apply(items, snapshot.index, read=snapshot.read, world=WORLD)  # type: ignore[attr-defined]


class Scale:
    """A callable object, whose state schedulers keep."""

    def __init__(self) -> None:
        self.factor = 0.5

    def __call__(self, step: int) -> float:
        return self.factor**step


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], lrs.LRScheduler]] = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda step: 0.9**step),
    "LambdaLR object": lambda o: lrs.LambdaLR(o, Scale()),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lrs.StepLR(o, 2),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [2, 2, 4]),
    "ConstantLR": lambda o: lrs.ConstantLR(o, total_iters=3),
    "LinearLR": lrs.LinearLR,
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: lrs.SequentialLR(o, [lrs.LinearLR(o), SWALR(o, 0.05)], [3]),
    "PolynomialLR": lrs.PolynomialLR,
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 7),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler(
        [lrs.StepLR(o, 2), lrs.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "CyclicLR function": lambda o: lrs.CyclicLR(
        o, 0.01, 0.1, step_size_up=3, scale_fn=lambda x: 0.9**x
    ),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.1, total_steps=20),
    "SWALR": lambda o: SWALR(o, 0.05),
}


def test_every_scheduler_of_torch_is_tried() -> None:
    known = {
        name
        for name, value in vars(lrs).items()
        if isinstance(value, type)
        and issubclass(value, lrs.LRScheduler)
        and not name.startswith(("_", "LRScheduler"))
    }
    assert known <= {name.split()[0] for name in SCHEDULERS}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_restored_scheduler_gives_the_same_rates(name: str, store: Store) -> None:
    def pair() -> tuple[torch.optim.Optimizer, lrs.LRScheduler]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2, momentum=0.9)
        return optimizer, SCHEDULERS[name](optimizer)

    def rates(
        optimizer: torch.optim.Optimizer, scheduler: lrs.LRScheduler, steps: int
    ) -> list[float]:
        found = []
        for _ in range(steps):
            optimizer.step()
            plateau = isinstance(scheduler, lrs.ReduceLROnPlateau)
            scheduler.step(1.0) if plateau else scheduler.step()
            found.append(optimizer.param_groups[0]["lr"])
        return found

    optimizer, scheduler = pair()
    rates(optimizer, scheduler, 3)
    snapshot = save(store, scheduler=scheduler, optimizer=optimizer)
    expected = rates(optimizer, scheduler, 6)
    other, again = pair()
    load(snapshot, scheduler=again, optimizer=other)
    assert rates(other, again, 6) == expected


def test_milestones_stay_a_counter(store: Store) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2)
    scheduler = lrs.MultiStepLR(optimizer, [1, 3])
    load(save(store, s=scheduler), s=scheduler)
    assert type(scheduler.milestones) is Counter


def test_scaler_comes_back(store: Store) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    snapshot = save(store, scaler=scaler)
    other = torch.amp.GradScaler("cpu", init_scale=2.0)
    load(snapshot, scaler=other)
    assert other.get_scale() == 8.0


def test_scaler_that_is_disabled_says_that_it_takes_no_state(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    snapshot = save(store, scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    load(snapshot, scaler=torch.amp.GradScaler("cpu", enabled=False))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "path='scaler'" in caplog.text


def test_scaler_that_is_enabled_misses_the_state_that_a_disabled_one_did_not_have(
    store: Store,
) -> None:
    snapshot = save(store, scaler=torch.amp.GradScaler("cpu", enabled=False))
    live = torch.amp.GradScaler("cpu", init_scale=4.0)
    with pytest.raises(UsageError, match=r"missing in the snapshot\. path='scaler'"):
        load(snapshot, scaler=live)
    kept = apply({"scaler": live}, snapshot.index, read=snapshot.read, world=WORLD, missing="keep")
    assert kept == ("scaler",)
    assert live.get_scale() == 4.0


def test_generators_come_back(store: Store) -> None:
    generator = torch.Generator().manual_seed(4)
    torch.randn(3, generator=generator)
    snapshot = save(store, g=generator, rng=RngState(), d={"inner": generator})
    expected = (
        torch.rand(2).tolist(),
        np.random.rand(),
        random.random(),
        torch.rand(2, generator=generator).tolist(),
    )
    other = torch.Generator()
    load(snapshot, g=other, rng=RngState(), d={"inner": torch.Generator()})
    assert (
        torch.rand(2).tolist(),
        np.random.rand(),
        random.random(),
        torch.rand(2, generator=other).tolist(),
    ) == expected


def loader(**options: object) -> StatefulDataLoader:
    return StatefulDataLoader(list(range(12)), batch_size=2, shuffle=True, **options)  # type: ignore[arg-type]


def test_loader_goes_on_in_the_middle_of_an_epoch(store: Store) -> None:
    first = loader()
    batches = iter(first)
    next(batches), next(batches)
    snapshot = save(store, data=first)
    rest = [batch.tolist() for batch in batches]
    second = loader()
    load(snapshot, data=second)
    assert [batch.tolist() for batch in second] == rest


def test_capturing_an_unopened_loader_draws_nothing_and_restores_to_the_start(store: Store) -> None:
    torch.manual_seed(0)
    first = loader()
    before = torch.get_rng_state()
    snapshot = save(store, data=first)
    assert torch.equal(torch.get_rng_state(), before)
    expected = [batch.tolist() for batch in first]
    second = loader()
    load(snapshot, data=second)
    assert [batch.tolist() for batch in second] == expected


def test_restored_and_recaptured_loader_keeps_its_place(store: Store) -> None:
    first = loader()
    batches = iter(first)
    next(batches)
    snapshot = save(store, data=first)
    rest = [batch.tolist() for batch in batches]
    second, third = loader(), loader()
    load(snapshot, data=second)
    load(save(store, data=second), data=third)
    assert [batch.tolist() for batch in third] == rest


def test_restoring_a_loader_that_is_iterated_is_refused(store: Store) -> None:
    first = loader()
    batches = iter(first)
    next(batches)
    snapshot = save(store, data=first)
    with pytest.raises(UsageError, match="being iterated"):
        load(snapshot, data=first)
    list(batches)
    load(snapshot, data=first)


def test_plain_loader_is_refused_naming_the_other() -> None:
    for items in ({"data": DataLoader([1])}, {"d": {"data": DataLoader([1])}}):
        with pytest.raises(UsageError, match="StatefulDataLoader"):
            CapturePlan(items, WORLD).capture()


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Pair(NamedTuple):
    left: object
    right: object


@dataclass
class Progress:
    epoch: int = 0
    best: torch.Tensor = field(default_factory=lambda: torch.zeros(2))


@dataclass(frozen=True)
class Config:
    width: int = 1


def tree(value: float) -> dict[str, object]:
    return {
        "epoch": int(value),
        "best": value,
        "ema": torch.full((2, 3), value),
        "list": [torch.full((2,), value), {"deep": [value]}],
        "tuple": (1, torch.full((1,), value)),
        "ordered": OrderedDict(b=1, a=value),
        "counter": Counter("aab"),
        "default": defaultdict(list, {"x": [value]}),
        "deque": deque([value], 4),
        "set": {1, 2, int(value)},
        "color": Color.RED if value > 1 else Color.BLUE,
        "pair": Pair(value, torch.full((1,), value)),
        "progress": Progress(int(value), torch.full((2,), value)),
        "config": Config(int(value)),
        "dtype": torch.bfloat16 if value > 1 else torch.float32,
        "device": torch.device("cpu"),
        "size": torch.Size([2, int(value)]),
        "array": np.full(3, value),
        ("key", 1): {2: value},
        Color.BLUE: b"x",
    }


def test_nested_values_come_back_in_the_same_containers(store: Store) -> None:
    snapshot = save(store, state=tree(3.0))
    live = tree(1.0)
    inner = [
        live["ema"],
        live["list"],
        live["ordered"],
        live["progress"],
        live["tuple"][1],
        live["list"][1]["deep"],
    ]  # type: ignore[index]
    load(snapshot, state=live)
    now = [
        live["ema"],
        live["list"],
        live["ordered"],
        live["progress"],
        live["tuple"][1],
        live["list"][1]["deep"],
    ]  # type: ignore[index]
    assert all(a is b for a, b in zip(inner, now, strict=True))
    assert repr(live) == repr(tree(3.0))
    default = live["default"]
    assert isinstance(default, defaultdict)
    assert default["new"] == []


def test_absent_tensors_are_made_and_stale_nested_entries_go(store: Store) -> None:
    snapshot = save(store, state={"ema": torch.ones(2), "history": {"a": 1}, "log": [1, 2]})
    live: dict[str, object] = {"ema": None, "history": {"b": 2}, "log": [5, 6, 7]}
    load(snapshot, state=live)
    assert live["history"] == {"a": 1}
    assert live["log"] == [1, 2]
    assert torch.equal(live["ema"], torch.ones(2))  # type: ignore[arg-type]


def test_live_keys_that_the_snapshot_lacks_are_refused_or_kept(store: Store) -> None:
    snapshot = save(store, state={"a": 1})
    live = {"a": 0, "new": 5}
    with pytest.raises(UsageError, match="missing in the snapshot"):
        load(snapshot, state=live)
    assert live == {"a": 0, "new": 5}
    apply({"state": live}, snapshot.index, read=snapshot.read, world=WORLD, missing="keep")  # type: ignore[attr-defined]
    assert live == {"a": 1, "new": 5}


@pytest.mark.parametrize("item", [3, "x", (1, 2), None, {1}])
def test_item_that_has_no_place_of_its_own_is_refused(item: object) -> None:
    with pytest.raises(UsageError, match="put it in a dict"):
        CapturePlan({"epoch": item}, WORLD)


def test_unsupported_value_is_named_by_path() -> None:
    with pytest.raises(UsageError, match=r"path='state/a/0'"):
        CapturePlan({"state": {"a": [object()]}}, WORLD).capture()


def test_stored_type_without_a_live_value_of_it_is_refused(store: Store) -> None:
    snapshot = save(store, state={"color": Color.RED, "config": Config()})
    with pytest.raises(UsageError, match="has a type that no live value there has"):
        load(snapshot, state={"color": None, "config": None})


def test_containers_and_arrays_that_others_hold_too_are_filled_in_place(store: Store) -> None:
    def made(*numbers: int) -> dict[str, object]:
        return {
            "queue": deque(numbers, maxlen=4),
            "seen": set(numbers),
            "raw": bytearray(numbers),
            "array": np.array(numbers, np.int64)[::-1],
        }

    snapshot = save(store, state=made(1, 2, 3))
    state = made(7, 8, 9)
    held = dict(state)
    load(snapshot, state=state)
    assert all(state[name] is value for name, value in held.items())
    assert list(held["queue"]) == [1, 2, 3] and held["seen"] == {1, 2, 3}  # type: ignore[call-overload]
    assert held["raw"] == bytearray((1, 2, 3))
    assert held["array"].tolist() == [3, 2, 1]  # type: ignore[attr-defined]


def test_array_of_another_shape_and_queue_of_another_length_are_replaced(store: Store) -> None:
    snapshot = save(store, state={"array": np.ones(3), "queue": deque([1], maxlen=2)})
    state: dict[str, object] = {"array": np.zeros(2), "queue": deque(maxlen=9)}
    load(snapshot, state=state)
    assert state["array"].tolist() == [1.0] * 3  # type: ignore[attr-defined]
    assert state["queue"] == deque([1]) and state["queue"].maxlen == 2  # type: ignore[attr-defined]


def test_one_initial_value_for_two_names_does_not_tie_what_was_stored_as_two(store: Store) -> None:
    def made() -> dict[str, object]:
        array, queue, values, seen = np.zeros(2), deque([0]), [0], {0}
        return {"a": [array, queue, values, seen], "b": [array, queue, values, seen]}

    trained: dict[str, object] = {
        "a": [np.ones(2), deque([1]), [1], {1}],
        "b": [np.full(2, 2.0), deque([2]), [2], {2}],
    }
    state = made()
    load(save(store, state=trained), state=state)
    assert [np.ndarray.tolist(state["a"][0]), *state["a"][1:]] == [[1, 1], deque([1]), [1], {1}]  # type: ignore[index]
    assert [np.ndarray.tolist(state["b"][0]), *state["b"][1:]] == [[2, 2], deque([2]), [2], {2}]  # type: ignore[index]
    tied = made()
    load(save(store, state=made()), state=tied)
    assert all(one is other for one, other in zip(tied["a"], tied["b"], strict=True))  # type: ignore[call-overload]


def test_shared_containers_of_tensors_are_filled_as_one_object(store: Store) -> None:
    stored = {"t": torch.ones(2), "more": [torch.zeros(1), 4]}
    shared: dict[str, object] = {"t": torch.zeros(2)}
    tensor, state = shared["t"], {"a": shared, "b": shared}
    load(save(store, state={"a": stored, "b": stored}), state=state)
    assert state["a"] is shared and state["b"] is shared and shared["t"] is tensor
    assert str(shared) == str(stored)


def test_shared_empty_list_that_was_stored_as_two_with_tensors_is_untied(store: Store) -> None:
    shared: list[object] = []
    state = {"a": shared, "b": shared}
    load(save(store, state={"a": [torch.ones(1)], "b": [torch.zeros(1)]}), state=state)
    assert state["a"] is shared
    assert str(state) == str({"a": [torch.ones(1)], "b": [torch.zeros(1)]})


def test_shared_list_of_tensors_that_was_stored_as_two_that_differ_is_refused(store: Store) -> None:
    shared: list[object] = [torch.zeros(2), 0]
    stored = {"a": [torch.ones(2), 1], "b": [torch.ones(2), 2]}
    with pytest.raises(UsageError, match=r"one live object.*path='state/b'"):
        load(save(store, state=stored), state={"a": shared, "b": shared})
    assert str(shared) == str([torch.zeros(2), 0])


def test_one_live_item_that_was_stored_as_two_that_differ_is_refused(store: Store) -> None:
    snapshot = save(store, first=[1], second=[2])
    both = [0]
    with pytest.raises(UsageError, match=r"one live object.*path='second'"):
        load(snapshot, first=both, second=both)
    assert both == [0]


def test_object_with_state_inside_a_dict_comes_back(store: Store) -> None:
    class Meter:
        def __init__(self) -> None:
            self.total = 0.0

        def state_dict(self) -> dict[str, object]:
            return {"total": self.total}

        def load_state_dict(self, state: dict[str, float]) -> None:
            self.total = state["total"]

    meter, other = Meter(), Meter()
    meter.total = 2.5
    live = {"meters": {"loss": other}}
    load(save(store, state={"meters": {"loss": meter}}), state=live)
    assert other.total == 2.5
    assert live["meters"]["loss"] is other
