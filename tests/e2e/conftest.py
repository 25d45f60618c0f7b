"""Real programs, real signals: every test gets a runtime folder of its own, and whatever it started is gone afterwards."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE / "programs")]  # for jobs, for servers.*, and for named

from jobs import Fleet  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.import_plugin("servers.fixtures")


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    """Starts programs and finds all that belongs to them. The test itself meets the same keepers."""
    fleet = Fleet(tmp_path)
    monkeypatch.setenv("CKPT_RUNTIME_DIR", str(fleet.runtime))
    yield fleet
    fleet.kill_all()
