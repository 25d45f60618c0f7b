"""Nodes that were not started alike: each row of the table in docs/running.md, with real nodes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from kit.jobs import wait_for
from kit.machines import Cluster, Machine, cluster

import ckpt

STEPS = 100
ARGUMENTS = (STEPS, "--every", 1000, "--step-s", 0.2)
RUNNING = 3
"""Steps after which the job runs."""
REFUSED = ckpt.errors.UsageError.exit_code
REDONE_MAX = 12


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    with ExitStack() as ending:
        yield lambda **how: ending.enter_context(cluster(tmp_path / "cluster", **how))


def said(machine: Machine) -> str:
    """What its program printed."""
    return (machine.folder / "output.txt").read_text()


def check_job_ends_well(one: Cluster, refused: Machine) -> None:
    ends = one.wait_end(hurry=True)
    assert ends.pop(refused.name) == REFUSED, one.output()
    assert set(ends.values()) == {0}, one.output()
    newest = ckpt.Checkpointer(str(one.results / "store")).latest()
    assert newest is not None and newest.step == STEPS


@pytest.mark.slow
def test_nodes_with_different_stores_all_end_at_once_and_name_both(
    made: Callable[..., Cluster], tmp_path: Path
) -> None:
    one = made(nodes="2")
    stores = [str(tmp_path / name) for name in ("here", "there")]
    for store in stores:
        one.start(*ARGUMENTS, "--store", store)
    assert set(one.wait_end().values()) == {REFUSED}, one.output()
    for machine in one.machines:
        assert all(store in said(machine) for store in stores), one.output()
    assert not any(Path(store).exists() for store in stores), "no step was taken"


@pytest.mark.slow
def test_nodes_with_unshared_disks_under_one_address_end_before_anything_is_lost(
    made: Callable[..., Cluster],
) -> None:
    one = made(nodes="2")
    for _ in range(2):  # a keeper's working directory is its own
        one.start(*ARGUMENTS, "--store", "/proc/self/cwd/disk")
    assert set(one.wait_end().values()) == {REFUSED}, one.output()
    for machine in one.machines:
        assert "sees another store than the node of rank 0" in said(machine), one.output()
    assert "is durable" not in one.output()


@pytest.mark.slow
def test_standby_with_a_disk_of_its_own_under_the_same_address_is_refused(
    made: Callable[..., Cluster],
) -> None:
    one = made(nodes="1")
    one.start(*ARGUMENTS, "--store", "/proc/self/cwd/disk")
    one.wait_steps(RUNNING)
    other = one.start(*ARGUMENTS, "--store", "/proc/self/cwd/disk")
    wait_for(lambda: other.process.poll() is not None, "its end", say=one.output)
    assert "sees another store than the node of rank 0" in said(other), one.output()
    assert sorted(one.wait_end(hurry=True).values()) == [0, REFUSED], one.output()


@pytest.mark.slow
def test_standby_with_another_store_is_refused_and_takes_over_nothing(
    made: Callable[..., Cluster], tmp_path: Path
) -> None:
    one = made(nodes="2")
    for _ in range(2):
        one.start(*ARGUMENTS)
    one.wait_steps(RUNNING)
    other = one.start(*ARGUMENTS, "--store", str(tmp_path / "mistyped"))
    wait_for(lambda: other.process.poll() is not None, "its end", say=one.output)
    assert str(tmp_path / "mistyped") in said(other), one.output()
    assert str(one.results / "store") in said(other), one.output()
    check_job_ends_well(one, other)
    assert one.job.attempts(0) == 1, one.output()


@pytest.mark.slow
def test_node_that_wants_another_number_of_nodes_is_refused(
    made: Callable[..., Cluster],
) -> None:
    one = made(nodes="2")
    for _ in range(2):
        one.start(*ARGUMENTS)
    one.wait_steps(RUNNING)
    other = one.start(*ARGUMENTS, more={"nodes_max": 3})
    wait_for(lambda: other.process.poll() is not None, "its end", say=one.output)
    assert "nodes=2:3" in said(other) and "nodes=2:2" in said(other), one.output()
    check_job_ends_well(one, other)


@pytest.mark.slow
def test_nodes_that_would_write_otherwise_all_end_at_once_and_name_both(
    made: Callable[..., Cluster],
) -> None:
    one = made(nodes="2")
    for job in ("one", "two"):
        one.start(*ARGUMENTS, "--job", job)
    assert set(one.wait_end().values()) == {REFUSED}, one.output()
    for machine in one.machines:
        assert "nodes of one job have different options" in said(machine), one.output()
        assert all(f"job={job}" in said(machine) for job in ("one", "two")), one.output()
    assert not (one.results / "store").exists(), "no step was taken"


@pytest.mark.slow
def test_standby_that_would_capture_at_other_steps_is_refused_and_told_both(
    made: Callable[..., Cluster],
) -> None:
    one = made(nodes="1")
    one.start(*ARGUMENTS)
    one.wait_steps(RUNNING)
    other = one.start(STEPS, "--every", 7)
    wait_for(lambda: other.process.poll() is not None, "its end", say=one.output)
    assert "every=1000 " in said(other) and "every=7 " in said(other), one.output()
    check_job_ends_well(one, other)


@pytest.mark.slow
def test_nodes_may_differ_in_options_that_rank_0_decides(made: Callable[..., Cluster]) -> None:
    one = made(nodes="2")
    for grace, linger in (("9s", "5s"), ("25s", "60s")):
        one.start(20, "--step-s", 0.01, "--every", 7, "--grace", grace, "--linger", linger)
    assert set(one.wait_end().values()) == {0}, one.output()
    newest = ckpt.Checkpointer(str(one.results / "store")).latest()
    assert newest is not None and newest.step == 20


def other_secret(folder: Path, name: str) -> dict[str, object]:
    path = folder / name
    path.write_text(os.urandom(32).hex())
    path.chmod(0o600)
    return {"secret": str(path)}


@pytest.mark.slow
def test_nodes_with_different_secrets_both_say_so_at_once(
    made: Callable[..., Cluster], tmp_path: Path
) -> None:
    one = made(nodes="2")
    for name in ("a.secret", "b.secret"):
        one.start(*ARGUMENTS, more=other_secret(tmp_path, name))
    for machine in one.machines:
        wait_for(
            lambda machine=machine: "another secret" in said(machine),
            "a word at each program",
            wait_s=20.0,
            say=one.output,
        )
    assert not one.ended()


@pytest.mark.slow
def test_standby_with_the_wrong_secret_takes_no_place_and_stops_no_job(
    made: Callable[..., Cluster], tmp_path: Path
) -> None:
    one = made(nodes="2")
    for _ in range(2):
        one.start(*ARGUMENTS)
    one.wait_steps(RUNNING)
    wrong = one.start(*ARGUMENTS, more=other_secret(tmp_path, "wrong.secret"))
    wait_for(lambda: "another secret" in said(wrong), "a word there", say=one.output)
    one.start(*ARGUMENTS)
    one.wait_steps(one.job.completed + RUNNING)
    lost = one.of_rank(1)
    lost.kill()
    (one.results / "hurry").touch()
    wait_for(
        lambda: all(
            machine.process.poll() is not None for machine in one.machines if machine is not wrong
        ),
        "the end of the others",
        say=one.output,
    )
    newest = ckpt.Checkpointer(str(one.results / "store")).latest()
    assert newest is not None and newest.step == STEPS, one.output()
    assert one.job.losses[0].poll().redone <= REDONE_MAX, one.output()


@pytest.mark.slow
def test_relative_store_in_different_working_directories_is_two_stores(
    made: Callable[..., Cluster], tmp_path: Path
) -> None:
    one = made(nodes="2")
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        one.start(*ARGUMENTS, "--store", "runs/a", cwd=tmp_path / name)
    assert set(one.wait_end().values()) == {REFUSED}, one.output()
    for machine in one.machines:
        assert "absolute paths" in said(machine), one.output()
        assert all(str(tmp_path / name / "runs/a") in said(machine) for name in ("here", "there"))


@pytest.mark.slow
def test_standby_of_another_release_is_told_and_takes_no_place(
    made: Callable[..., Cluster], tmp_path: Path
) -> None:
    one = made(nodes="2")
    arguments = (5 * STEPS, *ARGUMENTS[1:])
    for _ in range(2):
        one.start(*arguments)
    one.wait_steps(RUNNING)
    (tmp_path / "sitecustomize.py").write_text(
        "from ckpt.cluster.mesh import protocol\nprotocol.PROTOCOL_VERSION += 1\n"
    )
    other = one.start(*arguments, before=["env", f"PYTHONPATH={tmp_path}"])
    wait_for(
        lambda: (
            "another release of torch-ckpt" in said(other)
            and any("another release" in said(machine) for machine in one.machines[:2])
        ),
        "a word at both programs",
        say=one.output,
    )
    (one.results / "hurry").touch()
    ends = one.wait_end()
    assert [ends[machine.name] for machine in one.machines[:2]] == [0, 0], one.output()
    assert one.job.attempts(0) == 1, one.output()
