"""A small training whose every random number counts, and its uninterrupted run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn

import ckpt
from ckpt.backends.base import Backend


class CrashError(Exception):
    """Thrown where a training is to die."""


@dataclass
class Training:
    """One program: ``start`` begins it anew as a new process would."""

    every: int | str = 5
    accumulate: int = 1
    total: int = 20
    losses: dict[int, float] = field(default_factory=dict)
    state: dict[str, object] = field(default_factory=dict)
    starts: int = 0
    began_at: list[int] = field(default_factory=list)

    def start(
        self,
        store: Backend,
        *,
        crash_at: int | None = None,
        in_body: Callable[[ckpt.Run, int], None] | None = None,
    ) -> str:
        """Run until the end, or until ``crash_at`` in the middle of that step's body."""
        self.starts += 1
        seed = (
            1000 + self.starts if ckpt.Checkpointer(store).snapshots() else 1
        )  # what is restored brings its own numbers
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        model = nn.Sequential(
            nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Dropout(0.3), nn.Linear(12, 2)
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7)
        generator = torch.Generator().manual_seed(seed)
        history: list[float] = []

        @ckpt.resilient(store=store, every=self.every)
        def train(run: ckpt.Run) -> str:
            run.track(model=model, optimizer=optimizer, scheduler=scheduler)
            run.track(generator=generator, history=history)
            for step in run.steps(self.total):
                if not self.began_at or len(self.began_at) < self.starts:
                    self.began_at.append(step)
                x = (
                    torch.randn(4, 6, generator=generator)
                    + float(np.random.rand())
                    + random.random()
                )
                loss = model(x).square().mean() / self.accumulate
                loss.backward()
                if step == crash_at:
                    raise CrashError
                if (step + 1) % self.accumulate == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                    scheduler.step()
                history.append(loss.item())
                self.losses[step] = loss.item()
                run.log(loss=loss)
                if in_body is not None:
                    in_body(run, step)
            return "done"

        try:
            return train()
        finally:
            self.state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "generator": generator.get_state(),
                "history": list(history),
                "torch": torch.get_rng_state(),
                "numpy": np.random.get_state()[1].tolist(),
                "random": random.getstate(),
            }


def same(a: object, b: object) -> bool:
    """Bit-exact equality of nested states."""
    match a:
        case torch.Tensor():
            return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        case dict():
            return (
                isinstance(b, dict)
                and a.keys() == b.keys()
                and all(same(a[key], b[key]) for key in a)
            )
        case list() | tuple():
            return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and lose much where processors are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def equal() -> Callable[[object, object], bool]:
    """Bit-exact equality of nested states."""
    return same


@pytest.fixture
def crash() -> type[CrashError]:
    """What a dying training throws."""
    return CrashError


@pytest.fixture
def training() -> type[Training]:
    """A small training program."""
    return Training
