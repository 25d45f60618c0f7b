"""In place, with real keepers: one that is killed between two snapshots costs those around its
death, and no more."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import ckpt
from ckpt.backends.file.store import FileBackend
from ckpt.errors import FencedError, UnavailableError
from ckpt.events import Event
from ckpt.ipc.messages import Choices, GetChoices, Message, Persist
from ckpt.log.journal import Journal
from ckpt.session import connected, saving
from ckpt.session.keeper import attachment as keeping
from ckpt.session.keeper import connection as keeper_link
from ckpt.session.options import SessionOptions
from ckpt.session.restoring import FillRules
from ckpt.session.session import Session
from ckpt.values import SnapshotId

WAIT_S = 30.0


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a run with a keeper stores."""
    monkeypatch.setenv("CKPT_RUNTIME_DIR", str(tmp_path / "keepers"))
    monkeypatch.delenv("CKPT_KEEPER")
    return tmp_path / "run"


def state(value: float = 1.0) -> dict[str, object]:
    return {"w": {"w": torch.full((8,), value)}}


def keeper_of(session: Session) -> int:
    link = session.join().attachment.link
    assert link is not None
    return link.welcome.pid


def kill_keeper(*sessions: Session) -> int:
    """Kill it, and wait until all have noticed."""
    pid = keeper_of(sessions[0])
    os.kill(pid, signal.SIGKILL)
    until_s = time.monotonic() + WAIT_S
    for session in sessions:
        link = session.join().attachment.link
        while link is not None and link.lost is None:
            assert time.monotonic() < until_s, "nobody noticed"
            time.sleep(0.002)
    return pid


def run_of(store: Path) -> tuple[Session, list[Event]]:
    """A run of a world of one that is open, and what it tells."""
    session, told = Session(str(store), SessionOptions()), []
    session.emit = told.append
    session.open_run()
    session.track({"w": {"w": torch.ones(8)}})
    return session, told


def opens(store: Path) -> list[tuple[int, SnapshotId | None]]:
    found = Journal.open(FileBackend(store)).refresh().opens
    return [(one.epoch, one.resume) for one in found]


@pytest.mark.slow
def test_save_after_the_keepers_death_goes_to_the_next_keeper(store: Path) -> None:
    with ckpt.Checkpointer(store) as c:
        assert c.save(state(1), step=1).epoch == 1
        dead = kill_keeper(c._session)
        assert c.save(state(2), step=2).id == SnapshotId(2, 2)
        assert keeper_of(c._session) != dead
        assert c.save(state(3), step=3).id == SnapshotId(2, 3)
        with pytest.raises(ckpt.UsageError, match="steps must grow"):
            c.save(state(3), step=3)
    assert opens(store) == [(1, None), (2, SnapshotId(1, 1))]
    found = state(0)
    assert ckpt.Checkpointer(store).restore(found).step == 3
    assert torch.equal(found["w"]["w"], torch.full((8,), 3.0))


@pytest.mark.slow
def test_line_goes_on_from_the_last_pair_that_only_memory_held(store: Path) -> None:
    session, _ = run_of(store)
    session.snapshot(1, metadata={}, tags=(), wait_s=1.0).durable(WAIT_S)
    assert session.stage(2, metadata={})
    kill_keeper(session)
    assert session.stage(3, metadata={}), "memory needs no keeper"
    assert session.snapshot(4, metadata={}, tags=(), wait_s=1.0).durable(WAIT_S).id == SnapshotId(
        2, 4
    )
    assert session.stage(5, metadata={})
    assert opens(store) == [(1, None), (2, SnapshotId(1, 3))]
    link = session.join().attachment.link
    assert link is not None
    assert [(one.snapshot, one.tier) for one in link.ask(GetChoices(), Choices).choices][:2] == [
        (SnapshotId(2, 5), "staged"),
        (SnapshotId(2, 4), "staged"),
    ]
    session.finish()


def dies_at_the_next_submission(session: Session) -> None:
    """Its keeper stands still and is killed before it reads the next submission."""
    link = session.join().attachment.link
    assert link is not None
    pid, send = link.welcome.pid, link.send

    def send_to_the_dying(message: Message) -> None:
        if isinstance(message, Persist):
            link.send = send  # type: ignore[method-assign]
            os.kill(pid, signal.SIGSTOP)
            send(message)
            os.kill(pid, signal.SIGKILL)
        else:
            send(message)

    link.send = send_to_the_dying  # type: ignore[method-assign]


def hand_in_to_a_keeper_that_dies(c: ckpt.Checkpointer, step: int, *, tag: str) -> ckpt.Pending:
    dies_at_the_next_submission(c._session)
    return c.save_async(state(step), step=step, tag=tag)


