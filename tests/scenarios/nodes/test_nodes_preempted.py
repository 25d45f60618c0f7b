"""A machine of several is to be taken away: all stop at one boundary, whichever it is."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from kit.jobs import wait_for
from kit.machines import cluster
from kit.nemesis import disks

import ckpt

PREEMPTED = 128 + signal.SIGTERM
NOT_DURABLE = 75
BEGUN = 10
STEPS = 100


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_all_nodes_stop_durable_at_one_step_when_one_of_them_is_asked_to_go(
    tmp_path: Path, rank: int
) -> None:
    with cluster(tmp_path / "cluster", nodes="2") as made:
        for _ in range(2):
            made.start(10_000, "--every", 100_000, "--step-s", 0.06)
        made.wait_steps(BEGUN)
        asked = made.of_rank(rank).process
        assert asked is not None
        asked.send_signal(signal.SIGTERM)
        wait_for(made.ended, "the end of all programs", say=made.output)
        assert set(made.wait_end().values()) == {PREEMPTED}, made.output()
        assert "not done within the grace period" not in made.output()
        newest = ckpt.Checkpointer(str(made.results / "store")).latest()
        assert newest is not None, made.output()
        assert newest.step == made.job.completed, made.output()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_standby_goes_on_in_the_place_of_a_node_that_is_asked_to_go(
    tmp_path: Path, rank: int
) -> None:
    with cluster(tmp_path / "cluster", nodes="2") as made:
        for _ in range(3):
            made.start(STEPS, "--every", 100_000, "--step-s", 0.1)
        made.wait_steps(BEGUN)
        asked, stays = made.of_rank(rank), made.of_rank(1 - rank)
        assert asked.process is not None and stays.process is not None
        pid = stays.process.pid
        asked.process.send_signal(signal.SIGTERM)
        wait_for(lambda: made.job.attempts(rank) == 2, "a standby in its place", say=made.output)
        ends = made.wait_end(hurry=True)
        assert ends.pop(asked.name) == PREEMPTED, made.output()
        assert set(ends.values()) == {0}, made.output()
        assert stays.process.pid == pid, "no cold start"
        assert made.job.attempts(0) == 2, made.output()
        assert made.job.losses[0].poll().redone == 0, (
            "they went on from the step at which it stopped"
        )
        assert "not done within the grace period" not in made.output()
        newest = ckpt.Checkpointer(str(made.results / "store")).latest()
        assert newest is not None and newest.step == STEPS


@pytest.mark.slow
def test_keepers_bring_to_a_slow_store_what_all_nodes_had_when_they_were_asked_to_go(
    tmp_path: Path,
) -> None:
    disks.require()
    with (
        cluster(tmp_path / "cluster", nodes="2") as made,
        disks.disk(made.results / "store", tmp_path / "store.img") as store,
    ):
        for _ in range(2):
            made.start(10_000, "--every", 100_000, "--step-s", 0.1, "--grace", "2s")
        made.wait_steps(BEGUN)
        store.stall(60.0)
        for machine in made.machines:
            assert machine.process is not None
            machine.process.send_signal(signal.SIGTERM)
        wait_for(made.ended, "the end of all programs", say=made.output)
        store.resume()
        assert set(made.wait_end().values()) <= {PREEMPTED, NOT_DURABLE}, made.output()
        made.wait_gone()
        newest = ckpt.Checkpointer(str(made.results / "store")).latest()
        assert newest is not None and newest.step == made.job.completed, made.output()


@pytest.mark.slow
def test_keepers_bring_to_the_store_what_memory_holds_when_all_programs_are_killed(
    tmp_path: Path,
) -> None:
    with cluster(tmp_path / "cluster", nodes="2") as made:
        for _ in range(2):
            made.start(10_000, "--every", 100_000, "--step-s", 0.05, "--linger", "1s")
        made.wait_steps(BEGUN)
        for machine in made.machines:
            keeper = machine.keeper()
            for pid in machine.members():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if pid != keeper else 0)
        wait_for(made.ended, "the end of all programs", say=made.output)
        made.wait_gone()
        newest = ckpt.Checkpointer(str(made.results / "store")).latest()
        assert newest is not None and newest.step >= BEGUN // 2, made.output()
