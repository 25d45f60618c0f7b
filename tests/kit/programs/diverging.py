"""Two ranks under torchrun whose replicas diverge in the middle of training: ``diverging.py
FOLDER``. Rank 1's weights change by an update that rank 0 does not make, as a failing device would
change them."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ckpt


@ckpt.resilient(store=f"{sys.argv[1]}/store", every=1)
def train(run: ckpt.Run) -> None:
    """Train six steps; the weights differ from the fourth on."""
    dist.init_process_group("gloo")
    torch.manual_seed(1)
    model = DistributedDataParallel(nn.Linear(100, 100))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    run.track(model=model, optimizer=optimizer)
    for step in run.steps(6):
        optimizer.zero_grad()
        model(torch.randn(4, 100)).square().mean().backward()
        optimizer.step()
        if step == 3 and run.rank == 1:
            with torch.no_grad():
                model.module.weight.add_(0.001)
    dist.destroy_process_group()


if __name__ == "__main__":
    train()
