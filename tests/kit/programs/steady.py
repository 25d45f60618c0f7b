"""Trains to the end, whatever is done to it from outside.

    python steady.py FOLDER STEPS [--step-s S] [--ballast-mib N] [--every N] [--hang 3s] [--linger 60s]
        [--stall-at N] [--raise-at N] [--prepared] [--store STORE] [--grace 25s]
    torchrun ... steady.py FOLDER STEPS ...

``--stall-at``: that step never ends. ``--raise-at``: that step raises, whenever it is tried.
``--store``: another one than that in FOLDER. ``--prepared``: trainers run ahead, and each leaves ``ahead-<pid>`` before it is ready.
"""

from __future__ import annotations

import argparse
import os
import threading
from pathlib import Path

import torch.distributed as dist
from little import Training, enter

import ckpt


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--step-s", type=float, default=0.008)
    parser.add_argument("--ballast-mib", type=int, default=0)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--hang", default="10m")
    parser.add_argument("--linger", default="60s")
    parser.add_argument("--stall-at", type=int)
    parser.add_argument("--raise-at", type=int)
    parser.add_argument("--prepared", action="store_true")
    parser.add_argument("--store")
    parser.add_argument("--job")
    parser.add_argument("--grace", default="25s")
    return parser.parse_args()


OPTIONS = parse()


POLICY = ckpt.RestartPolicy(hang=OPTIONS.hang, linger=OPTIONS.linger, grace=OPTIONS.grace)


@ckpt.resilient(
    store=OPTIONS.store or str(OPTIONS.folder / "store"),
    job=OPTIONS.job,
    every=OPTIONS.every,
    memory_every=1,
    restart=POLICY,
    prepared=OPTIONS.prepared,
)
def train(run: ckpt.Run) -> None:
    """The loop, as users write it."""
    if OPTIONS.prepared:
        (OPTIONS.folder / f"ahead-{os.getpid()}").touch()
        run.ready()
    enter(OPTIONS.folder, run.rank)
    training = Training(run, OPTIONS.folder, ballast_mib=OPTIONS.ballast_mib)
    training.train(OPTIONS.steps, step_s=OPTIONS.step_s, before_step=before_step)
    if run.world_size > 1:
        dist.barrier()


def before_step(step: int) -> None:
    if step == OPTIONS.stall_at:
        threading.Event().wait()
    if step == OPTIONS.raise_at:
        raise ValueError(f"step {step} cannot be taken")


if __name__ == "__main__":
    train()
    if dist.is_initialized():
        dist.destroy_process_group()
