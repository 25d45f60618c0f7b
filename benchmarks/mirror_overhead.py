"""What mirroring costs the steps: a GPT trained on two nodes, staged, and mirrored on the other
node or not.

    python benchmarks/mirror_overhead.py              some ten minutes: three sizes
    python benchmarks/mirror_overhead.py --quick      a smoke test: the smallest size, few steps; no figures to quote

Two nodes of one rank on this machine, which meet in a file. In each job
(``stage_overhead_loop.py``) two equal models take turns, one staged as often as several nodes do
(every third step) and one never; jobs with mirrors and without take turns as well. So both costs
are measured against bare steps of the same minute: what staging costs, and what staging and
mirroring cost together. Where both nodes share two cores with both trainers and the loopback's
copying this is the worst case. Writes bench-out/mirror_overhead.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recovery_nodes_agents import Agents
from report import machine
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
JOB_S_MAX = 900.0
WIDTH_MIN = 130
NODES = 2
SIZES = {"tiny": 30, "small": 8, "wide": 3}
"""Rounds of each size in each job; see ``stage_overhead.py``."""
JOBS = 3
"""With mirrors, and as many without."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="the smallest size, few steps: does it still run?"
    )
    parser.add_argument("--sizes", nargs="+", choices=sorted(SIZES), help="leave the others out")
    parser.add_argument("--jobs", type=int, default=JOBS, help="of each kind")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    sizes = options.sizes or (["tiny"] if options.quick else list(SIZES))
    jobs = 1 if options.quick else options.jobs
    found = {
        size: measure(size, 4 if options.quick else SIZES[size], jobs, options.out)
        for size in sizes
    }
    document = {"machine": machine(), "nodes": NODES, "sizes": found}
    path = options.out / f"mirror_overhead{'_quick' if options.quick else ''}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    print_table(document)
    print(f"wrote {path}")


def measure(size: str, rounds: int, jobs: int, out: Path) -> dict[str, Any]:
    """Jobs of both kinds, A B, B A, ...; what each kind found, summed up."""
    taken: dict[int, list[dict[str, Any]]] = {0: [], 1: []}
    for number in range(jobs):
        for mirrors in (0, 1) if number % 2 == 0 else (1, 0):
            one = one_job(size, rounds, mirrors, out)
            cost_s = statistics.median(one["with_s"]) - statistics.median(one["without_s"])
            print(
                f"{number + 1}/{jobs} {size}, mirrors {mirrors}: {cost_s * 1e3:.2f} ms more a step"
            )
            taken[mirrors].append(one)
    return {
        "state_bytes": taken[0][0]["state_bytes"],
        "staged": summed(taken[0]),
        "mirrored": summed(taken[1]),
    }


def one_job(size: str, rounds: int, mirrors: int, out: Path) -> dict[str, Any]:
    """The times of rank 0 in one job."""
    with tempfile.TemporaryDirectory(prefix="mirror-", dir=out) as name:
        folder = Path(name).resolve()
        path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
        environment = {
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",
            "CKPT_STATE_DIR": str(folder / "state"),
        }
        launcher = [
            "-m",
            "ckpt",
            "run",
            "--rdzv-id=bench",
            f"--nnodes={NODES}",
            "--nproc-per-node=1",
            f"--mirrors={mirrors}",
        ]
        program = [str(HERE / "stage_overhead_loop.py"), str(folder), size, str(rounds)]
        with Agents(launcher, program, folder, environment) as agents:
            agents.wait_ended([agents.start().process for _ in range(NODES)], wait_s=JOB_S_MAX)
        times: dict[str, Any] = json.loads((folder / "times.json").read_text())
    return times


def summed(jobs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians over all steps of all jobs, means too: what comes in few steps must not vanish."""
    costs = [statistics.median(one["with_s"]) - statistics.median(one["without_s"]) for one in jobs]
    mean_costs = [
        statistics.fmean(one["with_s"]) - statistics.fmean(one["without_s"]) for one in jobs
    ]
    bare_s = statistics.median(step_s for one in jobs for step_s in one["without_s"])
    return {
        "bare_s": bare_s,
        "cost_s": statistics.median(costs),
        "mean_cost_s": statistics.median(mean_costs),
        "share": statistics.median(costs) / bare_s,
        "steps": sum(len(one["with_s"]) for one in jobs),
        "mirrored_share": statistics.median(
            one["mirror_bytes"] / one["staged_bytes"] for one in jobs
        ),
    }


def print_table(document: dict[str, Any]) -> None:
    table = Table(
        title=f"mirroring what is staged on one other node, {document['nodes']} nodes of one rank on one machine; medians",
        caption="  ".join(f"{name} {value}" for name, value in document["machine"].items()),
    )
    table.add_column("model", no_wrap=True)
    for title in (
        "a node stages MiB",
        "bare step ms",
        "staged, ms more",
        "staged and mirrored, ms more",
        "mirroring alone, ms",
        "of the step",
        "the same by means",
        "of staged bytes mirrored",
    ):
        table.add_column(title, justify="right")
    for size, found in document["sizes"].items():
        staged, mirrored = found["staged"], found["mirrored"]
        more_s = mirrored["cost_s"] - staged["cost_s"]
        mean_more_s = mirrored["mean_cost_s"] - staged["mean_cost_s"]
        table.add_row(
            size,
            f"{found['state_bytes'] / 2**20 / document['nodes']:.1f}",
            f"{staged['bare_s'] * 1e3:.1f} / {mirrored['bare_s'] * 1e3:.1f}",
            f"{staged['cost_s'] * 1e3:.2f}",
            f"{mirrored['cost_s'] * 1e3:.2f}",
            f"{more_s * 1e3:.2f}",
            f"{more_s / mirrored['bare_s']:.1%}",
            f"{mean_more_s * 1e3:.2f} ({mean_more_s / mirrored['bare_s']:.1%})",
            f"{mirrored['mirrored_share']:.0%}",
        )
    Console(width=max(Console().width, WIDTH_MIN)).print(table)


if __name__ == "__main__":
    main()
