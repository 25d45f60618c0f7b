# ruff: noqa: E402  the first line of the program is a mark
"""The rival where nodes are lost: the same training under torchrun, and DCP into a folder that all
nodes see."""

from __future__ import annotations

import time

STARTED_S = time.monotonic()

import os
import shutil
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from recovery_nodes_model import STEPS_MAX, Marks, Options, Training, parse_options

THREADS = 2


def main() -> None:
    options = parse_options()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    marks = Marks(options.folder, rank=rank, world=world)
    marks.tell("started", STARTED_S)
    training = Training(options, rank)
    marks.tell("built")
    dist.init_process_group("gloo")
    marks.tell("grouped")
    store = options.folder / "store"
    # A rank's state is its own, as in a pipeline: names that differ keep DCP from taking equal
    # names for replicas.
    own = {f"rank{rank}.{name}": tensor for name, tensor in training.state.tensors.items()}
    begin = newest(store)
    if begin:
        dcp.load(own, checkpoint_id=store / str(begin))
    marks.tell("restored", step=begin, digest=training.digest())
    train(options, training, marks, own, begin)
    dist.destroy_process_group()


def train(
    options: Options, training: Training, marks: Marks, own: dict[str, object], begin: int
) -> None:
    store = options.folder / "store"
    for completed in range(begin + 1, STEPS_MAX):
        last = training.step()
        marks.tell("step", step=completed, digest=training.digest())
        if completed % options.every == 0:
            writer = dcp.FileSystemWriter(store / str(completed), thread_count=THREADS)
            dcp.save(own, storage_writer=writer)
            if dist.get_rank() == 0:
                shutil.rmtree(store / str(completed - options.every), ignore_errors=True)
        if last:
            return


def newest(store: Path) -> int:
    """The step of the newest checkpoint that is whole: DCP writes ``.metadata`` last."""
    return max((int(found.parent.name) for found in store.glob("*/.metadata")), default=0)


if __name__ == "__main__":
    main()
