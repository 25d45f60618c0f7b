"""Real trainings under a policy: what is left is what it keeps, whatever is killed, and no restore
is harmed."""

from __future__ import annotations

import signal
import sys

import pytest
from kit.jobs import SOAK, WAIT_S, Fleet, Job, differences, plain, ranks, wait_for
from kit.template import run

import ckpt
from ckpt.backends.file.store import FileBackend
from ckpt.errors import NotFoundError
from ckpt.format import keys
from ckpt.log.catalog import load_index
from ckpt.log.journal import Journal
from ckpt.log.state import LogState
from ckpt.maintenance.gc.plan import PREFIXES
from ckpt.maintenance.gc.sweep import CLOCK_PROBES
from ckpt.restore.verify import verify
from ckpt.values import SnapshotId

KILLS = 2 if not SOAK else 25
RESTORES_MIN = 5


def log_of(job: Job) -> LogState | None:
    """The job's log; None while there is none yet."""
    try:
        return Journal.open(FileBackend(job.folder / "store")).refresh()
    except NotFoundError:
        return None


def steps(job: Job) -> list[int]:
    state = log_of(job)
    return [entry.snapshot.step for entry in state.snapshots] if state is not None else []


def floor(job: Job) -> SnapshotId | None:
    """What the last drop set as floor: it changes with each drop that follows a commit."""
    state = log_of(job)
    return state.floor if state is not None else None


def assert_exactly_what_is_needed(job: Job) -> None:
    """Every byte of what exists is there and right, and nothing else is."""
    store = FileBackend(job.folder / "store")
    state = Journal.open(store).refresh()
    needed: set[str] = set()
    for entry in state.snapshots:
        index = load_index(store, state, entry.snapshot)
        assert verify(index, store).ok
        needed |= {keys.manifest_key(entry.snapshot, entry.manifest_digest), *index.packs()}
        needed |= {ref.key for ref in index.manifest.parts}
    assert {stat.key for prefix in PREFIXES for stat in store.list(prefix)} == needed


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2] if SOAK else [2])
def test_finished_training_leaves_two_snapshots_and_exactly_their_bytes(
    fleet: Fleet, world_size: int
) -> None:
    start = plain if world_size == 1 else ranks
    job = fleet.start(start("kept.py", "{folder}", 60, "--keep", "last=2", "--grace", "0s"))
    assert job.wait_end() == 0, job.output()
    fleet.wait_gone()
    assert len(steps(job)) == 2
    assert steps(job)[-1] == 60
    assert_exactly_what_is_needed(job)
    assert list(FileBackend(job.folder / "store").list(CLOCK_PROBES)) == []


@pytest.mark.slow
def test_keeper_killed_while_it_drops_and_sweeps_loses_nothing(fleet: Fleet) -> None:
    calm = fleet.start(plain("kept.py", "{folder}", 600), "calm")
    job = fleet.start(plain("kept.py", "{folder}", 600, "--keep", "last=2", "--grace", "0s"))
    for number in range(KILLS):
        seen = floor(job)
        # A new keeper drops after its first commit: at that very moment it is killed, in the middle
        # of the sweep mostly.
        wait_for(
            lambda seen=seen: floor(job) != seen or job.process.poll() is not None,
            "a drop",
            say=job.output,
        )
        assert job.process.poll() is None, f"over after {number} kills\n{job.output()}"
        assert fleet.send(fleet.keeper(job.folder / "store"), signal.SIGKILL)
    assert job.wait_end() == 0, f"{job.output()}\n{fleet.describe()}"
    assert calm.wait_end() == 0, calm.output()
    assert differences(calm, job, world_size=1) == [], job.output()
    assert job.attempts() == KILLS + 1
    fleet.wait_gone()
    assert len(steps(job)) == 2
    assert steps(job)[-1] == 600
    assert_exactly_what_is_needed(job)


@pytest.mark.slow
def test_job_that_is_killed_with_its_keeper_goes_on_from_the_only_snapshot_that_is_kept(
    fleet: Fleet,
) -> None:
    total = 60 * (KILLS // 2) + 200
    command = plain("kept.py", "{folder}", total, "--keep", "last=1", "--grace", "0s")
    calm = fleet.start(plain("kept.py", "{folder}", total), "calm")
    assert calm.wait_end() == 0, calm.output()
    fleet.wait_gone()
    for number in range(KILLS // 2):
        job = fleet.start(command)
        job.wait_steps(job.completed + 20)
        wait_for(lambda job=job: len(steps(job)) > 0, "a snapshot", say=job.output)
        while members := fleet.members():
            for pid in members:
                fleet.send(pid, signal.SIGKILL)
        job.wait_end()
        assert steps(job), f"after {number + 1} kills\n{job.output()}"
    job = fleet.start(command)
    assert job.wait_end() == 0, job.output()
    assert differences(calm, job, world_size=1) == [], job.output()
    assert "can't be read whole" not in (job.folder / "output.txt").read_text()
    fleet.wait_gone()
    assert steps(job) == [total]
    assert_exactly_what_is_needed(job)


@pytest.mark.slow
def test_restores_beside_a_job_that_drops_and_sweeps_are_not_harmed(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    # A round comes each ten seconds at most, so that this takes a few of them.
    job = fleet.start(
        plain("kept.py", "{folder}", 1200, "--keep", "last=1", "--grace", "60s", "--step-s", 0.02)
    )
    store = FileBackend(job.folder / "store")
    wait_for(lambda: len(steps(job)) > 0, "a snapshot", say=job.output)
    state = Journal.open(store).refresh()
    begun = load_index(store, state, state.snapshots[0].snapshot)
    restored: list[int] = []
    while len(restored) < RESTORES_MIN or begun.manifest.snapshot.step in steps(job):
        assert job.process.poll() is None, f"over after {len(restored)} restores\n{job.output()}"
        found: dict[str, object] = {"seen": 0}
        with ckpt.Checkpointer(store) as reader:
            restored.append(
                reader.restore({"progress": found}, only=["progress"], missing="keep").step
            )
        assert found["seen"] == 5 * restored[-1]
    sweep = [sys.executable, "-m", "ckpt", "gc", str(job.folder / "store"), "--grace", "60s"]
    swept = run(sweep, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert swept.returncode == 0, swept.stdout + swept.stderr
    assert verify(begun, store).ok, "a restore that began before the drop goes on within the grace"
    assert restored == sorted(restored)
    assert not [record for record in caplog.records if "can't be read whole" in record.getMessage()]
    job.process.send_signal(signal.SIGTERM)
    job.wait_end()
    fleet.wait_gone()
