from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from ckpt.backends.file.store import FileBackend
from ckpt.backends.file.syscalls import REAL_OPS
from ckpt.testing.crashes import (
    DeleteStep,
    PowerCut,
    PowerLossOps,
    PutStep,
    Step,
    faults_found,
    run_steps,
)

STEPS: tuple[Step, ...] = (
    PutStep("packs/one", (1 << 20) + 5, seed=1),
    PutStep("log/0", 300, seed=2, create_only=True),
    PutStep("packs/one", (1 << 20) + 9_000, seed=3, aligned=False),
    PutStep("parts/a/b", 100, seed=5),
    DeleteStep("log/0"),
    PutStep("log/1", 200, seed=4, create_only=True),
)


def run_until_cut(top: Path, at: int | None) -> tuple[PowerLossOps, int]:
    """Run the steps over a folder whose power goes at a call; returns the shadow and how many steps
    had returned."""
    top.mkdir()
    ops = PowerLossOps(top, at=at)
    done: list[int] = []
    with contextlib.suppress(PowerCut):
        run_steps(FileBackend(top / "deep/store", ops=ops), STEPS, done=done.append)
    return ops, len(done)


@pytest.mark.slow
def test_file_store_whose_power_goes_at_any_call_keeps_what_returned_whole(tmp_path: Path) -> None:
    ops, returned = run_until_cut(tmp_path / "whole", None)
    assert returned == len(STEPS)
    for at in range(ops.count + 1):
        check_cut(tmp_path, at, seeds=range(4))


@pytest.mark.slow
def test_file_store_whose_power_goes_after_the_work_keeps_it_whole(tmp_path: Path) -> None:
    ops, _ = run_until_cut(tmp_path / "whole", None)
    check_cut(tmp_path, ops.count, seeds=range(6))
    check_cut(tmp_path, ops.count // 2, seeds=range(6))


def check_cut(tmp_path: Path, at: int, seeds: range) -> None:
    ops, done = run_until_cut(tmp_path / f"at-{at}", at)
    for seed in seeds:
        after = tmp_path / f"after-{at}-{seed}"
        after.mkdir()
        ops.wreck(after, seed=seed)
        store = FileBackend(after / "deep/store")
        assert faults_found(store, STEPS, done=done) == [], f"at={at} seed={seed} done={done}"
        run_steps(store, STEPS[done:], done=lambda number: None)
        assert faults_found(store, STEPS, done=len(STEPS)) == [], f"at={at} seed={seed}"


def written(ops: PowerLossOps, path: Path, data: bytes, *, sync: bool) -> None:
    fd = ops.open(str(path), os.O_WRONLY | os.O_CREAT)
    ops.write(fd, [memoryview(data)], 0)
    if sync:
        ops.fsync(fd)
    os.close(fd)


def states(ops: PowerLossOps, into: Path, count: int = 40) -> list[dict[str, bytes]]:
    found = []
    for seed in range(count):
        after = into / str(seed)
        after.mkdir(parents=True)
        ops.wreck(after, seed=seed)
        found.append({path.name: path.read_bytes() for path in after.iterdir() if path.is_file()})
    return found


@pytest.fixture
def top(tmp_path: Path) -> Path:
    (tmp_path / "top").mkdir()
    return tmp_path / "top"


def test_unsynced_write_is_lost_kept_cut_or_garbled(top: Path, tmp_path: Path) -> None:
    ops = PowerLossOps(top)
    written(ops, top / "a", b"x" * 9000, sync=False)
    ops.fsync_directory(str(top))
    found = [state["a"] for state in states(ops, tmp_path / "after")]
    assert found[0] == b""
    assert b"x" * 9000 in found
    assert any(body and len(body) < 9000 for body in found)
    assert any(len(body) == 9000 and body.strip(b"x") for body in found)


def test_unsynced_name_is_kept_or_undone(top: Path, tmp_path: Path) -> None:
    ops = PowerLossOps(top)
    written(ops, top / "a", b"x", sync=True)
    ops.fsync_directory(str(top))
    ops.rename(str(top / "a"), str(top / "b"))
    found = states(ops, tmp_path / "after")
    assert found[0] == {"a": b"x"}
    assert {"b": b"x"} in found
    ops.fsync_directory(str(top))
    assert all(state == {"b": b"x"} for state in states(ops, tmp_path / "later"))


def test_store_that_forgets_to_sync_is_caught(tmp_path: Path) -> None:
    class Forgetful(PowerLossOps):
        def fsync(self, fd: int) -> None:
            REAL_OPS.fsync(fd)

    (tmp_path / "top").mkdir()
    ops = Forgetful(tmp_path / "top")
    run_steps(FileBackend(tmp_path / "top/store", ops=ops), STEPS[:1], done=lambda number: None)
    (tmp_path / "after").mkdir()
    ops.wreck(tmp_path / "after", seed=0)
    assert faults_found(FileBackend(tmp_path / "after/store"), STEPS[:1], done=1) != []
