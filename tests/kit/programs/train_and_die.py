# ruff: noqa: E402  the killer is forked before anything that may start a thread is imported
"""Trains a tiny model that uses everything which must be restored, and kills itself at planned
random moments.

    python train_and_die.py FOLDER STEPS SEED KILLS
    torchrun ... train_and_die.py FOLDER STEPS SEED KILLS

The first KILLS attempts end by SIGKILL, the next ones don't. How attempt number n dies follows from
SEED and n: after a random time in the loop, or before, after or half-way through a random system
call of the store. Of several ranks one dies. Appends to ``losses-<rank>.txt`` each step's number
and exact loss, and writes digests of everything to ``final-<rank>.json`` at the end. Snapshots are
due at every step, so most of the time something is being saved.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

LOOP_S_MAX = 0.25
CALLS_MAX = 250
STEP_S = 0.008

FOLDER, STEPS, SEED, KILLS = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def count_attempt() -> int:
    """The number of this attempt, from 0; and one more line in the file that counts them."""
    path = FOLDER / f"attempts-{RANK}.txt"
    number = len(path.read_text().splitlines()) if path.exists() else 0
    with path.open("a") as file:
        file.write(f"{os.getpid()}\n")
    return number


def timed_killer(delay_s: float) -> int:
    """Fork a process that kills this one ``delay_s`` after a byte arrives; returns where to write
    it. Before any thread."""
    mine, theirs = os.getpid(), os.pipe()
    if os.fork() == 0:
        os.close(theirs[1])
        if os.read(theirs[0], 1):
            time.sleep(delay_s)
            if os.getppid() == mine:
                os.kill(mine, signal.SIGKILL)
        os._exit(0)
    os.close(theirs[0])
    return theirs[1]


ATTEMPT = count_attempt()
PLAN = random.Random(f"{SEED}/{ATTEMPT}")
DIES = ATTEMPT < KILLS and PLAN.randrange(WORLD_SIZE) == RANK
BY_CALL = PLAN.random() < 0.5
KILLER = timed_killer(PLAN.uniform(0, LOOP_S_MAX)) if DIES and not BY_CALL else -1

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import ckpt
from ckpt.backends.base import Backend
from ckpt.backends.file.store import FileBackend
from ckpt.testing.crashes import CrashingOps, CrashMode


def store() -> Backend:
    """The store, with a death at one of its system calls where the plan says so."""
    if DIES and BY_CALL:
        at, mode = PLAN.randrange(CALLS_MAX), PLAN.choice(list(CrashMode))
        return FileBackend(FOLDER / "store", ops=CrashingOps(at=at, mode=mode))
    return FileBackend(FOLDER / "store")


@ckpt.resilient(store=store(), every=1, compression="off")
def train(run: ckpt.Run) -> None:
    """The loop, as users write it."""
    torch.set_num_threads(1)
    if WORLD_SIZE > 1:
        dist.init_process_group("gloo")
    for seeded in (torch.manual_seed, random.seed, np.random.seed):
        seeded(11)
    model: nn.Module = nn.Sequential(
        nn.Linear(6, 16), nn.Dropout(0.3), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1)
    )
    if WORLD_SIZE > 1:
        model = DistributedDataParallel(model)
    for seeded in (torch.manual_seed, random.seed, np.random.seed):
        seeded(100 + RANK)
    data = torch.randn(37, 6)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.9)
    loader = StatefulDataLoader(TensorDataset(data), batch_size=5, shuffle=True, drop_last=True)
    progress: dict[str, object] = {"seen": 0, "mean": torch.zeros(6), "last": []}
    run.track(
        model=model, optimizer=optimizer, scheduler=scheduler, loader=loader, progress=progress
    )
    batches = iter(
        loader
    )  # opening a loader draws a random number: before the generators are restored by the loop
    if KILLER >= 0:
        os.write(KILLER, b"!")
    with (FOLDER / f"losses-{RANK}.txt").open("a", buffering=1) as losses:
        for step in run.steps(STEPS):
            try:
                (batch,) = next(batches)
            except StopIteration:
                batches = iter(loader)
                (batch,) = next(batches)
            noise = random.random() + float(np.random.rand()) + torch.rand(1)
            optimizer.zero_grad()
            loss = (model(batch * noise) - batch.sum(1, keepdim=True)).square().mean()
            loss.backward()
            time.sleep(STEP_S)
            optimizer.step()
            scheduler.step()
            seen, mean = progress["seen"], progress["mean"]
            assert isinstance(seen, int)
            assert isinstance(mean, torch.Tensor)
            mean.lerp_(batch.mean(0), 0.1)
            progress.update(seen=seen + len(batch), last=[step, noise.item()])
            losses.write(f"{step} {loss.item().hex()}\n")
    parts = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "progress": progress,
        "loader": loader.state_dict(),
        "random": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    digests = {name: digest(part) for name, part in parts.items()}
    if DIES:  # its moment never came: on a slow store all steps are over after few calls
        os.kill(os.getpid(), signal.SIGKILL)
    (FOLDER / f"final-{RANK}.json").write_text(json.dumps(digests))
    if WORLD_SIZE > 1:
        dist.barrier()


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


if __name__ == "__main__":
    train()
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
