"""A keeper drops old snapshots before it ends, by what the launch said that it has now."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from kit.keepers.served import Served, open_epoch, until

from ckpt.backends.file.store import FileBackend
from ckpt.ipc.messages import Policy, Retention
from ckpt.log.journal import Journal
from ckpt.maintenance.gc import plan as gc_due
from ckpt.values import SnapshotId

Serve = Callable[..., Served]
LAST_TWO = Retention(keep="last=2", grace_s=0.0)
LINGERS = Policy(linger_s=30.0, hang_s=0.0)


@pytest.fixture(autouse=True)
def _rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """No round but the first and the last."""
    monkeypatch.setattr(gc_due, "ROUND_S", 3600.0)


def steps(served: Served) -> list[int]:
    return [
        entry.snapshot.step for entry in Journal.open(FileBackend(served.store)).refresh().snapshots
    ]


def save(trainer, epoch: int, *some: int, slots: int = 0) -> None:
    """In three slots, the first of which is ``slots``: a keeper still has those of earlier
    launches."""
    for step in some:
        trainer.hand_in(SnapshotId(epoch, step), index=slots + step % 3)
        assert trainer.outcome().error is None


@pytest.mark.slow
def test_keeper_drops_what_the_policy_does_not_keep_before_it_ends(serve: Serve) -> None:
    served = serve()
    trainer = served.trainer()
    save(trainer, open_epoch(trainer, retention=LAST_TWO), 1, 2, 3, 4, 5)
    trainer.leave()
    assert served.ends()
    assert steps(served) == [4, 5]


@pytest.mark.slow
def test_keeper_that_was_told_nothing_drops_nothing(serve: Serve) -> None:
    served = serve()
    trainer = served.trainer()
    save(trainer, open_epoch(trainer), 1, 2, 3, 4, 5)
    trainer.leave()
    assert served.ends()
    assert steps(served) == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_launch_that_comes_to_a_lingering_keeper_brings_its_own_policy(serve: Serve) -> None:
    served = serve(LINGERS)
    first = served.trainer(launch="a")
    save(first, open_epoch(first, retention=LAST_TWO), 1, 2, 3, 4)
    first.leave(planned=False)
    until(lambda: served.report().state == "lingering")
    second = served.trainer(launch="b")
    save(
        second,
        open_epoch(second, SnapshotId(1, 4), retention=Retention(keep="last=5", grace_s=0.0)),
        5,
        6,
        slots=3,
    )
    second.leave()
    assert served.ends()
    assert steps(served) == [2, 3, 4, 5, 6]


@pytest.mark.slow
def test_launch_of_another_size_brings_its_own_policy_too(serve: Serve) -> None:
    served = serve(LINGERS)
    first = served.trainer(launch="a")
    save(first, open_epoch(first, retention=LAST_TWO), 1)
    first.leave(planned=False)
    until(lambda: served.report().state == "lingering")
    others = [served.trainer(rank, 2, launch="b") for rank in range(2)]
    epoch = open_epoch(others[0], SnapshotId(1, 1))
    for step in (2, 3):
        for other in others:
            other.hand_in(SnapshotId(epoch, step), index=step % 3)
        assert [other.outcome().error for other in others] == [None, None]
    for other in others:
        other.leave()
    assert served.ends()
    assert steps(served) == [1, 2, 3]
