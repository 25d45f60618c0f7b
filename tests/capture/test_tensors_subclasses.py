"""Subclasses of tensors: each one is captured with all that it holds, or refused by its name."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from ckpt.capture.leaves import Capture, World
from ckpt.capture.plan import capture
from ckpt.errors import UsageError

WORLD = World(0, 2)

MODULES_OF_TORCH = (
    "torch.distributed._functional_collectives",
    "torch.distributed._local_tensor",
    "torch.distributed._shard.sharded_tensor",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.masked",
    "torch.nested._internal.nested_tensor",
    "torch.nn.utils._expanded_weights",
    "torch.sparse.semi_structured",
    "torch.testing._internal.logging_tensor",
    "torch.testing._internal.two_tensor",
    "torch._subclasses.fake_tensor",
    "torch._subclasses.functional_tensor",
)
"""Where torch keeps its own subclasses."""

HOLD_PLAIN_MEMORY = {
    "torch.nn.parameter.Parameter",
    "torch.nn.parameter.Buffer",
    "torch.distributed.tensor.DTensor",
}
"""What is captured, with all that it holds."""

REFUSED_OTHERWISE = {
    "torch.nn.parameter.UninitializedParameter": "has no shape yet",
    "torch.nn.parameter.UninitializedBuffer": "has no shape yet",
    "torch.distributed.fsdp._flat_param.FlatParameter": "the module around it is refused",
    "torch.nn.utils._expanded_weights.expanded_weights_impl.ExpandedWeight": "carries a tensor",
}
"""What has plain memory, and is refused for another reason."""


class Scaled(torch.Tensor):
    """A float8 or quantized weight: two tensors inside, and no memory of its own."""

    data8: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, data8: torch.Tensor, scale: torch.Tensor) -> Scaled:
        made: Scaled = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, data8.shape, dtype=torch.float32, device=data8.device
        )
        made.data8, made.scale = data8, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data8", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], *rest: object) -> Scaled:
        return Scaled(inner["data8"], inner["scale"])

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> object:
        if func.overloadpacket in (torch.ops.aten.detach, torch.ops.aten.view):
            return Scaled(args[0].data8, args[0].scale)
        plain = [one.data8 * one.scale if isinstance(one, Scaled) else one for one in args]
        return func(*plain, **(kwargs or {}))


def scaled(value: float = 3.0) -> Scaled:
    return Scaled(torch.full((2, 4), value), torch.tensor(2.0))


class FourBit(nn.Parameter):
    """A quantized weight beside its scales, as an attribute: plain memory and more."""

    @staticmethod
    def __new__(cls, data: torch.Tensor, scales: object) -> FourBit:
        made: FourBit = torch.Tensor._make_subclass(cls, data, False)  # type: ignore[attr-defined]
        made.scales = scales  # type: ignore[attr-defined]
        return made


class QuantState:
    """Scales in an object of their own."""

    def __init__(self) -> None:
        self.absmax = torch.ones(3)


class FourBitLinear(nn.Module):
    """Stores the scales of its weight in its own entries."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = FourBit(torch.zeros(4, dtype=torch.uint8), torch.ones(3))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight.scales"] = self.weight.scales


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (2,), mesh_dim_names=("subclasses",))
    finally:
        dist.destroy_process_group()


