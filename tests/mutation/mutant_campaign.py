"""Mutate, run, and say what survived: ``make mutants``.

Exit 0 where every mutant is killed or explained, 1 where one is not or an explanation is wrong, 2
where the tests themselves fail. What is explained stands in ``docs/dev/design/014-mutants.md``, in
the tables.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from mutant_runs import BaselineError, Ran, Target, copied, preload, run_all
from mutant_targets import COPIED, TARGETS
from mutants import Mutant

ROOT = Path(__file__).resolve().parents[2]
EXPLAINED = ROOT / "docs" / "dev" / "design" / "014-mutants.md"
ROW = re.compile(r"^\| `(?P<where>[^`]+)` \| `(?P<name>.+)` \| (?P<why>.+) \|$", re.MULTILINE)

Name = tuple[str, str, str]
"""A mutant as a table names it: module, function, change."""


def explained(text: str) -> dict[Name, str]:
    """The mutants that a page explains, and why nobody could tell each from the right code."""
    found: dict[Name, str] = {}
    for row in ROW.finditer(text):
        module, _, function = row["where"].partition(":")
        found[f"ckpt/{module}", function, row["name"].replace(r"\|", "|")] = row["why"]
    return found


class Campaign:
    """Runs over some mutants of some modules, and what came of them."""

    def __init__(self, root: Path, known: dict[Name, str]) -> None:
        self._root = root
        self._known = known
        self.survived: list[str] = []
        self.wrong: list[str] = []
        self.broken: list[str] = []

    def run(self, target: Target, chosen: list[Mutant]) -> None:
        """Run ``chosen`` of a module and print a line for each survivor and one for all."""
        begun = time.monotonic()
        counts: Counter[str] = Counter()
        try:
            for mutant, ran in run_all(self._root, target, chosen):
                counts[self._judge(target, mutant, ran)] += 1
        except BaselineError as error:
            self.broken.append(target.path)
            print(f"{target.path}: the tests fail without any mutant. {error}", flush=True)
            return
        said = " ".join(
            f"{outcome}={counts[outcome]}"
            for outcome in ("killed", "hung", "equal", "survived", "broken")
        )
        print(
            f"{target.path} mutants={len(chosen)} {said} wall_s={time.monotonic() - begun:.0f}",
            flush=True,
        )

    def _judge(self, target: Target, mutant: Mutant, ran: Ran) -> str:
        known = (target.path, mutant.function, mutant.name) in self._known
        where = f"{target.path}:{mutant.line} {mutant.function}: {mutant.name}"
        if ran.outcome == "survived" and known:
            return "equal"
        if ran.outcome == "survived":
            self.survived.append(where)
            print(f"  survived {where}", flush=True)
        elif ran.outcome == "broken":
            self.broken.append(f"{where}: {ran.by}")
            print(f"  broken {where}: {ran.by}", flush=True)
        elif known:
            self.wrong.append(
                f"{where} is explained as equal, and a test tells it apart. by={ran.by}"
            )
        return ran.outcome

    def code(self) -> int:
        """The exit status."""
        return 2 if self.broken else 1 if self.survived or self.wrong else 0


def main(argv: list[str]) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="*", default=[], help="modules whose path holds one of these"
    )
    parser.add_argument("--function", help="only mutants of functions whose name holds this")
    parser.add_argument("--sample", type=int, help="so many mutants in all, drawn with --seed")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(argv)
    targets = [
        one for one in TARGETS if not asked.only or any(part in one.path for part in asked.only)
    ]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children and the copy go too
    known = explained(EXPLAINED.read_text()) if EXPLAINED.exists() else {}
    with copied(ROOT, COPIED) as root:
        drawn = [
            (target, mutant)
            for target in targets
            for mutant in target.mutants((root / target.path).read_text())
        ]
        names = {(target.path, mutant.function, mutant.name) for target, mutant in drawn}
        if asked.function:
            drawn = [pair for pair in drawn if asked.function in pair[1].function]
        print(
            f"mutants={len(drawn)} modules={len(targets)} sample={asked.sample} seed={asked.seed}",
            flush=True,
        )
        if asked.sample is not None:
            drawn = random.Random(asked.seed).sample(drawn, min(asked.sample, len(drawn)))
        preload()
        campaign = Campaign(root, known)
        paths = {target.path for target in targets}
        campaign.wrong += [
            f"{name} is explained, and there is no such mutant"
            for name in known
            if name[0] in paths and name not in names
        ]
        for target in targets:
            chosen = [mutant for of, mutant in drawn if of == target]
            if chosen:
                campaign.run(target, chosen)
    for line in campaign.wrong:
        print(f"  wrong {line}")
    print(
        f"survived={len(campaign.survived)} wrong={len(campaign.wrong)} "
        f"broken={len(campaign.broken)}"
    )
    return campaign.code()


if __name__ == "__main__":
    if sys.flags.hash_randomization:
        # Or the order of a set would decide, each time anew, whether a mutant that doesn't sort it
        # is seen.
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTEST_", "CKPT_"))
        }
        os.execve(sys.executable, [sys.executable, *sys.argv], {**kept, "PYTHONHASHSEED": "0"})
    sys.exit(main(sys.argv[1:]))
