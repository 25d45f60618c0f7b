"""The campaign on a module that it can judge: it finds what no test sees, and believes only
explanations that hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from mutant_campaign import explained
from mutant_runs import BaselineError, Ran, Target, run_all
from mutants import mutants_of

CAMPAIGN = Path(__file__).with_name("mutant_campaign.py")

MODULE = """
LIMIT = 3

def small(number):
    return number < LIMIT

def loop(number):
    while number > 0:
        number -= 1
    return number

class Thing:
    @property
    def name(self):
        return "thing"

def never(number):
    return number
"""

TESTS = """
from toy import loop, small, Thing

def test_small():
    assert small(2) and not small(4)

def test_loop():
    assert loop(3) == 0

def test_name():
    assert Thing().name == "thing"
"""


def campaign(folder: Path, tests: str = TESTS) -> dict[str, Ran]:
    """What came of each mutant of the toy."""
    folder.joinpath("toy.py").write_text(MODULE)
    folder.joinpath("test_toy.py").write_text(tests)
    found = run_all(folder, Target("toy.py", ("test_toy.py",)), mutants_of(MODULE), cpu_min_s=0.3)
    return {f"{mutant.function}: {mutant.name}": ran for mutant, ran in found}


@pytest.mark.slow
def test_what_no_test_tells_apart_survives_and_all_else_is_killed_by_the_test_that_does(
    tmp_path: Path,
) -> None:
    found = campaign(tmp_path)
    survived = {name for name, ran in found.items() if ran.outcome == "survived"}
    assert survived == {
        "small: number < LIMIT → number <= LIMIT",
        ": LIMIT = 3 → LIMIT = 4",
        "never: return number → return None",
    }
    assert found["small: number < LIMIT → True"] == Ran("killed", "test_toy.py::test_small")
    assert found[": LIMIT = 3 → LIMIT = 2"] == Ran("killed", "test_toy.py::test_small")
    assert found["Thing.name: return 'thing' → return ''"] == Ran(
        "killed", "test_toy.py::test_name"
    )
    assert found["loop: number -= 1 → pass"] == Ran("hung", "test_toy.py::test_loop")
    assert not [ran for ran in found.values() if ran.outcome == "broken"]


@pytest.mark.slow
def test_tests_that_fail_without_a_mutant_say_so(tmp_path: Path) -> None:
    with pytest.raises(BaselineError, match="test_small"):
        campaign(tmp_path, TESTS.replace("small(2)", "small(3)"))


def test_explanations_are_read_from_a_page() -> None:
    page = "| where | what | why |\n|---|---|---|\n| `a/b.py:C.d` | `x \\| y → x` | the same |\n| a | b | c |\n"
    assert explained(page) == {("ckpt/a/b.py", "C.d", "x | y → x"): "the same"}


@pytest.mark.slow
def test_a_sample_of_the_mutants_of_judging_voting_and_planning_is_killed() -> None:
    """The short form of ``make mutants``, with a seed of its own so that it is the same until the
    code changes."""
    modules = ["log/fold.py", "log/quorum.py", "restore/plan.py"]
    command = [sys.executable, str(CAMPAIGN), "--sample", "15", "--seed", "1", "--only", *modules]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
