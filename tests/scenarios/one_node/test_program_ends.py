"""How programs end: by Ctrl-C, by an exception inside or behind the call; and what an end leaves to
the next attempt."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kit.jobs import Fleet, Job, plain, ranks

import ckpt

AT_TERMINAL = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
WRAPPER = '#!/bin/sh\n"$@"\nstatus=$?\nexit $status\n'


def rest(job: Job) -> int:
    """How often the decorated call returned."""
    path = job.folder / "rest.txt"
    return len(path.read_text().splitlines()) if path.exists() else 0


def check_interrupted(fleet: Fleet, job: Job) -> None:
    """It ended of SIGINT, for good."""
    assert job.wait_end() == -signal.SIGINT, job.output()
    assert job.attempts() == 1, job.output()
    assert rest(job) == 0
    fleet.wait_gone()


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """A terminal: the end that people type into, and the program's."""
    ends = os.openpty()
    yield ends
    for fd in ends:
        os.close(fd)


@pytest.mark.slow
def test_ctrl_c_at_a_terminal_ends_the_program(fleet: Fleet, terminal: tuple[int, int]) -> None:
    keys, screen = terminal
    job = fleet.start(
        [sys.executable, "-c", AT_TERMINAL, *plain("ends.py", "{folder}", "endless")], stdin=screen
    )
    job.wait_steps(3)
    os.write(keys, b"\x03")
    check_interrupted(fleet, job)
    assert "KeyboardInterrupt" in job.output()


@pytest.mark.slow
def test_interrupt_of_the_supervisor_ends_the_program(fleet: Fleet) -> None:
    job = fleet.start(plain("ends.py", "{folder}", "endless"))
    job.wait_steps(3)
    assert fleet.send(job.supervisor(), signal.SIGINT)
    check_interrupted(fleet, job)


@pytest.mark.slow
def test_interrupt_of_the_trainer_ends_the_program(fleet: Fleet) -> None:
    job = fleet.start(plain("ends.py", "{folder}", "endless"))
    job.wait_steps(3)
    assert fleet.send(job.trainer(), signal.SIGINT)
    check_interrupted(fleet, job)


@pytest.mark.slow
def test_exception_unwinds_nothing_that_the_next_attempt_stands_in(fleet: Fleet) -> None:
    job = fleet.start(plain("ends.py", "{folder}", "raises"))
    assert job.wait_end() == 0, f"{job.output()}\n{fleet.describe()}"
    assert (job.attempts(), rest(job)) == (2, 1)
    assert job.output().count("RuntimeError: a batch that is bad once") >= 1
    assert "Traceback" in job.output()
    fleet.wait_gone()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["last", "early"])
def test_end_that_only_memory_had_is_durable_though_nothing_was_left_to_do(
    fleet: Fleet, how: str
) -> None:
    job = fleet.start(plain("ends.py", "{folder}", how))
    assert job.wait_end() == 0, job.output()
    assert (job.attempts(), rest(job)) == (2, 1)
    if how == "early":  # its keeper's work: the program has nothing of it
        fleet.wait_gone()
    store = ckpt.Checkpointer(str(job.folder / "store"))
    state = {"sum": torch.zeros(4)}
    restored = store.restore({"state": state})
    assert (restored.step, restored.metadata["sum"]) == (12, sum(range(12)))
    assert state["sum"].tolist() == [sum(range(12))] * 4
    assert store.verify().ok
    fleet.wait_gone()


@pytest.mark.slow
def test_exit_with_a_status_in_the_function_is_a_failure_like_an_exception(fleet: Fleet) -> None:
    job = fleet.start(plain("ends.py", "{folder}", "exits"))
    assert job.wait_end() == 4, f"{job.output()}\n{fleet.describe()}"
    assert (job.attempts(), rest(job)) == (2, 0), (
        "the same end at the same step twice in a row is a bug"
    )
    fleet.wait_gone()


@pytest.mark.slow
def test_ranks_that_would_capture_at_different_steps_end_before_the_first(fleet: Fleet) -> None:
    job = fleet.start(ranks("ends.py", "{folder}", "uneven"))
    assert job.wait_end() != 0
    assert "rank_0=(every=5 memory_every=some) rank_1=(every=6 " in job.output(), job.output()
    assert not (job.folder / "losses-0.txt").exists()
    assert (job.attempts(1), rest(job)) == (1, 0), job.output()
    fleet.wait_gone()


@pytest.mark.slow
def test_rest_of_the_program_is_run_once_though_it_fails(fleet: Fleet) -> None:
    job = fleet.start(plain("ends.py", "{folder}", "rest"))
    assert job.wait_end() == 1, f"{job.output()}\n{fleet.describe()}"
    assert (job.attempts(), rest(job)) == (1, 1), job.output()
    assert "no such plot" in job.output()
    fleet.wait_gone()


@pytest.mark.slow
def test_failure_in_a_second_decorated_call_starts_again(fleet: Fleet) -> None:
    job = fleet.start(plain("ends.py", "{folder}", "twice"))
    assert job.wait_end() == 0, f"{job.output()}\n{fleet.describe()}"
    assert job.attempts() == 2
    fleet.wait_gone()


@pytest.mark.slow
def test_script_between_launcher_and_ranks_does_not_matter(fleet: Fleet, tmp_path: Path) -> None:
    wrapper = tmp_path / "wrap.sh"
    wrapper.write_text(WRAPPER)
    wrapper.chmod(0o755)
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--no-python",
    ]
    job = fleet.start([*launcher, str(wrapper), *plain("ends.py", "{folder}", "dies")])
    assert job.wait_end() == 0, f"{job.output()}\n{fleet.describe()}"
    assert [job.attempts(rank) for rank in range(2)] == [2, 2], job.output()
    fleet.wait_gone()
