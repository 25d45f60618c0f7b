"""Saved by two ranks, continued by one: every sharded tensor is cut anew for the world that is
there.

    torchrun --standalone --nproc-per-node 2 examples/reshard.py --steps 40
    python examples/reshard.py --steps 60

Two ranks each hold half of every parameter and of AdamW's state (FSDP2); one rank alone holds them
whole. The digest printed at the end of the first command and at the start of the second is of the
same bytes.
"""

from __future__ import annotations

import argparse
import hashlib

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import ckpt

STORE = "runs/reshard"


@ckpt.resilient(store=STORE, every=20)
def train(run: ckpt.Run, steps: int) -> None:
    if run.world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if run.device.type == "cuda" else "gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 1)).to(run.device)
    if run.world_size > 1:
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run.track(model=model, optimizer=optimizer)

    say(
        run,
        f"{run.world_size} ranks go on after {run.completed_steps} steps, weights {digest(model)}",
    )
    for step in run.steps(steps):
        source = torch.Generator().manual_seed(
            step * run.world_size + run.rank
        )  # batches follow from step and rank
        inputs = torch.randn(16, 12, generator=source).to(run.device)
        loss = (model(inputs) - inputs.sum(1, keepdim=True)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss=loss)
    say(run, f"{run.world_size} ranks stop after {steps} steps, weights {digest(model)}")
    if run.world_size > 1:
        dist.destroy_process_group()


def digest(model: nn.Module) -> str:
    """Of all parameters as whole tensors, wherever their shards are. Every rank calls it."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        found.update(whole.detach().cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def say(run: ckpt.Run, text: str) -> None:
    if run.rank == 0:
        print(text, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="train sharded on any number of ranks")
    parser.add_argument(
        "--steps", type=int, default=60, help="steps in all, counting those already done"
    )
    train(parser.parse_args().steps)
