"""Names of module leaves are those of torch.distributed.checkpoint.state_dict, for every
wrapper."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from ckpt.capture.leaves import World
from ckpt.capture.plan import CapturePlan, capture

RANK, SIZE = 1, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.down(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 5, bias=False)
        self.head.weight = self.embed.weight

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: object) -> None:
        pass


@pytest.fixture
def world() -> Iterator[World]:
    """Rank 1 of 4, with a process group that sends nothing."""
    dist.init_process_group("fake", rank=RANK, world_size=SIZE, store=FakeStore())
    yield World(RANK, SIZE)
    dist.destroy_process_group()


def plain() -> nn.Module:
    return Net()


def ddp() -> nn.Module:
    return DistributedDataParallel(Net())


def sharded() -> nn.Module:
    net = Net()
    for block in net.blocks:
        fully_shard(block)
    return fully_shard(net)


def tensor_parallel() -> nn.Module:
    mesh = init_device_mesh("cpu", (SIZE,))
    net = Net()
    for block in net.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return net


def two_dimensional() -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    net = Net()
    for block in net.blocks:
        parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=mesh["dp"])
    return fully_shard(net, mesh=mesh["dp"])


def compiled() -> nn.Module:
    net = Net()
    net.blocks[0] = torch.compile(net.blocks[0])  # type: ignore[assignment]
    return torch.compile(net)  # type: ignore[return-value]


def checkpointed() -> nn.Module:
    net = Net()
    net.blocks[1] = checkpoint_wrapper(net.blocks[1])
    return net


def ddp_of_compiled_of_checkpointed() -> nn.Module:
    return DistributedDataParallel(torch.compile(checkpointed()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [
        plain,
        ddp,
        sharded,
        tensor_parallel,
        two_dimensional,
        pytest.param(compiled, marks=pytest.mark.slow),
        checkpointed,
        ddp_of_compiled_of_checkpointed,
    ],
)
def test_module_leaves_are_named_as_torch_names_them(make: object, world: World) -> None:
    net = make()  # type: ignore[operator]
    expected = get_model_state_dict(net)
    found = {one.leaf.name: one for one in capture({"model": net}, world=world).tensors}
    tensors = {
        f"model/{name}": value
        for name, value in expected.items()
        if isinstance(value, torch.Tensor)
    }
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].leaf.shape == tuple(tensor.shape)
    assert found["model/head.weight"].leaf.alias_of == "model/embed.weight"


@pytest.mark.slow
def test_ddp_parameters_are_shared_and_buffers_are_not(world: World) -> None:
    net = DistributedDataParallel(Net())
    found = {one.leaf.name: one for one in capture({"model": net}, world=world).tensors}
    assert found["model/blocks.0.up.weight"].leaf.rank is None
    assert found["model/blocks.0.up.weight"].replicas == (0, 1, 2, 3)
    assert found["model/blocks.0.norm.running_mean"].leaf.rank == RANK
    assert found["model/blocks.0.norm.running_mean"].replicas == (RANK,)


def test_ddp_optimizer_state_follows_its_parameter(world: World) -> None:
    net = DistributedDataParallel(nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(net.parameters())
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    found = capture({"model": net, "optimizer": optimizer}, world=world).tensors
    state = [one for one in found if one.leaf.name.startswith("optimizer/")]
    assert {one.leaf.name for one in state} >= {
        "optimizer/state/weight/exp_avg",
        "optimizer/state/bias/step",
    }
    assert all(one.leaf.rank is None and one.replicas == (0, 1, 2, 3) for one in state)


def test_sharded_parameter_has_its_box_and_step_is_shared(world: World) -> None:
    net = fully_shard(nn.Linear(3, 6))
    optimizer = torch.optim.AdamW(net.parameters())
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    found = {one.leaf.name: one for one in capture({"m": net, "o": optimizer}, world=world).tensors}
    weight, moment, step = (
        found["m/weight"],
        found["o/state/weight/exp_avg"],
        found["o/state/weight/step"],
    )
    assert (weight.box.offsets, weight.box.sizes, weight.leaf.shape) == ((2, 0), (2, 3), (6, 3))
    assert (moment.box, moment.leaf.rank, moment.replicas) == (weight.box, None, (RANK,))
    assert (step.leaf.shape, step.leaf.rank, step.replicas) == ((), None, (0, 1, 2, 3))


def test_parameters_gathered_by_a_forward_pass_are_captured_sharded(world: World) -> None:
    net = fully_shard(nn.Linear(3, 6))
    plan = CapturePlan({"m": net}, world)
    before = [one.leaf for one in plan.capture().tensors]
    with torch.no_grad():
        net(torch.ones(1, 3))
    assert tuple(net._parameters["weight"].shape) == (6, 3)
    found = plan.capture().tensors
    assert [one.leaf for one in found] == before
    assert [one.box.sizes for one in found] == [(2, 3), (2,)]


def test_replicated_mesh_dimension_gives_replicas(world: World) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    net = fully_shard(nn.Linear(3, 6, bias=False), mesh=mesh)
    (weight,) = capture({"m": net}, world=world).tensors
    assert (weight.box.offsets, weight.box.sizes, weight.replicas) == ((3, 0), (3, 3), (1, 3))
