"""A sample store on disk, and the command line run as the program runs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ckpt.backends.file.store import FileBackend
from ckpt.cli.main import run
from ckpt.testing.sample import write_sample_store


@dataclass(frozen=True)
class Done:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out)

    @property
    def error(self) -> dict:
        return json.loads(self.err)["error"]


@pytest.fixture
def store(tmp_path: Path) -> FileBackend:
    """Steps 10, 20 (tagged best), 30 of epoch 1."""
    backend = FileBackend(tmp_path / "store")
    write_sample_store(backend)
    return backend


@pytest.fixture
def ckpt(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run a command line in this process."""

    def command(*arguments: object) -> Done:
        capsys.readouterr()
        code = run([str(one) for one in arguments])
        out, err = capsys.readouterr()
        return Done(code, out, err)

    return command
