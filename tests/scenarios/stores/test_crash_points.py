from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.jobs import PROGRAMS
from kit.template import run

PROGRAM = PROGRAMS / "crash_points.py"
SOAK = os.environ.get("CKPT_SOAK") == "1"
TIMEOUT_S = 300.0 if not SOAK else 3600.0


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: SIGKILL spares the page cache, and the power cut is
    modelled."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="crash-points-", dir=memory) as made:
        yield Path(made)


def check(folder: Path, scenario: str, kind: str, *, share: int) -> None:
    """Try every ``share``-th point (each one in a soak), and expect nothing wrong."""
    done = run(
        [sys.executable, str(PROGRAM), str(folder), scenario, kind, "1" if SOAK else str(share)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    print(f"{scenario} {kind}: {report['calls']} calls, {report['tried']} points tried")
    assert report["wrong"] == []
    assert set(report["names"]) >= {
        "open",
        "write",
        "fsync",
        "link",
        "rename",
        "unlink",
        "fsync_directory",
    }
    assert report["tried"] > report["calls"] // share


@pytest.mark.slow
def test_save_killed_at_some_calls_leaves_old_or_new_snapshot_whole(tmp_path: Path) -> None:
    check(tmp_path, "over", "kill", share=40)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "share"),
    [("first", 11), ("over", 7), ("continued", 13), ("tagged", 17), ("second", 19)],
)
def test_save_killed_at_any_call_leaves_old_or_new_snapshot_whole(
    folder: Path, scenario: str, share: int
) -> None:
    check(folder, scenario, "kill", share=share)


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "share"), [("over", 13), ("first", 23), ("second", 37)])
def test_power_cut_at_any_call_leaves_old_or_new_snapshot_whole(
    folder: Path, scenario: str, share: int
) -> None:
    check(folder, scenario, "power", share=share)
