"""A store that hangs holds up no exit, whatever way training ended."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import Future

import pytest

from ckpt.errors import UnavailableError
from ckpt.session.saving import Pending
from ckpt.values import SnapshotId, SnapshotInfo

WAIT_S = 120
PROGRAM = """
import sys, threading
import torch
import ckpt
import ckpt.save.persister, ckpt.threads, ckpt.session.saving
from ckpt.testing.faults import Fault, FaultyBackend, Harm
from ckpt.backends.memory import MemoryBackend

ckpt.session.saving.ABANDON_WAIT_S = 0.2
ckpt.save.persister.ABANDON_STORE_S = 0.2
ckpt.threads.EXIT_WAIT_S = 0.2
hung = threading.Event()

def hang(seconds):
    hung.set()
    threading.Event().wait()

store = FaultyBackend(
    MemoryBackend(), [Fault(harm=Harm.SLOW, op="put", key="packs/", delay_s=1e9, times=None)], seed=0, sleep=hang
)

@ckpt.resilient(store=store, every=1)
def train(run):
    state = {"weight": torch.zeros(8)}
    run.track(state=state)
    for step in run.steps(3):
        if step == 2:
            assert hung.wait(30)
            raise SystemExit(7)

def save():
    ckpt.Checkpointer(store).save_async({"weight": torch.zeros(8)}, step=1)
    assert hung.wait(30)
    raise SystemExit(7)
"""


@pytest.mark.slow
@pytest.mark.parametrize("call", ["train()", "save()"])
def test_exit_with_a_hung_store_is_bounded(call: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + call],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 7, done.stderr


def test_abandoned_snapshot_says_so() -> None:
    never: Future[SnapshotInfo] = Future()
    never.cancel()
    pending = Pending(SnapshotId(1, 2), never)
    with pytest.raises(UnavailableError, match="abandoned"):
        pending.durable()
    assert "failed" in repr(pending)
    assert isinstance(pending.failure(), UnavailableError)
