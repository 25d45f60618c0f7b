"""Real programs, real signals: every test gets a runtime folder of its own, and whatever it started
is gone afterwards."""

from __future__ import annotations

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
