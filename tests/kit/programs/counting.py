"""A training whose every rank appends each step that it completed to a file. ``counting.py FOLDER
STEPS``."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import ckpt

FOLDER, STEPS = Path(sys.argv[1]), int(sys.argv[2])


@ckpt.resilient(store=str(FOLDER / "store"), every=100_000)
def train(run: ckpt.Run) -> None:
    dist.init_process_group("gloo")
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    run.track(model=model, optimizer=optimizer)
    with (FOLDER / f"steps-{os.environ['RANK']}.txt").open("a") as steps:
        for step in run.steps(STEPS):
            wrapped(torch.ones(2, 8)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            steps.write(f"{step + 1}\n")
            steps.flush()
            time.sleep(0.02)
    dist.destroy_process_group()


train()