@pytest.mark.slow
def test_what_was_handed_in_becomes_durable_although_its_keeper_dies(store: Path) -> None:
    with ckpt.Checkpointer(store) as c:
        c.save(state(1), step=1)
        pending = hand_in_to_a_keeper_that_dies(c, 2, tag="best")
        assert pending.durable(WAIT_S).id == SnapshotId(1, 2)
        assert c.save(state(3), step=3).id == SnapshotId(2, 3)
        later = hand_in_to_a_keeper_that_dies(c, 4, tag="later")
        assert c.save(state(5), step=5).step == 5
        assert later.durable(WAIT_S).id == SnapshotId(2, 4)
        last = hand_in_to_a_keeper_that_dies(c, 6, tag="last")
    assert last.done()
    log = Journal.open(FileBackend(store)).refresh()
    assert {name: pair.step for name, pair in log.tags.items()} == {
        "best": 2,
        "later": 4,
        "last": 6,
    }
    assert ckpt.Checkpointer(store).restore(found := state(0), tag="best").step == 2
    assert torch.equal(found["w"]["w"], torch.full((8,), 2.0))


@pytest.mark.slow
@pytest.mark.parametrize("dies_at", [0, 1])
def test_two_ranks_hand_in_and_their_keeper_dies(
    store: Path, make_channels, monkeypatch, dies_at: int
) -> None:
    ranks = Ranks(store, make_channels, monkeypatch)
    ranks.durable([ranks.save(rank, 1) for rank in range(2)])
    dies_at_the_next_submission(ranks.sessions[dies_at])
    decided = [threading.Event() for _ in (2, 3)]  # rank 0 saved this step; 1 may not be ahead

    def go_on(rank: int) -> list[SnapshotId]:
        pending = []
        for step, at_0 in zip((2, 3), decided, strict=True):
            assert rank == 0 or at_0.wait(WAIT_S)
            pending.append(ranks.save(rank, step))
            if rank == 0:
                at_0.set()
        return [one.durable(WAIT_S).id for one in pending]

    first, second = ranks.pool.map(go_on, range(2))
    assert first == second
    assert [pair.step for pair in first] == [2, 3]
    assert first[0].epoch == 1
    ranks.finish()


def in_another_thread(call: Callable[[], object]) -> list[object]:
    """What the call returned or raised; fails if it does not end."""
    ended: list[object] = []

    def run() -> None:
        try:
            ended.append(call())
        except UnavailableError as error:
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(WAIT_S)
    assert ended, "it waits for ever"
    return ended


@pytest.mark.slow
def test_another_thread_than_the_saving_one_waits_for_a_bounded_time_and_closes(
    store: Path, monkeypatch
) -> None:
    monkeypatch.setattr(saving, "SUCCESSOR_WAIT_S", 0.5)
    c = ckpt.Checkpointer(store)
    c.save(state(1), step=1)
    pending = hand_in_to_a_keeper_that_dies(c, 2, tag="best")
    (error,) = in_another_thread(pending.durable)
    assert "the thread that saves has not replaced it" in str(error)
    assert not pending.done()
    assert in_another_thread(c.close) == [None]
    assert pending.durable(0).id == SnapshotId(1, 2)


@pytest.mark.slow
def test_rank_that_waits_alone_after_the_keepers_death_waits_for_a_bounded_time(
    store: Path, make_channels, monkeypatch
) -> None:
    monkeypatch.setattr(saving, "SUCCESSOR_WAIT_S", 0.5)
    monkeypatch.setattr(connected, "OPEN_WAIT_S", WAIT_S / 2)
    ranks = Ranks(store, make_channels, monkeypatch)
    ranks.durable([ranks.save(rank, 1) for rank in range(2)])
    dies_at_the_next_submission(ranks.sessions[0])
    first, second = (ranks.save(rank, 2) for rank in range(2))
    began_s = time.monotonic()
    with pytest.raises(UnavailableError, match="the save continues"):
        second.durable(0.5)  # rank 0 replaces nothing meanwhile
    assert time.monotonic() - began_s < WAIT_S / 3
    assert not second.done()

    def wait_alone() -> object:
        ranks.sessions[0].saving._saves_in = threading.get_ident()
        return first.durable()

    (error,) = in_another_thread(wait_alone)
    assert re.search(r"have not followed to the next one\. ranks=\[1\]", str(error))
    assert not first.done()
    assert second.durable(WAIT_S).id == SnapshotId(1, 2)
    assert first.durable(WAIT_S).id == SnapshotId(1, 2)
    ranks.finish()


