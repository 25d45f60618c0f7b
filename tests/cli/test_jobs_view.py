"""What ``ckpt ps`` and ``ckpt top`` show, decided without a keeper."""

from __future__ import annotations

from pathlib import Path

import pytest
from kit.keepers.standin import job_report, rank_report
from msgspec.structs import replace as changed

from ckpt.cli.jobs import (
    KeeperIdentity,
    ReportSample,
    choose_keeper,
    human_seconds,
    recovery_rows,
    steps_per_s,
)
from ckpt.errors import NotFoundError, UsageError


def samples(*points: tuple[float, int, int]) -> list[ReportSample]:
    return [
        ReportSample(at_s, job_report(completed=done, attempt=attempt))
        for at_s, done, attempt in points
    ]


def test_pace_is_taken_from_the_oldest_sample_of_the_same_trainer() -> None:
    assert steps_per_s([]) == {}
    assert steps_per_s(samples((0, 5, 1))) == {0: None, 1: None}
    assert steps_per_s(samples((0, 5, 1), (1, 7, 1), (4, 13, 1))) == {0: 2.0, 1: 2.0}
    assert steps_per_s(samples((0, 50, 1), (1, 10, 2), (3, 14, 2))) == {0: 2.0, 1: 2.0}
    assert steps_per_s(samples((0, 50, 1), (1, 10, 2))) == {0: None, 1: None}
    # A trainer that has completed nothing is about to go on from a snapshot: that is no pace.
    assert steps_per_s(samples((0, -1, 1), (1, 100, 1), (2, 103, 1))) == {0: 3.0, 1: 3.0}
    other = changed(job_report(completed=6), ranks=(rank_report(0, completed=6, trainer_pid=77),))
    assert steps_per_s([*samples((0, 5, 2)), ReportSample(1.0, other)]) == {0: None}


def test_recoveries_are_shown_newest_first_and_bear_missing_facts() -> None:
    many = [{"attempt": attempt, "step_s": 0.5} for attempt in range(9)]
    rows = recovery_rows(many, last=2)
    assert [row[0] for row in rows] == ["8", "7"]
    assert rows[0][1:] == ("-", "-", "-", "-", "step 500 ms")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0 ms"),
        (0.0123, "12 ms"),
        (1, "1.0 s"),
        (59.9, "59.9 s"),
        (75, "1 min 15 s"),
        (7500, "2 h 5 min"),
    ],
)
def test_seconds_for_people(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


def test_job_is_chosen_by_name_or_folder() -> None:
    homes = [
        KeeperIdentity("a", "s", 1, Path("/r/0a")),
        KeeperIdentity("b", "s", 2, Path("/r/0b")),
        KeeperIdentity("b", "t", 3, Path("/r/0c")),
    ]
    assert choose_keeper(homes, "a") == 0
    assert choose_keeper(homes, "0c") == 2
    assert choose_keeper(homes[:1], None) == 0
    for wanted in ("b", None):
        with pytest.raises(UsageError, match=r"0b \(b in s\)"):
            choose_keeper(homes, wanted)
    with pytest.raises(NotFoundError, match="no such job"):
        choose_keeper(homes, "c")
    with pytest.raises(NotFoundError, match="no job runs"):
        choose_keeper([], None)
