# ruff: noqa: E402  the fork is to be seen from the first line on
"""Ours in ``recovery.py``: the same training, protected by ``ckpt.resilient``, every step
staged."""

from __future__ import annotations

import os
import time

STARTED_S = [time.monotonic()]
# A forked trainer comes into being in the middle of this program; the hook runs first thing in the
# child.
os.register_at_fork(after_in_child=lambda: STARTED_S.append(time.monotonic()))

import torch.distributed as dist
from recovery_model import STEPS_MAX, Marks, Options, Stepper, build, parse_options

import ckpt


def main() -> None:
    options = parse_options()
    resilient = ckpt.resilient(
        store=str(options.folder / "store"),
        every=options.every,
        memory_every=1,
        prepared=options.prepared,
    )
    resilient(train)(options)
    dist.destroy_process_group()


def train(run: ckpt.Run, options: Options) -> None:
    marks = Marks(options)
    marks.tell("started", STARTED_S[-1])
    marks.tell("entered")
    state = build(options)
    marks.tell("built")
    if options.prepared:
        run.ready()
        marks.tell("promoted")
    dist.init_process_group("gloo")
    marks.tell("grouped")
    run.track(model=state.model, optimizer=state.optimizer)
    begin = run.completed_steps
    marks.tell("restored", step=begin)
    stepper = Stepper(options, state)
    for step in run.steps(STEPS_MAX):
        last = stepper.step()
        marks.tell("step", completed=step + 1)
        if last:
            break


if __name__ == "__main__":
    main()