@pytest.mark.slow
def test_without_another_keeper_this_process_makes_durable_what_it_had_handed_in(
    store: Path, monkeypatch
) -> None:
    with ckpt.Checkpointer(store) as c:
        c.save(state(1), step=1)
        pending = hand_in_to_a_keeper_that_dies(c, 2, tag="best")

        def none(spec: object, *, start: bool) -> None:
            raise UnavailableError("no keeper can be started")

        monkeypatch.setattr(keeper_link, "open_connections", none)
        assert pending.durable(WAIT_S).id == SnapshotId(1, 2)
        for step in range(3, 8):
            assert c.save(state(step), step=step).id == SnapshotId(2, step)
    assert Journal.open(FileBackend(store)).refresh().tags == {"best": SnapshotId(1, 2)}


@pytest.mark.slow
def test_what_no_keeper_can_take_up_fails_and_the_next_save_brings_it_along(store: Path) -> None:
    with ckpt.Checkpointer(store) as c:
        c.save(state(1), step=1)
        log = c._session._log
        real = log.newest_epoch
        pending = hand_in_to_a_keeper_that_dies(c, 2, tag="best")

        def away() -> int:
            log.newest_epoch = real  # type: ignore[method-assign]
            raise UnavailableError("the store is away")

        log.newest_epoch = away  # type: ignore[method-assign]
        with pytest.raises(UnavailableError, match="is away"):
            pending.durable(WAIT_S)
        assert c.save(state(3), step=3).id == SnapshotId(2, 3)
    assert Journal.open(FileBackend(store)).refresh().tags == {"best": SnapshotId(1, 2)}


@pytest.mark.slow
def test_what_failed_with_its_keeper_holds_no_slot_of_a_process_alone(
    store: Path, monkeypatch
) -> None:
    with ckpt.Checkpointer(store, slots=2) as c:
        c.save(state(1), step=1)
        log = c._session._log
        real = log.newest_epoch
        pending = hand_in_to_a_keeper_that_dies(c, 2, tag="best")

        def away() -> int:
            log.newest_epoch = real  # type: ignore[method-assign]
            raise UnavailableError("the store is away")

        log.newest_epoch = away  # type: ignore[method-assign]
        with pytest.raises(UnavailableError, match="is away"):
            pending.durable(WAIT_S)
        kill_keeper(c._session)  # the one that was started already

        def none(spec: object, *, start: bool) -> None:
            raise UnavailableError("no keeper can be started")

        monkeypatch.setattr(keeper_link, "open_connections", none)
        assert c.save(state(3), step=3).id == SnapshotId(2, 3)
        shown = c._session.saving.slots
        own = c._session.board.rank(0)
        assert [own.slot(slot.number).held for slot in shown] == [False, False]


@pytest.mark.slow
def test_second_death_is_mended_too(store: Path) -> None:
    session, _ = run_of(store)
    for step in (1, 2, 3):
        assert session.snapshot(step, metadata={}, tags=(), wait_s=1.0).durable(
            WAIT_S
        ).id == SnapshotId(step, step)
        kill_keeper(session)
    session.saving.drain()
    assert opens(store) == [(1, None), (2, SnapshotId(1, 1)), (3, SnapshotId(2, 2))]
    session.abandon()


@pytest.mark.slow
def test_without_another_keeper_this_process_goes_on_alone(store: Path, monkeypatch) -> None:
    session, told = run_of(store)
    session.snapshot(1, metadata={}, tags=(), wait_s=1.0).durable(WAIT_S)
    kill_keeper(session)

    def none(spec: object, *, start: bool) -> None:
        raise UnavailableError("no keeper can be started")

    monkeypatch.setattr(keeper_link, "open_connections", none)
    for step in range(2, 8):
        assert session.snapshot(step, metadata={}, tags=(), wait_s=WAIT_S).durable(
            WAIT_S
        ).id == SnapshotId(2, step)
    assert session.stage(9, metadata={})
    assert [event.kind for event in told if event.alarm] == ["no-keeper", "keeper-replaced"]
    session.finish()
    assert opens(store) == [(1, None), (2, SnapshotId(1, 1))]


@pytest.mark.slow
def test_store_that_is_away_at_that_moment_is_asked_again_at_the_next_snapshot(store: Path) -> None:
    session, _ = run_of(store)
    session.snapshot(1, metadata={}, tags=(), wait_s=1.0).durable(WAIT_S)
    kill_keeper(session)
    log = session._log
    fails = [UnavailableError("the store is away")]
    real = log.newest_epoch

    def newest() -> int:
        if fails:
            raise fails.pop()
        return real()

    log.newest_epoch = newest  # type: ignore[method-assign]
    with pytest.raises(UnavailableError, match="is away"):
        session.snapshot(2, metadata={}, tags=(), wait_s=1.0)
    assert session.snapshot(3, metadata={}, tags=(), wait_s=1.0).durable(WAIT_S).id == SnapshotId(
        2, 3
    )
    session.finish()


