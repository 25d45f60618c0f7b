"""Decorated calls inside a decorated call: a search over learning rates, each trial a training of
its own.

    python examples/nested.py

The search remembers the trials that are done; the trial that was cut short goes on from its own
snapshots. Each call has a store of its own (two open runs on one store would fence each other, so
that is refused).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import ckpt

RATES = (0.3, 0.1, 0.03)
STEPS = 60


def say(rate: float, step: int, loss: float) -> None:
    if step % 20 == 0:
        print(f"rate {rate} step {step} loss {loss:.4f}", flush=True)


Report = Callable[[float, int, float], None]


@ckpt.resilient(store="runs/search", every=1)
def search(run: ckpt.Run, *, report: Report = say) -> dict[float, float]:
    """Try every learning rate; return the final loss of each."""
    losses: dict[float, float] = {}
    run.track(losses=losses)
    for number in run.steps(len(RATES)):
        trial = ckpt.resilient(store=f"runs/search-trial-{number}", every=10)(fit)
        losses[RATES[number]] = trial(RATES[number], report=report)
    return losses


def fit(run: ckpt.Run, rate: float, *, report: Report) -> float:
    torch.manual_seed(0)
    model = nn.Linear(10, 1).to(run.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    progress = {"loss": float("nan")}
    run.track(model=model, optimizer=optimizer, progress=progress)
    for step in run.steps(STEPS):
        inputs = torch.randn(16, 10, device=run.device)
        loss = (model(inputs) - inputs.mean(1, keepdim=True)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress["loss"] = loss.item()
        report(rate, step, progress["loss"])
    return progress["loss"]


if __name__ == "__main__":
    for rate, loss in search().items():
        print(f"rate {rate}: final loss {loss:.6f}")
