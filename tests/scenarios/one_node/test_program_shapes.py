"""Programs as people write them: threads, groups, imports and parallel work above the call, and
what they do inside."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.jobs import SOAK, Fleet, Job, differences, plain

COMPILE_S_MAX = 400.0
ABOVE_FORK, ABOVE_SPAWN = 1, 3
"""How often the code above the call runs: in the supervisor, and again for each of two trainers
that are spawned."""


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """The same training, undisturbed."""
    fleet = Fleet(tmp_path_factory.mktemp("calm"))
    job = fleet.start(plain("shapes.py", "{folder}", "plain"))
    try:
        assert job.wait_end() == 0, f"{job.output()}\n{fleet.describe()}"
        assert job.attempts() == 1
        check_after(job)
        fleet.wait_gone()
        yield job
    finally:
        fleet.kill_all()


def above(job: Job) -> int:
    """How often the code above the call ran."""
    return len((job.folder / "above.txt").read_text().splitlines())


def check_after(job: Job) -> None:
    """The rest of the program ran in the trainer, with the very object that the function
    returned."""
    assert json.loads((job.folder / "after.json").read_text()) == {
        "pid": job.trainer(),
        "same": True,
    }


def check_death(
    fleet: Fleet, calm: Job, shape: str, *, wait_s: float = 120.0, threads: int = 1
) -> Job:
    """Run a shape whose trainer dies once; it must end as the calm run did."""
    job = fleet.start(
        plain("shapes.py", "{folder}", shape, "dies"), env={"OMP_NUM_THREADS": str(threads)}
    )
    assert job.wait_end(wait_s) == 0, f"{job.output()}\n{fleet.describe()}"
    assert job.attempts() == 2, job.output()
    assert differences(calm, job, world_size=1) == [], job.output()
    assert job.losses[0].poll().redone <= 1
    check_after(job)
    fleet.wait_gone()
    return job


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["plain", "nested", "workers", "profiler"])
def test_program_whose_trainer_dies_goes_on_in_a_fork(fleet: Fleet, calm: Job, shape: str) -> None:
    job = check_death(fleet, calm, shape)
    assert above(job) == ABOVE_FORK, job.output()


@pytest.mark.slow
@pytest.mark.parametrize("package", ["pandas", "transformers", "sklearn"])
def test_large_packages_imported_above_the_call_do_not_spoil_the_fork(
    fleet: Fleet, calm: Job, package: str
) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    job = check_death(fleet, calm, package)
    assert above(job) == ABOVE_FORK, job.output()


@pytest.mark.slow
def test_thread_above_the_call_has_trainers_spawned_and_is_named(fleet: Fleet, calm: Job) -> None:
    job = check_death(fleet, calm, "thread")
    assert above(job) == ABOVE_SPAWN, job.output()
    assert "a-thread-above" in job.output()


@pytest.mark.slow
def test_parallel_operation_above_the_call_hangs_no_trainer(fleet: Fleet, calm: Job) -> None:
    check_death(fleet, calm, "parallel", threads=2)


@pytest.mark.slow
def test_process_group_above_the_call_means_training_in_place_with_one_warning(
    fleet: Fleet, calm: Job
) -> None:
    job = fleet.start(plain("shapes.py", "{folder}", "group"), env={"PYTHONWARNINGS": "default"})
    assert job.wait_end() == 0, job.output()
    assert (job.attempts(), above(job)) == (1, 1)
    assert job.trainer() == job.process.pid
    assert job.output().count("init_process_group()") == 1, job.output()
    assert differences(calm, job, world_size=1) == []
    check_after(job)
    fleet.wait_gone()


@pytest.mark.slow
def test_compiled_model_goes_on_in_a_fork(fleet: Fleet, tmp_path: Path) -> None:
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    # The short form traces and differentiates as the long one does, and leaves out the C++
    # compiler: half a minute of it.
    backend = "inductor" if SOAK else "aot_eager"
    if backend == "inductor" and (shutil.which("c++") is None or not headers.exists()):
        pytest.skip("torch.compile needs a C++ compiler and Python's headers")
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "TMPDIR": str(tmp_path)}
    compiled = {"COMPILER": backend, **caches}
    calm = fleet.start(plain("shapes.py", "{folder}", "compile"), "calm", env=compiled)
    assert calm.wait_end(COMPILE_S_MAX) == 0, f"{calm.output()}\n{fleet.describe()}"
    job = fleet.start(plain("shapes.py", "{folder}", "compile", "dies"), env=compiled)
    assert job.wait_end(COMPILE_S_MAX) == 0, f"{job.output()}\n{fleet.describe()}"
    assert job.attempts() == 2, job.output()
    assert differences(calm, job, world_size=1) == [], job.output()
    assert job.losses[0].poll().redone <= 1
    fleet.wait_gone()
