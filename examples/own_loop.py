"""A loop of one's own: epochs over a shuffling loader, stopped and resumed in the middle of an
epoch.

    python examples/own_loop.py

``run.steps`` is not used: the loop starts at ``run.completed_steps`` and tells each boundary with
``run.completed``. The loader is torchdata's StatefulDataLoader, which remembers how far it came in
its shuffled order; the epoch's number is a tracked dict.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import ckpt

STORE = "runs/own-loop"


def say(step: int, loss: float) -> None:
    if step % 20 == 0:
        print(f"step {step} loss {loss:.4f}", flush=True)


@ckpt.resilient(store=STORE, every=7)
def train(
    run: ckpt.Run, epochs: int = 5, *, report: Callable[[int, float], None] = say
) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.1), nn.Linear(16, 1)).to(run.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    inputs = torch.randn(112, 8)
    loader = StatefulDataLoader(
        TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=4, shuffle=True
    )
    progress = {"epoch": 0}
    run.track(model=model, optimizer=optimizer, loader=loader, progress=progress)

    batches = iter(
        loader
    )  # opening a loader draws a random number: before the generators are put back by the next line
    step = run.completed_steps
    while progress["epoch"] < epochs:
        for batch, targets in batches:
            loss = (model(batch.to(run.device)) - targets.to(run.device)).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            report(step, loss.item())
            step += 1
            run.completed(step)
        progress["epoch"] += 1
        batches = iter(loader)
    return model


if __name__ == "__main__":
    train()
