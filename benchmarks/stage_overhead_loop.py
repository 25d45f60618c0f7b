"""The job of ``stage_overhead.py``: two equal GPTs, two runs, one of which stages after every step.

torchrun ... stage_overhead_loop.py FOLDER SIZE ROUNDS
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ckpt

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from gpt_model import GPT, SHAPES, Shape, Windows, read_corpus

BLOCK = 5
"""Steps of one model before the other takes its turn."""

WARM_UP = 2
"""Rounds that don't count: allocators, DDP's buckets and the slots' memory settle."""

NEVER = 1_000_000
"""``every`` of both runs: nothing becomes durable before the end."""

FOLDER, SIZE, ROUNDS = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
WIDE = Shape(layers=6, heads=12, width=768, context=64, batch=8)
"""Much state and few tokens a step: half a GiB, where staging weighs most."""


class Trainer:
    """One model with all that its steps need."""

    def __init__(self, run: ckpt.Run) -> None:
        self.run = run
        shape = WIDE if SIZE == "wide" else SHAPES[SIZE]
        torch.manual_seed(0)
        model: nn.Module = GPT(shape)
        self.state_bytes = 3 * sum(parameter.nbytes for parameter in model.parameters())
        self.model = DistributedDataParallel(model) if run.world_size > 1 else model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.loader = Windows(
            read_corpus(), shape, rank=run.rank, world_size=run.world_size, seed=0
        )
        run.track(model=self.model, optimizer=self.optimizer, loader=self.loader)
        self.completed = run.completed_steps
        self.step_s: list[float] = []
        self.boundary_s: list[float] = []

    def steps(self, count: int, *, timed: bool) -> None:
        """Some steps as a user's loop takes them, the boundary after each included."""
        for _ in range(count):
            begin_s = time.perf_counter()
            inputs, targets = next(self.loader)
            loss = self.model(inputs, targets)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self.completed += 1
            body_s = time.perf_counter()
            self.run.completed(self.completed)
            end_s = time.perf_counter()
            if timed:
                self.step_s.append(end_s - begin_s)
                self.boundary_s.append(end_s - body_s)


@ckpt.resilient(store=str(FOLDER / "with"), every=NEVER, memory_every=1)
def outer(staging: ckpt.Run) -> None:
    torch.set_num_threads(1)
    if staging.world_size > 1:
        dist.init_process_group("gloo")
    train(Trainer(staging))


def train(staging: Trainer) -> None:
    @ckpt.resilient(store=str(FOLDER / "without"), every=NEVER, memory_every=0)
    def inner(bare: ckpt.Run) -> None:
        alternate(staging, Trainer(bare))

    inner()


def alternate(staging: Trainer, bare: Trainer) -> None:
    """A B, B A, A B, ...: neither always follows the other."""
    for number in range(WARM_UP + ROUNDS):
        pair: list[Trainer] = [staging, bare] if number % 2 == 0 else [bare, staging]
        for one in pair:
            one.steps(BLOCK, timed=number >= WARM_UP)
    if staging.run.rank == 0:
        report = keepers_report()
        times = {
            "state_bytes": staging.state_bytes,
            "with_s": staging.step_s,
            "without_s": bare.step_s,
            "boundary_s": staging.boundary_s,
            "bare_boundary_s": bare.boundary_s,
            "mirror_bytes": report["mirror_bytes"],
            "staged_bytes": report["ranks"][0]["staged"]
            * staging.state_bytes
            // staging.run.world_size,
        }
        (FOLDER / "times.json").write_text(json.dumps(times))


def keepers_report() -> dict[str, Any]:
    """What this node's keeper says of itself."""
    done = subprocess.run(
        [sys.executable, "-m", "ckpt", "ps", "--json"], capture_output=True, check=True, text=True
    )
    (keeper,) = json.loads(done.stdout)["jobs"]
    return dict(keeper)


def main(call: Callable[[], None]) -> None:
    call()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(outer)
