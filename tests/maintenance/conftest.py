"""Stores that hold one log, and ways to harm their files by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from kit.damage import replicate

from ckpt.backends.file.store import FileBackend
from ckpt.backends.replicated.open import open_stores
from ckpt.testing.sample import write_sample_store


@pytest.fixture(scope="session")
def lone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of three snapshots whose log knows of no other store; copy it."""
    root = tmp_path_factory.mktemp("lone") / "store"
    write_sample_store(FileBackend(root))
    return root


@pytest.fixture(scope="session")
def members(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stores 0, 1 and 2, written to as one job's three stores; copy it."""
    root = tmp_path_factory.mktemp("members")
    stores = open_stores([str(root / str(number)) for number in range(3)], emit=lambda event: None)
    write_sample_store(stores)
    stores.close()
    return root


@pytest.fixture(params=["lone", "members"])
def three(request: pytest.FixtureRequest, tmp_path: Path) -> list[FileBackend]:
    """Three full stores in folders 0, 1 and 2: a lone log and two replicas of it, or a job's three
    stores."""
    return copies(request.getfixturevalue(request.param), tmp_path, request.param)


@pytest.fixture
def trio(members: Path, tmp_path: Path) -> list[FileBackend]:
    """A job's three stores."""
    return copies(members, tmp_path, "members")


def copies(source: Path, target: Path, kind: str) -> list[FileBackend]:
    if kind == "lone":
        return [replicate(source, target / str(number), number) for number in range(3)]
    return [replicate(source / str(number), target / str(number), None) for number in range(3)]