@pytest.mark.slow
def test_writer_that_took_over_meanwhile_is_not_fenced(store: Path) -> None:
    session, _ = run_of(store)
    session.snapshot(1, metadata={}, tags=(), wait_s=1.0).durable(WAIT_S)
    kill_keeper(session)
    Journal.open(FileBackend(store)).open_epoch(resume=SnapshotId(1, 1))
    with pytest.raises(FencedError, match="newest=2 epoch=1"):
        session.snapshot(2, metadata={}, tags=(), wait_s=1.0)
    assert opens(store) == [(1, None), (2, SnapshotId(1, 1))]
    session.abandon()


@pytest.mark.slow
def test_restoring_after_the_death_reads_the_store_and_the_next_save_finds_a_keeper(
    store: Path,
) -> None:
    with ckpt.Checkpointer(store) as c:
        c.save(state(1), step=1)
        c.save(state(2), step=2)
        kill_keeper(c._session)
        assert c.restore(state(0), step=1).step == 1
        assert c.save(state(5), step=2).id == SnapshotId(2, 2)
    assert opens(store) == [(1, None), (2, SnapshotId(1, 1))]


class Ranks:
    """Two sessions in two threads, each a rank."""

    def __init__(
        self, store: Path, make_channels: Callable, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made, mine = make_channels(2), threading.local()
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        monkeypatch.setattr(keeping, "connect_ranks", lambda *, name: made[mine.rank])

        def begin(rank: int) -> Session:
            mine.rank = rank
            session = Session(str(store), SessionOptions())
            session.open_run()
            session.track({"w": {"w": torch.full((8,), float(rank))}})
            return session

        self.pool = ThreadPoolExecutor(2)
        self.sessions = list(self.pool.map(begin, range(2)))

    def save(self, rank: int, step: int) -> ckpt.Pending:
        return self.sessions[rank].snapshot(step, metadata={}, tags=(), wait_s=1.0)

    def durable(self, pending: list[ckpt.Pending]) -> set[SnapshotId]:
        return {one.durable(WAIT_S).id for one in pending}

    def finish(self) -> None:
        list(self.pool.map(lambda session: session.finish(), self.sessions))


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("alone", [False, True])
def test_rank_0_decides_for_all_and_what_another_rank_missed_is_refused(
    store: Path, make_channels, monkeypatch, first: int, alone: bool
) -> None:
    ranks = Ranks(store, make_channels, monkeypatch)
    assert ranks.durable([ranks.save(rank, 1) for rank in range(2)]) == {SnapshotId(1, 1)}
    kill_keeper(*ranks.sessions)
    if alone:

        def none(spec: object, *, start: bool) -> None:
            raise UnavailableError("no keeper can be started")

        monkeypatch.setattr(keeper_link, "open_connections", none)
    second = {rank: ranks.save(rank, 2) for rank in (first, 1 - first)}
    third = [ranks.save(rank, 3) for rank in range(2)]
    assert ranks.durable(third) == {SnapshotId(2, 3)}
    if first == 0:
        assert ranks.durable(list(second.values())) == {SnapshotId(2, 2)}
    else:
        for pending in second.values():
            with pytest.raises(UnavailableError):
                pending.durable(WAIT_S)
    ranks.finish()
    assert opens(store) == [(1, None), (2, SnapshotId(1, 1))]


@pytest.mark.slow
@pytest.mark.parametrize("alone", [False, True])
def test_ranks_that_restore_after_the_death_open_their_epoch_together(
    store: Path, make_channels, monkeypatch, alone: bool
) -> None:
    ranks = Ranks(store, make_channels, monkeypatch)
    ranks.durable([ranks.save(rank, 1) for rank in range(2)])
    kill_keeper(*ranks.sessions)
    if alone:

        def none(spec: object, *, start: bool) -> None:
            raise UnavailableError("no keeper can be started")

        monkeypatch.setattr(keeper_link, "open_connections", none)

    def back(session: Session) -> ckpt.Pending:
        session.restore(state(), session.newest_first, FillRules())
        return session.save(state(), 2, metadata={}, tags=())

    assert ranks.durable(list(ranks.pool.map(back, ranks.sessions))) == {SnapshotId(2, 2)}
    ranks.finish()
    assert opens(store) == [(1, None), (2, SnapshotId(1, 1))]
