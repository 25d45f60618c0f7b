"""Sharded over two ranks, continued by one, and by two again: the weights are the same bytes each
time."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import reshard
from kit.template import run as run_program

RUN_S_MAX = 150


def run(folder: Path, *, ranks: int, steps: int) -> tuple[str, str]:
    """Train to ``steps`` and return the weights' digests at the start and at the end."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        if ranks > 1
        else []
    )
    done = run_program(
        [sys.executable, *launcher, reshard.__file__, f"--steps={steps}"],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        capture_output=True,
        text=True,
        timeout=RUN_S_MAX,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    started, stopped = re.findall(r"weights (\w+)", done.stdout)
    return started, stopped


@pytest.mark.slow
def test_two_ranks_then_one_then_two_hand_over_the_same_weights(tmp_path: Path) -> None:
    _, two_left = run(tmp_path, ranks=2, steps=20)
    one_found, one_left = run(tmp_path, ranks=1, steps=30)
    two_found, _ = run(tmp_path, ranks=2, steps=40)
    assert one_found == two_left
    assert one_left != one_found
    assert two_found == one_left
