"""What the tests of this folder share lies beside them in the modules whose names begin with ``log_``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import pytest

from ckpt.log import replicas as copies_room
from ckpt.log.sequencers import STATE_VARIABLE

T = TypeVar("T")


class OneByOne:
    """See Lanes: each call at once, in order."""

    def ask(self, calls: Mapping[int, Callable[[], T]], enough: object) -> dict[int, T]:
        return {number: call() for number, call in calls.items()}


@pytest.fixture(autouse=True)
def _state_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test touches the user's own files."""
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """No threads: each store is asked at once, in order."""
    monkeypatch.setattr(copies_room, "ThreadWorkers", OneByOne)
    monkeypatch.setattr(copies_room, "read_all", lambda items, read: [read(item) for item in items])
