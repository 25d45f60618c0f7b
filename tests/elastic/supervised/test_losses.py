"""What is lost on the way: the keeper, several of them, and trainers that were prepared for it."""

from __future__ import annotations

import os
import signal
import time

import pytest

from ckpt.ipc.board import Board, now_ns
from ckpt.ipc.messages import (
    BoardKept,
    Bye,
    Died,
    DropSlot,
    Keep,
    KeepBoard,
    Kill,
    Killed,
    Leave,
    Preempt,
    SlotKept,
    Start,
    Started,
    StartPrepared,
)

AHEAD = (
    "seat = sit(prepare=True)\n"
    "say('built', seat.attempt, os.getpid())\n"
    "seat = seat.promoted()\n"
    "say('live', seat.attempt, seat.port, seat.how, os.environ['MASTER_PORT'], "
    "trainer_of_process() == seat, os.getpid())\n"
    "seat.first_step_done()\n"
    "forever()\n"
)


def memfd(text: bytes) -> int:
    """Shared memory that says ``text``."""
    fd = os.memfd_create("test")
    os.write(fd, text)
    return fd


@pytest.mark.slow
def test_lost_keeper_ends_the_trainer_and_the_next_one_gets_what_was_held(
    program, keeper, alive
) -> None:
    run = program("sit()\nforever()\n")
    link = keeper.accept()
    first = link.start().trainer_pid
    sent = [memfd(text) for text in (b"old", b"slot", b"gone", b"board")]
    link.send(Keep(rank=0, index=2, size_bytes=4), sent[:1])
    link.send(Keep(rank=0, index=2, size_bytes=4), sent[1:2])
    link.send(Keep(rank=0, index=3, size_bytes=4), sent[2:3])
    link.send(KeepBoard(), sent[3:])
    link.send(DropSlot(rank=0, index=3))
    for fd in sent:
        os.close(fd)
    link.close()

    link = keeper.accept(new=True, attempt=1)
    assert (link.hello.attempt, link.hello.pid) == (1, run.pid)
    assert not alive(first)
    link.expect(BoardKept)
    slot = link.expect(SlotKept)
    assert (slot.rank, slot.index, slot.size_bytes) == (0, 2, 4)
    assert link.expect(Killed).attempt == 1
    assert [os.pread(fd, 9, 0) for _, fd in link.fds] == [b"board", b"slot"]
    assert alive(link.start(attempt=2).trainer_pid)
    link.close()

    link = keeper.accept(attempt=2)  # one that knows it: nothing is handed over
    assert link.expect(Killed).attempt == 2
    link.start(attempt=3)
    link.send(Leave(status=0))
    link.expect(Bye)
    assert run.end() == 0


@pytest.mark.slow
def test_supervisor_whose_attempt_never_began_hands_over_what_it_held_and_says_so_first(
    program, keeper
) -> None:
    run = program("sit()\nforever()\n")
    link = keeper.accept()
    assert not link.hello.holds
    sent = [memfd(b"slot"), memfd(b"board")]
    link.send(Keep(rank=0, index=1, size_bytes=4), sent[:1])
    link.send(KeepBoard(), sent[1:])
    for fd in sent:
        os.close(fd)
    link.close()

    link = keeper.accept(new=True)
    assert (link.hello.attempt, link.hello.pid, link.hello.holds) == (0, run.pid, True)
    link.expect(BoardKept)
    assert link.expect(SlotKept).index == 1
    assert link.expect(Killed).attempt == 0
    link.start(attempt=1)


@pytest.mark.slow
def test_keeper_that_ends_at_the_hello_is_followed_by_another_and_is_none_that_died(
    program, keeper
) -> None:
    run = program("sit()\nforever()\n")
    keeper.accept().close()
    for _ in range(8):
        keeper.hang_up()
    link = keeper.accept()
    link.start()
    link.send(Leave(status=0))
    link.expect(Bye)
    assert run.end() == 0


@pytest.mark.slow
def test_end_that_a_dead_keeper_may_not_have_noted_is_told_again(program, keeper) -> None:
    run = program("sit()\n")
    link = keeper.accept()
    link.start()
    assert link.expect(Died).status == 0
    link.close()
    link = keeper.accept(new=True, attempt=1)
    died = link.expect(Died)
    assert (died.attempt, died.status) == (1, 0)
    assert link.expect(Killed).attempt == 1
    link.send(Leave(status=0))
    assert run.end() == 0


@pytest.mark.slow
def test_preemption_is_told_again_to_a_new_keeper(program, keeper) -> None:
    run = program("sit()\nforever()\n")
    link = keeper.accept()
    link.start()
    os.kill(run.pid, signal.SIGTERM)
    link.expect(Preempt)
    link.close()
    link = keeper.accept(attempt=1)
    link.expect(Preempt)
    assert link.expect(Killed).attempt == 1


@pytest.mark.slow
def test_keeper_that_cannot_be_had_again_ends_the_program_with_a_message(
    program, keeper, until, alive
) -> None:
    run = program(
        "from ckpt.errors import UnavailableError\n"
        "def nobody():\n    raise UnavailableError('no keeper')\n"
        "sit(reconnect=nobody)\nforever()\n"
    )
    link = keeper.accept()
    pid = link.start().trainer_pid
    link.close()
    assert run.line() == "ckpt: no keeper"
    assert run.end() == 11
    until(lambda: not alive(pid))


