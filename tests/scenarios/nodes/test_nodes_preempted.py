"""A machine of several is to be taken away: all stop at one boundary, whichever it is."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from kit.jobs import wait_for
from kit.machines import cluster

import ckpt

PREEMPTED = 128 + signal.SIGTERM
BEGUN = 20


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_all_nodes_stop_durable_at_one_step_when_one_of_them_is_asked_to_go(
    tmp_path: Path, rank: int
) -> None:
    with cluster(tmp_path / "cluster", nodes="2") as made:
        for _ in range(2):
            made.start(10_000, "--every", 100_000, "--step-s", 0.03)
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
