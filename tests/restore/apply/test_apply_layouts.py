"""Any layout to any layout: one device, DDP, FSDP2 and tensor parallel, with worlds of another
size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from ckpt.capture.leaves import Capture, TensorLeaf, World
from ckpt.capture.plan import capture
from ckpt.restore.apply.apply import apply

Items = dict[str, object]
Store = Callable[..., object]


@contextmanager
def ranks_of(rank: int, size: int) -> Iterator[World]:
    """A process group that sends nothing, as one rank of it."""
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield World(rank, size)
    finally:
        dist.destroy_process_group()


def plain(net: nn.Module) -> nn.Module:
    return net


def ddp(net: nn.Module) -> nn.Module:
    return DistributedDataParallel(net)


def mesh_of(*shape: int, names: tuple[str, ...]) -> DeviceMesh:
    # torch keeps meshes that it has seen, and takes equal ones for the same; here each rank needs
    # its own.
    own = tuple(f"{name}{dist.get_rank()}" for name in names)
    return init_device_mesh("cpu", shape, mesh_dim_names=own)


def sharded(net: nn.Module) -> nn.Module:
    return fully_shard(net, mesh=mesh_of(dist.get_world_size(), names=("shard",)))


def hybrid(net: nn.Module) -> nn.Module:
    return fully_shard(net, mesh=mesh_of(2, 2, names=("replicate", "shard")))


def two_dimensional(net: nn.Module) -> nn.Module:
    mesh = mesh_of(2, 2, names=("dp", "tp"))
    data, tensor = mesh.mesh_dim_names or ()
    parallelize_module(net, mesh[tensor], {"0": ColwiseParallel()})
    return fully_shard(net, mesh=mesh[data])


LAYOUTS: dict[str, tuple[Callable[[nn.Module], nn.Module], int]] = {
    "plain": (plain, 1),
    "ddp of 2": (ddp, 2),
    "sharded over 2": (sharded, 2),
    "sharded over 3": (sharded, 3),
    "hybrid over 4": (hybrid, 4),
    "2d over 4": (two_dimensional, 4),
}


def numbers(name: str, shape: tuple[int, ...], value: float) -> torch.Tensor:
    """What a leaf holds: different everywhere, the same on each rank."""
    start = sum(name.encode()) + value
    return (torch.arange(math.prod(shape)).reshape(shape) + start).to(torch.float32)


def fill(capture: Capture, value: float) -> None:
    """Put the numbers into the memory that was captured, each rank its own box."""
    for one in capture.tensors:
        at = tuple(
            slice(offset, offset + size)
            for offset, size in zip(one.box.offsets, one.box.sizes, strict=True)
        )
        one.tensor.copy_(numbers(one.leaf.name, one.leaf.shape, value)[at])


def make(wrap: Callable[[nn.Module], nn.Module], value: float, world: World) -> Items:
    """A model and its optimizer after a step; filled afterwards, because nothing is sent when it is
    wrapped here."""
    net = wrap(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)))
    optimizer = torch.optim.AdamW(net.parameters())
    for parameter in net.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    items: Items = {"model": net, "optimizer": optimizer, "d": {"step": int(value)}}
    fill(capture(items, world=world), value)
    return items


def captured(layout: str, value: float) -> list[Capture]:
    wrap, size = LAYOUTS[layout]
    found = []
    for rank in range(size):
        with ranks_of(rank, size) as world:
            found.append(capture(make(wrap, value, world), world=world))
    return found


def contents(capture: Capture) -> dict[str, list[float]]:
    return {one.leaf.name: one.tensor.flatten().tolist() for one in capture.tensors}


def kinds(items: Items) -> list[dict[str, type]]:
    state = items["optimizer"].state  # type: ignore[attr-defined]
    return [{key: type(one) for key, one in entry.items()} for entry in state.values()]


QUICK = {
    ("plain", "sharded over 2"),
    ("sharded over 3", "plain"),
    ("2d over 4", "sharded over 3"),
    ("ddp of 2", "2d over 4"),
}
PAIRS = [
    pytest.param(source, target, marks=() if (source, target) in QUICK else pytest.mark.slow)
    for source in LAYOUTS
    for target in LAYOUTS
]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_any_layout_restores_into_any(source: str, target: str, store: Store) -> None:
    snapshot = store(*captured(source, 3))
    wrap, size = LAYOUTS[target]
    for rank in range(size):
        with ranks_of(rank, size) as world:
            expected = contents(capture(make(wrap, 3, world), world=world))
            live, fresh = make(wrap, 50, world), make(wrap, 70, world)
            fresh["optimizer"].state.clear()  # type: ignore[attr-defined]
            for items in (live, fresh):
                apply(items, snapshot.index, read=snapshot.read, world=world)  # type: ignore[attr-defined]
                assert contents(capture(items, world=world)) == expected
                assert items["d"] == {"step": 3}
            assert kinds(live) == kinds(fresh)


@pytest.mark.slow
def test_norm_beside_tensor_parallel_layers_is_replicated_over_them() -> None:
    with ranks_of(1, 4) as world:
        found = {one.leaf.name: one for one in captured_once(world)}
    weight, linear, step = (
        found["model/1.weight"],
        found["model/0.weight"],
        found["optimizer/state/1.weight/step"],
    )
    assert (weight.box.offsets, weight.replicas) == ((0,), (0, 1))
    assert linear.replicas == (1,)
    assert step.replicas == (0, 1, 2, 3)


def captured_once(world: World) -> tuple[TensorLeaf, ...]:
    return capture(make(two_dimensional, 1, world), world=world).tensors
