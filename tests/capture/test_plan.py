"""A plan notices everything that moves, and is still while nothing does."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from ckpt.capture.leaves import TensorLeaf, World
from ckpt.capture.plan import CapturePlan, capture
from ckpt.errors import UsageError
from ckpt.format.objects import StateNode, decode_object

WORLD = World(0, 1)


class Job:
    """A model, its optimizer after one step, and a dict."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.state: dict[str, object] = {"ema": torch.zeros(3)}
        self.items = {"model": self.model, "optimizer": self.optimizer, "state": self.state}

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(4, 3)).sum().backward()
        self.optimizer.step()


@pytest.fixture
def job() -> Job:
    job = Job()
    job.step()
    return job


def by_name(leaves: tuple[TensorLeaf, ...]) -> dict[str, TensorLeaf]:
    return {one.leaf.name: one for one in leaves}


def test_steady_plan_gives_the_same_tuple(job: Job) -> None:
    plan = CapturePlan(job.items, WORLD)
    first = plan.capture()
    job.step()
    assert not plan.refresh()
    assert plan.capture().tensors is first.tensors


def test_lazy_optimizer_state_appears() -> None:
    job = Job()
    plan = CapturePlan(job.items, WORLD)
    assert not any(one.leaf.name.startswith("optimizer/") for one in plan.capture().tensors)
    job.step()
    assert "optimizer/state/0.weight/exp_avg" in by_name(plan.capture().tensors)


def replace_data(job: Job) -> None:
    job.model[0].weight.data = torch.ones(3, 3)


def transpose_data(job: Job) -> None:
    job.model[0].weight.data = job.model[0].weight.data.t()


def narrow_data(job: Job) -> None:
    job.model[1].running_mean.data = job.model[1].running_mean.data[:2]


def replace_buffer(job: Job) -> None:
    job.model[1].running_var = torch.full((3,), 7.0)


def add_module(job: Job) -> None:
    job.model.append(nn.Linear(1, 1))


def remove_module(job: Job) -> None:
    del job.model[1]


def rename_parameter(job: Job) -> None:
    layer = job.model[1]
    bias = layer.bias
    del layer.bias
    layer.register_parameter("shift", bias)


def hide_buffer(job: Job) -> None:
    job.model[1].register_buffer("running_mean", job.model[1].running_mean, persistent=False)


def load_optimizer(job: Job) -> None:
    job.optimizer.load_state_dict(copy.deepcopy(job.optimizer.state_dict()))


def replace_state(job: Job) -> None:
    job.optimizer.state[job.model[0].weight]["exp_avg"] = torch.ones(3, 3)


def add_group(job: Job) -> None:
    extra = nn.Parameter(torch.ones(2))
    job.optimizer.add_param_group({"params": [extra]})
    job.optimizer.state[extra] = {"step": torch.tensor(1.0)}


def clear_state(job: Job) -> None:
    job.optimizer.state.clear()


def replace_in_dict(job: Job) -> None:
    job.state["ema"] = torch.ones(3)


def add_hook(job: Job) -> None:
    job.model.register_state_dict_post_hook(lambda *args: args[1].update(made=torch.ones(1)))


CHANGES: list[Callable[[Job], None]] = [
    replace_data,
    transpose_data,
    narrow_data,
    replace_buffer,
    add_module,
    remove_module,
    rename_parameter,
    hide_buffer,
    load_optimizer,
    replace_state,
    add_group,
    clear_state,
    replace_in_dict,
    add_hook,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda one: one.__name__)
def test_plan_sees_what_a_new_plan_sees_after(change: Callable[[Job], None], job: Job) -> None:
    plan = CapturePlan(job.items, WORLD)
    before = plan.capture()
    change(job)
    now, fresh = plan.capture(), capture(job.items, world=WORLD)
    assert now.tensors is not before.tensors
    assert [one.leaf for one in now.tensors] == [one.leaf for one in fresh.tensors]
    for mine, theirs in zip(now.tensors, fresh.tensors, strict=True):
        same_made = mine.leaf.name == "model/made"
        assert same_made or mine.tensor.data_ptr() == theirs.tensor.data_ptr()
        assert mine.tensor.stride() == theirs.tensor.stride()
    assert [one.data for one in now.objects] == [one.data for one in fresh.objects]


def test_hyper_parameters_and_plain_values_are_read_each_time(job: Job) -> None:
    plan = CapturePlan({**job.items, "progress": (progress := {"epoch": 0})}, WORLD)
    plan.capture()
    job.optimizer.param_groups[0]["lr"] = 0.5
    progress["epoch"] = 3
    found = {one.leaf.name: decode_object(one.data) for one in plan.capture().objects}
    assert isinstance(optimizer := found["optimizer"], StateNode)
    assert optimizer.class_name.partition(":")[2] == type(job.optimizer).__qualname__
    assert optimizer.state["param_groups"][0]["lr"] == 0.5  # type: ignore[index]
    assert found["progress"] == {"epoch": 3}


def test_tied_parameters_are_one_leaf_and_an_alias() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    found = by_name(capture({"m": model}, world=WORLD).tensors)
    assert found["m/1.weight"].leaf.alias_of == "m/0.weight"
    assert found["m/1.bias"].leaf.alias_of is None


def test_overlapping_views_are_stored_by_value() -> None:
    base = torch.zeros(6)
    found = by_name(
        capture(
            {"d": {"a": base, "b": base[:3], "c": base.view(2, 3), "e": base[:0]}}, world=WORLD
        ).tensors
    )
    assert all(one.leaf.alias_of is None for one in found.values())


def test_object_tracked_twice_is_refused(job: Job) -> None:
    with pytest.raises(UsageError, match="tracked twice"):
        CapturePlan({"a": job.model, "b": {"again": job.model}}, WORLD)


def test_parameters_without_gradient_have_no_state_and_none_is_made(job: Job) -> None:
    job.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    capture(job.items, world=WORLD)
    assert len(job.optimizer.state) == 4


def test_keys_with_separators_are_escaped() -> None:
    (leaf,) = capture({"a/b": {"c%/d": torch.zeros(1)}}, world=WORLD).tensors
    assert leaf.leaf.name == "a%2Fb/c%25%2Fd"
