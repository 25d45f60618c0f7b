"""A save that is still on its way when the program ends becomes durable: the interpreter waits for
it."""

import subprocess
import sys
from pathlib import Path

import pytest

import ckpt

PROGRAM = """
import sys, torch, ckpt
c = ckpt.Checkpointer(sys.argv[1])
c.save_async({"m": {"w": torch.ones(8_000_000)}}, step=1)
"""


@pytest.mark.slow
def test_a_save_in_flight_at_exit_becomes_durable(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "s")],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert not done.stderr
    found = ckpt.Checkpointer(str(tmp_path / "s")).latest()
    assert found is not None
    assert found.step == 1
