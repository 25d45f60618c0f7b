"""Trains in whole numbers until it is told where to end, and writes down all that it does.

    python exact.py FOLDER [--step-s S] [--every N] [--stores N]

Each trainer appends to a file of its own, ``FOLDER/events/<machine>-<pid>.jsonl``, one line for
each event; times are of CLOCK_BOOTTIME in nanoseconds, one clock for all machines of a test.

    enter   it goes on: ``attempt`` (the membership's epoch), ``epoch`` (the log's), rank, world, the pair resumed, its state
    step    a step that all ranks took together: when it began and ended, and the value after it
    beat    it is alive now, and until when its node may act, as the board says

``FOLDER/finish`` holds how many steps there shall be; who trains looks there at each step, and all
learn it in the same one. Tracked beside the weights is a trail: in which epoch of the log each step
was taken. So a state says itself of which line it is. Written down it is a list of epochs, each
with a number of steps.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from exact_state import COLUMNS, ROWS, Exact
from torch.nn.parallel import DistributedDataParallel

import ckpt

TRAIL_MAX = 1 << 14
BEAT_S = 0.04


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--step-s", type=float, default=0.1)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--stores", type=int, default=1)
    return parser.parse_args()


OPTIONS = parse()
POLICY = ckpt.RestartPolicy(same_error_max=100, stuck_max=100)
"""Faults come so close together here that several attempts in a row may end before their first
step."""


def now_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Events:
    """This trainer's file. Each line is one write, so that a death leaves whole lines."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        machine = Path(os.environ["CKPT_RUNTIME_DIR"]).parent.name
        self._fd = os.open(
            folder / f"{machine}-{os.getpid()}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
        )

    def say(self, kind: str, **facts: object) -> None:
        os.write(self._fd, f"{json.dumps({'kind': kind, **facts})}\n".encode())


def beat(run: ckpt.Run, events: Events, over: threading.Event) -> None:
    """Tell that this process lives, as long as it trains."""
    board = run._session.board
    assert board is not None
    while not over.wait(BEAT_S):
        events.say("beat", at=now_ns(), until=board.act_until_ns)


def runs(trail: torch.Tensor) -> list[list[int]]:
    epochs, counts = torch.unique_consecutive(trail, return_counts=True)
    return torch.stack([epochs, counts], 1).tolist()


def finish_at() -> int:
    path = OPTIONS.folder / "finish"
    return int(path.read_text()) if path.exists() else 0


STORES = [str(OPTIONS.folder / f"store-{number}") for number in range(OPTIONS.stores)]


@ckpt.resilient(store=STORES, job="exact", every=OPTIONS.every, memory_every=1, restart=POLICY)
def train(run: ckpt.Run) -> None:
    events = Events(OPTIONS.folder / "events")
    dist.init_process_group("gloo")
    exact = Exact()
    # Never called; it says that all ranks hold the same weights, each of which is then stored by
    # one rank only.
    model = DistributedDataParallel(exact.model)
    trail = torch.full((TRAIL_MAX,), -1, dtype=torch.int64)
    run.track(model=model, optimizer=exact.optimizer, progress={"trail": trail})
    done, resumed = run.completed_steps, run.restored
    assert run._trainer is not None
    events.say(
        "enter",
        attempt=run._trainer.attempt,
        epoch=run.membership_epoch,
        rank=run.rank,
        world=run.world_size,
        at=now_ns(),
        pair=[resumed.epoch, resumed.step] if resumed is not None else None,
        step=done,
        value=exact.value(),
        trail=runs(trail[:done]),
        clean=bool((trail[done:] == -1).all()),
    )
    over = threading.Event()
    threading.Thread(target=beat, args=(run, events, over), daemon=True).start()
    total = torch.zeros(ROWS * COLUMNS + 1, dtype=torch.int64)
    for step in run.steps(done if 0 < finish_at() <= done else TRAIL_MAX):
        began = now_ns()
        total[:-1] = exact.share(step, run.rank, run.world_size).flatten()
        total[-1] = finish_at() if run.rank == 0 else 0
        dist.all_reduce(total)
        exact.apply(total[:-1].view(ROWS, COLUMNS))
        trail[step] = run.membership_epoch
        value = exact.value()
        events.say(
            "step", epoch=run.membership_epoch, step=step, began=began, ended=now_ns(), value=value
        )
        time.sleep(OPTIONS.step_s)
        if 0 < int(total[-1]) <= step + 1:
            break
    dist.barrier()
    over.set()
    done = run.completed_steps
    end = {"step": done, "value": exact.value(), "trail": runs(trail[:done])}
    (OPTIONS.folder / f"final-{run.rank}.json").write_text(json.dumps(end))


if __name__ == "__main__":
    train()
    dist.destroy_process_group()
