"""The demo proves what it says: killed in mid-step, the run ends with the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN_S_MAX = 900
SOAK = os.environ.get("CKPT_SOAK") == "1"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3] if SOAK else [2])
def test_demo_killed_run_equals_undisturbed_run(ranks: int) -> None:
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), f"--ranks={ranks}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_S_MAX, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal: all" in done.stdout
