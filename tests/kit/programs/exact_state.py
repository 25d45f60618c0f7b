"""A training whose every sum is exact: the same state after the same steps, however many ranks took
them. No ``ckpt``.

Gradients are whole numbers small enough for a float64, so that no order of summation rounds; all
else is elementwise. Each gradient depends on every weight's bits, so one wrong step, a mixture of
two, or a step left out changes all that follow.
"""

from __future__ import annotations

import zlib

import torch
from torch import nn

ITEMS = 12
"""The batch of one step, shared out among the ranks."""

ROWS, COLUMNS = 6, 200
MODULUS = 1009


class Exact:
    """Weights and their optimizer."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        start = torch.arange(COLUMNS, dtype=torch.float64)
        self.model = nn.ParameterList(
            [nn.Parameter((start * (row + 3) % 17) / 16.0) for row in range(ROWS)]
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=2.0**-12, momentum=0.5)

    def share(self, step: int, rank: int, world_size: int) -> torch.Tensor:
        """What this rank's items of a step add to the gradient: to be summed over all ranks."""
        found = torch.zeros(ROWS, COLUMNS, dtype=torch.int64)
        seen = torch.stack([(one.detach() * 1024.0).to(torch.int64) for one in self.model])
        for item in range(rank, ITEMS, world_size):
            found += (
                torch.remainder(seen * (item + 3) + step * 31 + item * 7, MODULUS) - MODULUS // 2
            )
        return found

    def apply(self, total: torch.Tensor) -> None:
        """Take the step whose gradient is ``total``."""
        for one, gradient in zip(self.model, total, strict=True):
            one.grad = gradient.to(torch.float64)
        self.optimizer.step()

    def value(self) -> int:
        """A digest of weights and momentum."""
        found = 0
        for one in self.model:
            held = (
                self.optimizer.state[one].get("momentum_buffer")
                if one in self.optimizer.state
                else None
            )
            found = value_of([one.detach(), *([held] if held is not None else [])], found)
        return found


def value_of(tensors: list[torch.Tensor], found: int = 0) -> int:
    """A digest of tensors, in this order."""
    for one in tensors:
        found = zlib.crc32(one.contiguous().numpy().tobytes(), found)
    return found


def reference(steps: int) -> list[int]:
    """The value after 0, 1, … ``steps`` undisturbed steps."""
    exact = Exact()
    values = [exact.value()]
    for step in range(steps):
        exact.apply(exact.share(step, 0, 1))
        values.append(exact.value())
    return values
