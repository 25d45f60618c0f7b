"""Supervisors and a real keeper: attempts, deaths, hangs, preemption, and another keeper after this
one."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from kit.keepers.served import (
    POLICY,
    Peer,
    Served,
    Trainer,
    die,
    end_well,
    gone,
    kept,
    open_epoch,
    started,
    until,
)
from kit.keepers.slot_makers import MadeSlot

from ckpt.backends.file.store import FileBackend
from ckpt.ipc import messages as answers
from ckpt.ipc import messages as words
from ckpt.ipc.board import Board
from ckpt.ipc.messages import Choices, GetChoices, Number, OpenEpoch, Persist, Policy, Welcome
from ckpt.keeper import daemon as daemon_module
from ckpt.keeper.attempts import hang_watch as watch_module
from ckpt.keeper.job_state import JobUploads
from ckpt.log.journal import Journal
from ckpt.values import SnapshotId, TrainerPhase

Serve = Callable[..., Served]
PAIR = SnapshotId(1, 5)
ERROR = words.Failing(kind="ValueError", text="bad", fingerprint="f", step=3)


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon_module, "TICK_S_MAX", 0.05)


def trainers(served: Served, ranks: int, attempt: int) -> list[Trainer]:
    return [served.trainer(rank, ranks, attempt=attempt) for rank in range(ranks)]


def test_a_death_starts_all_anew_on_another_port_with_an_empty_room(serve: Serve) -> None:
    served = serve()
    crew = served.supervisors(2)
    first = started(crew)
    some = trainers(served, 2, 1)
    some[0].calls.send(words.Post(key="k", value=b"dead"))
    assert [one.board.attempt for one in some] == [1, 1]
    for one in some:
        one.leave(planned=False)
    die(crew, first.attempt, rank=1)
    second = started(crew)
    assert (first.attempt, second.attempt) == (1, 2)
    assert second.port != first.port
    assert served.report().state == "running"
    (anew,) = [served.trainer(0, 2, attempt=2)]
    assert anew.calls.ask(words.Peek(key="k"), answers.Value).value is None
    assert anew.board.attempt == 2
    anew.leave()
    end_well(crew, 2)
    assert served.ends()


def test_slots_outlive_the_attempt_and_what_it_handed_in_becomes_durable(serve: Serve) -> None:
    served = serve()
    crew = served.supervisors(2)
    started(crew)
    some = trainers(served, 2, 1)
    open_epoch(some[0])
    some[0].hand_in(PAIR)
    some[1].stage(PAIR)  # dies before it hands it in
    for one in crew:
        assert len(one.so_far(words.Keep)) == 2 or one.next(words.Keep)
    for one in some:
        one.leave(planned=False)
    die(crew, 1)
    started(crew)
    anew = trainers(served, 2, 2)
    found = anew[0].calls.ask(words.GetChoices(), answers.Choices).choices
    assert found[0] == answers.Choice(PAIR, "staged")
    until(lambda: served.report().durable is not None)
    assert open_epoch(anew[0], PAIR) == 2
    for one in anew:
        one.leave()
    end_well(crew, 2)
    assert served.ends()
    entries = Journal.open(FileBackend(served.store)).refresh().snapshots
    assert [entry.snapshot for entry in entries] == [PAIR]


def test_words_that_a_dead_trainer_left_in_its_socket_count(serve: Serve) -> None:
    served = serve()
    crew = served.supervisors(2)
    started(crew)
    some = trainers(served, 2, 1)
    go_on = served.pause()
    # Its death is heard before its last words are read, and its connections end in the same breath.
    crew[1].say(words.Died(attempt=1, status=1, at_s=time.monotonic()))
    some[1].calls.send(ERROR)
    for one in some:
        one.leave(planned=False)
    go_on.set()
    for one in crew:
        one.next(words.Kill)
        one.say(words.Killed(attempt=1))
    assert started(crew).attempt == 2
    die(crew, 2, rank=0)
    started(crew)
    assert served.failed is None
    end_well(crew, 3)


def test_the_same_error_twice_ends_the_job_with_its_status(serve: Serve) -> None:
    served = serve()
    crew = served.supervisors(2)
    for attempt in (1, 2):
        started(crew)
        trainer = served.trainer(1, 2, attempt=attempt)
        trainer.calls.send(ERROR)
        trainer.leave(planned=False)
        die(crew, attempt, rank=1, status=3)
    for one in crew:
        leave = one.next(words.Leave)
        assert leave.status == 3
        assert "a bug" in leave.text
        one.leave()
    assert served.ends()


@pytest.mark.slow
def test_a_job_that_is_given_up_leaves_its_newest_pair_durable(serve: Serve) -> None:
    served = serve(Policy(linger_s=30.0, hang_s=0.0))
    crew = served.supervisors(2)
    started(crew)
    some = trainers(served, 2, 1)
    open_epoch(some[0])
    for one in some:
        one.stage(PAIR)
    crew[0].leave(planned=False)
    assert crew[1].next(words.Kill).attempt == 1
    for one in some:
        one.leave(planned=False)
    crew[1].say(words.Killed(attempt=1))
    assert "cut off" in crew[1].next(words.Leave).text
    crew[1].leave()
    until(lambda: served.store.exists() and served.report().durable is not None)
    assert served.report().state == "lingering"


def test_a_supervisor_that_comes_too_late_is_told_to_go(serve: Serve) -> None:
    served = serve()
    first = served.peer(role="supervisor", rank=0, ranks=3)
    second = served.peer(role="supervisor", rank=1, ranks=3)
    for one in (first, second):
        one.next(Welcome)
    first.leave(planned=False)
    assert second.next(words.Leave).status == 1
    late = served.peer(role="supervisor", rank=2, ranks=3)
    assert late.next(words.Leave).status == 1
    second.leave()
    late.leave()


def beat(one: Trainer, completed: int) -> None:
    words_of = one.board.rank(one.rank)
    words_of.phase, words_of.first_step_done = TrainerPhase.TRAINING, True
    words_of.beat(completed)


@pytest.mark.slow
def test_a_hang_is_dumped_told_and_started_anew(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "STACKS_WAIT_S", 60.0)
    served = serve(Policy(linger_s=0.0, hang_s=0.3))
    crew = served.supervisors(2)
    started(crew)
    some = trainers(served, 2, 1)
    beat(some[0], 4)
    beat(some[1], 3)
    for one in crew:
        Path(one.next(words.Dump).path).write_text(f"stack of {one.hello.rank}")
    for one in crew:
        one.next(words.Kill)
        one.say(words.Killed(attempt=1))
    assert "rank 1 hangs here:\nstack of 1" in [
        tell.text for tell in crew[0].so_far(words.PrintLine)
    ]
    gone_now = started(crew)
    for one in some:
        one.leave(planned=False)
    end_well(crew, gone_now.attempt)


@pytest.mark.slow
def test_a_hang_after_another_rank_ended_ends_the_job(serve: Serve) -> None:
    served = serve(Policy(linger_s=0.0, hang_s=0.3))
    crew = served.supervisors(2)
    started(crew)
    some = trainers(served, 2, 1)
    end_well(crew[:1], 1)
    some[0].leave(planned=False)
    beat(some[1], 3)
    Path(crew[1].next(words.Dump).path).write_text("stack")
    crew[1].next(words.Kill)
    crew[1].say(words.Killed(attempt=1))
    leave = crew[1].next(words.Leave)
    assert "hangs" in leave.text
    assert "after another rank had ended" in leave.text
    gone(crew[1:], some[1:])


def test_a_preempted_job_stops_and_is_not_started_again(serve: Serve) -> None:
    served = serve()
    crew = served.supervisors(2)
    started(crew)
    first = served.trainer(0, 2, attempt=1)
    crew[1].say(words.Preempt(grace_s=5.0))
    assert 0 < first.events.next(words.Stop).grace_s <= 5.0
    late = served.trainer(1, 2, attempt=1)
    assert 0 < late.events.next(words.Stop).grace_s <= 5.0
    gone([], [first, late])
    for one in crew:
        one.say(words.Died(attempt=1, status=143, at_s=time.monotonic()))
        assert one.next(words.Leave).status == 143
        one.leave()
    assert served.ends()


def test_a_preempted_job_that_takes_too_long_is_killed(serve: Serve) -> None:
    served = serve()
    crew = served.supervisors(1)
    started(crew)
    crew[0].say(words.Preempt(grace_s=0.1))
    assert crew[0].next(words.Kill).attempt == 1
    crew[0].say(words.Killed(attempt=1))
    assert crew[0].next(words.Leave).status == 143
    crew[0].leave()


def test_a_recovery_is_told_in_one_line_and_kept_for_tools(serve: Serve) -> None:
    served = serve()
    crew = served.supervisors(1)
    started(crew)
    die(crew, 1)
    started(crew)
    anew = served.trainer(0, 1, attempt=2)
    for name in ("entered", "tracked", "restored", "first-step"):
        anew.calls.send(words.Phase(name=name, at_s=time.monotonic()))
    failed, line = (crew[0].next(words.PrintLine).text for _ in range(2))
    assert failed == "attempt 1 failed: rank 0 died of SIGKILL; the next one starts now"
    assert re.match(r"recovered in \d+\.\d{3} s: ", line)
    (facts,) = served.report().recoveries
    assert (facts["attempt"], facts["why"], facts["how"]) == (2, "rank 0 died of SIGKILL", "fork")
    assert {"kill_s", "fork_s", "build_s", "restore_s", "step_s"} <= set(facts)
    anew.leave()
    end_well(crew, 2)


def test_hang_in_the_first_step_is_warned_of_and_ended(serve: Serve) -> None:
    served = serve(Policy(linger_s=0.0, hang_s=0.2, start_s=0.6))
    crew = served.supervisors(1)
    started(crew)
    (trainer,) = trainers(served, 1, 1)
    trainer.board.rank(0).phase = TrainerPhase.TRAINING
    assert "the first step has taken" in crew[0].next(words.PrintLine).text
    crew[0].next(words.Kill)
    assert served.told("slow-start")
    trainer.leave(planned=False)
    crew[0].say(words.Killed(attempt=1))
    started(crew)
    end_well(crew, 2)


def test_preempted_job_ends_within_its_grace_and_says_that_its_last_step_is_not_durable(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(JobUploads, "idle", property(lambda self: False))
    monkeypatch.setattr(JobUploads, "flush_newest", lambda self: None)  # the store is away
    served = serve(Policy(grace_s=2.0, linger_s=30.0, hang_s=0.0))
    crew = served.supervisors(1)
    started(crew)
    (trainer,) = trainers(served, 1, 1)
    trainer.stage(PAIR)
    began_s = time.monotonic()
    crew[0].say(words.Preempt(grace_s=2.0))
    assert trainer.events.next(words.Stop).grace_s <= 1.6
    crew[0].next(words.Kill)
    trainer.leave(planned=False)
    crew[0].say(words.Killed(attempt=1))
    leave = crew[0].next(words.Leave)
    assert time.monotonic() - began_s < 2.5
    assert leave.status == 75
    assert "step 5 is staged and not durable" in leave.text
    crew[0].leave()
    monkeypatch.undo()


def test_the_next_keeper_gets_slots_and_board_and_numbers_go_on(serve: Serve) -> None:
    served = serve()
    crew = served.supervisors(2)
    started(crew)
    die(crew, 1)
    assert started(crew).attempt == 2
    some = trainers(served, 2, 2)
    open_epoch(some[0])
    for one in some:
        one.stage(PAIR)
    some[0].board.rank(0).hold(0)  # of an upload that died with the keeper
    slots = [one.slots[0] for one in some]
    for one in crew:
        until(
            lambda one=one: (
                len(kept(one)[1]) == 2
                if not one.so_far(words.Keep)
                else len(one.so_far(words.Keep)) == 2
            )
        )
    served.crash()
    assert all(one.ended() for one in crew)

    after = serve()
    board_fd = os.dup(some[0].board.fd)
    anew = []
    for rank in range(2):
        peer = after.peer(role="supervisor", rank=rank, ranks=2, attempt=2)
        assert peer.next(Welcome).new
        peer.say(words.BoardKept(), [board_fd])
        for owner, slot in enumerate(slots):
            peer.say(words.SlotKept(rank=owner, index=0, size_bytes=slot.size_bytes), [slot.fd])
        anew.append(peer)
    os.close(board_fd)
    assert anew[0].so_far(words.Start) == [], "nothing starts before all of the old attempt is dead"
    for peer in anew:
        peer.say(words.Killed(attempt=2))
    assert started(anew).attempt == 3
    third = after.trainer(0, 2, attempt=3)
    assert third.board.attempt == 3
    assert third.calls.ask(words.GetChoices(), answers.Choices).choices == (
        answers.Choice(PAIR, "staged"),
    )
    assert third.board.newest_complete() == PAIR
    assert not third.board.rank(0).slot(0).held
    assert some[0].board.attempt == 3, "it is the same board"
    third.leave()
    for one in some:
        one.leave(planned=False)
    for peer in crew:
        peer.leave(planned=False)
    end_well(anew, 3)
    assert after.ends()


def handed_over(served: Served, slots: Sequence[MadeSlot], *, ranks: int) -> list[Peer]:
    """The supervisors of an attempt that lost its keeper give their slots to the next one."""
    peers = []
    for rank in range(ranks):
        peer = served.peer(role="supervisor", rank=rank, ranks=ranks, attempt=2)
        peer.next(Welcome)
        for owner, slot in enumerate(slots):
            peer.say(words.SlotKept(rank=owner, index=0, size_bytes=slot.size_bytes), [slot.fd])
        peer.say(words.Killed(attempt=2))
        peers.append(peer)
    return peers


def test_what_was_handed_in_to_a_keeper_that_died_is_made_durable_by_the_next(
    serve: Serve,
) -> None:
    served = serve()
    some = [served.trainer(rank, 2) for rank in range(2)]
    epoch = some[0].calls.ask(OpenEpoch(resume=None), Number)
    slots = [MadeSlot() for _ in range(2)]
    for rank, slot in enumerate(slots):
        slot.seal(PAIR, rank=rank, ranks=2, origin=epoch.origin)
    assert slots[1].header.hand_in(("best",)), "one of them came to it"
    for one in some:
        one.leave(planned=False)
    served.crash()

    after = serve()
    peers = handed_over(after, slots, ranks=2)
    assert started(peers).attempt == 3
    third = after.trainer(0, 2, attempt=3)
    assert [one.snapshot for one in third.calls.ask(GetChoices(), Choices).choices] == [PAIR]
    open_epoch(third, PAIR)
    assert third.outcome().info is not None
    log = Journal.open(FileBackend(after.store)).refresh()
    assert log.tags == {"best": PAIR}
    third.leave()
    end_well(peers, 3)
    assert after.ends()
    for slot in slots:
        slot.close()


def test_of_what_was_handed_in_only_the_tag_may_be_missing(serve: Serve) -> None:
    served = serve()
    trainer = served.trainer()
    epoch = trainer.calls.ask(OpenEpoch(resume=None), Number)
    slot = trainer.slots[0] = trainer.make(0)
    slot.seal(PAIR, ranks=1, origin=epoch.origin)
    slot.header.hand_in(("best", "old"))
    trainer.board.rank(0).hold(0)
    trainer.calls.send(Persist(snapshot=PAIR, index=0, generation=1, tags=("old",)))
    assert trainer.outcome().info is not None
    kept = MadeSlot()
    kept.memory[:] = slot.memory
    trainer.leave(planned=False)
    served.crash()

    after = serve()
    (peer,) = handed_over(after, [kept], ranks=1)
    started([peer])
    second = after.trainer(attempt=3)
    second.calls.ask(GetChoices(), Choices)
    open_epoch(second, PAIR)
    log = Journal.open(FileBackend(after.store))
    until(lambda: log.refresh().tags == {"best": PAIR, "old": PAIR})
    second.leave()
    end_well([peer], 3)
    assert after.ends()
    kept.close()


def test_a_keeper_takes_no_board_that_is_none(serve: Serve) -> None:
    served = serve()
    peer = served.peer(role="supervisor", attempt=4, ranks=1)
    peer.next(Welcome)
    fd = os.memfd_create("no-board")
    other = Board.create(3)
    peer.say(words.BoardKept(), [fd])
    peer.say(words.BoardKept(), [other.fd])
    peer.say(words.Killed(attempt=4))
    assert started([peer]).attempt == 5
    assert served.told("refused")
    os.close(fd)
    other.close()
    end_well([peer], 5)


def test_policy_of_the_first_hello_holds(serve: Serve) -> None:
    served = serve(POLICY)
    crew = served.supervisors(1, policy=Policy(stuck_max=1, linger_s=0.0, hang_s=0.0))
    started(crew)
    die(crew, 1)
    assert "without one new step" in crew[0].next(words.Leave).text
    crew[0].leave()


def test_a_rank_that_ended_while_there_was_no_keeper_is_not_started_again(serve: Serve) -> None:
    served = serve()
    for attempt, status in ((4, 0), (5, -9)):
        peer = served.peer(role="supervisor", attempt=attempt, ranks=1, launch=f"l{attempt}")
        peer.next(Welcome)
        peer.say(words.Died(attempt=attempt, status=status, at_s=time.monotonic()))
        peer.say(words.Killed(attempt=attempt))
        if status:
            assert started([peer]).attempt == attempt + 1
            end_well([peer], attempt + 1)
        else:
            another = served.wire()  # keeps the keeper for the second one
            assert peer.next(words.Leave) == words.Leave(status=0)
            assert peer.so_far(words.Start) == []
            peer.leave()
    another.close()
