from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from kit.jobs import PROGRAMS
from kit.template import run

PROGRAM = PROGRAMS / "keeper_crash_points.py"
SOAK = os.environ.get("CKPT_SOAK") == "1"
SHARE = 1 if SOAK else 31
TIMEOUT_S = 300.0 if not SOAK else 3600.0


@pytest.mark.slow
def test_what_was_handed_in_becomes_durable_at_whatever_change_its_keeper_dies(
    tmp_path: Path,
) -> None:
    done = run(
        [sys.executable, str(PROGRAM), str(tmp_path), str(SHARE)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    print(f"{len(report['names'])} changes, {report['tried']} points, {report['died']} deaths")
    assert report["wrong"] == []
    assert {"write", "fsync", "link", "hold", "release"} <= set(report["names"])
    assert report["died"] >= report["tried"] * 0.8, "a keeper that does not die shows nothing"
