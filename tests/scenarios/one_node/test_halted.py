"""A process that is stopped before its first step is found and replaced: that no compiler takes so
long is certain there."""

from __future__ import annotations

import pytest
from kit.jobs import Fleet, plain


@pytest.mark.slow
def test_trainer_stopped_before_its_first_step_is_found_and_replaced(fleet: Fleet) -> None:
    job = fleet.start(plain("halts.py", "{folder}"), "halted")
    assert job.wait_end() == 0, job.output()
    assert "trained" in job.output()
    assert "rank 0 hangs" in job.output()
    fleet.wait_gone()
