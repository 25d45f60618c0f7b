from __future__ import annotations

import functools
import signal
from pathlib import Path

import pytest

from ckpt.backends.file.store import FileBackend
from ckpt.backends.memory import MemoryBackend
from ckpt.testing.crashes import (
    CrashingBackend,
    CrashMode,
    DeleteStep,
    DoneFile,
    OpCall,
    PutStep,
    RecordingOps,
    Rehearsal,
    Step,
    faults_found,
    run_in_child,
    run_steps,
)

STEPS: tuple[Step, ...] = (
    PutStep("packs/one", (1 << 20) + 5, seed=1),
    PutStep("log/0", 300, seed=2, create_only=True),
    PutStep("packs/one", (1 << 20) + 70_000, seed=3, aligned=False),
    DeleteStep("packs/one"),
    PutStep("log/1", 200, seed=4, create_only=True),
)


def recorded(folder: Path) -> list[OpCall]:
    ops = RecordingOps()
    run_steps(FileBackend(folder / "count", ops=ops), STEPS, done=lambda number: None)
    return ops.calls


def check_crash(folder: Path, at: int, mode: CrashMode) -> None:
    """Kill a child at one point; the store must be whole, and a new writer must get on and leave no
    garbage."""
    folder.mkdir()
    done = DoneFile(str(folder / "done"))
    rehearsal = Rehearsal(root=str(folder / "store"), steps=STEPS, done=done, at=at, mode=mode)
    assert run_in_child(rehearsal) == -signal.SIGKILL
    store = FileBackend(folder / "store")
    assert faults_found(store, STEPS, done=done.count()) == [], f"at={at} mode={mode}"
    run_steps(FileBackend(folder / "store"), STEPS[done.count() :], done=lambda number: None)
    assert faults_found(store, STEPS, done=len(STEPS)) == [], f"at={at} mode={mode}"
    assert list((folder / "store/.tmp").iterdir()) == [], f"at={at} mode={mode}"


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(CrashMode))
def test_file_store_killed_at_any_call_is_whole_and_goes_on(
    tmp_path: Path, mode: CrashMode
) -> None:
    for call in recorded(tmp_path):
        check_crash(tmp_path / f"at-{call.number}", call.number, mode)


@pytest.mark.slow
def test_file_store_killed_half_way_through_a_write_is_whole_and_goes_on(tmp_path: Path) -> None:
    at = next(call.number for call in recorded(tmp_path) if call.name == "write")
    check_crash(tmp_path / "torn", at, CrashMode.TORN)


def test_work_has_crash_points_of_every_kind(tmp_path: Path) -> None:
    names = {call.name for call in recorded(tmp_path)}
    assert names == {
        "open",
        "preallocate",
        "write",
        "fsync",
        "link",
        "rename",
        "unlink",
        "mkdir",
        "rmdir",
        "fsync_directory",
    }


def test_crashing_backend_dies_at_the_named_change(tmp_path: Path) -> None:
    steps = tuple(PutStep(key, 10, seed=1) for key in "abc")
    for mode, names in ((CrashMode.BEFORE, ["a"]), (CrashMode.AFTER, ["a", "b"])):
        root, done = tmp_path / mode.value, DoneFile(str(tmp_path / f"done-{mode.value}"))
        rehearsal = Rehearsal(
            root=str(root), steps=steps, done=done, at=1, mode=mode, whole_puts=True
        )
        assert run_in_child(rehearsal) == -signal.SIGKILL
        assert [entry.key for entry in FileBackend(root).list("")] == names
        assert done.count() == 1


def test_crashing_backend_refuses_a_torn_put() -> None:
    with pytest.raises(ValueError, match="never torn"):
        CrashingBackend(MemoryBackend(), at=0, mode="torn")


def test_child_that_survives_reports_success() -> None:
    assert run_in_child(functools.partial(int, "0")) == 0
