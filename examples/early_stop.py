"""Early stopping: validate now and then, keep the best state under a tag, stop when nothing
improves any more.

    python examples/early_stop.py

How often validation failed to improve is part of the state, so a run that was killed stops where an
undisturbed one does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import ckpt

STORE = "runs/early-stop"
VALIDATE_EVERY = 10
PATIENCE = 3


def say(step: int, loss: float) -> None:
    if step % 50 == 0:
        print(f"step {step} loss {loss:.4f}", flush=True)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 1))


def make_data(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """32 samples of noisy data: few enough that the model soon learns the noise by heart."""
    source = torch.Generator().manual_seed(seed)
    inputs = torch.randn(32, 20, generator=source)
    return inputs, inputs[:, :1] + 0.5 * torch.randn(32, 1, generator=source)


@ckpt.resilient(store=STORE, every=25)
def train(run: ckpt.Run, steps: int = 1000, *, report: Callable[[int, float], None] = say) -> int:
    """Train until validation stops improving; return the number of completed steps."""
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    progress = {"best": float("inf"), "failed": 0}
    run.track(model=model, optimizer=optimizer, progress=progress)

    inputs, targets = make_data(seed=1)
    held_inputs, held_targets = make_data(seed=2)
    if progress["failed"] >= PATIENCE:  # the run had stopped before it was started again
        return run.completed_steps
    for step in run.steps(steps):
        loss = (model(inputs) - targets).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(step, loss.item())

        if (step + 1) % VALIDATE_EVERY == 0:
            with run.paused(), torch.no_grad():
                held = (model(held_inputs) - held_targets).pow(2).mean().item()
            run.log(validation=held)
            if held < progress["best"]:
                progress.update(best=held, failed=0)
                run.save(
                    "best"
                )  # taken at this body's end; the tag moves on from the last best one
            else:
                progress["failed"] += 1
            if progress["failed"] >= PATIENCE:
                break
    return run.completed_steps


def best_model() -> tuple[nn.Module, ckpt.SnapshotInfo]:
    """The model that validated best, from the snapshot with the tag."""
    model = make_model()
    with ckpt.Checkpointer(STORE) as checkpointer:
        info = checkpointer.restore({"model": model}, tag="best")
    return model, info


if __name__ == "__main__":
    stopped_at = train()
    model, info = best_model()
    print(f"stopped after {stopped_at} steps")
    print(f"best after {info.step}, validation loss {info.metadata['validation']:.4f}")
