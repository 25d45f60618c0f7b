"""Without a keeper the saving process itself drops what its policy does not keep: after saves, in
nobody's time."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
import torch

import ckpt
from ckpt.backends.base import Backend
from ckpt.backends.file.store import FileBackend
from ckpt.backends.memory import MemoryBackend
from ckpt.format import keys
from ckpt.ipc.messages import Retention
from ckpt.log.catalog import load_index
from ckpt.log.journal import Journal
from ckpt.maintenance.gc import plan as gc_due
from ckpt.maintenance.gc.plan import PREFIXES
from ckpt.session.options import SessionOptions, check_grace, check_keep, retention_of
from ckpt.testing.faults import Fault, FaultyBackend, Harm

WAIT_S = 60.0


def state(step: int) -> dict[str, object]:
    return {"model": {"w": torch.full((1000,), float(step)), "fixed": torch.ones(1000)}}


def steps(store: Backend) -> list[int]:
    return [entry.snapshot.step for entry in Journal.open(store).refresh().snapshots]


def objects(store: Backend) -> set[str]:
    return {stat.key for prefix in PREFIXES for stat in store.list(prefix)}


def needed(store: Backend) -> set[str]:
    """What the snapshots that exist refer to."""
    log = Journal.open(store).refresh()
    found: set[str] = set()
    for entry in log.snapshots:
        index = load_index(store, log, entry.snapshot)
        found |= {keys.manifest_key(entry.snapshot, entry.manifest_digest), *index.packs()}
        found |= {ref.key for ref in index.manifest.parts}
    return found


def until(there) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not there():
        assert time.monotonic() < deadline_s, "nothing came of it"
        time.sleep(0.002)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc_due, "ROUND_S", 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [ckpt.keep_last(2), "last=2"])
def test_closed_checkpointer_leaves_what_the_policy_keeps_and_exactly_its_bytes(
    tmp_path: Path, keep
) -> None:
    with ckpt.Checkpointer(tmp_path / "run", keep=keep, grace="0s") as c:
        for step in range(1, 7):
            c.save(state(step), step=step)
    store = FileBackend(tmp_path / "run")
    assert steps(store) == [5, 6]
    assert objects(store) == needed(store)
    found = state(0)
    assert ckpt.Checkpointer(tmp_path / "run").restore(found, step=5).step == 5
    assert torch.equal(found["model"]["w"], state(5)["model"]["w"])


def test_without_a_policy_everything_is_kept() -> None:
    store = MemoryBackend()
    with ckpt.Checkpointer(store, grace="0s") as c:
        for step in range(1, 5):
            c.save(state(step), step=step)
    assert steps(store) == [1, 2, 3, 4]


def test_bytes_stay_for_a_day_by_default() -> None:
    store = MemoryBackend()
    with ckpt.Checkpointer(store, keep="last=1") as c:
        for step in range(1, 5):
            c.save(state(step), step=step)
    assert steps(store) == [4]
    assert len([key for key in objects(store) if key.startswith(keys.MANIFESTS)]) == 4


@pytest.mark.slow
def test_old_snapshots_go_while_saves_go_on(quick: None) -> None:
    store = MemoryBackend()
    with ckpt.Checkpointer(store, keep="last=2", grace="0s") as c:
        for step in range(1, 6):
            c.save(state(step), step=step)
            until(lambda step=step: steps(store) == list(range(max(1, step - 1), step + 1)))


def test_tagged_ones_and_the_best_by_metadata_stay() -> None:
    store = MemoryBackend()
    with ckpt.Checkpointer(
        store, keep=ckpt.keep_last(1) | ckpt.keep_best("loss", 2), grace="0s"
    ) as c:
        for step, loss in enumerate([0.9, 0.2, 0.5, 0.1, 0.7, 0.8], 1):
            c.save(
                state(step), step=step, metadata={"loss": loss}, tag="first" if step == 1 else None
            )
    assert steps(store) == [1, 2, 4, 6]


@pytest.mark.slow
def test_restored_snapshot_is_there_until_the_next_save_though_newer_ones_are_committed(
    quick: None,
) -> None:
    store = MemoryBackend()
    with ckpt.Checkpointer(store, keep="last=1,every=3", grace="0s") as c:
        for step in range(1, 8):
            c.save(state(step), step=step)
        until(lambda: steps(store) == [3, 6, 7])
        found = state(0)
        assert c.restore(found, step=3).step == 3
        assert torch.equal(found["model"]["w"], state(3)["model"]["w"])
        c.save(state(4), step=4)
        assert c.verify(step=3).ok
        until(lambda: steps(store) == [3, 6, 4])
    assert ckpt.Checkpointer(store).latest().step == 4


def test_run_without_keeper_keeps_to_the_policy_by_what_it_logs() -> None:
    store = MemoryBackend()

    @ckpt.resilient(
        store=store, every=1, keep=ckpt.keep_best("loss", 1) | ckpt.keep_every(5), grace="0s"
    )
    def train(run: ckpt.Run) -> None:
        run.track(x={"v": 1})
        for step in run.steps(8):
            run.log(loss=abs(step - 2))
            run.save()  # waits for a slot, where a snapshot that is due is skipped

    train()
    assert steps(store) == [3, 5, 8]
    assert objects(store) == needed(store)


def test_failing_rounds_are_alarms_and_never_raised(caplog: pytest.LogCaptureFixture) -> None:
    inner = MemoryBackend()
    store = FaultyBackend(inner, [Fault(harm=Harm.DENIED, op="delete", times=None)])
    with (
        caplog.at_level(logging.WARNING, logger="ckpt"),
        ckpt.Checkpointer(store, keep="last=1", grace="0s") as c,
    ):
        for step in range(1, 5):
            c.save(state(step), step=step)
    assert steps(inner) == [4]
    assert (
        "not swept to the end" in caplog.text
        or "dropping or deleting old snapshots failed" in caplog.text
    )
    with ckpt.Checkpointer(inner, keep="last=1", grace="0s") as c:
        c.save(state(5), step=5)
    assert steps(inner) == [5]
    assert objects(inner) == needed(inner), "the next run finishes it"


def test_writer_that_was_overtaken_drops_nothing() -> None:
    store = MemoryBackend()
    first = ckpt.Checkpointer(store, keep="last=1", grace="0s")
    first.save(state(1), step=1)
    with ckpt.Checkpointer(store) as second:
        for step in (2, 3):
            second.save(state(step), step=step)
    with pytest.raises(ckpt.FencedError):
        first.save(state(4), step=4)
    with pytest.raises(ckpt.FencedError):
        first.close()
    assert steps(store) == [1, 2, 3]


@pytest.mark.parametrize(
    "keep", [7, True, ["last=1"], ckpt.SnapshotId(1, 1), "", "newest", "last=0"]
)
def test_policy_that_is_none_is_refused_when_it_is_made(keep: object) -> None:
    for make in (
        lambda: ckpt.Checkpointer(MemoryBackend(), keep=keep),
        lambda: ckpt.resilient(store="x", keep=keep),
    ):
        with pytest.raises(ckpt.UsageError):
            make()


@pytest.mark.parametrize("grace", [0, None, "soon", "-1h", "1.5h", 24.0])
def test_grace_that_is_no_length_of_time_is_refused_when_it_is_made(grace: object) -> None:
    for make in (
        lambda: ckpt.Checkpointer(MemoryBackend(), grace=grace),
        lambda: ckpt.resilient(store="x", grace=grace),
    ):
        with pytest.raises(ckpt.UsageError):
            make()


def test_policy_travels_to_a_keeper_as_text_that_means_the_same() -> None:
    policy = (
        ckpt.keep_last(3)
        | ckpt.keep_best("val/loss", 2, "max")
        | ckpt.keep_for("36h")
        | ckpt.keep_tagged()
    )
    retention = retention_of(SessionOptions(keep=policy, grace_s=check_grace("90m")))
    assert retention == Retention(keep="last=3,tagged,best=val/loss:2:max,for=36h", grace_s=5400.0)
    assert check_keep(retention.keep) == policy
    assert retention_of(SessionOptions()) is None
