"""The store fails, training doesn't: full, read-only, gone, denied and hanging stores, and what is
said about them."""

from __future__ import annotations

import errno
import logging
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ckpt
from ckpt.backends.base import Backend
from ckpt.backends.file.store import FileBackend
from ckpt.testing.crashes import FailingOps

WAIT_S = 30.0
LARGE = 2_000_000


def remount(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True, capture_output=True)


def noise(step: int, size: int = 1000) -> torch.Tensor:
    """Values that no other step has, so that nothing is stored twice."""
    return torch.randint(1 << 40, (size,), generator=torch.Generator().manual_seed(step))


class Switch:
    """A store that works, fails as an operating system would, or hangs, as the test says."""

    def __init__(self, folder: Path) -> None:
        self._whole: Backend = FileBackend(folder)
        self._broken: Backend = FileBackend(folder, ops=FailingOps(errno.EACCES))
        self.broken = False
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Event()

    @property
    def url(self) -> str:
        return self._whole.url

    def __getattr__(self, name: str) -> object:
        if name == "put" and not self.gate.is_set():
            self.waiting.set()
            assert self.gate.wait(WAIT_S)
        return getattr(self._broken if self.broken else self._whole, name)


def train(
    store: str | Backend, steps: int, body: Callable[[ckpt.Run, int], None], *, size: int = 1000
) -> list[int]:
    """A decorated training that saves at each step and calls ``body`` in each; the steps it
    made."""
    made: list[int] = []

    at_once = ckpt.RestartPolicy(end_wait="never")

    @ckpt.resilient(store=store, every=1, compression="off", restart=at_once)
    def loop(run: ckpt.Run) -> None:
        state: dict[str, object] = {"x": noise(0, size)}
        run.track(state=state)
        for step in run.steps(steps):
            body(run, step)
            state["x"] = noise(step + 1, size)
            made.append(step)

    loop()
    return made


def settle(run: ckpt.Run) -> None:
    """Wait until what is in flight has ended, well or not."""
    for pending in run._session.saving._pendings:
        try:
            pending.durable(WAIT_S)
        except ckpt.CkptError:
            continue


def alarms(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]


