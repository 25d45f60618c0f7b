"""State goes into objects of the class that it came from: another one may take it without an error
and mean something else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    SequentialLR,
    StepLR,
)

from ckpt.capture.leaves import Capture, World
from ckpt.capture.plan import capture
from ckpt.errors import UsageError
from ckpt.format.objects import StateNode, decode_object, encode_object
from ckpt.restore.apply.apply import apply

WORLD = World(0, 1)
Store = Callable[..., object]


def optimizer(kind: str) -> torch.optim.Optimizer:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    made: torch.optim.Optimizer = getattr(torch.optim, kind)([weight], lr=0.1)
    made.step()
    return made


def scheduler(kind: str) -> object:
    base = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    match kind:
        case "step":
            return StepLR(base, 3)
        case "cosine":
            return CosineAnnealingLR(base, 10)
        case "warm cosine":
            return SequentialLR(base, [LinearLR(base), CosineAnnealingLR(base, 10)], [3])
        case _:
            return SequentialLR(base, [LinearLR(base), ExponentialLR(base, 0.9)], [3])


class Counter:
    """An object with state."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, object]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self.count = state_dict["count"]  # type: ignore[assignment]


class Gauge(Counter):
    """Another class with equal state."""


def taken(item: object) -> Capture:
    return capture({"x": item}, world=WORLD)


def load(store: Store, saved: object, live: object, **options: object) -> None:
    snapshot = store(taken(saved))
    apply({"x": live}, snapshot.index, read=snapshot.read, world=WORLD, **options)  # type: ignore


@pytest.mark.parametrize(
    ("saved", "live", "stored", "own"),
    [
        (lambda: optimizer("AdamW"), lambda: optimizer("SGD"), "adamw:AdamW", "sgd:SGD"),
        (lambda: optimizer("Adam"), lambda: optimizer("AdamW"), "adam:Adam", "adamw:AdamW"),
        (lambda: scheduler("step"), lambda: scheduler("cosine"), ":StepLR", ":CosineAnnealingLR"),
        (
            lambda: scheduler("warm cosine"),
            lambda: scheduler("warm exponential"),
            "SequentialLR(LinearLR, CosineAnnealingLR)",
            "SequentialLR(LinearLR, ExponentialLR)",
        ),
        (Counter, Gauge, ":Counter", ":Gauge"),
    ],
)
def test_state_of_another_class_is_refused_naming_both(
    store: Store,
    saved: Callable[[], object],
    live: Callable[[], object],
    stored: str,
    own: str,
) -> None:
    target = live()
    before = [leaf.data for leaf in taken(target).objects]
    with pytest.raises(UsageError, match="another class") as caught:
        load(store, saved(), target)
    text = str(caught.value)
    assert stored in text and own in text and 'classes="any"' in text and "path='x'" in text
    assert [leaf.data for leaf in taken(target).objects] == before


def test_another_class_is_taken_where_it_is_meant(store: Store) -> None:
    saved, live = Counter(), Gauge()
    saved.count = 3
    load(store, saved, live, classes="any")
    assert live.count == 3


def test_class_that_moved_to_another_module_is_the_same(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, live = Counter(), Counter()
    saved.count = 3
    found = taken(saved)
    monkeypatch.setattr(Counter, "__module__", "__main__")
    snapshot = store(found)
    apply({"x": live}, snapshot.index, read=snapshot.read, world=WORLD)  # type: ignore[attr-defined]
    assert live.count == 3


@pytest.mark.parametrize("make", [Counter, lambda: optimizer("AdamW")])
def test_state_stored_without_its_class_loads_into_any(
    store: Store, make: Callable[[], object]
) -> None:
    found = taken(make())
    (leaf,) = found.objects
    node = decode_object(leaf.data)
    assert isinstance(node, StateNode)
    data = encode_object(node.state)
    older = dataclasses.replace(
        leaf, data=data, leaf=dataclasses.replace(leaf.leaf, shape=(len(data),))
    )
    snapshot = store(dataclasses.replace(found, objects=(older,)))
    live = Gauge() if make is Counter else optimizer("SGD")
    apply({"x": live}, snapshot.index, read=snapshot.read, world=WORLD)  # type: ignore[attr-defined]


def test_unknown_choice_is_refused(store: Store) -> None:
    with pytest.raises(UsageError, match="classes='none'"):
        load(store, Counter(), Counter(), classes="none")
