"""Extra state and entries that a module's hooks make: captured, and loaded by the module itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ckpt.capture.leaves import World
from ckpt.capture.plan import CapturePlan, capture
from ckpt.errors import UsageError
from ckpt.restore.apply.apply import apply

WORLD = World(0, 1)
Store = Callable[..., object]


def save(store: Store, **items: object) -> object:
    return store(capture(items, world=WORLD))


def load(snapshot: object, **items: object) -> None:
    apply(items, snapshot.index, read=snapshot.read, world=WORLD)  # type: ignore[attr-defined]


class Extras(nn.Module):
    """A parameter, extra state with a tensor in it, and a value that a hook computes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.calls = {"n": 0, "t": torch.zeros(1)}
        self.seen = 0
        self.register_state_dict_post_hook(self._add)  # type: ignore[no-untyped-call]

    def get_extra_state(self) -> dict[str, object]:
        return {"n": self.calls["n"], "t": self.calls["t"].clone()}  # type: ignore[union-attr]

    def set_extra_state(self, state: dict[str, object]) -> None:  # type: ignore[override]
        self.calls = state  # type: ignore[assignment]

    @staticmethod
    def _add(module: nn.Module, state: dict[str, object], prefix: str, local: object) -> None:
        state[prefix + "weight"].numpy()  # type: ignore[attr-defined]  # as hooks may do with a detached parameter
        state[prefix + "seen"] = torch.tensor(module.seen)

    def _load_from_state_dict(self, state: dict[str, object], prefix: str, *rest: object) -> None:
        self.seen = int(state.pop(prefix + "seen"))  # type: ignore[call-overload]
        super()._load_from_state_dict(state, prefix, *rest)  # type: ignore[arg-type]


def test_extra_state_and_what_hooks_compute_come_back(store: Store) -> None:
    model = nn.Sequential(Extras())
    inner = model[0]
    inner.calls, inner.seen = {"n": 4, "t": torch.ones(1)}, 9
    plan = CapturePlan({"model": model}, WORLD)
    plan.capture()
    inner.seen = 10
    with torch.no_grad():
        inner.weight.fill_(2.0)
    snapshot = store(plan.capture())
    fresh = nn.Sequential(Extras())
    load(snapshot, model=fresh)
    assert fresh[0].seen == 10
    assert fresh[0].calls == {"n": 4, "t": torch.ones(1)}
    assert fresh[0].weight.tolist() == [2.0, 2.0]


def _adds_made(module: nn.Module, state: dict[str, object], prefix: str, local: object) -> None:
    state[prefix + "made"] = torch.ones(1)


def test_entry_of_a_hook_that_loading_ignores_is_an_error_that_names_it(store: Store) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    made = torch.ones(1)

    def adds(module: nn.Module, state: dict[str, object], prefix: str, local: object) -> None:
        state[prefix + "made"] = made.clone()

    model[0].register_state_dict_post_hook(adds)
    snapshot = save(store, model=model)
    made.zero_()
    with pytest.raises(UsageError, match=r"path='model' entries=\['0.made'\]"):
        load(snapshot, model=model)


def test_entry_that_loading_ignores_and_the_module_makes_again_is_not_lost(store: Store) -> None:
    def reads(module: nn.Module, state: dict[str, object], prefix: str, *rest: object) -> None:
        module.seen = state.get(prefix + "seen")  # type: ignore[assignment]

    def adds(module: nn.Module, state: dict[str, object], prefix: str, local: object) -> None:
        state[prefix + "seen"] = module.seen
        state[prefix + "half"] = module.weight.detach() / 2  # type: ignore[operator]

    def made(seen: int) -> nn.Module:
        model = nn.Linear(2, 2)
        model.seen = seen  # type: ignore[assignment]
        model.register_state_dict_post_hook(adds)
        model.register_load_state_dict_pre_hook(reads)
        return model

    trained, model = made(5), made(0)
    load(save(store, model=trained), model=model)
    assert model.seen == 5 and torch.equal(model.weight, trained.weight)  # type: ignore[arg-type]


def test_entry_that_a_load_hook_renames_comes_back(store: Store) -> None:
    def takes(module: nn.Module, state: dict[str, object], prefix: str, *rest: object) -> None:
        model.taken = state.pop(prefix + "made")  # type: ignore[assignment]

    model = nn.Linear(2, 2)
    model.register_state_dict_post_hook(_adds_made)
    model.register_load_state_dict_pre_hook(takes)
    snapshot = save(store, model=model)
    load(snapshot, model=model)
    assert torch.equal(model.taken, torch.ones(1))


def test_averaged_model_comes_back(store: Store) -> None:
    averaged = AveragedModel(nn.Linear(2, 2))
    averaged.update_parameters(nn.Linear(2, 2))
    snapshot = save(store, ema=averaged)
    other = AveragedModel(nn.Linear(2, 2))
    load(snapshot, ema=other)
    assert other.n_averaged == 1
    assert torch.equal(other.module.weight, averaged.module.weight)