def sharded(local: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    shape = torch.Size((2 * local.shape[0], *local.shape[1:]))
    made = DTensor.from_local(
        local,
        mesh,
        [Shard(0)],
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )
    assert type(made._local_tensor) is type(local)
    return made


def one(tensor: torch.Tensor) -> Capture:
    return capture({"d": {"t": tensor}}, world=WORLD)


def test_wrapper_subclass_is_refused_by_name_also_as_parameter_of_a_module() -> None:
    with pytest.raises(UsageError, match=r"type=Scaled.*leaf='d/t'"):
        one(scaled())
    module = nn.Linear(4, 2, bias=False)
    module.weight = nn.Parameter(scaled(), requires_grad=False)
    with pytest.raises(UsageError, match=r"type=Scaled.*leaf='m/weight'"):
        capture({"m": module}, world=WORLD)


def test_distributed_tensor_over_a_wrapper_is_refused_by_name(mesh: DeviceMesh) -> None:
    with pytest.raises(UsageError, match=r"type=Scaled.*leaf='d/t'"):
        one(sharded(scaled(), mesh))


def test_two_distributed_wrappers_of_one_shape_do_not_become_aliases(mesh: DeviceMesh) -> None:
    with pytest.raises(UsageError, match="type=Scaled"):
        capture({"d": {"a": sharded(scaled(1), mesh), "b": sharded(scaled(2), mesh)}}, world=WORLD)


def test_distributed_optimizer_state_over_a_wrapper_is_refused(mesh: DeviceMesh) -> None:
    module = nn.Linear(4, 4, bias=False)
    module.weight = nn.Parameter(sharded(torch.zeros(2, 4), mesh))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    optimizer.state[module.weight] = {"momentum_buffer": sharded(scaled(), mesh)}
    with pytest.raises(UsageError, match=r"type=Scaled.*momentum_buffer"):
        capture({"m": module, "o": optimizer}, world=WORLD)


def test_distributed_tensor_whose_collective_still_runs_is_refused(mesh: DeviceMesh) -> None:
    with pytest.raises(UsageError, match="AsyncCollectiveTensor"):
        one(sharded(AsyncCollectiveTensor(torch.zeros(2, 2)), mesh))


def test_distributed_tensor_over_a_local_one_without_data_is_refused(mesh: DeviceMesh) -> None:
    with pytest.raises(UsageError, match="meta device"):
        one(sharded(torch.zeros(2, 2, device="meta"), mesh))


def test_subclass_of_distributed_tensor_with_its_own_dispatch_is_refused(mesh: DeviceMesh) -> None:
    class Own(DTensor):
        @classmethod
        def __torch_dispatch__(cls, func: Any, *rest: Any) -> object:
            raise AssertionError("not reached")

    made = sharded(torch.zeros(2, 2), mesh)
    made.__class__ = Own
    with pytest.raises(UsageError, match=r"type=.*Own"):
        one(made)


def freed() -> torch.Tensor:
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(0)
    return tensor


def cut_off() -> torch.Tensor:
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(8)
    return tensor


@pytest.mark.parametrize(
    "make", [freed, cut_off, lambda: torch._to_functional_tensor(torch.ones(3))]
)
def test_tensor_without_memory_for_all_elements_is_refused(
    make: Callable[[], torch.Tensor],
) -> None:
    with pytest.raises(UsageError, match=r"no memory.*leaf='d/t'"):
        one(make())


def test_tensor_inside_a_function_transform_is_refused() -> None:
    def loss(value: torch.Tensor) -> torch.Tensor:
        with pytest.raises(UsageError, match="leaf='d/t'"):
            one(value)
        return value.sum()

    torch.func.grad(loss)(torch.ones(3))


@pytest.mark.parametrize("scales", [torch.ones(3), QuantState(), [torch.ones(3)]])
def test_subclass_that_carries_tensors_is_refused_naming_them(scales: object) -> None:
    with pytest.raises(UsageError, match=r"type=FourBit attributes=\['scales'\].*leaf='d/t'"):
        one(FourBit(torch.zeros(4, dtype=torch.uint8), scales))


def test_subclass_that_carries_numbers_only_is_captured() -> None:
    assert one(FourBit(torch.zeros(4, dtype=torch.uint8), 64)).tensors[0].leaf.shape == (4,)


def test_module_that_stores_what_its_weight_carries_is_captured_whole() -> None:
    found = capture({"m": FourBitLinear()}, world=WORLD)
    assert [leaf.leaf.name for leaf in found.tensors] == ["m/weight", "m/weight.scales"]


def subclasses(kind: type) -> Iterator[type]:
    for child in type.__subclasses__(kind):
        yield child
        yield from subclasses(child)


def test_every_subclass_of_torch_is_captured_whole_or_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in MODULES_OF_TORCH:
            # A torch of another release may lack one.
            if importlib.util.find_spec(name.rpartition(".")[0]) and importlib.util.find_spec(name):
                importlib.import_module(name)
    unknown = []
    for kind in subclasses(torch.Tensor):
        name = f"{kind.__module__}.{kind.__qualname__}"
        if not kind.__module__.startswith("torch."):
            continue
        dispatches = kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__  # type: ignore[attr-defined]
        known = name in HOLD_PLAIN_MEMORY or name in REFUSED_OTHERWISE
        if not known and not dispatches:
            unknown.append(name)
    assert unknown == []


def test_expanded_weight_of_torch_is_refused() -> None:
    impl = importlib.import_module("torch.nn.utils._expanded_weights.expanded_weights_impl")
    weight = impl.ExpandedWeight(torch.ones(2, requires_grad=True), 3, loss_reduction="sum")
    with pytest.raises(UsageError, match="ExpandedWeight"):
        one(weight)


def test_weights_of_torchao_are_refused_by_name() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    module = nn.Linear(64, 64, dtype=torch.bfloat16)
    quantization.quantize_(module, quantization.Int8WeightOnlyConfig())
    with pytest.raises(UsageError, match="tensor subclass is not stored"):
        capture({"m": module}, world=WORLD)
