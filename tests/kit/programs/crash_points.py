"""Dies at every mutating system call of one save, and checks after each death what a fresh process
finds.

    python crash_points.py FOLDER SCENARIO KIND SHARE

SCENARIO: ``first`` saves version 1 into an empty store, ``over`` version 2 over version 1,
``continued`` restores version 1 first (so version 2 refers to its chunks), ``tagged`` tags version
2 too, ``second`` saves both in one process. KIND: ``kill`` (SIGKILL before, after and half-way
through each call) or ``power`` (the power goes, unsynced bytes are lost, kept or garbled as seeds
say). SHARE: every so many-th point, 1 for all.

This process imports torch, runs no operation on two threads and starts no thread: so its forks are
as good as fresh processes, at milliseconds each. Prints one JSON object: the calls met, the points
tried and everything that is wrong.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from ckpt.backends.file.store import FileBackend
from ckpt.backends.file.syscalls import REAL_OPS, FileOps
from ckpt.errors import NotFoundError
from ckpt.session.checkpointer import Checkpointer
from ckpt.testing.crashes import (
    CrashingOps,
    CrashMode,
    OpCall,
    PowerCut,
    PowerLossOps,
    RecordingOps,
)

HALVED = frozenset({"write", "preallocate"})
POWER_SEEDS = (0, 1, 2)
SAVED = 7
"""Exit status of a child whose save returned."""

State = dict[str, object]


def state_of(version: int) -> State:
    """A state whose every changing part says which version it is; ``frozen`` is the same in all."""
    linear = torch.nn.Linear(3, 3)
    for parameter in linear.parameters():
        parameter.data.fill_(version)
    return {
        "model": linear,
        "large": torch.full((300_000,), version, dtype=torch.float32),
        "small": torch.full((5,), version, dtype=torch.int64),
        "frozen": torch.arange(2000),
        "progress": {"version": version, "text": f"version {version}"},
    }


def version_of(state: State) -> str:
    """Which version a state is, or what it is a mixture of."""
    model, progress = state["model"], state["progress"]
    assert isinstance(model, torch.nn.Module)
    assert isinstance(progress, dict)
    tensors = [*(p.detach() for p in model.parameters()), state["large"], state["small"]]
    seen = {float(value) for t in tensors if isinstance(t, torch.Tensor) for value in t.unique()}
    seen.add(float(progress["version"]))
    whole = progress["text"] == f"version {progress['version']}" and torch.equal(
        torch.as_tensor(state["frozen"]), torch.arange(2000)
    )
    return str(int(seen.pop())) if len(seen) == 1 and whole else f"mixture of {sorted(seen)}"


def save(root: Path, scenario: str, ops: FileOps) -> None:
    """The save under test, every system call of it through ``ops``."""
    with Checkpointer(FileBackend(root, ops=ops), compression="off") as checkpointer:
        if scenario == "first":
            checkpointer.save(state_of(1), step=1)
            return
        if scenario == "second":
            checkpointer.save(state_of(1), step=1)
            checkpointer.save_async(state_of(2), step=2).durable()
            return
        if scenario == "continued":
            checkpointer.restore(state_of(0))
        checkpointer.save(state_of(2), step=2, tag="best" if scenario == "tagged" else None)


def allowed(scenario: str, *, saved: bool) -> set[str]:
    """The versions that a restore may find; ``none`` where there may be no snapshot."""
    match scenario, saved:
        case "first", True:
            return {"1"}
        case "first", False:
            return {"none", "1"}
        case "second", False:
            return {"none", "1", "2"}
        case _, True:
            return {"2"}
        case _:
            return {"1", "2"}


def faults_found(root: Path, scenario: str, *, saved: bool) -> list[str]:
    """What a fresh process finds wrong: it restores, verifies, saves on, and restores that."""
    wrong = []
    state = state_of(0)
    with Checkpointer(str(root), compression="off") as checkpointer:
        try:
            found = checkpointer.restore(state)
            seen = version_of(state)
            if seen != str(found.step):
                wrong.append(f"the snapshot of step {found.step} restored as {seen}")
        except NotFoundError:
            seen = "none"
        if seen not in allowed(scenario, saved=saved):
            wrong.append(f"restored {seen}, allowed {sorted(allowed(scenario, saved=saved))}")
        for info in checkpointer.snapshots():
            report = checkpointer.verify(step=info.step, epoch=info.epoch)
            wrong += [f"verify of {info.id}: {one.message}" for one in report.damaged]
            if info.maybe_stale or info.problem:
                wrong.append(f"{info.id} is doubtful: {info.problem}")
        checkpointer.save(state_of(3), step=3)
    again = state_of(0)
    with Checkpointer(str(root)) as checkpointer:
        checkpointer.restore(again)
    if version_of(again) != "3":
        wrong.append(f"saving did not go on: restored {version_of(again)}")
    left = [path.name for path in (root / ".tmp").iterdir()]
    if left:
        wrong.append(f"garbage of the dead is left: {left}")
    return wrong


def in_child(work: Callable[[], int], *, output: Path | None = None) -> int:
    """Run ``work`` in a fork; its exit status, negative for a signal. What it raises goes to
    ``output`` as text."""
    if output is not None:
        output.unlink(missing_ok=True)
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        status = work()
    except BaseException:  # noqa: BLE001  a fork must never return into its parent's code
        if output is not None:
            output.write_text(json.dumps([traceback.format_exc()]))
    finally:
        os._exit(status)


class Points:
    """All points of one scenario, below one folder."""

    def __init__(self, folder: Path, scenario: str) -> None:
        self.folder = folder
        self.scenario = scenario
        self.wrong: list[str] = []
        self.tried = 0
        self._template = folder / "template"
        if scenario in ("first", "second"):
            self._template.mkdir(parents=True)
        else:
            self._expect(
                in_child(lambda: self._save_quietly(self._template, "first")),
                SAVED,
                "the first save",
            )
        self.calls = self._enumerate()

    def kill(self, call: OpCall, mode: CrashMode) -> None:
        """Die at one call, and look."""
        root = self._fresh()
        output = self.folder / "wrong.json"
        status = in_child(
            lambda: self._save_with(root, CrashingOps(at=call.number, mode=mode)), output=output
        )
        here = f"{self.scenario}: killed {mode.value} call {call.number} ({call.name} {Path(call.path).name})"
        self._expect(status, -signal.SIGKILL, here)
        self._check(root, here, saved=False)

    def power(self, call: OpCall, seed: int) -> None:
        """Cut the power before one call, and look at one thing that the disk may hold then."""
        root = self._fresh()
        wreck = self.folder / "wreck"
        shutil.rmtree(wreck, ignore_errors=True)
        wreck.mkdir()

        def cut() -> int:
            ops = PowerLossOps(root.parent, at=call.number)
            try:
                save(root, self.scenario, ops)
            except PowerCut:
                ops.wreck(wreck, seed=seed)
                return 0
            return SAVED

        here = f"{self.scenario}: power cut before call {call.number} ({call.name} {Path(call.path).name}) seed={seed}"
        self._expect(in_child(cut, output=self.folder / "wrong.json"), 0, here)
        self._check(wreck / root.name, here, saved=False)

    def _check(self, root: Path, here: str, *, saved: bool) -> None:
        self.tried += 1
        output = self.folder / "wrong.json"

        def look() -> int:
            output.write_text(json.dumps(faults_found(root, self.scenario, saved=saved)))
            return 0

        in_child(look, output=output)
        found = json.loads(output.read_text()) if output.exists() else ["the checking child died"]
        self.wrong += [f"{here}: {one}" for one in found]

    def _enumerate(self) -> list[OpCall]:
        root, output = self._fresh(), self.folder / "calls.json"

        def record() -> int:
            ops = RecordingOps()
            save(root, self.scenario, ops)
            output.write_text(
                json.dumps([(call.number, call.name, call.path) for call in ops.calls])
            )
            return SAVED

        self._expect(
            in_child(record, output=self.folder / "wrong.json"), SAVED, "the save that is counted"
        )
        self._check(root, f"{self.scenario}: undisturbed", saved=True)
        return [OpCall(*call) for call in json.loads(output.read_text())]

    def _fresh(self) -> Path:
        root = self.folder / "box" / "store"
        shutil.rmtree(root.parent, ignore_errors=True)
        root.parent.mkdir()
        # Each life of this address begins anew: nobody has seen more of it before.
        seen = self.folder / "state"
        shutil.rmtree(seen, ignore_errors=True)
        os.environ["CKPT_STATE_DIR"] = str(seen)
        if any(self._template.iterdir()):
            shutil.copytree(self._template, root)
        return root

    def _save_quietly(self, root: Path, scenario: str) -> int:
        save(root, scenario, REAL_OPS)
        return SAVED

    def _save_with(self, root: Path, ops: FileOps) -> int:
        save(root, self.scenario, ops)
        return SAVED

    def _expect(self, status: int, wanted: int, here: str) -> None:
        if status != wanted:
            output = self.folder / "wrong.json"
            why = output.read_text() if output.exists() else ""
            self.wrong.append(f"{here}: the child ended with {status}, not {wanted}. {why}")


def main() -> None:
    """See the module."""
    folder, scenario, kind, share = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    logging.getLogger("ckpt").addHandler(logging.NullHandler())
    torch.set_num_threads(1)
    points = Points(folder, scenario)
    for call in points.calls[::share]:
        if kind == "power":
            for seed in POWER_SEEDS:
                points.power(call, seed)
            continue
        for mode in CrashMode:
            if mode is not CrashMode.TORN or call.name in HALVED:
                points.kill(call, mode)
    names = sorted({call.name for call in points.calls})
    print(
        json.dumps(
            {
                "calls": len(points.calls),
                "names": names,
                "tried": points.tried,
                "wrong": points.wrong,
            }
        )
    )


if __name__ == "__main__":
    main()
