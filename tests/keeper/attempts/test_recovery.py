"""One recovery, told in phases."""

from __future__ import annotations

import pytest

from ckpt.keeper.attempts.events import Failure
from ckpt.keeper.attempts.recovery import NAMES, POINTS, Recovery
from ckpt.values import SnapshotId

FAILURE = Failure(1, "died", "rank 1 died of SIGKILL", -9, at_s=10.0)


def recovery(**changes: object) -> Recovery:
    known = {
        "attempt": 2,
        "failure": FAILURE,
        "completed": 12,
        "known_s": 10.25,
        "killed_s": 10.5,
        **changes,
    }
    return Recovery(**known)  # type: ignore[arg-type]


def test_each_phase_ends_with_the_slowest_rank_and_together_they_are_all_of_it() -> None:
    one = recovery(resume=SnapshotId(3, 11))
    for rank, late_s in ((0, 0.0), (1, 0.125)):
        for at, name in enumerate(POINTS):
            one.reach(rank, name, 11.0 + at + late_s)
    phases = one.phases()
    assert list(phases) == ["detect", "kill", *NAMES.values()]
    assert phases == {
        "detect": 0.25,
        "kill": 0.25,
        "fork": 0.625,
        "rendezvous": 1.0,
        "build": 1.0,
        "restore": 1.0,
        "step": 1.0,
    }
    assert one.seconds == pytest.approx(15.125 - 10.0)


def test_a_phase_that_did_not_happen_is_left_out() -> None:
    one = recovery()
    one.reach(0, "entered", 11.0)
    one.reach(0, "first-step", 12.0)
    assert list(one.phases()) == ["detect", "kill", "fork", "step"]
    assert one.seconds == pytest.approx(2.0)


def test_the_first_time_counts_and_unknown_points_do_not() -> None:
    one = recovery()
    one.reach(0, "entered", 11.0)
    one.reach(0, "entered", 99.0)
    one.reach(0, "lunch", 50.0)
    assert one.points == {0: {"entered": 11.0}}


def test_it_is_done_when_every_rank_has_made_a_step() -> None:
    one = recovery()
    one.reach(0, "first-step", 12.0)
    assert not one.done(2)
    one.reach(1, "first-step", 12.0)
    assert one.done(2)


def test_clocks_that_disagree_make_no_phase_negative() -> None:
    one = recovery(known_s=9.0, killed_s=8.0)
    one.reach(0, "tracked", 7.0)
    assert min(one.phases().values()) >= 0


@pytest.mark.parametrize(
    ("resume", "lost"),
    [(SnapshotId(3, 11), 1), (SnapshotId(3, 12), 0), (SnapshotId(3, 13), 0), (None, 12)],
)
def test_lost_steps_are_those_completed_beyond_what_was_restored(
    resume: SnapshotId | None, lost: int
) -> None:
    assert recovery(resume=resume).steps_lost == lost


def test_the_line_and_the_facts_tell_the_same() -> None:
    one = recovery(resume=SnapshotId(3, 11), how="fork")
    one.reach(0, "first-step", 11.0)
    assert one.line() == (
        "recovered in 1.000 s: rank 1 died of SIGKILL with 12 steps complete; all ranks went on "
        "from step 11 "
        "(detect 0.250, kill 0.250, step 0.500); 1 steps redone"
    )
    facts = one.facts()
    assert (facts["seconds"], facts["steps_lost"], facts["resumed"], facts["step_s"]) == (
        1.0,
        1,
        11,
        0.5,
    )


def test_nothing_completed_is_told_as_zero_steps() -> None:
    assert (
        "with 0 steps complete; all ranks went on from the start" in recovery(completed=-1).line()
    )
