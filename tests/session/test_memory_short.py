"""Memory that becomes short in mid-training costs snapshots, never the training."""

from __future__ import annotations

import pytest
import torch

from ckpt.errors import UnavailableError, UsageError
from ckpt.session.agreement import Skip, Take
from ckpt.staging import slot
from ckpt.values import SnapshotId


class Gauge:
    """Stands for the machine's free memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.short = False
        monkeypatch.setattr(slot, "check_available", self._check)

    def _check(self, needed_bytes: int, *, purpose: str, **more: object) -> None:
        if self.short and needed_bytes:
            raise UsageError(f"not enough memory for {purpose}.")


@pytest.fixture
def gauge(monkeypatch: pytest.MonkeyPatch) -> Gauge:
    return Gauge(monkeypatch)


@pytest.fixture
def _no_helper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots are made when they are needed only."""
    monkeypatch.setattr(slot.SlotPool, "_start_prefault", lambda self: None)


def items(count: int = 4, value: float = 1.0) -> dict[str, object]:
    return {"m": {"w": torch.full((count,), value)}}


def test_state_that_never_fitted_is_the_users_to_know(rank_over, gauge: Gauge, job) -> None:
    gauge.short = True
    rank = rank_over(job.store)
    with pytest.raises(UsageError, match="not enough memory"):
        rank.save(items(), 1)
    with pytest.raises(UsageError, match="not enough memory"):
        rank.saving.stage(items(), SnapshotId(rank.epoch, 2), metadata={})
    assert "memory-short" not in [event.kind for event in rank.events]


@pytest.mark.usefixtures("_no_helper")
def test_missing_slot_is_done_without(rank_over, gauge: Gauge, job) -> None:
    rank = rank_over(job.store)
    state = items()
    assert rank.save(state, 1).durable(20).step == 1
    gauge.short = True
    for step in range(2, 5):
        assert rank.save(state, step).durable(20).step == step
    assert [event.kind for event in rank.events if event.alarm] == ["memory-short"]


def test_state_that_has_outgrown_its_slots_is_skipped(rank_over, gauge: Gauge, job) -> None:
    rank = rank_over(job.store)
    assert rank.save(items(), 1).durable(20).step == 1
    gauge.short = True
    large = items(100_000)
    assert not rank.saving.stage(large, SnapshotId(rank.epoch, 2), metadata={})
    with pytest.raises(
        UnavailableError, match=r"has grown and its slots can't grow: not enough memory"
    ):
        rank.save(large, 3)
    gauge.short = False
    assert rank.save(large, 4).durable(20).step == 4
    assert [event.kind for event in rank.events if event.kind == "memory-short"] == ["memory-short"]


@pytest.mark.usefixtures("_no_helper")
def test_rank_0_counts_on_no_more_slots_than_memory_has_room_for(
    job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(needed_bytes: int, *, purpose: str, **more: object) -> None:
        if purpose.startswith("3"):
            raise UsageError(f"not enough memory for {purpose}.")

    monkeypatch.setattr(slot, "check_available", check)
    rank = job.ranks(1, slots=3)[0]
    rank.saving.prepare(items())
    assert isinstance(rank.saving.may_take(1), Take)
    assert isinstance(rank.saving.may_take(2), Skip)
