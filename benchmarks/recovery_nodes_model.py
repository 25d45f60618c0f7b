"""What is trained when whole nodes are lost, by ours and by its rival, and how ranks tell when they
reached what.

A rank's state is its own, as in a sharded job, and differs from every other rank's. A step changes
every byte of it, and meets the other ranks in one small sum. Each step's mark has a digest of all
state, so that what is restored can be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash
from contestant import State

SHARED_ELEMENTS = 1 << 14
STEPS_MAX = 1_000_000
"""Training ends when the orchestrator says so, long before."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says. ``step_s``: the least time a step takes; ``build_s``: added to
    the time the build takes."""

    folder: Path
    mib: int
    every: int
    step_s: float
    build_s: float


def parse_options() -> Options:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mib", type=int, default=10)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--step-s", type=float, default=0.05)
    parser.add_argument("--build-s", type=float, default=0.0)
    return Options(**vars(parser.parse_args()))


class Marks:
    """Appends what this process reached, and when, to its rank's file: one line of JSON, one
    write."""

    def __init__(self, folder: Path, *, rank: int, world: int) -> None:
        self._file = os.open(folder / f"marks-{rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._who = {"pid": os.getpid(), "rank": rank, "world": world}

    def tell(self, name: str, at_s: float | None = None, **facts: int | str) -> None:
        """``at_s``: CLOCK_MONOTONIC seconds, by default now."""
        at_s = time.monotonic() if at_s is None else at_s
        os.write(
            self._file,
            json.dumps({"name": name, "at_s": at_s, **self._who, **facts}).encode() + b"\n",
        )


class Training:
    """One rank's model and optimizer, and its steps."""

    def __init__(self, options: Options, rank: int) -> None:
        self._options, self._rank = options, rank
        torch.set_num_threads(1)
        time.sleep(options.build_s)
        self.state = State(size_mib=options.mib)
        with torch.no_grad():
            for parameter in self.state.model.parameters():
                parameter.add_(rank)
        self._shared = torch.zeros(SHARED_ELEMENTS)

    def step(self) -> bool:
        """One step; whether it was the last, which the orchestrator says by a file named
        ``stop``."""
        due_s = time.monotonic() + self._options.step_s
        self.state.step()
        self._shared.fill_(0.0)
        if self._rank == 0 and (self._options.folder / "stop").exists():
            self._shared[0] = 1.0
        dist.all_reduce(self._shared)
        time.sleep(max(0.0, due_s - time.monotonic()))
        return bool(self._shared[0])

    def digest(self) -> str:
        """A digest of all state as it is in the live objects now."""
        found = xxhash.xxh3_64()
        for parameter in self.state.model.parameters():
            for tensor in (parameter.detach(), *self.state.optimizer.state[parameter].values()):
                found.update(tensor.reshape(-1).view(torch.uint8).numpy())
        return found.hexdigest()
