"""What both contestants of ``recovery.py`` train, and how they tell when they reached what.

A rank holds a state of its own, as a rank of a sharded or pipelined job does, so that the size
named is what each rank restores. A step changes every byte of it, and meets the other ranks in one
small sum.
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
from contestant import State

SHARED_ELEMENTS = 1 << 14
"""What a step sums over the ranks: 64 KiB, so that a dead rank is noticed as in any training."""

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
    prepared: bool

    @property
    def rank(self) -> int:
        return int(os.environ["RANK"])


def parse_options() -> Options:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--mib", type=int, required=True)
    parser.add_argument("--every", type=int, required=True)
    parser.add_argument("--step-s", type=float, required=True)
    parser.add_argument("--build-s", type=float, required=True)
    parser.add_argument("--prepared", action="store_true")
    return Options(**vars(parser.parse_args()))


class Marks:
    """Appends what this process reached, and when, to its rank's file: one line of JSON, one
    write."""

    def __init__(self, options: Options) -> None:
        self.file = os.open(
            options.folder / f"marks-{options.rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND
        )

    def tell(self, name: str, at_s: float | None = None, **facts: int) -> None:
        at_s = time.monotonic() if at_s is None else at_s
        os.write(
            self.file,
            json.dumps({"name": name, "at_s": at_s, "pid": os.getpid(), **facts}).encode() + b"\n",
        )


def build(options: Options) -> State:
    """The state as a fresh program makes it, before anything is restored."""
    torch.set_num_threads(1)
    time.sleep(options.build_s)
    return State(size_mib=options.mib)


class Stepper:
    """Takes steps until the orchestrator leaves a file named ``stop``; all ranks end at the same
    one."""

    def __init__(self, options: Options, state: State) -> None:
        self.options, self.state = options, state
        self.shared = torch.zeros(SHARED_ELEMENTS)

    def step(self) -> bool:
        """One step; whether it was the last."""
        due_s = time.monotonic() + self.options.step_s
        self.state.step()
        self.shared.fill_(0.0)
        if self.options.rank == 0 and (self.options.folder / "stop").exists():
            self.shared[0] = 1.0
        dist.all_reduce(self.shared)
        time.sleep(max(0.0, due_s - time.monotonic()))
        return bool(self.shared[0])
