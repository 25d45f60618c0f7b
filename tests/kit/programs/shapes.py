"""One training in programs of many shapes: ``python shapes.py FOLDER SHAPE [dies]``.

``dies``: the first attempt ends by SIGKILL in mid-training. Appends a line to ``above.txt`` for
each time that the code above the decorated call runs, and writes ``after.json`` behind the call.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from little import Training, enter
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

import ckpt

STEPS, DEATH_AT = 20, 7
FOLDER, SHAPE, DIES = Path(sys.argv[1]), sys.argv[2], sys.argv[3:] == ["dies"]
RETURNED: list[object] = []


def above() -> None:
    """What this shape of program does before the decorated call."""
    with (FOLDER / "above.txt").open("a") as file:
        file.write(f"{os.getpid()}\n")
    match SHAPE:
        case "thread":
            threading.Thread(
                target=threading.Event().wait, name="a-thread-above", daemon=True
            ).start()
        case "parallel":
            assert torch.get_num_threads() > 1
            torch.ones(1 << 22).mul_(2.0).sum()
        case "group":
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        case "pandas" | "transformers" | "sklearn":
            importlib.import_module(SHAPE)


@ckpt.resilient(store=str(FOLDER / "store"), every=5, memory_every=1)
def train(run: ckpt.Run) -> object:
    """The training, with what this shape does inside."""
    attempt = enter(FOLDER, run.rank)
    if SHAPE == "nested":
        inner()
    training = Training(run, FOLDER)
    watched: list[Callable[[int], None]] = []
    if SHAPE == "workers":
        watched.append(worker_items(run.completed_steps))

    def before_step(step: int) -> None:
        for one in watched:
            one(step)
        if DIES and attempt == 0 and step == DEATH_AT:
            os.kill(os.getpid(), signal.SIGKILL)

    if SHAPE == "compile":
        training.model = torch.compile(training.model, backend=os.environ["COMPILER"])
    if SHAPE == "profiler":
        with profile(activities=[ProfilerActivity.CPU]) as found:
            training.train(STEPS, before_step=before_step)
        assert any("addmm" in one.key for one in found.key_averages())
    else:
        training.train(STEPS, before_step=before_step)
    RETURNED.append(object())
    return RETURNED[-1]


@ckpt.resilient(store=str(FOLDER / "inner"), every=1)
def inner(run: ckpt.Run) -> None:
    """A run inside the run, with a store of its own; a second attempt finds it done."""
    state = {"sum": torch.zeros(3)}
    run.track(state=state)
    for step in run.steps(3):
        state["sum"] += step
    assert state["sum"].tolist() == [3.0, 3.0, 3.0]


def worker_items(begin: int) -> Callable[[int], None]:
    """A loader with worker processes, which gives the number of each step that is left."""
    # A generator of its own: the loader draws its workers' seed from it, not from the one that the
    # training restores.
    loader = DataLoader(
        range(STEPS), sampler=range(begin, STEPS), num_workers=2, generator=torch.Generator()
    )
    items = iter(loader)

    def check(step: int) -> None:
        assert next(items).item() == step

    return check


def main() -> None:
    above()
    returned = train()
    same = len(RETURNED) == 1 and returned is RETURNED[0]
    (FOLDER / "after.json").write_text(json.dumps({"pid": os.getpid(), "same": same}))


if __name__ == "__main__":
    main()
