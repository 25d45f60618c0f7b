"""Real processes: a supervisor, the trainers that it forks, and a keeper that says what the test
wants."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from ckpt.ipc.messages import (
    Bye,
    Died,
    Dump,
    Kill,
    Killed,
    Leave,
    Preempt,
    PrintLine,
    Start,
    Started,
)

REST = "say(json.dumps([seat.attempt, seat.port, seat.how, os.getppid(), os.getpgrp() == os.getpid()]))\n"


@pytest.mark.slow
def test_forked_trainer_has_its_environment_and_goes_on_with_the_program(program, keeper) -> None:
    run = program(
        "kept = {'weights': [1, 2]}\nseat = sit()\n"
        + REST
        + "say(os.environ['MASTER_ADDR'], os.environ['MASTER_PORT'], os.environ['TORCHELASTIC_USE_AGENT_STORE'],"
        "os.environ['TORCHELASTIC_RESTART_COUNT'], os.environ.get('RANK'), kept)\n"
        "say(trainer_of_process() == seat, sorted(os.listdir('/proc/self/fd')))"
    )
    link = keeper.accept()
    assert (link.hello.pid, link.hello.attempt, link.hello.role) == (run.pid, 0, "supervisor")
    before_s = time.monotonic()
    started = link.start(attempt=3, port=4567)
    assert (started.attempt, started.how) == (3, "fork")
    assert before_s <= started.at_s <= time.monotonic()
    assert json.loads(run.line()) == [3, 4567, "fork", run.pid, True]
    assert run.line() == "127.0.0.1 4567 False 2 None {'weights': [1, 2]}"
    own, fds = run.line().split(maxsplit=1)
    assert own == "True"
    assert len(json.loads(fds.replace("'", '"'))) <= 6, (
        "stdin, stdout, stderr, report, stacks, the listing"
    )
    died = link.expect(Died)
    assert (died.attempt, died.status) == (3, 0)
    link.send(Leave(status=0))
    link.expect(Bye)
    assert run.end() == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ends", "status", "told"),
    [
        ("sys.exit(7)", 7, 7),
        ("raise ValueError('x')", 1, 1),
        ("os.kill(os.getpid(), signal.SIGSEGV)", -signal.SIGSEGV, 128 + signal.SIGSEGV),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, 128 + signal.SIGKILL),
        ("raise KeyboardInterrupt", -signal.SIGINT, 128 + signal.SIGINT),
    ],
)
def test_supervisor_ends_as_its_trainer_did(
    program, keeper, ends: str, status: int, told: int
) -> None:
    run = program(f"sit()\n{ends}\n")
    link = keeper.accept()
    link.start()
    assert link.expect(Died).status == status
    link.send(Leave(status=told))
    link.expect(Bye)
    assert run.end() == status


@pytest.mark.slow
def test_status_of_another_ranks_trainer_is_the_exit_code(program, keeper, until, alive) -> None:
    run = program("sit()\nforever()\n")
    link = keeper.accept()
    pid = link.start().trainer_pid
    link.send(Leave(status=139, text="rank 1 died of SIGSEGV"))
    link.expect(Bye)
    assert run.end() == 139
    assert run.line() == "ckpt: rank 1 died of SIGSEGV"
    until(lambda: not alive(pid))


@pytest.mark.slow
def test_kill_ends_the_whole_group_and_the_next_attempt_starts(program, keeper, alive) -> None:
    run = program(
        "seat = sit()\n"
        "for _ in range(2):\n"
        "    if os.fork() == 0:\n"
        "        if os.fork() == 0:\n"
        "            say(os.getpid())\n"
        "        forever()\n"
        "forever()\n"
    )
    link = keeper.accept()
    first = link.start().trainer_pid
    grandchildren = [int(run.line()), int(run.line())]
    assert all(map(alive, [first, *grandchildren]))
    link.send(Kill(attempt=1))
    assert link.expect(Killed).attempt == 1
    assert not any(map(os.path.exists, [f"/proc/{pid}" for pid in [first, *grandchildren]])), (
        "not even a zombie"
    )
    second = link.start(attempt=2).trainer_pid
    assert alive(second)
    assert second != first
    link.send(Leave(status=1))
    link.expect(Bye)
    assert run.end() == 1


@pytest.mark.slow
def test_what_a_dead_trainer_left_behind_is_gone_before_the_next_starts(
    program, keeper, alive
) -> None:
    run = program(
        "seat = sit()\n"
        "if seat.attempt == 1:\n"
        "    heard, says = os.pipe()\n"
        "    if os.fork() == 0:\n"
        "        say(os.getpid())\n"
        "        os.write(says, b'.')\n"
        "        forever()\n"
        "    os.read(heard, 1)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "say('second')\n"
    )
    link = keeper.accept()
    link.start()
    assert link.expect(Died).status == -signal.SIGKILL
    orphan = int(run.line())
    link.start(attempt=2)
    assert run.line() == "second"
    assert not alive(orphan)
    assert link.expect(Died).status == 0


@pytest.mark.slow
def test_process_that_a_trainer_left_to_itself_leaves_no_zombie(program, keeper, until) -> None:
    run = program(
        "sit()\nif os.fork() == 0:\n    if os.fork() == 0:\n        say(os.getpid())\n    "
        "os._exit(0)\nos.wait()\nforever()\n"
    )
    keeper.accept().start()
    orphan = run.line()
    until(lambda: not Path(f"/proc/{orphan}").exists())


@pytest.mark.slow
def test_zombie_that_nobody_reaps_does_not_block_the_next_attempt(program, keeper, alive) -> None:
    run = program(
        "sit()\nheard, says = os.pipe()\nif os.fork() == 0:\n    if os.fork() == 0:\n        "
        "os.read(heard, 1)\n        os._exit(0)\n    os.setsid()  # it leaves the group, and never "
        "waits\n    os.write(says, b'.')\n    say(os.getpid())\n    forever()\nforever()\n"
    )
    link = keeper.accept()
    link.start()
    careless = int(run.line())
    link.send(Kill(attempt=1))
    assert link.expect(Killed).attempt == 1
    assert alive(careless)
    link.start(attempt=2)
    os.kill(careless, signal.SIGKILL)


@pytest.mark.slow
def test_kill_of_an_attempt_that_is_not_running_is_answered_and_harms_nothing(
    program, keeper, alive
) -> None:
    program("sit()\nforever()\n")
    link = keeper.accept()
    link.send(Kill(attempt=1))
    assert link.expect(Killed).attempt == 1
    pid = link.start(attempt=2).trainer_pid
    link.send(Kill(attempt=1))
    assert link.expect(Killed).attempt == 1
    assert alive(pid)


@pytest.mark.slow
def test_trainer_dies_with_its_supervisor(program, keeper, until, alive) -> None:
    run = program("sit()\nforever()\n")
    pid = keeper.accept().start().trainer_pid
    run.process.kill()
    until(lambda: not alive(pid))


@pytest.mark.slow
def test_sigterm_that_comes_twice_at_once_is_one(program, keeper, alive) -> None:
    run = program(
        "from ckpt.elastic import sigterm as terms\nterms.REPEAT_S = 1000.0\nsit()\nforever()\n"
    )
    link = keeper.accept()
    pid = link.start().trainer_pid
    os.kill(run.pid, signal.SIGTERM)
    link.expect(Preempt)
    os.kill(run.pid, signal.SIGTERM)
    link.send(PrintLine(text="heard"))
    assert run.line() == "ckpt: heard"
    link.send(PrintLine(text="again"))  # a signal that came before it is dealt with by now
    assert run.line() == "ckpt: again"
    assert alive(pid)


@pytest.mark.slow
def test_first_sigterm_asks_a_later_one_ends(program, keeper, until, alive) -> None:
    run = program(
        "from ckpt.elastic import sigterm as terms\nterms.REPEAT_S = 0.0\nsit()\nforever()\n"
    )
    link = keeper.accept()
    pid = link.start().trainer_pid
    os.kill(run.pid, signal.SIGTERM)
    assert link.expect(Preempt).grace_s == 3.0
    assert alive(pid)
    os.kill(run.pid, signal.SIGTERM)
    assert run.end() == 143
    until(lambda: not alive(pid))


@pytest.mark.slow
def test_sigterm_before_anything_was_started_ends_at_once(program, keeper) -> None:
    run = program("sit()\n")
    link = keeper.accept()
    link.send(PrintLine(text="hello"))
    assert run.line() == "ckpt: hello"
    os.kill(run.pid, signal.SIGTERM)
    assert run.end() == 143


@pytest.mark.slow
def test_sigterm_to_the_trainer_is_passed_on_and_does_not_end_it(program, keeper, alive) -> None:
    program("signal.signal(signal.SIGTERM, lambda *_: say('mine'))\nsit()\nsay('in')\nforever()\n")
    link = keeper.accept()
    pid = link.start().trainer_pid
    assert program.started[0].line() == "in"
    os.kill(pid, signal.SIGTERM)
    link.expect(Preempt)
    assert program.started[0].line() == "mine"
    assert alive(pid)


@pytest.mark.slow
def test_interrupt_reaches_the_trainer(program, keeper) -> None:
    run = program(
        "sit()\ntry:\n    say('in')\n    forever()\nexcept KeyboardInterrupt:\n    say('caught')\n "
        "   raise\n"
    )
    link = keeper.accept()
    link.start()
    assert run.line() == "in"
    os.kill(run.pid, signal.SIGINT)
    assert run.line() == "caught"
    assert link.expect(Died).status == -signal.SIGINT
    link.send(Leave(status=130))
    assert run.end() == -signal.SIGINT


@pytest.mark.slow
def test_interrupt_is_the_cause_whatever_the_trainer_makes_of_it(program, keeper) -> None:
    run = program(
        "sit()\ntry:\n    say('in')\n    forever()\nexcept KeyboardInterrupt:\n    say('caught')\n "
        "   sys.exit(3)\n"
    )
    link = keeper.accept()
    link.start()
    assert run.line() == "in"
    os.kill(run.pid, signal.SIGINT)
    assert run.line() == "caught"
    assert link.expect(Died).status == -signal.SIGINT
    link.send(Leave(status=130))
    assert run.end() == 3


@pytest.mark.slow
def test_nothing_is_started_after_an_interrupt(program, keeper, until, alive) -> None:
    run = program(
        "sit()\nsignal.signal(signal.SIGINT, lambda *_: say('mine'))\nsay('in')\nforever()\n"
    )
    link = keeper.accept()
    pid = link.start().trainer_pid
    assert run.line() == "in"
    os.kill(run.pid, signal.SIGINT)
    assert run.line() == "mine"
    link.send(Kill(attempt=1))  # another rank died of it
    link.expect(Killed)
    link.send(Start(attempt=2, port=1))
    assert run.end() == -signal.SIGINT
    until(lambda: not alive(pid))


@pytest.mark.slow
def test_signals_that_the_program_handles_reach_the_trainer(program, keeper) -> None:
    run = program(
        "signal.signal(signal.SIGHUP, lambda *_: say('hup', os.getppid()))\n"
        "sit()\nsignal.signal(signal.SIGUSR1, lambda *_: say('usr1'))\nsay('in')\nforever()\n"
    )
    keeper.accept().start()
    assert run.line() == "in"
    os.kill(run.pid, signal.SIGHUP)
    assert run.line() == f"hup {run.pid}"
    os.kill(run.pid, signal.SIGUSR1)
    assert run.line() == "usr1"


@pytest.mark.slow
def test_signals_that_the_function_itself_handles_reach_the_trainer(program, keeper) -> None:
    run = program(
        "sit()\n"
        "for name in ('SIGUSR2', 'SIGTERM'):\n"
        "    signal.signal(getattr(signal, name), lambda number, _: say('got', int(number)))\n"
        "say('in')\nforever()\n"
    )
    keeper.accept().start()
    assert run.line() == "in"
    for number in (signal.SIGUSR2, signal.SIGTERM):
        os.kill(run.pid, number)
        assert run.line() == f"got {int(number)}"


@pytest.mark.slow
def test_what_was_written_before_the_call_is_written_once_and_processes_can_be_waited_for(
    program, keeper, tmp_path
) -> None:
    run = program(
        "import subprocess\nprint('early')\nlog = open('log.txt', 'w')\nlog.write('early\\n')\n"
        "above = subprocess.Popen(['sh', '-c', 'while [ ! -e go ]; do sleep 0.02; done; exit 7'])\n"
        "seat = sit()\nprint('attempt', seat.attempt, above.poll())\nPath('go').touch()\n"
        "print('above ended with', above.wait())\nlog.write(f'attempt {seat.attempt}\\n')\nlog.close()\n",
        environment={"PYTHONUNBUFFERED": ""},
    )
    link = keeper.accept()
    for attempt in (1, 2):
        link.start(attempt)
        link.expect(Died)
    link.send(Leave(status=0))
    assert run.end() == 0
    assert [run.line() for _ in range(6)] == [
        "early",
        "attempt 1 None",
        "above ended with 7",
        "attempt 2 7",
        "above ended with 7",
        "",
    ]
    assert (tmp_path / "log.txt").read_text() == "early\nattempt 1\nattempt 2\n"


@pytest.mark.slow
def test_stacks_are_dumped_to_the_file_that_the_keeper_names(
    program, keeper, until, tmp_path
) -> None:
    run = program("sit()\ndef stuck():\n    say('in')\n    forever()\nstuck()\n")
    link = keeper.accept()
    link.start()
    assert run.line() == "in"
    wanted = tmp_path / "dump.txt"
    for _ in range(2):
        link.send(Dump(attempt=1, path=str(wanted)))
        until(lambda: wanted.exists() and "in stuck" in wanted.read_text())
        wanted.unlink()
    link.send(Kill(attempt=1))
    link.expect(Killed)
    assert not list(tmp_path.glob("rank-*"))


@pytest.mark.slow
def test_stacks_that_can_not_be_written_keep_nobody_from_training_or_from_being_killed(
    program, keeper, tmp_path
) -> None:
    run = program("os.environ['TEST_FOLDER'] += '/gone'\nsit()\nsay('in')\nforever()\n")
    link = keeper.accept()
    link.start()
    assert run.line() == "in"
    link.send(Dump(attempt=1, path=str(tmp_path / "dump.txt")))
    link.send(Kill(attempt=1))
    assert link.expect(Killed).attempt == 1


@pytest.mark.slow
def test_stacks_whose_folder_is_removed_keep_nobody_from_being_killed(
    program, keeper, tmp_path
) -> None:
    (tmp_path / "stacks").mkdir()
    run = program("os.environ['TEST_FOLDER'] += '/stacks'\nsit()\nsay('in')\nforever()\n")
    link = keeper.accept()
    link.start()
    assert run.line() == "in"
    shutil.rmtree(tmp_path / "stacks")
    link.send(Dump(attempt=1, path=str(tmp_path / "stacks" / "dump.txt")))
    link.send(Kill(attempt=1))
    assert link.expect(Killed).attempt == 1
    link.start(attempt=2)
    assert run.line() == "in"


@pytest.mark.slow
def test_start_for_which_the_last_trainer_has_to_be_killed_first(program, keeper, alive) -> None:
    program("sit()\nforever()\n")
    link = keeper.accept()
    first = link.start().trainer_pid
    link.send(Start(attempt=2, port=1))
    assert link.expect(Started).attempt == 2
    assert not alive(first)


@pytest.mark.slow
def test_spawned_trainer_runs_the_command_again_from_where_it_was_started(program, keeper) -> None:
    run = program(
        "say('above', os.getcwd())\nos.chdir('/')\nthreading.Thread(target=forever, "
        "daemon=True).start()\n"
        "seat = sit(Spawn('threads'))\n"
        + REST
        + "say(sys.argv, trainer_of_process() == seat)\nos.kill(os.getpid(), 15)\n"
        "forever()\n"
    )
    link = keeper.accept()
    assert run.line().startswith("above")
    assert link.start(attempt=2, port=77).how == "spawn"
    assert run.line() == f"above {program.folder}"
    assert json.loads(run.line()) == [2, 77, "spawn", run.pid, True]
    assert run.line() == "['program.py'] True"
    link.expect(Preempt)
    link.send(Kill(attempt=2))
    link.expect(Killed)
    link.send(Leave(status=0))
    assert run.end() == 0
