"""Kill one of two ranks, and take the time until training is further than it was: ckpt beside plain
torchrun with DCP.

    python benchmarks/recovery.py                    about ten minutes: 10, 200 and 1024 MiB a rank, 6 kills each
    python benchmarks/recovery.py --build-s 5        building the model takes 5 s; with and without prepared trainers
    python benchmarks/recovery.py --quick            a smoke test: 10 MiB, 1 kill; no figures to quote
    python benchmarks/recovery.py --nodes            a whole node is lost instead: see recovery_nodes.py

Prints a table and writes bench-out/recovery.json (recovery_build.json with a build).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import recovery_nodes
from measure import warm_memory
from recovery_job import Job, JobHungError, Recovery
from recovery_table import print_table, summary
from report import machine

HERE = Path(__file__).parent
RANKS = 2
OFFSET = 7
"""A kill comes this many steps after a checkpoint of the rival's."""

KILLS = 2
"""Kills that one start of a job lives through; then a fresh one takes its turn."""

CONTESTANTS = ("ckpt", "ckpt, prepared", "torchrun + DCP")
TORCHRUN = (
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    f"--nproc-per-node={RANKS}",
)


@dataclass(frozen=True, slots=True)
class Plan:
    """How large, how often. ``rounds`` fresh starts of each contestant, ``kills`` in each."""

    sizes_mib: Sequence[int]
    rounds: int
    kills: int
    build_s: float
    every: int
    step_s: float


def main() -> int:
    if "--nodes" in sys.argv:
        return recovery_nodes.main([one for one in sys.argv[1:] if one != "--nodes"])
    options = parse()
    plan = Plan(
        sizes_mib=options.mib or ([10] if options.quick else [10, 200, 1024]),
        rounds=options.rounds or (1 if options.quick else 3),
        kills=1 if options.quick else KILLS,
        build_s=options.build_s,
        every=options.every,
        step_s=options.step_s,
    )
    names = options.only or [name for name in CONTESTANTS if plan.build_s or "prepared" not in name]
    options.out.mkdir(exist_ok=True)
    results: dict[str, dict[str, list[Recovery | None]]] = {}
    for mib in plan.sizes_mib:
        results[str(mib)] = run_rounds(plan, mib, names, options)
    facts = machine()
    document = {"machine": facts, "plan": asdict(plan), "seed": options.seed}
    document["sizes_mib"] = {
        mib: {name: summary(found) for name, found in of_name.items()}
        for mib, of_name in results.items()
    }
    path = (
        options.out
        / f"recovery{'_quick' if options.quick else ''}{'_build' if plan.build_s else ''}.json"
    )
    path.write_text(json.dumps(document, indent=1) + "\n")
    print_table(document)
    print(f"wrote {path}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="10 MiB, one kill: does it still run?")
    parser.add_argument(
        "--nodes",
        action="store_true",
        help="lose a whole node; has options of its own: --nodes --help",
    )
    parser.add_argument("--mib", type=int, nargs="+", help="sizes of a rank's state")
    parser.add_argument(
        "--rounds", type=int, help=f"fresh starts of each contestant, with {KILLS} kills each"
    )
    parser.add_argument(
        "--build-s",
        type=float,
        default=0.0,
        help="seconds that building takes besides its own time",
    )
    parser.add_argument(
        "--every",
        type=int,
        default=10,
        help="steps between two durable checkpoints, of all contestants",
    )
    parser.add_argument(
        "--step-s", type=float, default=0.05, help="the least time that a step takes"
    )
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, help="leave the others out")
    parser.add_argument(
        "--seed", type=int, default=random.randrange(1 << 30), help="of the moments of the kills"
    )
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    return parser.parse_args()


def run_rounds(
    plan: Plan, mib: int, names: Sequence[str], options: argparse.Namespace
) -> dict[str, list[Recovery | None]]:
    """A B, then B A, and so on. None stands for a job that hung."""
    results: dict[str, list[Recovery | None]] = {name: [] for name in names}
    for number in range(plan.rounds):
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):
            begin_s = time.monotonic()
            chance = random.Random(f"{options.seed}/{mib}/{number}/{name}")
            found = run_job(plan, mib, name, options.out, chance)
            results[name] += found
            took = " ".join("hung" if one is None else f"{one.new_s:.2f}" for one in found)
            note = f"recovered in {took} s (all in all {time.monotonic() - begin_s:.0f} s)"
            print(
                f"{mib} MiB, round {number + 1}/{plan.rounds}, {name}: {note}",
                file=sys.stderr,
                flush=True,
            )
    return results


def command(plan: Plan, mib: int, name: str, folder: Path) -> list[str]:
    """The rival looks at its processes a hundred times a second, ten times as often as by
    default."""
    script = "recovery_torchrun.py" if "torchrun" in name else "recovery_ours.py"
    launcher = [*TORCHRUN, "--max-restarts=100"]
    launcher += ["--monitor-interval=0.01"] if "torchrun" in name else []
    program = [str(HERE / script), f"--folder={folder}", f"--mib={mib}", f"--every={plan.every}"]
    program += [f"--step-s={plan.step_s}", f"--build-s={plan.build_s}"]
    return [*launcher, *program, *(["--prepared"] if "prepared" in name else [])]


def run_job(
    plan: Plan, mib: int, name: str, out: Path, chance: random.Random
) -> list[Recovery | None]:
    """One fresh start of one contestant, killed ``plan.kills`` times."""
    folder = Path(tempfile.mkdtemp(prefix="recovery-", dir=out)).resolve()
    found: list[Recovery | None] = []
    environment = {
        "PYTHONPATH": os.pathsep.join(
            filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH")))
        ),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "CKPT_RUNTIME_DIR": str(folder / "runtime"),
        # Shared among attempts, the agent's store leads a restart to dead addresses, where it can
        # wait forever.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    try:
        with Job(
            command(plan, mib, name, folder),
            folder,
            environment,
            ranks=RANKS,
            log=out / "recovery.log",
        ) as job:
            for _ in range(plan.kills):
                job.wait_steps(plan.every, prepared="prepared" in name)
                warm_memory(RANKS * (mib << 20), scratch=out)
                job.wait_offset(OFFSET, plan.every)
                found.append(job.kill(1, after_s=chance.uniform(0.0, job.step_s)))
            job.stop()
    except JobHungError as error:
        print(f"{name}: {error}", file=sys.stderr)
        found.append(None)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
