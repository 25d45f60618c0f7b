"""A little training that uses everything which must be restored. Shared by the programs of this
folder.

Each rank writes into the program's folder:

    pids-<rank>.json      its trainer and the process above it, written anew by each attempt
    attempts-<rank>.txt   a line for each time that the training function was entered
    losses-<rank>.txt     each step's number and exact loss, appended as it is computed
    final-<rank>.json     digests of all state, at the end

Where there is a file ``hurry``, steps have no pauses any more: nobody waits for anything but the
end.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import ckpt

EXIT_STATUS = 7
"""What ``os._exit`` ends with when SIGUSR1 arrives: a death that no Python code can see coming."""


def enter(folder: Path, rank: int) -> int:
    """Write who runs this attempt; the number of attempts before it."""
    path = folder / f"attempts-{rank}.txt"
    before = len(path.read_text().splitlines()) if path.exists() else 0
    with path.open("a") as file:
        file.write(f"{os.getpid()}\n")
    new = folder / f"pids-{rank}.new"
    new.write_text(json.dumps({"trainer": os.getpid(), "supervisor": os.getppid()}))
    new.replace(folder / f"pids-{rank}.json")
    signal.signal(signal.SIGUSR1, lambda number, frame: os._exit(EXIT_STATUS))
    return before


class Training:
    """Model, optimizer, scheduler, loader, loose tensors, and random numbers of three libraries."""

    def __init__(self, run: ckpt.Run, folder: Path, *, ballast_mib: int = 0) -> None:
        self.run, self.folder, self.hurry = run, folder, folder / "hurry"
        torch.set_num_threads(1)
        if run.world_size > 1 and not dist.is_initialized():
            dist.init_process_group("gloo")
        for seeded in (torch.manual_seed, random.seed, np.random.seed):
            seeded(11)
        layers = nn.Linear(6, 16), nn.Dropout(0.3), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1)
        model: nn.Module = nn.Sequential(*layers)
        self.model = DistributedDataParallel(model) if run.world_size > 1 else model
        for seeded in (torch.manual_seed, random.seed, np.random.seed):
            seeded(100 + run.rank)
        data = torch.randn(37, 6)
        self.ballast = torch.zeros(max(1, ballast_mib << 18))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=7, gamma=0.9)
        self.loader = StatefulDataLoader(
            TensorDataset(data), batch_size=5, shuffle=True, drop_last=True
        )
        self.progress: dict[str, object] = {"seen": 0, "mean": torch.zeros(6), "last": []}
        run.track(
            model=self.model, optimizer=self.optimizer, scheduler=self.scheduler, loader=self.loader
        )
        run.track(progress=self.progress, ballast=self.ballast)
        # Opening a loader draws a random number: before the generators are restored by the loop.
        self.batches = iter(self.loader)

    def train(
        self,
        steps: int,
        *,
        step_s: float = 0.0,
        before_step: Callable[[int], None] = lambda step: None,
    ) -> None:
        """All steps that are left, and the digests of what came of them."""
        with (self.folder / f"losses-{self.run.rank}.txt").open("a", buffering=1) as losses:
            for step in self.run.steps(steps):
                before_step(step)
                losses.write(f"{step} {self.step(step, step_s).hex()}\n")
        self.write_digests()

    def step(self, step: int, step_s: float) -> float:
        """One step; its loss."""
        try:
            (batch,) = next(self.batches)
        except StopIteration:
            self.batches = iter(self.loader)
            (batch,) = next(self.batches)
        noise = random.random() + float(np.random.rand()) + torch.rand(1)
        self.optimizer.zero_grad()
        loss = (self.model(batch * noise) - batch.sum(1, keepdim=True)).square().mean()
        loss.backward()
        if not self.hurry.exists():
            time.sleep(step_s)
        self.optimizer.step()
        self.scheduler.step()
        self.ballast += loss.item()
        seen, mean = self.progress["seen"], self.progress["mean"]
        assert isinstance(seen, int)
        assert isinstance(mean, torch.Tensor)
        mean.lerp_(batch.mean(0), 0.1)
        self.progress.update(seen=seen + len(batch), last=[step, noise.item()])
        value: float = loss.item()
        return value

    def write_digests(self) -> None:
        parts = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "progress": self.progress,
            "loader": self.loader.state_dict(),
            "ballast": self.ballast,
            "random": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
        }
        found = {name: digest(part) for name, part in parts.items()}
        (self.folder / f"final-{self.run.rank}.json").write_text(json.dumps(found))


def digest(value: object) -> str:
    """A digest of a tree, exact to the bit."""
    found = hashlib.sha256()

    def feed(one: object) -> None:
        match one:
            case torch.Tensor():
                found.update(f"{one.dtype} {tuple(one.shape)}".encode())
                found.update(one.detach().contiguous().numpy().tobytes())
            case np.ndarray():
                found.update(f"{one.dtype} {one.shape}".encode() + one.tobytes())
            case dict():
                for key in sorted(one, key=str):
                    found.update(repr(key).encode())
                    feed(one[key])
            case list() | tuple():
                found.update(f"{len(one)}".encode())
                for inner in one:
                    feed(inner)
            case float():
                found.update(one.hex().encode())
            case _:
                found.update(repr(one).encode())

    feed(value)
    return found.hexdigest()[:16]
