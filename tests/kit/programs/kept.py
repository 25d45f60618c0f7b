"""Trains under a policy, restoring from the store alone.

python kept.py FOLDER STEPS --keep POLICY [--grace 24h] [--every N] [--step-s S] [--linger 60s]
[--memory-every N] torchrun ... kept.py FOLDER STEPS ...
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch.distributed as dist
from little import Training, enter

import ckpt


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--keep")
    parser.add_argument("--grace", default="24h")
    parser.add_argument("--every", type=int, default=2)
    parser.add_argument("--step-s", type=float, default=0.01)
    parser.add_argument("--linger", default="60s")
    parser.add_argument("--memory-every", type=int, default=1)
    return parser.parse_args()


OPTIONS = parse()


@ckpt.resilient(
    store=str(OPTIONS.folder / "store"),
    every=OPTIONS.every,
    memory_every=OPTIONS.memory_every,
    keep=OPTIONS.keep,
    grace=OPTIONS.grace,
    restart=ckpt.RestartPolicy(linger=OPTIONS.linger),
)
def train(run: ckpt.Run) -> None:
    """The loop, as users write it."""
    enter(OPTIONS.folder, run.rank)
    Training(run, OPTIONS.folder).train(OPTIONS.steps, step_s=OPTIONS.step_s)
    if run.world_size > 1:
        dist.barrier()


if __name__ == "__main__":
    train()
    if dist.is_initialized():
        dist.destroy_process_group()
