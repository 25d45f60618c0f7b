"""A trainer's seat, and what it does to the process that sits on it."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest

from ckpt.elastic.processes.trainer import (
    TRAINER_VARIABLE,
    TrainerProcess,
    environment,
    trainer_of_process,
)
from ckpt.errors import UsageError
from ckpt.ipc.messages import Kill, Killed, Preempt


def seat(**changes: object) -> TrainerProcess:
    """A seat, mostly of nobody."""
    return replace(TrainerProcess(attempt=1, port=2, how="fork", pid=1, report_fd=9), **changes)


@pytest.mark.slow
def test_process_without_a_seat_is_no_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRAINER_VARIABLE, raising=False)
    assert trainer_of_process() is None


@pytest.mark.slow
def test_seat_of_another_process_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(seat(pid=os.getppid())).items():
        monkeypatch.setenv(name, value)
    assert trainer_of_process() is None


@pytest.mark.slow
def test_seat_that_cannot_be_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRAINER_VARIABLE, "{}")
    with pytest.raises(UsageError, match=f"unset|{TRAINER_VARIABLE}"):
        trainer_of_process()


@pytest.mark.slow
def test_prepared_seat_says_nothing_of_a_process_group_yet() -> None:
    assert environment(seat(attempt=0)).keys() == {TRAINER_VARIABLE}
    assert environment(seat(attempt=3, port=5))["MASTER_PORT"] == "5"
    assert environment(seat(attempt=3, port=5))["TORCHELASTIC_RESTART_COUNT"] == "2"


@pytest.mark.slow
def test_children_of_a_trainer_end_on_sigterm_as_children_do(program, keeper) -> None:
    run = program(
        "sit()\nheard, says = os.pipe()\npid = os.fork()\nif pid == 0:\n    os.write(says, b'.')\n "
        "   forever()\n"
        "os.read(heard, 1)\nos.kill(pid, signal.SIGTERM)\n"
        "say(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    keeper.accept().start()
    assert run.line() == str(-signal.SIGTERM)


@pytest.mark.slow
def test_programs_that_a_trainer_starts_are_no_trainers(program, keeper) -> None:
    run = program(
        "import subprocess\nsit()\n"
        "code = 'from ckpt.elastic.processes.trainer import trainer_of_process as s; print(s())'\n"
        "subprocess.run([sys.executable, '-c', code])\n"
    )
    keeper.accept().start()
    assert run.line() == "None"


@pytest.mark.slow
def test_trainer_is_killed_before_its_supervisor_where_memory_is_short(program, keeper) -> None:
    run = program(
        "own = Path('/proc/self/oom_score_adj')\nbefore = int(own.read_text())\nsit()\n"
        "say(int(own.read_text()) > before or before == 1000)\n"
    )
    keeper.accept().start()
    assert run.line() == "True"


@pytest.mark.slow
def test_ignored_sigterm_stays_ignored(program, keeper) -> None:
    run = program(
        "signal.signal(signal.SIGTERM, "
        "signal.SIG_IGN)\nsit()\nsay(signal.getsignal(signal.SIGTERM).name)\nforever()\n"
    )
    link = keeper.accept()
    link.start()
    assert run.line() == "SIG_IGN"
    os.kill(run.pid, signal.SIGTERM)
    link.send(Kill(attempt=1))
    link.expect(Killed)


@pytest.mark.slow
def test_handlers_of_the_program_are_there_in_the_trainer(program, keeper) -> None:
    run = program(
        "def mine(*_): pass\nsignal.signal(signal.SIGINT, mine)\nsignal.signal(signal.SIGCHLD, "
        "mine)\nsit()\n"
        "say(signal.getsignal(signal.SIGINT) is mine, signal.getsignal(signal.SIGCHLD) is mine,"
        "signal.getsignal(signal.SIGTSTP).name, signal.pthread_sigmask(signal.SIG_BLOCK, []), "
        "signal.set_wakeup_fd(-1))\n"
    )
    keeper.accept().start()
    assert run.line() == "True True SIG_DFL set() -1"


@pytest.mark.slow
def test_two_sigterms_to_the_trainer_are_one_preemption(program, keeper) -> None:
    run = program("sit()\nsay('in')\nforever()\n")
    link = keeper.accept()
    pid = link.start().trainer_pid
    assert run.line() == "in"
    for _ in range(2):
        os.kill(pid, signal.SIGTERM)
        os.kill(run.pid, signal.SIGCHLD)
    link.expect(Preempt)
    link.send(Kill(attempt=1))
    link.expect(Killed)
