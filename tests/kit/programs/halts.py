"""Stops its own process before the first step of the first attempt, as SIGSTOP from outside does;
then trains on."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

import ckpt

FOLDER = Path(sys.argv[1])


@ckpt.resilient(
    store=str(FOLDER / "store"), every=1000, restart=ckpt.RestartPolicy(hang="2s", linger="1s")
)
def train(run: ckpt.Run) -> None:
    model = nn.Linear(2, 1)
    run.track(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    run.completed_steps  # noqa: B018  the start is over, the first step is not
    mark = FOLDER / "halted"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGSTOP)
    for _ in run.steps(3):
        pass
    print("trained", flush=True)


train()
