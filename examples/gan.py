"""Two models and two optimizers that train against each other, as one state.

    python examples/gan.py

Kill it at any moment and run it again: noise, both models and both optimizers go on where the last
snapshot had them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

import ckpt

STORE = "runs/gan"
NOISE = 8
BATCH = 64


def say(step: int, loss: float) -> None:
    if step % 50 == 0:
        print(f"step {step} discriminator loss {loss:.4f}", flush=True)


@ckpt.resilient(store=STORE, every=50)
def train(
    run: ckpt.Run, steps: int = 300, *, report: Callable[[int, float], None] = say
) -> nn.Module:
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(NOISE, 32), nn.ReLU(), nn.Linear(32, 2)).to(run.device)
    discriminator = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 1)).to(run.device)
    makes = torch.optim.Adam(generator.parameters(), lr=1e-3)
    judges = torch.optim.Adam(discriminator.parameters(), lr=1e-3)
    run.track(
        models={"generator": generator, "discriminator": discriminator},
        optimizers={"generator": makes, "discriminator": judges},
    )

    yes = torch.ones(BATCH, 1, device=run.device)
    no = torch.zeros(BATCH, 1, device=run.device)
    for step in run.steps(steps):
        fake = generator(torch.randn(BATCH, NOISE, device=run.device))
        judged_real = discriminator(ring(run.device))
        judged_fake = discriminator(fake.detach())
        loss = cross_entropy(judged_real, yes) + cross_entropy(judged_fake, no)
        judges.zero_grad()
        loss.backward()
        judges.step()

        fooled = cross_entropy(discriminator(fake), yes)
        makes.zero_grad()
        fooled.backward()
        makes.step()

        run.log(discriminator=loss, generator=fooled)
        report(step, loss.item())
    return generator


def ring(device: torch.device) -> torch.Tensor:
    """Points on the unit circle. Drawn from torch's own generator, which a run tracks by itself."""
    angle = 2 * torch.pi * torch.rand(BATCH, device=device)
    return torch.stack([angle.cos(), angle.sin()], dim=1)


if __name__ == "__main__":
    train()
