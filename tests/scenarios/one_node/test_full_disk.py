"""A disk that is full when a training ends: it waits, says what is held, and is never done again."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
from kit.jobs import Fleet, Job, wait_for

import ckpt

PROGRAM = """
import os, sys, ckpt, torch
folder = sys.argv[1]
@ckpt.resilient(store=os.path.join(folder, "disk", "store"), every=1, compression="off", restart=ckpt.RestartPolicy(grace="2s"))
def train(run):
    with open(os.path.join(folder, "calls"), "a") as file: file.write("x")
    state = {"x": torch.zeros(200_000)}
    run.track(state=state)
    for step in run.steps(40):
        state["x"] = torch.rand(200_000)
train()
print("the rest", flush=True)
"""


def start(fleet: Fleet, disk: Path) -> Job:
    """The program, once it says that it waits at its end."""
    (disk / "filler").write_bytes(bytes(3 << 20))
    program = fleet.folder / "program.py"
    program.write_text(PROGRAM)
    job = fleet.start([sys.executable, str(program), str(fleet.folder)])
    wait_for(
        lambda: "the training is finished" in job.output(),
        "the program to say that it waits",
        say=job.output,
    )
    return job


@pytest.mark.slow
def test_full_disk_at_the_end_of_a_supervised_training(fleet: Fleet, disk: Path) -> None:
    job = start(fleet, disk)
    (disk / "filler").unlink()
    assert job.wait_end() == 0, job.output()
    assert (fleet.folder / "calls").read_text() == "x"
    output = job.output()
    assert "the rest" in output
    assert "Traceback" not in output
    assert len([line for line in output.splitlines() if "rank 0]" in line]) <= 4, output
    with ckpt.Checkpointer(str(disk / "store")) as checkpointer:
        assert checkpointer.latest().step == 40


@pytest.mark.slow
def test_end_that_is_interrupted_while_it_waits_is_not_trained_again(
    fleet: Fleet, disk: Path
) -> None:
    job = start(fleet, disk)
    assert fleet.send(job.process.pid, signal.SIGTERM)
    assert job.wait_end() not in (0, None)
    assert (fleet.folder / "calls").read_text() == "x"
    assert "its end is not durable" in job.output()