def test_full_disk_raises_alarms_only_and_training_goes_on(
    disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filler = disk / "filler"

    def body(run: ckpt.Run, step: int) -> None:
        settle(run)
        if step == 3:
            filler.write_bytes(bytes(shutil.disk_usage(disk).free - (64 << 10)))
        if step == 7:
            filler.unlink()

    assert train(str(disk / "store"), 12, body, size=12_000) == list(range(12))
    told = [one for one in alarms(caplog) if "not durable" in one]
    assert len(told) == 1
    assert all(
        str(disk / "store") in one and "the store is full" in one and "free space" in one
        for one in told
    )
    with ckpt.Checkpointer(str(disk / "store")) as checkpointer:
        steps = [info.step for info in checkpointer.snapshots()]
        assert steps[-1] == 12
        assert not set(steps) & {5, 6, 7}
        state = {"state": {"x": torch.zeros(12_000, dtype=torch.int64)}}
        assert checkpointer.restore(state).step == 12
        assert torch.equal(state["state"]["x"], noise(12, 12_000))
        assert all(checkpointer.verify(step=step).ok for step in steps)


def test_full_disk_fails_save_with_its_error_and_the_next_save_succeeds(disk: Path) -> None:
    with ckpt.Checkpointer(str(disk / "store"), compression="off") as checkpointer:
        checkpointer.save({"state": {"x": noise(1)}}, step=1)
        with pytest.raises(ckpt.StoreFullError, match=r"(?s)disk/store.*free"):
            checkpointer.save({"state": {"x": noise(2, LARGE)}}, step=2)
        pending = checkpointer.save_async({"state": {"x": noise(3, LARGE)}}, step=3)
        with pytest.raises(ckpt.StoreFullError):
            pending.durable(WAIT_S)
        assert checkpointer.save({"state": {"x": noise(4)}}, step=4).step == 4
        assert [info.step for info in checkpointer.snapshots()] == [1, 4]
        assert checkpointer.verify().ok


def test_writer_that_meets_a_full_disk_in_one_of_many_packs_never_reports_success(
    disk: Path,
) -> None:
    state = {"state": {str(n): noise(n, 40_000) for n in range(20)}}
    with ckpt.Checkpointer(str(disk / "store"), compression="off") as checkpointer:
        pending = checkpointer.save_async(state, step=1)
        with pytest.raises(ckpt.StoreFullError):
            pending.durable(WAIT_S)
        assert checkpointer.latest() is None
        checkpointer.save({"state": {}}, step=2)


def test_last_snapshot_that_a_full_disk_keeps_from_being_durable_is_raised_at_the_end(
    disk: Path,
) -> None:
    made: list[int] = []

    def body(run: ckpt.Run, step: int) -> None:
        made.append(step)

    with pytest.raises(ckpt.StoreFullError):
        train(str(disk / "store"), 3, body, size=LARGE)
    assert made == [0, 1, 2]


def test_read_only_remount_raises_alarms_only_and_training_goes_on(
    disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def body(run: ckpt.Run, step: int) -> None:
        settle(run)
        if step in (2, 5):
            remount(disk, "ro" if step == 2 else "rw")

    assert train(str(disk / "store"), 8, body) == list(range(8))
    told = [one for one in alarms(caplog) if "not durable" in one]
    assert len(told) == 1
    assert all(str(disk / "store") in one for one in told)
    assert all("EROFS" in one and "mount it writable" in one for one in told)
    with ckpt.Checkpointer(str(disk / "store")) as checkpointer:
        assert [info.step for info in checkpointer.snapshots()] == [1, 2, 6, 7, 8]


def test_read_only_store_fails_save_with_its_error_and_can_be_read(disk: Path) -> None:
    with ckpt.Checkpointer(str(disk / "store")) as checkpointer:
        checkpointer.save({"state": {"x": noise(1)}}, step=1)
        remount(disk, "ro")
        with pytest.raises(ckpt.StoreDeniedError, match="disk/store"):
            checkpointer.save({"state": {"x": noise(2)}}, step=2)
        live = {"state": {"x": noise(0)}}
        with ckpt.Checkpointer(str(disk / "store")) as reader:
            assert reader.restore(live).step == 1
        assert torch.equal(live["state"]["x"], noise(1))
        remount(disk, "rw")
        checkpointer.save({"state": {"x": noise(3)}}, step=3)
        assert [info.step for info in checkpointer.snapshots()] == [1, 3]


@pytest.mark.slow
def test_denied_store_raises_alarms_only_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Switch(tmp_path / "store")

    def body(run: ckpt.Run, step: int) -> None:
        settle(run)
        store.broken = 2 <= step < 5

    assert train(store, 8, body) == list(range(8))
    told = [one for one in alarms(caplog) if "not durable" in one]
    assert len(told) == 1
    assert all(str(tmp_path / "store") in one and "grant permission" in one for one in told)
    with ckpt.Checkpointer(store) as checkpointer:
        assert [info.step for info in checkpointer.snapshots()] == [1, 2, 6, 7, 8]


def test_denied_store_fails_save_with_its_error_and_the_next_save_succeeds(tmp_path: Path) -> None:
    store = Switch(tmp_path / "store")
    with ckpt.Checkpointer(store) as checkpointer:
        checkpointer.save({"state": {"x": noise(1)}}, step=1)
        store.broken = True
        with pytest.raises(ckpt.StoreDeniedError, match=r"(?s)store.*permission"):
            checkpointer.save({"state": {"x": noise(2)}}, step=2)
        with pytest.raises(ckpt.StoreDeniedError):
            checkpointer.save_async({"state": {"x": noise(3)}}, step=3).durable(WAIT_S)
        store.broken = False
        checkpointer.save({"state": {"x": noise(4)}}, step=4)
        assert [info.step for info in checkpointer.snapshots()] == [1, 4]


@pytest.mark.slow
def test_vanished_folder_is_an_error_until_it_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, away = tmp_path / "store", tmp_path / "away"

    def body(run: ckpt.Run, step: int) -> None:
        settle(run)
        if step == 2:
            store.rename(away)
        if step == 5:
            shutil.rmtree(store, ignore_errors=True)
            away.rename(store)

    assert train(str(store), 8, body) == list(range(8))
    told = [one for one in alarms(caplog) if "not durable" in one]
    assert len(told) == 1
    assert all(str(store) in one for one in told)
    with ckpt.Checkpointer(str(store)) as checkpointer:
        assert [info.step for info in checkpointer.snapshots()] == [1, 2, 6, 7, 8]
        assert checkpointer.verify().ok


def test_vanished_folder_fails_save_and_the_next_save_succeeds_when_it_is_back(
    tmp_path: Path,
) -> None:
    store, away = tmp_path / "store", tmp_path / "away"
    with ckpt.Checkpointer(str(store)) as checkpointer:
        checkpointer.save({"state": {"x": noise(1)}}, step=1)
        store.rename(away)
        with pytest.raises(ckpt.CkptError, match=str(store)):
            checkpointer.save({"state": {"x": noise(2)}}, step=2)
        shutil.rmtree(store, ignore_errors=True)
        away.rename(store)
        checkpointer.save({"state": {"x": noise(3)}}, step=3)
        assert [info.step for info in checkpointer.snapshots()] == [1, 3]
        assert checkpointer.verify().ok


@pytest.mark.slow
def test_hanging_store_blocks_no_step_and_due_snapshots_are_skipped_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Switch(tmp_path / "store")

    def body(run: ckpt.Run, step: int) -> None:
        if step < 3:
            settle(run)
        if step == 2:
            store.gate.clear()
        if step == 4:
            assert store.waiting.wait(WAIT_S)
        if step == 15:
            store.gate.set()  # reached only because no step waited for the store
            settle(run)

    assert train(store, 20, body) == list(range(20))
    told = [one for one in alarms(caplog) if "skipped" in one]
    with ckpt.Checkpointer(store) as checkpointer:
        steps = [info.step for info in checkpointer.snapshots()]
    assert steps[:5] == [1, 2, 3, 4, 5]  # three slots: the snapshots of 3, 4 and 5 waited in memory
    assert steps[-1] == 20
    assert not set(steps) & set(range(6, 16))
    assert len(told) == 1, "more of the same is told once a minute"
    assert told[0].endswith("(step=6)")


def test_store_that_is_slow_for_one_call_delays_durability_only(tmp_path: Path) -> None:
    slow = Switch(tmp_path / "store")
    with ckpt.Checkpointer(slow) as checkpointer:
        checkpointer.save({"state": {"x": noise(1)}}, step=1)
        slow.gate.clear()
        pending = checkpointer.save_async({"state": {"x": noise(2)}}, step=2)
        assert not pending.done()
        with pytest.raises(ckpt.UnavailableError, match="not durable yet"):
            pending.durable(0.01)
        slow.gate.set()
        assert pending.durable(WAIT_S).step == 2


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, ckpt.StoreFullError),
        (errno.EDQUOT, ckpt.StoreFullError),
        (errno.EACCES, ckpt.StoreDeniedError),
        (errno.EROFS, ckpt.StoreDeniedError),
        (errno.EIO, ckpt.UnavailableError),
        (errno.ESTALE, ckpt.UnavailableError),
    ],
)
def test_error_of_the_operating_system_becomes_the_right_class(
    tmp_path: Path, number: int, kind: type[ckpt.CkptError]
) -> None:
    FileBackend(tmp_path / "store").put("ckpt-test", [b"x"])
    with (
        pytest.raises(kind) as caught,
        ckpt.Checkpointer(
            FileBackend(tmp_path / "store", ops=FailingOps(number, op="write"))
        ) as checkpointer,
    ):
        checkpointer.save({"state": {"x": noise(1)}}, step=1)
    assert str(tmp_path / "store") in str(caught.value)
