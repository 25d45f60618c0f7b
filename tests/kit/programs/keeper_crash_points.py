"""Kills a keeper at each change that it makes while a plain ``Checkpointer`` hands it a snapshot, and
looks whether that becomes durable.

    python keeper_crash_points.py FOLDER SHARE

SHARE: every so many-th point, 1 for all. What the program does after it handed the snapshot in
changes from point to point: it waits for it, saves on, or ends. Prints one JSON object: the names
of the changes, the points tried and everything that is wrong.

As ``crash_points.py``, this process runs no operation of torch on two threads and starts no thread,
so its forks are as good as fresh processes.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from ckpt.backends.file.store import FileBackend
from ckpt.ipc.client import ensure_keeper
from ckpt.ipc.runtime_dir import list_jobs
from ckpt.log.journal import Journal
from ckpt.session.checkpointer import Checkpointer
from ckpt.session.keeper import connection
from ckpt.testing.crashes import CrashMode

HALVED = frozenset({"write", "preallocate"})
WAIT_S = 60.0
THEN = ("waits", "saves on", "ends")


def state_of(version: int) -> dict[str, object]:
    return {"w": {"w": torch.full((20_000,), float(version))}}


def work(folder: Path, then: str) -> None:
    """Save one snapshot, then hand in the one under test."""
    with Checkpointer(folder / "store") as checkpointer:
        checkpointer.save(state_of(1), step=1)
        (folder / "armed").touch()
        pending = checkpointer.save_async(state_of(2), step=2, tag="best")
        if then == "saves on":
            checkpointer.save(state_of(3), step=3)
        if then != "ends":
            pending.durable(WAIT_S)
    pending.durable(0.0)
    (folder / "armed").unlink(missing_ok=True)


def faults_found(folder: Path, then: str) -> list[str]:
    """What a process without keeper finds wrong in the store."""
    wrong = []
    state, log = state_of(0), Journal.open(FileBackend(folder / "store")).refresh()
    with Checkpointer(folder / "store") as checkpointer:
        found = checkpointer.restore(state, tag="best")
    item = state["w"]
    assert isinstance(item, dict)
    if found.step != 2 or not torch.equal(item["w"], torch.full((20_000,), 2.0)):
        wrong.append(f"what is tagged is not what was handed in: {found}")
    steps = {entry.snapshot.step for entry in log.snapshots}
    if steps != ({1, 2, 3} if then == "saves on" else {1, 2}):
        wrong.append(f"the store has other snapshots than those saved: {sorted(steps)}")
    return wrong


def in_child(call: Callable[[], list[str]], output: Path) -> list[str]:
    """What ``call`` returns in a fork of its own, or how that ended."""
    output.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        try:
            found = call()
        except BaseException:  # noqa: BLE001  a fork must never return into its parent's code
            found = [traceback.format_exc()]
        output.write_text(json.dumps(found))
        os._exit(0)
    os.waitpid(pid, 0)
    return json.loads(output.read_text()) if output.exists() else ["the child died"]


def run(folder: Path, *, at: int, mode: CrashMode, then: str) -> list[str]:
    """One run whose first keeper dies at one change; what is wrong afterwards."""
    box = folder / "box"
    shutil.rmtree(box, ignore_errors=True)
    box.mkdir(parents=True)
    os.environ["CKPT_RUNTIME_DIR"] = str(box / "run")
    os.environ["KEEPER_CRASH"] = json.dumps({"at": at, "mode": mode.value, "folder": str(box)})

    def saved() -> list[str]:
        program = ("-m", "kit.keepers.crashing")
        connection.ensure_keeper = functools.partial(ensure_keeper, program=program)
        work(box, then)
        return []

    def looked() -> list[str]:
        os.environ["CKPT_KEEPER"] = "off"
        return faults_found(box, then)

    output = folder / "wrong.json"
    wrong = in_child(saved, output) or in_child(looked, output)
    until_s = time.monotonic() + WAIT_S
    while any(job.has_keeper() for job in list_jobs()):
        if time.monotonic() > until_s:
            return [*wrong, "a keeper stays"]
        time.sleep(0.005)
    return wrong


def main() -> None:
    """See the module."""
    folder, share = Path(sys.argv[1]), int(sys.argv[2])
    logging.getLogger("ckpt").addHandler(logging.NullHandler())
    torch.set_num_threads(1)
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
    os.environ.pop("CKPT_KEEPER", None)
    wrong = [
        f"undisturbed: {one}" for one in run(folder, at=-1, mode=CrashMode.BEFORE, then="waits")
    ]
    names = (folder / "box" / "calls").read_text().splitlines()
    points = [
        (at, mode)
        for at, name in enumerate(names)
        for mode in CrashMode
        if mode is not CrashMode.TORN or name in HALVED
    ]
    died = 0
    for number, (at, mode) in list(enumerate(points))[::share]:
        then = THEN[number // share % len(THEN)]
        found = run(folder, at=at, mode=mode, then=then)
        died += len((folder / "box" / "calls").read_text().splitlines()) == at + 1
        wrong += [f"{mode.value} change {at} ({names[at]}), then {then}: {one}" for one in found]
    tried = len(points[::share])
    print(json.dumps({"names": names, "tried": tried, "died": died, "wrong": wrong}))


if __name__ == "__main__":
    main()
