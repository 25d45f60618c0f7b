"""Real programs, real signals: every test gets a runtime folder of its own, and whatever it started
is gone afterwards."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.jobs import Fleet

HERE = Path(__file__).parent


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    """Starts programs and finds all that belongs to them. The test itself meets the same
    keepers."""
    fleet = Fleet(tmp_path)
    monkeypatch.setenv("CKPT_RUNTIME_DIR", str(fleet.runtime))
    yield fleet
    fleet.kill_all()


DISK = "4m"


def mounted(folder: Path, size: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mounted(folder, DISK):
        pytest.skip("mounting is not permitted here; the injected faults are tested instead")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
