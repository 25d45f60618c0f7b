"""Save and load one training state with ckpt and with what people use today, side by side on this
machine.

    python benchmarks/save_load.py            about a quarter of an hour: 1 GiB, 3 rounds
    python benchmarks/save_load.py --quick    a smoke test: 64 MiB, 1 round, one contestant of each kind; no figures to quote

Prints a table and writes bench-out/save_load.json. What is measured, and how: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from measure import memory_bytes, watched_memory
from report import CONTESTANTS, Measured, machine, print_table, summary

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Plan:
    """How large and how long."""

    mib: int
    rounds: int
    saves: int
    calm_s: float


FULL = Plan(mib=1024, rounds=3, saves=2, calm_s=0.7)
QUICK = Plan(mib=64, rounds=1, saves=1, calm_s=0.1)
QUICK_NAMES = (
    "ckpt",
    "torch.save",
    "safetensors",
    "dcp-async-tuned",
    "dcp-async-process",
    "torchsnapshot-async",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="64 MiB and one round: does it still run?"
    )
    parser.add_argument("--mib", type=int, help="size of the state")
    parser.add_argument("--rounds", type=int, help="fresh processes a contestant")
    parser.add_argument(
        "--only", nargs="+", choices=sorted(CONTESTANTS), help="leave the others out"
    )
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    plan = Plan(options.mib or plan.mib, options.rounds or plan.rounds, plan.saves, plan.calm_s)
    options.out.mkdir(exist_ok=True)
    names = options.only or (QUICK_NAMES if options.quick else tuple(CONTESTANTS))
    results = run_rounds(plan, names, options.out)
    facts = machine()
    document = {"machine": facts, "plan": {name: getattr(plan, name) for name in Plan.__slots__}}
    document["contestants"] = {name: summary(measured) for name, measured in results.items()}
    path = options.out / ("save_load_quick.json" if options.quick else "save_load.json")
    path.write_text(json.dumps(document, indent=1) + "\n")
    print_table(results, facts)
    print(f"wrote {path}")
    if wrong := [name for name, measured in results.items() if measured.wrong]:
        raise SystemExit(f"loaded other bytes than were saved: {', '.join(wrong)}")


def run_rounds(plan: Plan, names: Sequence[str], out: Path) -> dict[str, Measured]:
    """A B C ..., then B C ... A, and so on: no contestant always follows the same one."""
    results = {name: Measured() for name in names}
    for number in range(plan.rounds):
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):
            if results[name].absent is None:
                begin_s = time.monotonic()
                run_worker(name, plan, results[name], out)
                note = results[name].absent or f"{time.monotonic() - begin_s:.0f} s"
                print(
                    f"round {number + 1}/{plan.rounds} {name}: {note}", file=sys.stderr, flush=True
                )
    return results


def run_worker(name: str, plan: Plan, measured: Measured, out: Path) -> None:
    """One contestant, one round, one fresh process; what it reports is added to ``measured``."""
    folder = Path(tempfile.mkdtemp(prefix="store-", dir=out))
    mark = f"CKPT_BENCHMARK={uuid.uuid4().hex}"
    variable, _, value = mark.partition("=")
    command = [
        sys.executable,
        str(HERE / "worker.py"),
        f"--contestant={CONTESTANTS[name]}",
        f"--folder={folder}",
    ]
    command += [f"--mib={plan.mib}", f"--saves={plan.saves}", f"--calm-s={plan.calm_s}"]
    path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {variable: value, "PYTHONPATH": path}
    try:
        with (out / "save_load.log").open("ab") as log:
            worker = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
            try:
                listen(worker, mark, measured)
            finally:
                worker.kill()
                worker.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def listen(worker: subprocess.Popen[str], mark: str, measured: Measured) -> None:
    """Take in what the worker says until it ends, and answer what it asks."""
    assert worker.stdout is not None
    base_bytes = 0
    done = False
    for line in worker.stdout:
        fact = json.loads(line)
        match fact.pop("event"):
            case "size":
                measured.size_bytes, measured.tensors = fact["bytes"], fact["tensors"]
            case "memory":
                base_bytes = memory_bytes(mark)
                answer(worker)
            case "watch":
                with watched_memory(mark) as peak:
                    answer(worker)
                    worker.stdout.readline()
                measured.extra_bytes.append(peak[0] - base_bytes)
                answer(worker)
            case "first":
                measured.first.append(fact)
            case "save":
                measured.saves.append(fact)
            case "load":
                measured.loads.setdefault(fact["name"], []).append(fact["load_s"])
                measured.wrong |= not fact["right"]
            case "absent":
                measured.absent = fact["why"]
                done = True
            case "done":
                done = True
    if not done:
        measured.absent = "failed: see save_load.log"


def answer(worker: subprocess.Popen[str]) -> None:
    assert worker.stdin is not None
    worker.stdin.write("\n")
    worker.stdin.flush()


if __name__ == "__main__":
    main()
