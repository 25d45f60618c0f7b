"""A program that starts its other rank inside the decorated function, as some frameworks do:
``python ranks_within.py FOLDER``."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import torch.distributed as dist

import ckpt


def launch() -> None:
    """Start this script again as rank 1, and meet it."""
    if "LOCAL_RANK" not in os.environ:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = str(server.getsockname()[1])
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        other = {**os.environ, **shared, "LOCAL_RANK": "1"}
        subprocess.Popen([sys.executable, *sys.argv], env=other)
        os.environ.update(shared, LOCAL_RANK="0")
    dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=2)


@ckpt.resilient(store=f"{sys.argv[1]}/store", every=2)
def train(run: ckpt.Run) -> None:
    """Count steps."""
    launch()
    state = {"n": 0}
    run.track(state=state)
    for _ in run.steps(4):
        state["n"] += 1


if __name__ == "__main__":
    train()
