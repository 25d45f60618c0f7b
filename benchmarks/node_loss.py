"""Take a whole node away from a job of three, and see where the time goes until training is further
than it was.

    python benchmarks/node_loss.py                               every kind of loss, three times
    python benchmarks/node_loss.py --scenario killed --repeat 1  one of them, once

Real processes, each node's killed with all that is below it, or its link pulled (network
namespaces: wants root), over a real etcd of three members. Prints medians with their phases beside
what is promised, and writes bench-out/node_loss.json. Exits with 1 where one run broke its bound,
redid more than what was not mirrored yet, or went on from a state that was never there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from node_loss_phases import PHASES
from node_loss_scenes import SCENES, TTL_S, Options, Result, Scene, play
from report import machine
from rich.console import Console
from rich.table import Table

WIDTH_MIN = 215


def main() -> int:
    options = parse()
    scenes = [scene for scene in SCENES if not options.scenario or scene.name in options.scenario]
    missing = _missing(scenes)
    if missing:
        print(f"left out, for {missing}", file=sys.stderr)
        scenes = [scene for scene in scenes if not scene.silent] if "root" in missing else []
    how = Options(options.mib, options.every, options.step_s, options.build_s)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no node outlives this process
    options.out.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="node-loss-", dir=options.out)).resolve()
    found: dict[str, list[Result]] = {}
    loads = []
    for number in range(options.repeat):
        for scene in scenes:
            loads.append(os.getloadavg()[0])
            for result in play(scene, folder / f"{number}-{SCENES.index(scene)}", how):
                found.setdefault(result.name, []).append(result)
                text = f"{result.taken_s:.2f} s and {result.account.phases_s['build']:.2f} of build"
                print(
                    f"{number + 1}/{options.repeat} {result.name}: {text}",
                    *result.broken,
                    file=sys.stderr,
                    sep="; ",
                )
    facts = {**machine(), "load": f"{min(loads):.1f} to {max(loads):.1f}"}
    print_table(found, facts, how)
    path = options.json or options.out / "node_loss.json"
    document = {name: [asdict(result) for result in results] for name, results in found.items()}
    path.write_text(
        json.dumps(
            {"machine": facts, "options": asdict(how), "ttl_s": TTL_S, "found": document}, indent=1
        )
    )
    print(f"wrote {path}")
    if any(result.broken for results in found.values() for result in results):
        print(f"what the processes said is in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0 if found else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--scenario",
        nargs="+",
        choices=[scene.name for scene in SCENES],
        help="leave the others out",
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--mib", type=int, default=10, help="a rank's state")
    parser.add_argument(
        "--every", type=int, default=1000, help="steps between two durable snapshots"
    )
    parser.add_argument(
        "--step-s", type=float, default=0.05, help="the least time that a step takes"
    )
    parser.add_argument(
        "--build-s",
        type=float,
        default=0.0,
        help="seconds that building takes besides its own time",
    )
    parser.add_argument(
        "--json", type=Path, help="where the samples go; by default into the folder of --out"
    )
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    return parser.parse_args()


def _missing(scenes: Sequence[Scene]) -> str:
    if shutil.which("etcd") is None:
        return "etcd is not installed (Debian: apt-get install etcd-server)"
    if any(scene.silent for scene in scenes) and (os.geteuid() != 0 or shutil.which("ip") is None):
        return "only root makes network namespaces, with iproute2"
    return ""


def print_table(
    found: Mapping[str, Sequence[Result]], facts: Mapping[str, str], how: Options
) -> None:
    table = Table(
        title=f"A node of three is lost; seconds, medians; {how.mib} MiB a rank, steps of at least {how.step_s} s, "
        f"TTL {TTL_S:g} s",
        caption="  ".join(f"{name} {value}" for name, value in facts.items()),
    )
    table.add_column("", no_wrap=True)
    for title in (
        "bound",
        "taken",
        "worst",
        *PHASES,
        "redone",
        "not mirrored",
        "world",
        "epochs",
        "broken",
    ):
        table.add_column(title, justify="right")
    for name, results in found.items():
        taken = [result.taken_s for result in results]
        phases = [
            statistics.median(result.account.phases_s[phase] for result in results)
            for phase in PHASES
        ]
        table.add_row(
            name,
            f"{results[0].bound_s:g}",
            f"[bold]{statistics.median(taken):.2f}",
            f"{max(taken):.2f}",
            *(f"{seconds:.3f}" for seconds in phases),
            f"{statistics.median(result.redone for result in results):.0f}",
            f"{statistics.median(result.mirrored_interval for result in results):.0f}",
            "/".join(sorted({str(result.world) for result in results})),
            f"{max(result.account.epochs for result in results)}",
            f"{sum(bool(result.broken) for result in results)} of {len(results)}",
        )
    Console(width=max(Console().width, WIDTH_MIN)).print(table)


if __name__ == "__main__":
    sys.exit(main())