@pytest.mark.slow
def test_keepers_that_die_one_after_the_other_end_the_program(program, keeper) -> None:
    run = program("sit()\nforever()\n")
    keeper.accept().close()
    for _ in range(5):
        keeper.accept(attempt=0).close()
    assert run.line().startswith("ckpt: keepers die one after another")
    assert run.end() == 11


@pytest.mark.slow
def test_prepared_trainer_runs_ahead_and_takes_the_next_attempt(program, keeper, alive) -> None:
    run = program(AHEAD)
    link = keeper.accept()
    first = link.start(attempt=1, port=11).trainer_pid
    assert run.line() == f"built 1 {first}"
    assert run.line() == f"live 1 11 fork 11 True {first}"
    word, attempt, ahead = run.line().split()
    assert (word, attempt) == ("built", "0")
    os.kill(first, signal.SIGKILL)
    link.expect(Died)
    link.send(Start(attempt=2, port=22))
    started = link.expect(Started)
    assert (started.how, started.attempt, started.trainer_pid) == ("prepared", 2, int(ahead))
    assert run.line() == f"live 2 22 prepared 22 True {ahead}"
    word, attempt, third = run.line().split()
    assert (word, attempt) == ("built", "0")
    link.send(Kill(attempt=2))
    assert link.expect(Killed).attempt == 2
    assert alive(int(third)), "a kill is for the attempt that failed"
    link.send(Leave(status=3))
    link.expect(Bye)
    assert run.end() == 3
    assert not alive(int(third))


@pytest.mark.slow
def test_prepared_trainer_that_dies_is_replaced_by_a_fork(program, keeper) -> None:
    run = program(AHEAD)
    link = keeper.accept()
    link.start(attempt=1, port=11)
    lines = [run.line() for _ in range(3)]
    ahead = int(lines[2].split()[2])
    os.kill(ahead, signal.SIGKILL)
    assert run.line() == "prepared-died"
    link.send(Kill(attempt=1))
    link.expect(Killed)
    assert link.start(attempt=2, port=22).how == "fork"


@pytest.mark.slow
def test_trainer_runs_ahead_on_a_standby_where_the_program_wants_it(program, keeper) -> None:
    run = program(AHEAD)
    link = keeper.accept()
    link.send(StartPrepared())
    word, attempt, ahead = run.line().split()
    assert (word, attempt) == ("built", "0")
    link.send(Start(attempt=7, port=22))
    started = link.expect(Started)
    assert (started.how, started.trainer_pid) == ("prepared", int(ahead))
    assert run.line().startswith("live 7 22 prepared 22 True")

    plain = program(AHEAD.replace("prepare=True", "prepare=False"))
    link = keeper.accept()
    link.send(StartPrepared())
    link.silent(0.5)
    assert link.start(attempt=7, port=22).how == "fork"
    assert plain.line().startswith("built 7")


@pytest.mark.slow
def test_prepared_trainer_dies_with_its_supervisor(program, keeper, until, alive) -> None:
    run = program(AHEAD)
    keeper.accept().start()
    ahead = int([run.line() for _ in range(3)][2].split()[2])
    run.process.kill()
    until(lambda: not alive(ahead))


@pytest.mark.slow
def test_spawned_trainers_are_prepared_too(program, keeper) -> None:
    run = program(AHEAD.replace("sit(", "sit(Spawn('x'), "))
    link = keeper.accept()
    link.start(attempt=1, port=11)
    assert run.line().startswith("built 1")
    assert run.line().startswith("live 1 11 spawn 11 True")
    assert run.line().startswith("built 0")
    link.send(Kill(attempt=1))
    link.expect(Killed)
    link.send(Start(attempt=2, port=22))
    assert link.expect(Started).how == "prepared"
    assert run.line().startswith("live 2 22 prepared 22 True")


@pytest.mark.slow
def test_node_that_may_not_act_has_its_trainer_stopped_and_starts_none_until_it_may(
    program, keeper, alive
) -> None:
    run = program("sit()\nforever()\n")
    link = keeper.accept()
    board = Board.create(1)

    def may_act(seconds: float) -> None:
        board.extend_act_until(now_ns() + int(seconds * 1e9))

    may_act(10.0)
    link.send(KeepBoard(), [board.fd])
    first = link.start().trainer_pid
    died = link.expect(Died)  # nobody prolongs it
    assert (died.attempt, died.status, died.overdue) == (1, -signal.SIGKILL, True)
    assert not alive(first)

    link.send(Start(attempt=2, port=12345))
    link.silent(1.0)
    may_act(10.0)
    started = link.expect(Started)
    assert started.attempt == 2
    os.kill(started.trainer_pid, signal.SIGKILL)
    assert not link.expect(Died).overdue

    while now_ns() < board.act_until_ns:
        time.sleep(0.01)
    link.send(Start(attempt=3, port=12345))
    link.send(Kill(attempt=3))  # a newer epoch came before this one could begin
    assert link.expect(Killed).attempt == 3
    link.send(Leave(status=0))
    link.expect(Bye)
    run.end()
    board.close()
