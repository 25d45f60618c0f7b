"""Trains on the stores that ``stores.json`` names, until it is told to stop or all steps are taken.

    python stored.py FOLDER [--steps N] [--step-s S] [--every N] [--ballast-mib N]
    torchrun ... stored.py FOLDER --steps N ...

One rank stops after the step during which FOLDER/stop appears. Every event of ckpt goes to the output.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch.distributed as dist
from little import Training, enter
from named import stores

import ckpt


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--step-s", type=float, default=0.02)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--ballast-mib", type=int, default=0)
    return parser.parse_args()


OPTIONS = parse()


@ckpt.resilient(every=OPTIONS.every, **stores(OPTIONS.folder))
def train(run: ckpt.Run) -> None:
    """The loop, as users write it."""
    enter(OPTIONS.folder, run.rank)
    training = Training(run, OPTIONS.folder, ballast_mib=OPTIONS.ballast_mib)
    with (OPTIONS.folder / f"losses-{run.rank}.txt").open("a", buffering=1) as losses:
        for step in run.steps(OPTIONS.steps):
            losses.write(f"{step} {training.step(step, OPTIONS.step_s).hex()}\n")
            if (OPTIONS.folder / "stop").exists():
                break
    training.write_digests()
    if run.world_size > 1:
        dist.barrier()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    train()
    if dist.is_initialized():
        dist.destroy_process_group()
