"""Getting a keeper: one that ends just then, one that is busy, and one writer a seat."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ckpt
from ckpt.backends.memory import MemoryBackend
from ckpt.errors import UnavailableError, UsageError
from ckpt.events import Event
from ckpt.ipc import messages as words
from ckpt.ipc.client import KeeperSpec, ensure_keeper
from ckpt.ipc.mailbox import SoloMailbox
from ckpt.session.keeper import attachment as keeping
from ckpt.session.keeper.attachment import SupervisedTrainer, connect_in_place
from ckpt.session.keeper.connection import KeeperLink
from ckpt.session.keeper.persister import KeeperPersister
from ckpt.session.keeper.slots import SharedSlots
from ckpt.session.options import SessionOptions
from ckpt.session.saving import Saving
from ckpt.session.session import Session
from ckpt.staging.slot import read_slot
from ckpt.values import SnapshotId

from .conftest import HELLO, SPEC, FakeKeeper

STATE = {"w": {"w": torch.arange(3.0)}}


def test_keeper_that_ends_before_its_welcome_is_looked_for_again(keeper: FakeKeeper) -> None:
    keeper.ends = 1
    link = KeeperLink.connect(SPEC, HELLO)
    assert link.lost is None
    assert len(keeper.wait(words.Hello)) >= 3
    link.close()


def test_without_starting_one_a_keeper_that_ends_is_an_error(keeper: FakeKeeper) -> None:
    keeper.ends = 1
    with pytest.raises(UnavailableError, match="hung up at the hello"):
        KeeperLink.connect(SPEC, HELLO, start=False)


def test_busy_keeper_is_waited_for_and_that_is_told_once(keeper: FakeKeeper, monkeypatch) -> None:
    monkeypatch.setattr(keeping, "BUSY_POLL_S", 0.001)
    keeper.busy = 3
    told: list[Event] = []
    link = connect_in_place(SPEC, SoloMailbox(), emit=told.append)
    assert link is not None
    assert [(event.kind, event.alarm) for event in told] == [("keeper-busy", False)]
    assert "still bringing step 3" in told[0].text
    link.close()


@pytest.mark.slow
def test_keeper_that_stays_busy_is_given_up_with_an_alarm(keeper: FakeKeeper, monkeypatch) -> None:
    monkeypatch.setattr(keeping, "BUSY_POLL_S", 0.001)
    monkeypatch.setattr(keeping, "BUSY_WAIT_S", 1.0)
    keeper.busy = 10**6
    told: list[Event] = []
    assert connect_in_place(SPEC, SoloMailbox(), emit=told.append) is None
    assert [(event.kind, event.alarm) for event in told] == [
        ("keeper-busy", False),
        ("no-keeper", True),
    ]


@pytest.fixture
def seated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The store of a trainer under a supervisor, with a keeper of its own."""
    monkeypatch.setenv("CKPT_RUNTIME_DIR", str(tmp_path / "keepers"))
    monkeypatch.delenv("CKPT_KEEPER")
    store = tmp_path / "run"
    spec = KeeperSpec(job="run", store=str(store))
    ensure_keeper(spec).close()
    monkeypatch.setattr(
        keeping, "_trainer", SupervisedTrainer(launch="l", attempt=0, rank=0, ranks=1, spec=spec)
    )
    yield store


@pytest.mark.slow
def test_second_writer_in_one_seat_is_refused_before_it_touches_anything(seated: Path) -> None:
    first, second = ckpt.Checkpointer(seated), ckpt.Checkpointer(seated)
    first.save(STATE, step=1)
    for write in (lambda: second.save(STATE, step=2), lambda: second.prepare(STATE)):
        with pytest.raises(UsageError, match=r"writes to this store already.*run\.save\(\)"):
            write()
    assert second._session._connected is None
    with pytest.raises(UsageError, match="writes to this store already"):
        ckpt.Checkpointer(seated, job="another-name").save(STATE, step=2)
    found = {"w": {"w": torch.zeros(3)}}
    assert second.restore(found).step == 1
    assert torch.equal(found["w"]["w"], STATE["w"]["w"])
    assert first.save(STATE, step=2).epoch == 1
    first.close()
    assert second.save(STATE, step=3).epoch == 2
    second.close()


@pytest.mark.slow
def test_writers_of_several_stores_share_a_seat(seated: Path) -> None:
    with ckpt.Checkpointer(seated) as first, ckpt.Checkpointer(seated.parent / "other") as second:
        assert first.save(STATE, step=1).step == second.save(STATE, step=1).step == 1


def test_exception_does_not_wait_for_what_the_keeper_has(link: KeeperLink) -> None:

    board = link.board()
    slots = SharedSlots(link, board, 0)
    slots.epoch = 1
    saving = Saving(SoloMailbox(), SessionOptions(), lambda event: None)
    saving.use_regions(slots)
    saving.write_through_keeper(KeeperPersister(link, slots, emit=lambda event: None), origin="o")
    pending = saving.snapshot(STATE, SnapshotId(1, 1), metadata={}, tags=())
    began_s = time.monotonic()
    saving.abandon()
    assert time.monotonic() - began_s < 5.0
    with pytest.raises(UnavailableError, match="the keeper continues with it"):
        pending.durable(0)
    found = [read_slot(region.view) for _, region in link.slots(0)]
    assert [one[0].origin for one in found if one is not None] == ["o"]
    board.close()


@pytest.mark.parametrize("error", [UnavailableError("gone"), RuntimeError("broken pipe")])
def test_rank_0_that_is_gone_hides_no_exception_of_the_user(
    make_channels, monkeypatch, error: Exception
) -> None:
    _, channel = make_channels(2)
    monkeypatch.setattr(keeping, "connect_ranks", lambda *, name: channel)

    def post(key: str, value: bytes) -> None:
        raise error

    told: list[Event] = []
    for how in ("exception", "end"):
        session = Session(MemoryBackend("job"), SessionOptions())
        session.emit = told.append
        session.join()
        monkeypatch.setattr(channel, "post", post)
        if how == "exception":
            session.abandon()
        else:
            with pytest.raises(type(error)):
                session.finish()
    assert [event.kind for event in told] == ["left"]
