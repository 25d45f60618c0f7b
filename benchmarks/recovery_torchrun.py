# ruff: noqa: E402  the first line of the program is a mark
"""The rival of ``recovery.py``: plain torchrun, which starts the program anew, and DCP into a local
folder."""

from __future__ import annotations

import time

STARTED_S = time.monotonic()

import shutil
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from contestant import State
from recovery_model import STEPS_MAX, Marks, Options, Stepper, build, parse_options

THREADS = 2


def main() -> None:
    options = parse_options()
    marks = Marks(options)
    marks.tell("started", STARTED_S)
    marks.tell("entered")
    state = build(options)
    marks.tell("built")
    dist.init_process_group("gloo")
    marks.tell("grouped")
    store = options.folder / "store"
    # A rank's state is its own, as in a pipeline: names that differ keep DCP from taking equal
    # names for replicas.
    own = {f"rank{options.rank}.{name}": tensor for name, tensor in state.tensors.items()}
    begin = newest(store)
    if begin:
        dcp.load(own, checkpoint_id=store / str(begin))
    marks.tell("restored", step=begin)
    train(options, state, marks, own, store, begin)
    dist.destroy_process_group()


def train(
    options: Options, state: State, marks: Marks, own: dict[str, object], store: Path, begin: int
) -> None:
    stepper = Stepper(options, state)
    for completed in range(begin + 1, STEPS_MAX):
        last = stepper.step()
        marks.tell("step", completed=completed)
        if completed % options.every == 0:
            writer = dcp.FileSystemWriter(store / str(completed), thread_count=THREADS)
            dcp.save(own, storage_writer=writer)
            if options.rank == 0:
                shutil.rmtree(store / str(completed - options.every), ignore_errors=True)
        if last:
            return


def newest(store: Path) -> int:
    """The step of the newest checkpoint that is whole: DCP writes ``.metadata`` last."""
    return max((int(found.parent.name) for found in store.glob("*/.metadata")), default=0)


if __name__ == "__main__":
    main()
