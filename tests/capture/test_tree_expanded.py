"""Expanded tensors: refused where a restore would have to write into them, stored where it makes a
new one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from ckpt.capture.leaves import World
from ckpt.capture.plan import capture
from ckpt.errors import UsageError

WORLD = World(0, 1)


def expanded() -> torch.Tensor:
    return torch.ones(1, 2).expand(3, 2)


def as_buffer() -> object:
    module = nn.Module()
    module.register_buffer("b", expanded())
    return module


def as_optimizer_state() -> object:
    parameter = nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.state[parameter] = {"b": expanded()}
    return optimizer


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"b": expanded()},
        lambda: {"inner": [(expanded(),)]},
        as_buffer,
    ],
)
def test_expanded_tensor_is_refused_when_it_is_captured(make: object) -> None:
    with pytest.raises(UsageError, match=r"share memory.*clone\(\).*leaf='x/"):
        capture({"x": make()}, world=WORLD)  # type: ignore[operator]


class Metric:
    """An object that makes its state anew each time."""

    def state_dict(self) -> dict[str, object]:
        return {"sum": expanded()}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        raise AssertionError("not reached")


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Replaced as a whole by a restore."""

    value: torch.Tensor


class WithExtra(nn.Module):
    """Extra state goes to ``set_extra_state``."""

    def get_extra_state(self) -> object:
        return {"sum": expanded()}


@pytest.mark.parametrize(
    "make", [Metric, WithExtra, as_optimizer_state, lambda: {"f": Frozen(expanded())}]
)
def test_expanded_tensor_that_a_restore_makes_anew_is_stored(make: object) -> None:
    (found,) = capture({"x": make()}, world=WORLD).tensors  # type: ignore[operator]
    assert found.leaf.shape == (3, 2)


def test_dimensions_of_one_element_are_never_expanded() -> None:
    assert capture({"x": {"b": torch.arange(4).expand(1, 4)}}, world=WORLD).tensors
