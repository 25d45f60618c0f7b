"""Trains on several stores. A file ``hurry`` in its folder ends the pauses between steps, which are
long in the last quarter.

    python stored.py FOLDER STEPS --stores '["s3://a/run", "/mnt/run"]' [--options '[{...}, null]'] [--quorum N]
        [--key file:PATH] [--every N] [--step-s S] [--payload-kib N] [--linger 60s]
    torchrun ... stored.py FOLDER STEPS ...

Beside what ``little`` writes: ``walls-<rank>.txt``, how long each step took from its beginning to
the next one's, without the pause. ``STORED_OPTIONS`` may hold the stores' options, so that no key
stands on a command line.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from little import Training, digest, enter

import ckpt

MARK = bytes(range(65, 97)) + b"ckpt: a mark that nothing else h"
"""64 bytes of the state that can be found again wherever they stand unencrypted."""

NAP_S = 0.005
LONGER = 10
"""Pauses of the last quarter against those before: there a test finds its program still training
though it took its time."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--stores", type=json.loads, required=True)
    parser.add_argument("--options", type=json.loads)
    parser.add_argument("--quorum", type=int)
    parser.add_argument("--key")
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--step-s", type=float, default=0.0)
    parser.add_argument("--payload-kib", type=int, default=128)
    parser.add_argument("--linger", default="60s")
    return parser.parse_args()


class Stored(Training):
    """The little training, with a payload of which every byte changes in each step."""

    def __init__(self, run: ckpt.Run, folder: Path, *, payload_kib: int) -> None:
        super().__init__(run, folder)
        self.payload = torch.arange(payload_kib << 8, dtype=torch.int32)
        self.mark = torch.frombuffer(bytearray(MARK), dtype=torch.uint8)
        run.track(payload=self.payload, mark=self.mark)

    def step(self, step: int, step_s: float) -> float:
        """One step; its loss."""
        loss = super().step(step, step_s)
        self.payload.mul_(5).add_(step)
        return loss

    def write_digests(self) -> None:
        """Those of the little training, and the payload's."""
        super().write_digests()
        path = self.folder / f"final-{self.run.rank}.json"
        found = {
            **json.loads(path.read_text()),
            "payload": digest(self.payload),
            "mark": digest(self.mark),
        }
        path.write_text(json.dumps(found))


class Pace:
    """Pauses before each step until somebody is in a hurry, and writes down how long steps take."""

    def __init__(self, folder: Path, rank: int, *, pause_s: float, long_from: int) -> None:
        self._hurry = folder / "hurry"
        self._walls = (folder / f"walls-{rank}.txt").open("a", buffering=1)
        self._pause_s = pause_s
        self._long_from = long_from
        self._begun_s: float | None = None

    def before_step(self, step: int) -> None:
        """Called at each step's beginning."""
        now_s = time.monotonic()
        if self._begun_s is not None:
            self._walls.write(f"{step - 1} {now_s - self._begun_s:.6f}\n")
        pause_s = self._pause_s * (LONGER if step >= self._long_from else 1)
        while self._pause_s and time.monotonic() < now_s + pause_s:
            if self._hurry.exists():
                self._pause_s = 0.0
            time.sleep(NAP_S)
        self._begun_s = time.monotonic()


CHOICE = parse()
OPTIONS = (
    json.loads(os.environ["STORED_OPTIONS"]) if "STORED_OPTIONS" in os.environ else CHOICE.options
)


@ckpt.resilient(
    store=CHOICE.stores,
    storage_options=OPTIONS,
    write_quorum=CHOICE.quorum,
    encryption_key=CHOICE.key,
    job="stored",
    every=CHOICE.every,
    memory_every=1,
    compression="off",
    restart=ckpt.RestartPolicy(linger=CHOICE.linger),
)
def train(run: ckpt.Run) -> None:
    """The loop, as users write it."""
    enter(CHOICE.folder, run.rank)
    training = Stored(run, CHOICE.folder, payload_kib=CHOICE.payload_kib)
    pace = Pace(CHOICE.folder, run.rank, pause_s=CHOICE.step_s, long_from=CHOICE.steps * 3 // 4)
    training.train(CHOICE.steps, before_step=pace.before_step)
    if run.world_size > 1:
        dist.barrier()


if __name__ == "__main__":
    train()
    if dist.is_initialized():
        dist.destroy_process_group()
