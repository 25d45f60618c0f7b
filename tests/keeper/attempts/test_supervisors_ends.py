"""How attempts and launches end, and begin: who waits for whom, and what is never started again."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest
from kit.keepers.served import (
    Peer,
    Served,
    Trainer,
    die,
    end_well,
    gone,
    open_epoch,
    started,
    until,
)

from ckpt.backends.file.store import FileBackend
from ckpt.ipc import messages as words
from ckpt.ipc.messages import Policy, Welcome
from ckpt.keeper import daemon as daemon_module
from ckpt.keeper.attempts import hang_watch as watch_module
from ckpt.keeper.attempts import supervisors as crew_module
from ckpt.log.journal import Journal
from ckpt.values import SnapshotId, TrainerPhase

Serve = Callable[..., Served]
PAIR = SnapshotId(1, 5)


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon_module, "TICK_S_MAX", 0.05)


@pytest.fixture
def hold_commits(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """No commit is written before the event is set."""
    go_on, write = threading.Event(), Journal.commit
    monkeypatch.setattr(
        Journal, "commit", lambda *args, **named: go_on.wait(10) and write(*args, **named)
    )
    return go_on


def staged_by(served: Served, ranks: int) -> tuple[list[Peer], list[Trainer]]:
    """A crew whose trainers have staged a pair in their first attempt."""
    crew = served.supervisors(ranks)
    started(crew)
    some = [served.trainer(rank, ranks, attempt=1) for rank in range(ranks)]
    open_epoch(some[0])
    for one in some:
        one.stage(PAIR)
    return crew, some


def durable(served: Served) -> list[SnapshotId]:
    return [entry.snapshot for entry in Journal.open(FileBackend(served.store)).refresh().snapshots]


def test_nobody_leaves_before_what_only_memory_holds_is_durable(
    serve: Serve, hold_commits: threading.Event
) -> None:
    served = serve(Policy(linger_s=30.0, hang_s=0.0))
    crew, some = staged_by(served, 2)
    some[0].calls.send(
        words.Failing(kind="UsageError", text="wrong", fingerprint="u", step=0, final=True)
    )
    for one in some:
        one.leave(planned=False)
    die(crew, 1, rank=0, status=2)
    assert "leaving when what is staged is in the store" in crew[0].next(words.PrintLine).text
    assert served.report().state == "over"
    assert not any(one.so_far(words.Leave) for one in crew)
    hold_commits.set()
    for one in crew:
        assert one.next(words.Leave).status == 2
    assert durable(served) == [PAIR]
    gone(crew, [])
    assert served.ends()


def test_what_only_memory_holds_is_durable_though_all_ended_well(serve: Serve) -> None:
    served = serve(Policy(linger_s=0.0, hang_s=0.0))
    crew, some = staged_by(served, 2)
    for one in some:
        one.leave()
    end_well(crew, 1)
    assert served.ends()
    assert durable(served) == [PAIR]


@pytest.mark.slow
def test_a_store_that_takes_too_long_holds_nobody_longer_than_the_grace_time(
    serve: Serve, hold_commits: threading.Event
) -> None:
    served = serve(Policy(linger_s=30.0, hang_s=0.0, grace_s=0.3))
    crew, some = staged_by(served, 1)
    began_s = time.monotonic()
    crew[0].say(words.Preempt(grace_s=0.3))
    assert crew[0].next(words.Kill).attempt == 1
    some[0].leave(planned=False)
    crew[0].say(words.Killed(attempt=1))
    assert crew[0].next(words.Leave).status == 75
    assert 0.25 < time.monotonic() - began_s < 5.0
    hold_commits.set()
    gone(crew, [])
    assert served.ends()
    assert durable(served) == [PAIR]


def test_preempted_job_that_waits_for_no_store_says_that_its_last_step_is_not_durable(
    serve: Serve, hold_commits: threading.Event
) -> None:
    served = serve(Policy(linger_s=0.0, hang_s=0.0))
    crew, some = staged_by(served, 1)
    crew[0].say(words.Preempt(grace_s=0.05))
    assert crew[0].next(words.Kill).attempt == 1
    some[0].leave(planned=False)
    crew[0].say(words.Killed(attempt=1))
    leave = crew[0].next(words.Leave)
    assert leave.status == 75
    assert "step 5 is staged and not durable" in leave.text
    hold_commits.set()
    gone(crew, [])
    assert served.ends()


def test_preempted_job_knows_what_an_earlier_keeper_made_durable(serve: Serve) -> None:
    served = serve(Policy(linger_s=30.0, hang_s=0.0))
    crew, some = staged_by(served, 1)
    some[0].hand_in(PAIR, index=0)
    assert some[0].outcome().info is not None
    slot, board_fd = some[0].slots[0], os.dup(some[0].board.fd)
    served.crash()
    after = serve(Policy(linger_s=30.0, hang_s=0.0))
    peer = after.peer(role="supervisor", ranks=1, attempt=1, holds=True)
    assert peer.next(Welcome).new
    peer.say(words.BoardKept(), [board_fd])
    peer.say(words.SlotKept(rank=0, index=0, size_bytes=slot.size_bytes), [slot.fd])
    os.close(board_fd)
    peer.say(words.Killed(attempt=1))
    begun = started([peer])
    peer.say(words.Preempt(grace_s=0.05))
    peer.next(words.Kill)
    peer.say(words.Killed(attempt=begun.attempt))
    leave = peer.next(words.Leave)
    assert (leave.status, leave.text[-17:]) == (143, "step 5 is durable")
    for one in (*some, *crew):
        one.leave(planned=False)
    gone([peer], [])
    assert after.ends()


@pytest.mark.slow
def test_a_lost_supervisor_holds_the_others_not(
    serve: Serve, hold_commits: threading.Event
) -> None:
    served = serve(Policy(linger_s=30.0, hang_s=0.0))
    crew, some = staged_by(served, 2)
    crew[0].leave(planned=False)
    assert crew[1].next(words.Kill).attempt == 1
    for one in some:
        one.leave(planned=False)
    crew[1].say(words.Killed(attempt=1))
    assert crew[1].next(words.Leave).status == 1
    assert durable(served) == []
    hold_commits.set()
    gone(crew[1:], [])
    until(lambda: served.report().durable is not None)


def test_what_a_supervisor_holds_is_handed_over_before_the_first_attempt(serve: Serve) -> None:
    served = serve()
    crew, some = staged_by(served, 1)
    slot, board_fd = some[0].slots[0], os.dup(some[0].board.fd)
    served.crash()
    after = serve()
    peer = after.peer(role="supervisor", ranks=1, attempt=0, holds=True)
    assert peer.next(Welcome).new
    peer.say(words.BoardKept(), [board_fd])
    peer.say(words.SlotKept(rank=0, index=0, size_bytes=slot.size_bytes), [slot.fd])
    os.close(board_fd)
    assert after.report().state == "gathering"
    assert peer.so_far(words.Start) == []
    peer.say(words.Killed(attempt=0))
    begun = started([peer])
    anew = after.trainer(0, 1, attempt=begun.attempt)
    assert anew.board.newest_complete() == PAIR
    anew.leave()
    for one in some:
        one.leave(planned=False)
    for one in crew:
        one.leave(planned=False)
    end_well([peer], begun.attempt)
    assert after.ends()


def test_ranks_that_do_not_come_are_named_and_then_given_up(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve()
    one = served.peer(role="supervisor", rank=1, ranks=4)
    other = served.peer(role="supervisor", rank=2, ranks=4)
    for peer in (one, other):
        peer.next(Welcome)
    monkeypatch.setattr(crew_module, "GATHER_REPORT_S", 0.0)
    for peer in (one, other):
        told = peer.next(words.PrintLine)
        assert told.alarm
        assert "missing on this node: 0, 3 of 4" in told.text
    (event,) = served.told("missing")
    assert "LOCAL_WORLD_SIZE" in event.text
    monkeypatch.setattr(crew_module, "GATHER_MAX_S", 0.0)
    for peer in (one, other):
        leave = peer.next(words.Leave)
        assert leave.status == 1
        assert "0, 3 of 4" in leave.text
        assert peer.so_far(words.PrintLine) == []
        peer.leave()


def test_the_rest_of_a_program_is_not_run_again(serve: Serve) -> None:
    served = serve()
    crew = served.supervisors(2)
    started(crew)
    some = [served.trainer(rank, 2, attempt=1) for rank in range(2)]
    some[1].calls.send(words.Finished())
    for one in some:
        one.leave(planned=False)
    die(crew, 1, rank=1, status=3)
    for one in crew:
        leave = one.next(words.Leave)
        assert leave.status == 3
        assert "had returned" in leave.text
        one.leave()
    assert served.ends()


def test_a_training_function_that_is_called_again_is_started_again(serve: Serve) -> None:
    served = serve()
    crew = served.supervisors(1)
    started(crew)
    one = served.trainer(attempt=1)
    one.calls.send(words.Finished())
    one.calls.send(words.Phase(name="entered", at_s=time.monotonic()))
    one.leave(planned=False)
    die(crew, 1, status=3)
    assert started(crew).attempt == 2
    end_well(crew, 2)


def test_ctrl_c_ends_the_job_as_the_shell_expects(serve: Serve) -> None:
    served = serve()
    crew = served.supervisors(2)
    started(crew)
    die(crew, 1, rank=0, status=-2)
    for one in crew:
        assert one.next(words.Leave).status == 130
        one.leave()


@pytest.mark.slow
def test_a_folder_of_stacks_that_was_taken_away_hides_no_hang(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "STACKS_WAIT_S", 0.3)
    served = serve(Policy(linger_s=0.0, hang_s=0.3))
    crew = served.supervisors(1)
    started(crew)
    one = served.trainer(attempt=1)
    served.folder.stacks.rmdir()
    words_of = one.board.rank(0)
    words_of.phase, words_of.first_step_done = TrainerPhase.TRAINING, True
    words_of.beat(3)
    crew[0].next(words.Dump)
    crew[0].next(words.Kill)
    crew[0].say(words.Killed(attempt=1))
    assert "the process did not answer" in crew[0].next(words.PrintLine).text
    one.leave(planned=False)
    end_well(crew, started(crew).attempt)


def test_supervisors_are_welcome_before_anything_of_a_store_is_made(serve: Serve) -> None:
    served = serve()
    crew = served.supervisors(2)
    begun = started(crew)
    assert served.daemon._job.state.uploads.current is None
    one = served.trainer(0, 2, attempt=begun.attempt)
    assert open_epoch(one) == 1
    assert served.daemon._job.state.uploads.current is not None
    one.leave()
    end_well(crew, begun.attempt)
