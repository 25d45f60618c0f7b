"""An undecorated program: one all_reduce a step, and a line for each.

    torchrun ... plain.py FOLDER STEPS

Each rank appends ``<step> <world size> <sum> <restarts>`` to ``FOLDER/plain-<rank>.txt``, and its
own process to ``pids.txt``.
"""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

folder, steps = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
rank, world = dist.get_rank(), dist.get_world_size()
with (folder / "pids.txt").open("a") as file:
    file.write(f"{rank} {os.getpid()} {os.getppid()}\n")
with (folder / f"plain-{rank}.txt").open("a", buffering=1) as file:
    for step in range(steps):
        total = torch.ones(1)
        dist.all_reduce(total)
        file.write(f"{step} {world} {int(total)} {os.environ['TORCHELASTIC_RESTART_COUNT']}\n")
        time.sleep(0.02)
dist.barrier()
dist.destroy_process_group()
