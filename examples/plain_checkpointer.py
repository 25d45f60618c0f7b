"""Without the decorator: the loop says itself when to restore and when to save.

    python examples/plain_checkpointer.py

``Checkpointer`` tracks nothing by itself. So whatever the next step depends on is in the dict that
is saved: here also the generator that draws the batches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import ckpt

STORE = "runs/plain"
SAVE_EVERY = 20


def say(step: int, loss: float) -> None:
    if step % 40 == 0:
        print(f"step {step} loss {loss:.4f}", flush=True)


def train(steps: int = 200, *, report: Callable[[int, float], None] = say) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(16, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = torch.Generator().manual_seed(1)
    state = {"model": model, "optimizer": optimizer, "batches": batches}

    with ckpt.Checkpointer(STORE) as checkpointer:  # leaving waits until the last save is durable
        start = checkpointer.restore(state).step if checkpointer.latest() is not None else 0
        for step in range(start, steps):
            inputs = torch.randn(16, 16, generator=batches)
            loss = (model(inputs) - inputs.sum(1, keepdim=True)).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            report(step, loss.item())
            if (step + 1) % SAVE_EVERY == 0:
                checkpointer.save_async(state, step=step + 1, metadata={"loss": loss.item()})
    return model


if __name__ == "__main__":
    train()
