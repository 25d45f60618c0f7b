"""What staging after every step costs: a GPT trained with ``memory_every=1`` and with
``memory_every=0``, turn by turn.

    python benchmarks/stage_overhead.py              about five minutes: three sizes, two ranks
    python benchmarks/stage_overhead.py --quick      a smoke test: the smallest size, few steps; no figures to quote

Two equal models train in one process, each in a run of its own: a few steps of one, then a few of
the other, so that whatever else the machine does meets both alike. A time is that of the body and
the boundary after it. The cost is the difference of the medians, as a share of the step without
staging; "boundary" is the part of it that the loop waits in ``completed``, the rest is what staging
leaves behind (cold caches, memory bandwidth, the keeper's checks). Nothing is made durable
meanwhile. Writes bench-out/stage_overhead.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import machine
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
RUN_S_MAX = 900.0
WIDTH_MIN = 130
SIZES = {"tiny": 60, "small": 12, "wide": 4}
"""Rounds of each size: a round is ``BLOCK`` steps of either kind. The shapes stand in
``stage_overhead_loop.py``."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="the smallest size, few steps: does it still run?"
    )
    parser.add_argument("--sizes", nargs="+", choices=sorted(SIZES), help="leave the others out")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    found = {}
    for size in options.sizes or (["tiny"] if options.quick else list(SIZES)):
        found[size] = measure(size, 4 if options.quick else SIZES[size], options)
    document = {"machine": machine(), "ranks": options.ranks, "sizes": found}
    path = options.out / f"stage_overhead{'_quick' if options.quick else ''}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    print_table(document)
    print(f"wrote {path}")


def measure(size: str, rounds: int, options: argparse.Namespace) -> dict[str, Any]:
    """One job that trains both models; rank 0's times, with their medians."""
    with tempfile.TemporaryDirectory(prefix="overhead-", dir=options.out) as name:
        folder = Path(name).resolve()
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={options.ranks}",
        ]
        program = [str(HERE / "stage_overhead_loop.py"), str(folder), size, str(rounds)]
        path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
        environment = {
            **os.environ,
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",
            "CKPT_RUNTIME_DIR": str(folder / "runtime"),
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        with (options.out / "stage_overhead.log").open("ab") as log:
            subprocess.run(
                [*launcher, *program],
                env=environment,
                stdout=log,
                stderr=log,
                check=True,
                timeout=RUN_S_MAX,
            )
        times = json.loads((folder / "times.json").read_text())
    with_s, without_s = statistics.median(times["with_s"]), statistics.median(times["without_s"])
    times["medians"] = {
        "with_s": with_s,
        "without_s": without_s,
        "boundary_s": statistics.median(times["boundary_s"]),
        "share": (with_s - without_s) / without_s,
    }
    return times


def print_table(document: dict[str, Any]) -> None:
    table = Table(
        title=f"staging after every step, {document['ranks']} ranks, one thread each; medians",
        caption="  ".join(f"{name} {value}" for name, value in document["machine"].items()),
    )
    table.add_column("model", no_wrap=True)
    titles = (
        "state MiB",
        "a rank stages MiB",
        "step ms, staged / not",
        "cost, ms",
        "share of the step",
        "boundary ms",
    )
    for title in (*titles, "steps of each"):
        table.add_column(title, justify="right")
    for size, times in document["sizes"].items():
        medians = times["medians"]
        with_s, without_s = medians["with_s"], medians["without_s"]
        table.add_row(
            size,
            f"{times['state_bytes'] / 2**20:.1f}",
            f"{times['state_bytes'] / 2**20 / document['ranks']:.1f}",
            f"{with_s * 1e3:.2f} / {without_s * 1e3:.2f}",
            f"{(with_s - without_s) * 1e3:.2f}",
            f"{medians['share']:.1%}",
            f"{medians['boundary_s'] * 1e3:.2f}",
            str(len(times["with_s"])),
        )
    Console(width=max(Console().width, WIDTH_MIN)).print(table)


if __name__ == "__main__":
    main()
