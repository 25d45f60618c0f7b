"""Kill a training process in mid-step, and show that nothing was lost: not one bit of one loss
differs.

Trains ``train_gpt.py`` twice under torchrun on two ranks: once undisturbed, and once with a SIGKILL
of rank 1 between two snapshots. Exits with 1 where the two runs differ in any loss or in the final
weights.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SCRIPT = Path(__file__).with_name("train_gpt.py")
ROOT = SCRIPT.parents[1]
RANKS = 2
STEPS = 150
EVERY = 20
KILL_AT = 70  # half-way between the snapshots after 60 and after 80 steps
RUN_S_MAX = 300.0
POLL_S = 0.005


@dataclass
class Losses:
    """A loss file as it grows: what was computed for each step, in the order of arrival.

    A step that was redone after a restart has several entries; all of them must be equal.
    """

    path: Path
    of_step: dict[int, list[str]] = field(default_factory=dict)
    _read_bytes: int = 0

    def poll(self) -> None:
        """Take in the whole lines that were appended since the last call."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read_bytes)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
        self._read_bytes += len(text)
        for line in text.decode().splitlines():
            step, loss = line.split()
            self.of_step.setdefault(int(step), []).append(loss)

    @property
    def last_step(self) -> int:
        return max(self.of_step, default=-1)

    @property
    def redone(self) -> int:
        return sum(len(losses) - 1 for losses in self.of_step.values())


@dataclass(frozen=True)
class Outcome:
    """One finished training run. ``recovery_s`` is the time from the kill to the next step that was
    new."""

    losses: Losses
    log: str
    wall_s: float
    killed_after: int | None = None
    recovery_s: float | None = None

    @property
    def weights(self) -> str:
        return self.found(r"weights sha256=(\w+)")[-1]

    def found(self, pattern: str) -> list[str]:
        return re.findall(pattern, self.log)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="leave the folder with stores and logs")
    parser.add_argument("--ranks", type=int, default=RANKS, help="training processes, 2 or more")
    options = parser.parse_args()
    ranks, keep = options.ranks, options.keep
    folder = Path(tempfile.mkdtemp(prefix="ckpt-demo-"))
    try:
        print(
            f"training {STEPS} steps on {ranks} ranks, a snapshot every {EVERY} steps, undisturbed "
            "...",
            flush=True,
        )
        calm = train(folder / "calm", ranks=ranks, kill_at=None)
        print(f"the same again, and SIGKILL for rank 1 at step {KILL_AT} ...", flush=True)
        killed = train(folder / "killed", ranks=ranks, kill_at=KILL_AT)
        return report(calm, killed)
    finally:
        if keep:
            print(f"kept {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def train(folder: Path, *, ranks: int, kill_at: int | None) -> Outcome:
    """Run the example under torchrun to its end; with ``kill_at``, kill rank 1 once that step was
    logged."""
    folder.mkdir()
    losses = Losses(folder / "losses.txt")
    killed_after = recovery_s = None
    killed_at_s = 0.0
    begin_s = time.monotonic()
    with started(folder, ranks) as process:
        while process.poll() is None:
            if time.monotonic() - begin_s > RUN_S_MAX:
                raise SystemExit(f"training hangs: no end after {RUN_S_MAX:.0f} s\n{tail(folder)}")
            losses.poll()
            if kill_at is not None and killed_after is None and losses.last_step >= kill_at:
                os.kill(int((folder / "rank-1.pid").read_text()), signal.SIGKILL)
                killed_at_s = time.monotonic()
                losses.poll()
                killed_after = losses.last_step
            if killed_after is not None and recovery_s is None and losses.last_step > killed_after:
                recovery_s = time.monotonic() - killed_at_s
            time.sleep(POLL_S)
    losses.poll()
    if process.returncode != 0:
        raise SystemExit(f"training failed. exit={process.returncode}\n{tail(folder)}")
    wall_s = time.monotonic() - begin_s
    return Outcome(losses, (folder / "log.txt").read_text(), wall_s, killed_after, recovery_s)


@contextlib.contextmanager
def started(folder: Path, ranks: int) -> Iterator[subprocess.Popen[bytes]]:
    """The job under torchrun, ended after the block, come what may."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=3"),
        *(f"--nproc-per-node={ranks}", str(SCRIPT), f"--steps={STEPS}", f"--every={EVERY}"),
        *(
            f"--store={folder / 'store'}",
            f"--loss-file={folder / 'losses.txt'}",
            f"--pid-dir={folder}",
        ),
    ]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": "1",
        # With the agent's store shared among attempts, a restart after a kill can wait for a dead
        # address forever.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()  # torchrun passes it on to the ranks
                try:
                    process.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def tail(folder: Path) -> str:
    lines = (folder / "log.txt").read_text(errors="replace").splitlines()
    return "\n".join(lines[-40:])


def report(calm: Outcome, killed: Outcome) -> int:
    """Print what the kill cost; 0 where both runs are equal to the last bit, else 1."""
    restored = [int(step) for step in killed.found(r"restored step (\d+)")]
    rows = [
        ("killed after step", str(killed.killed_after)),
        ("restored snapshot of step", ", ".join(map(str, restored)) or "none"),
        ("steps lost (done twice)", str(killed.losses.redone)),
        (
            "seconds from kill to the next new step",
            "-" if killed.recovery_s is None else f"{killed.recovery_s:.2f}",
        ),
        ("snapshots saved, undisturbed / killed", f"{count_saved(calm)} / {count_saved(killed)}"),
        ("seconds in all, undisturbed / killed", f"{calm.wall_s:.1f} / {killed.wall_s:.1f}"),
        ("final weights, undisturbed / killed", f"{calm.weights} / {killed.weights}"),
    ]
    print()
    for name, value in rows:
        print(f"  {name:<40} {value}")
    print()
    faults = differences(calm, killed)
    if not restored:
        faults.append("the killed run never restored a snapshot")
    for fault in faults:
        print(f"NOT EQUAL: {fault}")
    if not faults:
        print(f"equal: all {STEPS} losses and the final weights of both runs agree, bit for bit")
    return 1 if faults else 0


def count_saved(outcome: Outcome) -> int:
    return len(outcome.found(r"saved step \d+"))


def differences(calm: Outcome, killed: Outcome) -> list[str]:
    """Every way in which the killed run strays from the calm one; empty where they are equal."""
    faults = []
    for step in range(STEPS):
        first = calm.losses.of_step.get(step, [])
        again = killed.losses.of_step.get(step, [])
        if len(first) != 1 or not again:
            faults.append(f"step {step} was computed {len(first)} and {len(again)} times")
        elif {*again} != {*first}:
            faults.append(
                f"step {step} gave loss {first[0]} undisturbed, {' then '.join(again)} around the "
                "kill"
            )
    if calm.weights != killed.weights:
        faults.append(f"the final weights differ: {calm.weights} and {killed.weights}")
    return faults[:10]


if __name__ == "__main__":
    sys.exit(main())
