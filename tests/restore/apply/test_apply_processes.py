"""Real process groups: a sharded and a data-parallel run, captured at each step and restored, go on
bit for bit."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from ckpt.capture.leaves import Capture, World
from ckpt.capture.plan import CapturePlan, capture
from ckpt.restore.apply.apply import apply

SIZE = 2
WAIT_S = 90
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "sharded": fully_shard,
    "ddp": DistributedDataParallel,
    "divided": DistributedDataParallel,
}


def make(wrapper: str, seed: int) -> dict[str, object]:
    torch.manual_seed(seed)
    net = WRAPPERS[wrapper](nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)))
    if wrapper == "divided":
        divided = ZeroRedundancyOptimizer(net.parameters(), torch.optim.AdamW, lr=0.1)
        return {"model": net, "optimizer": divided}
    return {"model": net, "optimizer": torch.optim.AdamW(net.parameters(), lr=0.1)}


def train(items: dict[str, object], steps: range, *, plan: CapturePlan | None = None) -> None:
    model, optimizer = items["model"], items["optimizer"]
    for step in steps:
        torch.manual_seed(100 * step + dist.get_rank())
        optimizer.zero_grad()  # type: ignore[attr-defined]
        model(torch.randn(4, 5)).square().sum().backward()  # type: ignore[operator]
        optimizer.step()  # type: ignore[attr-defined]
        if plan is not None:
            plan.capture()


def contents(items: dict[str, object], world: World) -> list[object]:
    found = capture(items, world=world)
    return [
        [(one.leaf.name, one.tensor.tolist()) for one in found.tensors],
        [one.data for one in found.objects],
    ]


def rank_main(rank: int, wrapper: str, file: str, store: Callable[..., object]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=SIZE)
    world = World(rank, SIZE)
    watched, alone = make(wrapper, 1), make(wrapper, 1)
    train(watched, range(3), plan=CapturePlan(watched, world))
    train(alone, range(3))
    assert contents(watched, world) == contents(alone, world)

    captures: list[Capture] = [capture(watched, world=world)] * SIZE
    dist.all_gather_object(captures, captures[rank])
    snapshot = store(*captures)
    train(watched, range(3, 5))
    for steps_before in (0, 2):
        fresh = make(wrapper, 2)
        train(fresh, range(steps_before))
        apply(fresh, snapshot.index, read=snapshot.read, world=world)  # type: ignore[attr-defined]
        assert contents(fresh, world) == contents(alone, world)
        train(fresh, range(3, 5))
        assert contents(fresh, world) == contents(watched, world)
    dist.destroy_process_group()


def report(
    rank: int, wrapper: str, file: str, store: Callable[..., object], pipe: Connection
) -> None:
    try:
        rank_main(rank, wrapper, file, store)
        pipe.send("")
    except BaseException:
        pipe.send(traceback.format_exc())
        raise


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_run_of_two_processes_goes_on_bit_for_bit(
    wrapper: str, tmp_path: Path, store: Callable[..., object]
) -> None:
    context = multiprocessing.get_context("fork")
    pipes, children = [], []
    for rank in range(SIZE):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(
            target=report, args=(rank, wrapper, str(tmp_path / "store"), store, theirs)
        )
        child.start()
        pipes.append(ours)
        children.append(child)
    try:
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(WAIT_S), f"rank {rank} said nothing"
            assert pipe.recv() == ""
    finally:
        for child in children:
            child.join(1)
            child.kill()
