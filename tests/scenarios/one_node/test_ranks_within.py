"""Ranks that a framework starts inside the decorated function."""

from __future__ import annotations

import pytest
from kit.jobs import Fleet, plain


@pytest.mark.slow
def test_ranks_started_inside_the_function_are_refused_and_nothing_is_saved(fleet: Fleet) -> None:
    job = fleet.start(plain("ranks_within.py", "{folder}"))
    assert job.wait_end() == 1, f"{job.output()}\n{fleet.describe()}"
    assert "ranks=1 group_rank=0 group_ranks=2" in job.output()
    assert "start it with torchrun --nproc-per-node=2" in job.output()
    saved = [path for path in (job.folder / "store").rglob("*") if path.is_file()]
    assert saved == []
    fleet.wait_gone()
