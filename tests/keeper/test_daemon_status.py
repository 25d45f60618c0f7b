"""What a keeper tells tools about itself."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
from kit.keepers.served import POLICY, Served, open_epoch, started, until
from kit.keepers.slot_makers import SLOT_BYTES

from ckpt.ipc import messages as answers
from ckpt.ipc import messages as words
from ckpt.ipc.messages import Policy
from ckpt.values import SnapshotId, TrainerPhase

Serve = Callable[..., Served]
PAIR = SnapshotId(1, 5)


@pytest.mark.slow
def test_a_keeper_without_a_job_tells_of_itself(serve: Serve) -> None:
    served = serve()
    report = served.report()
    assert (report.job, report.store, report.pid, report.boot) == (
        "job",
        str(served.store),
        os.getpid(),
        "b00t",
    )
    assert (report.launch, report.attempt, report.epoch, report.state) == ("", 0, 0, "lingering")
    assert (report.complete, report.durable, report.ranks, report.recoveries) == (
        None,
        None,
        (),
        (),
    )
    assert (report.uploads, report.slot_bytes) == (0, 0)
    assert report.rss_bytes > 1 << 20
    assert 0 <= report.since_s < 60


@pytest.mark.slow
def test_a_job_in_place_shows_ranks_slots_and_what_is_durable(serve: Serve) -> None:
    served = serve(Policy(linger_s=30.0, hang_s=0.0))
    one, two = (served.trainer(rank, 2, pid=100 + rank) for rank in range(2))
    open_epoch(one)
    for trainer in (one, two):
        trainer.hand_in(PAIR, index=2)
    for trainer in (one, two):
        assert trainer.outcome().error is None
    mine = one.board.rank(0)
    mine.phase, mine.staged, mine.skipped = TrainerPhase.PAUSED, 3, 1
    mine.beat(6)
    report = served.report()
    assert (report.state, report.launch, report.epoch, report.complete) == (
        "in place",
        "l1",
        1,
        PAIR,
    )
    assert report.durable is not None
    assert report.durable.id == PAIR
    assert report.slot_bytes == 2 * SLOT_BYTES
    first, second = report.ranks
    assert (first.rank, first.supervisor_pid, first.trainer_pid) == (0, 0, 100)
    assert (first.completed, first.phase, first.staged, first.skipped) == (6, "paused", 3, 1)
    assert 0 <= first.idle_s < 10
    assert (second.trainer_pid, second.completed, second.phase, second.idle_s) == (
        101,
        -1,
        "starting",
        0.0,
    )
    assert [(slot.index, slot.size_bytes, slot.snapshot) for slot in second.slots] == [
        (2, SLOT_BYTES, PAIR)
    ]
    for trainer in (one, two):
        trainer.leave(planned=False)
    until(lambda: served.report().state == "lingering")


def test_a_supervised_job_shows_its_attempt_and_its_processes(serve: Serve) -> None:
    served = serve(POLICY)
    first = served.peer(role="supervisor", rank=0, ranks=2, pid=70)
    first.next(answers.Welcome)
    assert served.report().state == "gathering"
    second = served.peer(role="supervisor", rank=1, ranks=2, pid=71)
    second.next(answers.Welcome)
    started([first, second])
    second.say(words.Died(attempt=1, status=-11, at_s=time.monotonic()))
    assert first.next(words.Kill).attempt == 1
    report = served.report()
    assert (report.state, report.attempt) == ("killing", 1)
    assert [rank.supervisor_pid for rank in report.ranks] == [70, 71]
    first.say(words.Killed(attempt=1))
    assert started([first, second]).attempt == 2
    assert served.report().state == "running"
    for one in (first, second):
        one.say(words.Died(attempt=2, status=0, at_s=time.monotonic()))
        one.next(words.Leave)
        one.leave()
