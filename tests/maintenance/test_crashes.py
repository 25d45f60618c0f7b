"""A scrub or a sync may die, or the power go, at any system call: nothing right is lost, and the
next one finishes."""

from __future__ import annotations

import shutil
import signal
from itertools import count
from pathlib import Path

import pytest
from kit.damage import SOAK, faults_of, flip, names_nothing_missing, objects_of
from kit.scrub_crashes import Dying, Work

from ckpt.backends.file.store import FileBackend
from ckpt.backends.file.syscalls import REAL_OPS
from ckpt.format import keys
from ckpt.maintenance.scrub.scrub import scrub
from ckpt.maintenance.sync.sync import sync
from ckpt.testing.crashes import CrashMode, PowerCut, PowerLossOps, RecordingOps, run_in_child

TARGETS = {"scrub": "2", "sync": "new"}


def prepare(members: Path, root: Path, kind: str) -> Path:
    """Three stores of which, for a scrub, the last has lost its log, and a part and a pack, and has
    rot in others."""
    shutil.copytree(members, root)
    if kind == "scrub":
        store = FileBackend(root / "2")
        packs, parts = sorted(objects_of(store, keys.PACKS)), sorted(objects_of(store, keys.PARTS))
        shutil.rmtree(root / "2" / "log")
        (root / "2" / packs[0]).unlink()
        (root / "2" / parts[0]).unlink()
        flip(store.url, packs[1], 0)
        flip(store.url, parts[1], 20)
    return root


def check(root: Path, target: Path, kind: str) -> None:
    """What is left names only what is there; the same work, done again, ends with everything
    right."""
    truth = FileBackend(root / "0")
    store = FileBackend(target)
    assert faults_of(truth, FileBackend(root / "1")) == []
    if kind == "sync":
        assert names_nothing_missing(store)
        report = sync(truth, store)
        assert report.ok
    else:
        if objects_of(store, keys.LOG):
            assert names_nothing_missing(store)
        scrubbed = scrub([truth, FileBackend(root / "1"), store], 2)
        assert scrubbed is not None
        assert scrubbed.ok, scrubbed
    assert faults_of(store, truth) == []


def calls_of(members: Path, tmp_path: Path, kind: str) -> int:
    root = prepare(members, tmp_path / "counted", kind)
    recording = RecordingOps(inner=REAL_OPS)
    Work(str(root), kind).run(recording)
    check(root, root / TARGETS[kind], kind)
    return len(recording.calls)


def killed(members: Path, tmp_path: Path, kind: str, share: int) -> None:
    calls = calls_of(members, tmp_path, kind)
    tried = 0
    for mode in CrashMode:
        for at in range(tried % share, calls, share):
            root = prepare(members, tmp_path / f"{mode.value}-{at}", kind)
            assert run_in_child(Dying(Work(str(root), kind), at, mode)) == -signal.SIGKILL
            check(root, root / TARGETS[kind], kind)
            shutil.rmtree(root)
            tried += 1
    print(f"{kind}: {calls} calls, {tried} points tried")
    assert tried > calls // share


def cut(members: Path, tmp_path: Path, kind: str, share: int, seeds: range) -> None:
    calls = calls_of(members, tmp_path, kind)
    names = count()
    for at in range(0, calls, share):
        root = prepare(members, tmp_path / f"cut-{next(names)}", kind)
        ops = PowerLossOps(root, at=at)
        with pytest.raises(PowerCut):
            Work(str(root), kind).run(ops)
        for seed in seeds:
            wreck = tmp_path / f"wreck-{next(names)}"
            wreck.mkdir()
            ops.wreck(wreck, seed=seed)
            check(wreck, wreck / TARGETS[kind], kind)
            shutil.rmtree(wreck)
        shutil.rmtree(root)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scrub", "sync"])
def test_killed_at_some_calls_it_harms_nothing_and_the_next_one_finishes(
    members: Path, tmp_path: Path, kind: str
) -> None:
    killed(members, tmp_path, kind, share=90)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scrub", "sync"])
def test_power_cut_at_some_calls_harms_nothing_and_the_next_one_finishes(
    members: Path, tmp_path: Path, kind: str
) -> None:
    cut(members, tmp_path, kind, share=60, seeds=range(2))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scrub", "sync"])
def test_killed_at_any_call_it_harms_nothing_and_the_next_one_finishes(
    members: Path, tmp_path: Path, kind: str
) -> None:
    killed(members, tmp_path, kind, share=1 if SOAK else 37)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scrub", "sync"])
def test_power_cut_at_any_call_harms_nothing_and_the_next_one_finishes(
    members: Path, tmp_path: Path, kind: str
) -> None:
    cut(members, tmp_path, kind, share=1 if SOAK else 23, seeds=range(3))
