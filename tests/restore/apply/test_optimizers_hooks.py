"""Hooks on an optimizer's state dict are called when torch calls them, and see what it shows."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from ckpt.capture.leaves import World
from ckpt.capture.plan import capture
from ckpt.errors import UsageError
from ckpt.restore.apply.apply import apply

WORLD = World(0, 1)
Store = Callable[..., object]
StateDict = dict[str, object]


def trained(lr: float = 0.1) -> Optimizer:
    """Adam over two parameters in two groups, after one step."""
    one, two = nn.Parameter(torch.ones(3)), nn.Parameter(torch.full((2, 2), 2.0))
    optimizer = torch.optim.Adam([{"params": [one]}, {"params": [two], "lr": lr / 2}], lr=lr)
    ((one * lr).sum() + two.square().sum()).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return optimizer


def by_torch(saved: Optimizer, live: Optimizer) -> None:
    live.load_state_dict(copy.deepcopy(saved.state_dict()))


def by_us(store: Store, saved: Optimizer, live: Optimizer, only: list[str] | None = None) -> None:
    snapshot = store(capture({"o": saved}, world=WORLD))
    apply({"o": live}, snapshot.index, read=snapshot.read, world=WORLD, only=only)  # type: ignore[attr-defined]


def text(state: object) -> str:
    """A state dict by value, whatever the order of its keys."""
    match state:
        case dict():
            return str(sorted((str(key), text(value)) for key, value in state.items()))
        case torch.Tensor():
            return f"{state.dtype} {state.tolist()}"
        case list() | tuple():
            return str(list(map(text, state)))
    return repr(state)


def watched(optimizer: Optimizer, seen: list[str]) -> Optimizer:
    """The optimizer with a hook of each kind that notes what it sees, live and given."""

    def note(kind: str) -> Callable[..., None]:
        def hook(live: Optimizer, state: StateDict | None = None) -> None:
            groups = [{**group, "params": None} for group in live.param_groups]
            seen.append(f"{kind} {text(groups)} {text(list(live.state.values()))} {text(state)}")

        return hook

    optimizer.register_state_dict_pre_hook(note("before save"))
    optimizer.register_state_dict_post_hook(note("after save"))
    optimizer.register_load_state_dict_pre_hook(note("before load"))
    optimizer.register_load_state_dict_post_hook(note("after load"))
    return optimizer


def test_hooks_see_in_each_call_what_they_see_with_torch(store: Store) -> None:
    torch_seen: list[str] = []
    by_torch(watched(trained(), torch_seen), watched(trained(0.3), torch_seen))
    seen: list[str] = []
    by_us(store, watched(trained(), seen), watched(trained(0.3), seen))
    assert seen == torch_seen
    assert [line.partition(" {")[0].split(" [")[0] for line in seen] == [
        "before save",
        "after save",
        "before load",
        "after load",
    ]


def _stretches(optimizer: Optimizer) -> None:
    """Stores moments as halves and a count beside them, and loads them back."""

    def packs(live: Optimizer, state: StateDict) -> StateDict:
        halves = {
            number: {key: value.half() for key, value in entry.items()}
            for number, entry in state["state"].items()  # type: ignore[attr-defined]
        }
        return {**state, "state": halves, "packed": len(halves), "mean": torch.ones(2)}

    def unpacks(live: Optimizer, state: StateDict) -> None:
        assert torch.equal(state.pop("mean"), torch.ones(2))  # type: ignore[arg-type]
        live.packed = state.pop("packed")  # type: ignore[attr-defined]
        for entry in state["state"].values():  # type: ignore[attr-defined]
            entry["exp_avg"] = entry["exp_avg"].double() * 2
            entry["step"] = entry["step"].float()
        # A rate that is set by hand is kept, and what it is read from is the live optimizer.
        state["param_groups"][0]["lr"] = live.param_groups[0]["lr"]  # type: ignore[index]
        del state["param_groups"][1]["eps"]  # type: ignore[index]

    optimizer.register_state_dict_post_hook(packs)
    optimizer.register_load_state_dict_pre_hook(unpacks)
    optimizer.register_load_state_dict_post_hook(
        lambda live: live.param_groups[1].update(weight_decay=live.param_groups[1]["lr"])
    )


def test_hooks_that_change_the_state_give_what_they_give_with_torch(store: Store) -> None:
    results = []
    for load in (by_torch, lambda saved, live: by_us(store, saved, live)):
        saved, live = trained(), trained(0.3)
        _stretches(saved)
        _stretches(live)
        load(saved, live)
        groups = [{**group, "params": None} for group in live.param_groups]
        # torch's loading makes floats of moments that were stored as halves, as a hook of its
        # own kind gives them; what no hook touched comes back here as it was stored.
        state = [
            {key: value.float() for key, value in live.state[group["params"][0]].items()}
            for group in live.param_groups
        ]
        results.append((text(groups), text(state), live.packed))  # type: ignore[attr-defined]
    assert results[0] == results[1]
    assert results[0][2] == 2


def test_entries_that_no_hook_loads_are_refused_by_name(store: Store) -> None:
    saved, live = trained(), trained(0.3)
    _stretches(saved)
    before = text(live.state_dict())
    with pytest.raises(UsageError, match=r"entries=\['mean', 'packed'\].*path='o'"):
        by_us(store, saved, live)
    assert text(live.state_dict()) == before


def test_part_of_an_optimizer_with_hooks_before_loading_is_refused(store: Store) -> None:
    live = watched(trained(0.3), [])
    with pytest.raises(UsageError, match=r"only be restored whole.*path='o'"):
        by_us(store, trained(), live, only=["o/state"])


def test_hook_that_returns_no_state_dict_is_refused_at_capture() -> None:
    optimizer = trained()
    optimizer.register_state_dict_post_hook(lambda live, state: {"state": {}, "param_groups": []})
    with pytest.raises(UsageError, match=r"no state dict of it. item='o'"):
        capture({"o": optimizer}, world=WORLD)


def test_state_stays_in_its_memory_without_hooks_before_loading(store: Store) -> None:
    live = trained(0.3)
    live.register_load_state_dict_post_hook(lambda one: None)
    moment = next(iter(live.state.values()))["exp_avg"]
    by_us(store, trained(), live)
    assert next(iter(live.state.values()))["exp_avg"] is moment
