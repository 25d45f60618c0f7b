"""One contestant in one fresh process: says a line of JSON for each result, on a pipe that only the
parent reads.

The parent answers the two questions that need an outside view, ``memory`` and ``watch``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from contestant import Contestant, Saving, State
from measure import evict, read_through, stored_bytes, warm_memory
from torch import nn

TAIL_S = 0.15
"""The training loop goes on this long after a save is durable, so that what it leaves behind counts
too."""

DURABLE_S_MAX = 300.0


class Training:
    """A small model's training loop in one thread, of which only the speed matters."""

    def __init__(self, *, calm_s: float) -> None:
        self.calm_s = calm_s
        self.model = nn.Sequential(
            nn.Embedding(256, 192),
            nn.Linear(192, 768),
            nn.GELU(),
            nn.Linear(768, 192),
            nn.Linear(192, 256),
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.data = torch.randint(0, 256, (513,))

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(self.data[:-1]), self.data[1:])
        loss.backward()
        self.optimizer.step()

    def undisturbed(self) -> tuple[int, float]:
        """Steps and seconds of an undisturbed stretch."""
        begin_s, steps = time.perf_counter(), 0
        while (now_s := time.perf_counter()) - begin_s < self.calm_s:
            self.step()
            steps += 1
        return steps, now_s - begin_s


@dataclass(frozen=True, slots=True)
class SaveTimes:
    """One save, in seconds. ``slowdown_s``: steps that the training loop lost beside it, as
    time."""

    blocked_s: float
    fsync_s: float
    total_s: float
    slowdown_s: float
    step_s: float

    @property
    def lost_s(self) -> float:
        return self.blocked_s + self.slowdown_s


def time_save(
    contestant: Contestant, training: Training, step: int, *, warm: Callable[[], None]
) -> SaveTimes:
    """Save once and train beside it until the save is durable, and a little longer."""
    calm_before = training.undisturbed()
    warm()
    ended_s: list[float] = []
    begin_s = time.perf_counter()
    saving: Saving = contestant.save(step)
    free_s = time.perf_counter()
    if saving.durable.done():
        saving.durable.result()
        return SaveTimes(
            free_s - begin_s, saving.fsync_s, free_s - begin_s, 0.0, calm_before[1] / calm_before[0]
        )
    saving.durable.add_done_callback(lambda _: ended_s.append(time.perf_counter()))
    steps = 0
    while not ended_s or time.perf_counter() - ended_s[0] < TAIL_S:
        training.step()
        steps += 1
        if time.perf_counter() - begin_s > DURABLE_S_MAX:
            raise TimeoutError(f"not durable within {DURABLE_S_MAX:.0f} s")
    beside_s = time.perf_counter() - free_s
    saving.durable.result()
    calm_after = training.undisturbed()
    step_s = (calm_before[1] + calm_after[1]) / (calm_before[0] + calm_after[0])
    slowdown_s = beside_s - steps * step_s
    return SaveTimes(free_s - begin_s, saving.fsync_s, ended_s[0] - begin_s, slowdown_s, step_s)


class Round:
    """All measurements of one contestant in this process, in order."""

    def __init__(self, options: argparse.Namespace, kind: type[Contestant]) -> None:
        self.options = options
        self.folder: Path = options.folder
        # Loops of 2 ranks on 2 cores have one thread each; so has this one, and so has every copy
        # that torch makes.
        torch.set_num_threads(1)
        self.state = State(size_mib=options.mib)
        self.training = Training(calm_s=options.calm_s)
        self.training.undisturbed()
        say("size", bytes=self.state.size_bytes, tensors=len(self.state.tensors))
        ask("memory")
        self.contestant: Contestant = kind(self.state, self.folder)

    def run(self) -> None:
        last = self.options.saves + 1
        for step in range(1, last + 1):
            self.state.step()
            before_bytes = stored_bytes(self.folder)
            times = time_save(self.contestant, self.training, step, warm=self.warm)
            say(
                "first" if step == 1 else "save",
                **{name: getattr(times, name) for name in (*SaveTimes.__slots__, "lost_s")},
                stored_bytes=stored_bytes(self.folder) - before_bytes,
            )
            self.contestant.forget(step)
        self.state.step()
        digest = self.state.digest()
        ask("watch")
        self.contestant.save(last + 1).durable.result(timeout=DURABLE_S_MAX)
        ask("watched")
        read_through(self.folder)
        self.time_load("warm", last + 1, digest)
        evict(self.folder)
        self.time_load("cold", last + 1, digest)
        self.contestant.close()

    def time_load(self, name: str, step: int, digest: str) -> None:
        self.state.wipe()
        self.warm()
        begin_s = time.perf_counter()
        self.contestant.load(step)
        load_s = time.perf_counter() - begin_s
        say("load", name=name, load_s=load_s, right=self.state.digest() == digest)

    def warm(self) -> None:
        warm_memory(self.state.size_bytes, scratch=self.folder.parent)


def say(event: str, **facts: object) -> None:
    print(json.dumps({"event": event, **facts}), file=PIPE, flush=True)


def ask(event: str) -> None:
    say(event)
    if not sys.stdin.readline():
        raise SystemExit("the parent is gone")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--contestant", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--mib", type=int, required=True)
    parser.add_argument("--saves", type=int, required=True)
    parser.add_argument("--calm-s", type=float, required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    module, _, name = options.contestant.partition(":")
    try:
        kind = getattr(importlib.import_module(module), name)
    except ImportError as error:
        say("absent", why=f"not installed: {error}")
        return
    Round(options, kind).run()
    say("done")


if __name__ == "__main__":
    # Whatever a contestant prints goes to the log; results have the original standard output for
    # themselves.
    PIPE = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main()
