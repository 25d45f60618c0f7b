"""A small training whose ends are of many kinds: ``python ends.py FOLDER HOW``.

HOW is ``endless``, ``raises`` (the first attempt, in mid-training, inside a folder that only the
program's first lines make), ``rest`` (what comes after the decorated call fails), ``twice`` (two
decorated calls, the second dies once), ``dies`` (rank 0's first attempt by SIGKILL), ``last`` (the
first attempt dies with all steps complete and only memory holding the last of them), ``early`` (so
too; the next one sees that nothing is left to do, and returns before it tracks anything),
``exits`` (``sys.exit(4)`` in every attempt) or ``uneven`` (each rank has another ``every``). A line
in ``rest.txt`` each time that the call returned.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from little import enter

import ckpt

FOLDER, HOW = Path(sys.argv[1]), sys.argv[2]
STEPS, DEATH_AT = 12, 5


def fail(run: ckpt.Run, attempt: int, needed: Path) -> None:
    """What this kind of end does in the middle of a step."""
    match HOW:
        case "raises":
            assert needed.exists(), (
                "the first attempt's exception has unwound what the second one needs"
            )
            if attempt == 0:
                raise RuntimeError("a batch that is bad once")
        case "exits":
            sys.exit(4)
        case "dies" if attempt == 0 and run.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)


EVERY = 5 + int(os.environ.get("RANK", "0")) * (HOW == "uneven")


@ckpt.resilient(store=str(FOLDER / "store"), every=EVERY)
def train(run: ckpt.Run, needed: Path) -> None:
    """The training."""
    attempt = enter(FOLDER, run.rank)
    if run.world_size > 1:
        dist.init_process_group("gloo")
    state = {"sum": torch.zeros(4)}
    if HOW == "early" and attempt:
        return
    run.track(state=state)
    if HOW in ("last", "early"):
        for step in range(run.completed_steps, STEPS):
            state["sum"] += step
            run.log(sum=state["sum"][0])
            run.completed(step + 1)
        if attempt == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return
    for step in run.steps(10**9 if HOW == "endless" else STEPS):
        if step == DEATH_AT:
            fail(run, attempt, needed)
        state["sum"] += step
        with (FOLDER / f"losses-{run.rank}.txt").open("a") as losses:
            losses.write(f"{step} {state['sum'][0].item()}\n")
        time.sleep(0.01)
    if dist.is_initialized():
        dist.destroy_process_group()


@ckpt.resilient(store=str(FOLDER / "store2"), every=5)
def train_on(run: ckpt.Run) -> None:
    """A second one."""
    path = FOLDER / "second.txt"
    first = not path.exists()
    path.touch()
    state = {"sum": torch.zeros(4)}
    run.track(state=state)
    for step in run.steps(STEPS):
        if step == DEATH_AT and first:
            raise RuntimeError("once")


def main() -> None:
    """The program around the training."""
    with tempfile.TemporaryDirectory() as needed:
        train(Path(needed))
    with (FOLDER / "rest.txt").open("a") as rest:
        rest.write("returned\n")
    if HOW == "rest":
        raise RuntimeError("no such plot")
    if HOW == "twice":
        train_on()


if __name__ == "__main__":
    main()
