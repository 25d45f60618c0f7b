"""Reading waits for a keeper that nobody uses any more, and is no launch."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from kit.template import run

import ckpt
from ckpt.events import Event
from ckpt.ipc import messages as words
from ckpt.ipc.client import KeeperSpec
from ckpt.ipc.messages import KeeperReport
from ckpt.ipc.runtime_dir import JobFolder
from ckpt.session import log as settled
from ckpt.session.log import await_final_flush, unflushed
from ckpt.values import SnapshotId, SnapshotInfo

from .conftest import SPEC, FakeKeeper

WAIT_S = 60.0


def report(
    *,
    state: str = "lingering",
    complete: int | None = None,
    durable: int | None = None,
    uploads: int = 0,
) -> KeeperReport:
    info = (
        None
        if durable is None
        else SnapshotInfo(
            epoch=1, step=durable, world_size=1, size_bytes=1, new_bytes=1, created_unix_s=0.0
        )
    )
    return KeeperReport(
        job="job",
        store="/store",
        pid=2,
        boot="b",
        launch="l",
        attempt=0,
        epoch=1,
        state=state,
        since_s=1.0,
        complete=None if complete is None else SnapshotId(1, complete),
        durable=info,
        uploads=uploads,
        slot_bytes=0,
        rss_bytes=0,
        ranks=(),
        recoveries=(),
    )


@pytest.mark.parametrize(
    ("said", "left"),
    [
        (None, None),
        (report(), None),
        (report(complete=5, durable=5), None),
        (report(complete=4, durable=5), None),
        (report(complete=5, durable=4), "step 5"),
        (report(complete=5), "step 5"),
        (report(uploads=2), "(2)"),
        (report(state="running", complete=5, uploads=1), None),
        (report(state="in place", complete=5, uploads=1), None),
    ],
)
def test_only_what_a_keeper_without_users_still_settles_is_waited_for(
    said: KeeperReport | None, left: str | None
) -> None:
    found = unflushed(said)
    assert found == left if left is None or found is None else left in found


def nothing(snapshot: SnapshotId) -> bool:
    return False


def test_what_the_store_has_is_not_waited_for(keeper: FakeKeeper) -> None:
    keeper.reports = [report(complete=5)]
    await_final_flush(
        SPEC, lambda event: pytest.fail(event.text), has=lambda pair: pair == SnapshotId(1, 5)
    )


def test_no_keeper_is_no_wait(folder: JobFolder) -> None:
    await_final_flush(SPEC, lambda event: pytest.fail(event.text), has=nothing)


def test_it_waits_until_the_newest_pair_is_durable_and_tells_once(
    keeper: FakeKeeper, monkeypatch
) -> None:
    monkeypatch.setattr(settled, "FLUSH_POLL_S", 0.001)
    keeper.reports = [report(complete=5, durable=4)] * 3 + [report(complete=5, durable=5)]
    told: list[Event] = []
    await_final_flush(SPEC, told.append, has=nothing)
    assert [(event.kind, event.alarm) for event in told] == [("settling", False)]
    assert len(keeper.wait(words.GetStatus)) == 4
    assert [one.role for one in keeper.wait(words.Hello)] == ["tool"]


@pytest.mark.slow
def test_waiting_is_bounded_and_the_bound_is_told(keeper: FakeKeeper, monkeypatch) -> None:
    monkeypatch.setattr(settled, "FLUSH_POLL_S", 0.001)
    keeper.reports = [report(complete=5)]
    told: list[Event] = []
    await_final_flush(SPEC, told.append, has=nothing, timeout_s=1.0)
    assert [(event.kind, event.alarm) for event in told] == [
        ("settling", False),
        ("unsettled", True),
    ]


def test_keeper_that_ends_meanwhile_is_waited_for_no_longer(keeper: FakeKeeper) -> None:
    keeper.reports = [report(complete=5)]
    waiting = threading.Thread(
        target=await_final_flush, args=(SPEC, lambda event: None), kwargs={"has": nothing}
    )
    waiting.start()
    keeper.wait(words.GetStatus)
    keeper.die()
    waiting.join(WAIT_S)
    assert not waiting.is_alive()


def test_restoring_says_no_hello_as_a_trainer_and_reads_the_store(
    tmp_path: Path, monkeypatch
) -> None:
    store = tmp_path / "run"
    w = torch.arange(3.0)
    with ckpt.Checkpointer(store) as c:
        c.save({"w": {"w": w}}, step=1)
    monkeypatch.delenv("CKPT_KEEPER")
    monkeypatch.setenv("CKPT_RUNTIME_DIR", str(tmp_path / "keepers"))
    spec = KeeperSpec(job="run", store=str(store))
    keeper = FakeKeeper(JobFolder(spec.store, spec.job))
    keeper.reports = [report(state="running", complete=5)]
    found = {"w": {"w": torch.zeros(3)}}
    with ckpt.Checkpointer(store) as c:
        assert c.restore(found).step == 1
    assert torch.equal(found["w"]["w"], w)
    assert {one.role for one in keeper.wait(words.Hello)} == {"tool"}
    keeper.close()


DIES = """
import os, sys, torch
from ckpt.session.options import SessionOptions
from ckpt.session.session import Session

session = Session(sys.argv[1], SessionOptions())
session.open_run()
w = torch.ones(1 << 20)
session.track({"w": {"w": w}})
session.snapshot(1, metadata={}, tags=(), wait_s=10.0).durable(30)
w.fill_(2.0)
session.stage(2, metadata={})
os._exit(9)
"""


@pytest.mark.slow
def test_what_a_dead_run_left_in_memory_is_restored_from_the_store_and_its_keeper_lives_on(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.delenv("CKPT_KEEPER")
    monkeypatch.setenv("CKPT_RUNTIME_DIR", str(tmp_path / "keepers"))
    store = tmp_path / "run"
    assert run([sys.executable, "-c", DIES, str(store)], check=False).returncode == 9
    note = JobFolder(str(store), "run").read_info()
    assert note is not None
    try:
        found = {"w": {"w": torch.zeros(1 << 20)}}
        with ckpt.Checkpointer(store) as c:
            assert c.restore(found).step == 2
            assert c._session.join().attachment.link is None
        assert torch.equal(found["w"]["w"], torch.full((1 << 20,), 2.0))
        os.kill(note.pid, 0)
    finally:
        os.kill(note.pid, signal.SIGKILL)
