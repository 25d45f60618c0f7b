"""Two ranks, struck by whatever ends processes, at random moments: no bit of a loss differs, and
nothing is left behind."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from kit.job_chaos import HARMLESS, OTHERS, TRAINER, Campaign, plan
from kit.jobs import SEED, SOAK, Fleet, Job, differences, ranks, wait_for

import ckpt

RESTARTS = 20
"""Of torchrun's own: each death of a supervisor costs one."""

HANG = ("--hang", "3s")

SMALL_SHM = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'


def struck(
    fleet: Fleet, command: Sequence[str], calm: Job, strikes: Sequence[str], *, steps_max: int
) -> Job:
    """Run ``command`` under strikes to its end, and compare it with the calm run."""
    chance = random.Random(f"{SEED}/{' '.join(strikes)}")
    job = fleet.start(command, "struck")
    campaign = Campaign(fleet, job, plan(strikes, chance, steps_max=steps_max, doubles=0.2))
    print(f"seed={SEED} (CKPT_SEED={SEED} repeats it)")
    wrong = campaign.run()
    status = job.wait_end()
    assert status == 0, f"status={status}\n{campaign.say()}"
    assert differences(calm, job, world_size=2) == [], job.output()
    assert wrong == [], job.output()
    return job


def check_store(job: Job, steps: int) -> None:
    """The end is durable and readable."""
    reader = ckpt.Checkpointer(str(job.folder / "store"))
    newest = reader.latest()
    assert newest is not None
    assert newest.step == steps
    assert reader.verify().ok


def calm_run(fleet: Fleet, steps: int, *options: object) -> Job:
    calm = fleet.start(ranks("steady.py", "{folder}", steps, *options), "calm")
    assert calm.wait_end() == 0, f"{calm.output()}\n{fleet.describe()}"
    assert calm.attempts() == 1, calm.output()
    return calm


@pytest.mark.slow
def test_job_struck_at_random_moments_ends_bit_for_bit_as_if_never_struck(fleet: Fleet) -> None:
    kinds = [*TRAINER, *OTHERS, "nap-keeper"]
    if SOAK:
        kinds = [*(TRAINER * 16), *(OTHERS * 8), *(HARMLESS * 5), *("keeper",) * 8]
    steps_max = 25
    steps = (steps_max + 12) * len(kinds)
    calm = calm_run(fleet, steps)
    command = ranks("steady.py", "{folder}", steps, *HANG, restarts=RESTARTS)
    job = struck(fleet, command, calm, kinds, steps_max=steps_max)
    check_store(job, steps)
    fleet.wait_gone()


@pytest.mark.slow
def test_trainers_that_die_cost_a_step_each_where_shared_memory_is_as_small_as_in_a_container(
    fleet: Fleet,
) -> None:
    """Slots of 40 MB, three a rank: several times what ``/dev/shm`` holds here."""
    enter = ["unshare", "-m", "sh", "-c", SMALL_SHM, "sh"]
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare here")
    allowed = subprocess.run([*enter, "true"], capture_output=True, text=True, check=False)
    if allowed.returncode != 0:
        pytest.skip(f"a mount namespace is not permitted here: {allowed.stderr.strip()}")
    kinds = ["kill", "exit"] if not SOAK else ["kill", "exit", "segv", "oom"] * 5
    steps, room = 40 * len(kinds), ("--ballast-mib", 40, "--every", 60)
    calm = calm_run(fleet, steps, *room)
    command = [*enter, *ranks("steady.py", "{folder}", steps, *room, *HANG, restarts=RESTARTS)]
    job = struck(fleet, command, calm, kinds, steps_max=20)
    check_store(job, steps)
    fleet.wait_gone()


def test_plan_repeats_from_its_seed_and_never_strikes_three_times_without_a_step() -> None:
    kinds = [*TRAINER, *OTHERS, *HARMLESS] * 20
    plans = [plan(kinds, random.Random("7"), steps_max=9, doubles=0.9) for _ in range(2)]
    assert plans[0] == plans[1]
    assert sorted(strike.kind for strike in plans[0]) == sorted(kinds)
    pairs = zip(plans[0], plans[0][1:], strict=False)
    assert not any(first.steps is None and second.steps is None for first, second in pairs)


@pytest.mark.slow
def test_processes_of_a_fleet_are_told_from_strangers(fleet: Fleet, tmp_path: Path) -> None:
    job = fleet.start(["sleep", "60"])
    # Between its fork and its exec a process still looks like its parent.
    wait_for(lambda: job.process.pid in fleet.members(), "the process to be a member")
    assert not fleet.is_member(1)
    fleet.kill_all()
    assert job.wait_end() != 0
    assert fleet.members() == []
