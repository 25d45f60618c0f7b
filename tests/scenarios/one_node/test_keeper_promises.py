"""What the keeper promises for whole programs: nothing staged is lost, preemption in time, one run
a job, bugs end."""

from __future__ import annotations

import json
import random
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.jobs import SEED, SOAK, Fleet, Job, differences, plain, ranks, wait_for

import ckpt

BATCH = 5
"""Programs that die at the same time."""

DEATHS = BATCH if not SOAK else 50
PREEMPTIONS = 1 if not SOAK else 20
GRACE_S = 25.0
"""How long a preempted job may take by default."""

AT_ONCE_S = 20.0
PREEMPTED = 128 + signal.SIGTERM
STEPS = 150


def newest_step(store: Path) -> int:
    """The step of the newest snapshot, as a reader sees it that had no part in the job; -1 for
    none."""
    newest = ckpt.Checkpointer(str(store)).latest()
    return -1 if newest is None else newest.step


def calm_run(fleet: Fleet, command: list[str]) -> Job:
    calm = fleet.start(command, "calm")
    assert calm.wait_end() == 0, f"{calm.output()}\n{fleet.describe()}"
    return calm


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """All steps of the little training, undisturbed."""
    fleet = Fleet(tmp_path_factory.mktemp("calm"))
    try:
        yield calm_run(fleet, plain("steady.py", "{folder}", STEPS))
        fleet.wait_gone()
    finally:
        fleet.kill_all()


@pytest.mark.slow
def test_what_save_async_took_becomes_durable_though_the_process_is_killed_right_after_it_returned(
    fleet: Fleet,
) -> None:
    for first in range(0, DEATHS, BATCH):
        jobs = []
        for number in range(first, first + BATCH):
            jobs.append(
                fleet.start(
                    plain("save_and_die.py", "{folder}", f"{SEED}/{number}"), f"job-{number}"
                )
            )
        for job in jobs:
            assert job.wait_end() == -signal.SIGKILL, job.output()
        for job in jobs:
            saved = json.loads((job.folder / "saved.json").read_text())
            store = job.folder / "store"
            assert newest_step(store) == saved["step"], f"{saved} in {store}\n{fleet.describe()}"
        readers = [fleet.start(plain("read_back.py", "{folder}"), job.folder.name) for job in jobs]
        for job, reader in zip(jobs, readers, strict=True):
            assert reader.wait_end() == 0, f"seed={SEED} {reader.output()}"
            assert (job.folder / "found.json").read_text() == (
                job.folder / "saved.json"
            ).read_text(), job.folder
    if SOAK:
        fleet.wait_gone()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2] if SOAK else [1])
def test_preempted_program_is_durable_at_the_step_it_stopped_at_and_goes_on_from_there(
    fleet: Fleet, world_size: int
) -> None:
    chance = random.Random(f"{SEED}/{world_size}")
    steps = 30 * (PREEMPTIONS + 1)
    command = (plain if world_size == 1 else ranks)("steady.py", "{folder}", steps, "--every", 1000)
    calm = calm_run(fleet, command)
    for number in range(PREEMPTIONS):
        job = fleet.start(
            [*command, "--step-s", "0.2"], "preempted"
        )  # so that it is not over before the signal comes
        job.wait_steps(job.completed + chance.randint(1, 25))
        job.process.send_signal(signal.SIGTERM)
        status = job.wait_end(GRACE_S + 10.0)
        where = f"seed={SEED} preemption={number + 1} status={status}\n{job.output()}\n{fleet.describe()}"
        assert status == PREEMPTED if world_size == 1 else status != 0, where
        stopped = [job.losses[rank].poll().completed for rank in range(world_size)]
        assert stopped == [stopped[0]] * world_size, where
        assert newest_step(job.folder / "store") == stopped[0], f"stopped={stopped}\n{where}"
    job = fleet.start(command, "preempted")
    assert job.wait_end() == 0, job.output()
    assert differences(calm, job, world_size=world_size) == [], job.output()
    assert [job.losses[rank].poll().redone for rank in range(world_size)] == [0] * world_size
    fleet.wait_gone()


@pytest.mark.slow
def test_second_sigterm_ends_at_once_and_the_newest_complete_pair_becomes_durable(
    fleet: Fleet,
) -> None:
    job = fleet.start(
        plain("steady.py", "{folder}", STEPS, "--every", 1000, "--stall-at", 12, "--linger", "1s")
    )
    job.wait_steps(12)

    # Two signals that arrive together are one; so they are sent until it has noticed the second.
    def ended() -> bool:
        job.process.send_signal(signal.SIGTERM)
        return job.process.poll() is not None

    wait_for(ended, "the end after a second SIGTERM", wait_s=AT_ONCE_S, say=job.output)
    assert job.process.returncode in (PREEMPTED, -signal.SIGTERM), job.output()
    wait_for(
        lambda: newest_step(job.folder / "store") == 12, "step 12 in the store", say=fleet.describe
    )
    fleet.wait_gone()
    assert ckpt.Checkpointer(str(job.folder / "store")).verify().ok


@pytest.mark.slow
def test_second_run_of_a_job_that_lives_is_refused_and_the_first_goes_on_unharmed(
    fleet: Fleet, calm: Job
) -> None:
    # It takes far longer than the ten seconds that the second waits for a launch which may just be
    # ending.
    command = plain("steady.py", fleet.folder / "first", STEPS, "--step-s", 0.8)
    first = fleet.start(command, "first")
    first.wait_steps(3)
    second = fleet.start(command, "second")
    assert second.wait_end() not in (0, -signal.SIGKILL), second.output()
    assert re.search(r"ConflictError: .*job='store'", second.output()), second.output()
    assert first.process.poll() is None, "the first run was over before the second one came"
    (first.folder / "hurry").touch()
    assert first.wait_end() == 0, first.output()
    assert first.attempts() == 1
    assert differences(calm, first, world_size=1) == []
    assert newest_step(first.folder / "store") == STEPS
    fleet.wait_gone()


@pytest.mark.slow
def test_two_jobs_on_one_machine_do_not_disturb_each_other(fleet: Fleet, calm: Job) -> None:
    command = plain("steady.py", "{folder}", STEPS)
    jobs = [fleet.start([*command, "--step-s", "0.3"], name) for name in ("one", "other")]
    for job in jobs:
        job.wait_steps(5)
    assert fleet.keeper(jobs[0].folder / "store") != fleet.keeper(jobs[1].folder / "store")
    assert fleet.send(jobs[0].trainer(), signal.SIGKILL)
    for job in jobs:
        (job.folder / "hurry").touch()
    assert [job.wait_end() for job in jobs] == [0, 0], f"{jobs[0].output()}\n{jobs[1].output()}"
    assert [job.attempts() for job in jobs] == [2, 1]
    for job in jobs:
        assert differences(calm, job, world_size=1) == []
    fleet.wait_gone()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2] if SOAK else [2])
def test_same_exception_at_the_same_step_twice_in_a_row_ends_the_job_with_its_traceback(
    fleet: Fleet, world_size: int
) -> None:
    job = fleet.start(
        (plain if world_size == 1 else ranks)("steady.py", "{folder}", STEPS, "--raise-at", 7)
    )
    assert job.wait_end() == 1, job.output()
    assert [job.attempts(rank) for rank in range(world_size)] == [2] * world_size, job.output()
    output = (job.folder / "output.txt").read_text()
    assert "Traceback (most recent call last)" in output
    assert "ValueError: step 7 cannot be taken" in output
    assert "in before_step" in output
    assert job.losses[0].poll().redone <= 1
    fleet.wait_gone()
