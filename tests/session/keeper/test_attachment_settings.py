"""A keeper that outlived its program, and a next launch that asks for other stores, options or
keys."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ckpt.errors import UsageError
from ckpt.ipc.messages import Choices, GetChoices
from ckpt.ipc.runtime_dir import list_jobs
from ckpt.session.options import SessionOptions
from ckpt.session.session import Session
from ckpt.values import SnapshotId

WAIT_S = 30.0


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a run with a keeper stores; no keeper is left."""
    monkeypatch.setenv("CKPT_RUNTIME_DIR", str(tmp_path / "keepers"))
    monkeypatch.delenv("CKPT_KEEPER")
    yield tmp_path / "run"
    for folder in list_jobs():
        info = folder.read_info()
        if info is not None and folder.has_keeper():
            os.kill(info.pid, signal.SIGKILL)


def run_of(store: object, **options: object) -> Session:
    session = Session(store, SessionOptions(job="run", **options))  # type: ignore[arg-type]
    session.open_run()
    session.track({"w": {"w": torch.ones(8)}})
    return session


def keeper_of(session: Session) -> int:
    link = session.join().attachment.link
    assert link is not None
    return link.welcome.pid


def cut_off(session: Session) -> None:
    """The process is gone, as its keeper sees it."""
    link = session.join().attachment.link
    assert link is not None
    link._calls._wire.close()
    link._events.close()
    link._thread.join()
    link._closing = True
    session.abandon()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_launch_that_names_more_stores_is_not_served_with_the_old_ones(
    store: Path, tmp_path: Path
) -> None:
    first = run_of(str(store))
    first.snapshot(1, metadata={}, tags=(), wait_s=1.0).durable(WAIT_S)
    cut_off(first)
    wider = (str(store), str(tmp_path / "b"), str(tmp_path / "c"))
    session = Session(wider, SessionOptions(job="run", write_quorum=2))
    with pytest.raises(UsageError, match="add the others"):
        session.open_run()
    session.abandon()


@pytest.mark.slow
def test_next_launch_with_other_options_gets_a_keeper_of_its_own_with_all_slots(
    store: Path,
) -> None:
    first = run_of(str(store))
    before = keeper_of(first)
    first.snapshot(1, metadata={}, tags=(), wait_s=1.0).durable(WAIT_S)
    assert first.stage(2, metadata={})
    cut_off(first)
    second = Session(str(store), SessionOptions(job="run", compression="off"))
    second.attach_keeper()
    assert keeper_of(second) != before
    link = second.join().attachment.link
    assert link is not None
    choices = link.ask(GetChoices(), Choices).choices
    assert (SnapshotId(1, 2), "staged") in [(one.snapshot, one.tier) for one in choices]
    until_s = time.monotonic() + WAIT_S
    while alive(before):
        assert time.monotonic() < until_s, "the keeper before it stays"
        time.sleep(0.01)
    second.open_run()
    second.track({"w": {"w": torch.ones(8)}})
    assert second.restored is not None and second.restored.step == 2
    assert second.snapshot(3, metadata={}, tags=(), wait_s=1.0).durable(WAIT_S).step == 3
    second.finish()


@pytest.mark.slow
def test_next_launch_with_equal_settings_keeps_the_keeper(store: Path) -> None:
    first = run_of(str(store))
    before = keeper_of(first)
    first.snapshot(1, metadata={}, tags=(), wait_s=1.0).durable(WAIT_S)
    cut_off(first)
    second = run_of(str(store))
    assert keeper_of(second) == before
    second.finish()
