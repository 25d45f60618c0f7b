# ruff: noqa: E402  the fork is to be seen from the first line on
"""Ours where nodes are lost: the training of ``recovery_nodes_model`` under ``ckpt.resilient``,
every step staged."""

from __future__ import annotations

import os
import time

STARTED_S = [time.monotonic()]
# A forked trainer comes into being in the middle of this program; the hook runs first thing in the
# child.
os.register_at_fork(after_in_child=lambda: STARTED_S.append(time.monotonic()))

import torch.distributed as dist
from recovery_nodes_model import STEPS_MAX, Marks, Options, Training, parse_options

import ckpt


def main() -> None:
    options = parse_options()
    resilient = ckpt.resilient(
        store=str(options.folder / "store"), every=options.every, memory_every=1
    )
    resilient(train)(options)
    if dist.is_initialized():
        dist.destroy_process_group()


def train(run: ckpt.Run, options: Options) -> None:
    marks = Marks(options.folder, rank=run.rank, world=run.world_size)
    marks.tell("started", STARTED_S[-1])
    training = Training(options, run.rank)
    marks.tell("built")
    dist.init_process_group("gloo")
    marks.tell("grouped")
    run.track(model=training.state.model, optimizer=training.state.optimizer)
    begin = run.completed_steps
    marks.tell("restored", step=begin, digest=training.digest())
    for step in run.steps(STEPS_MAX):
        last = training.step()
        marks.tell("step", step=step + 1, digest=training.digest())
        if last:
            break


if __name__ == "__main__":
    main()
