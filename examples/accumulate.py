"""Gradient accumulation: snapshots fall on the boundaries behind an optimizer step, never between
two micro-batches.

    python examples/accumulate.py

Each step of the loop is one micro-batch. A snapshot is due every 50 of them, but the optimizer
steps every 4: the one due at 50 is taken at 52, because gradients that are half added up are in no
snapshot.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import ckpt

STORE = "runs/accumulate"
MICRO_BATCHES = 4


def say(step: int, loss: float) -> None:
    if step % 40 == 0:
        print(f"micro-batch {step} loss {loss:.4f}", flush=True)


@ckpt.resilient(store=STORE, every=50)
def train(
    run: ckpt.Run, micro_batches: int = 240, *, report: Callable[[int, float], None] = say
) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.1), nn.Linear(32, 1)).to(run.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run.track(model=model, optimizer=optimizer)

    for step in run.steps(micro_batches):
        inputs = torch.randn(8, 16, device=run.device)
        loss = (model(inputs) - inputs.sum(1, keepdim=True)).pow(2).mean()
        (loss / MICRO_BATCHES).backward()
        if (step + 1) % MICRO_BATCHES == 0:
            optimizer.step()
            optimizer.zero_grad()
        report(step, loss.item())
    return model


if __name__ == "__main__":
    train()
    for info in ckpt.Checkpointer(STORE).snapshots():
        print(f"snapshot after micro-batch {info.step}")
