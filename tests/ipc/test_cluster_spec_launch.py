"""One start of the program has one name, whatever scripts stand between the launcher and its
ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ckpt.ipc.cluster_spec import launch_name

WAIT_S = 60
SAY = "import os; from ckpt.ipc.cluster_spec import launch_name; os.write(1, f'{launch_name()}\\n'.encode())"
LAUNCHER = """
import os, subprocess, sys
ranks = [
    subprocess.Popen(
        sys.argv[2:], env={**os.environ, **{name: str(rank) for name in sys.argv[1].split(",")}, "WORLD_SIZE": "2"}
    )
    for rank in range(2)
]
sys.exit(max(one.wait() for one in ranks))
"""


def names(tmp_path: Path, per_rank: str, *command: str, **environment: str) -> list[str]:
    """What two ranks call their launch; ``per_rank`` are the variables that the launcher sets for
    each."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RANK", "SLURM", "PMI", "OMPI"))
    }
    (tmp_path / "say.py").write_text(SAY)
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, per_rank, *command],
        env={**kept, **environment},
        cwd=tmp_path,
        timeout=WAIT_S,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.split()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("per_rank", "script"),
    [
        ("RANK", "exec {python} say.py"),
        ("RANK", "{python} say.py; true"),
        ("RANK", "sh -c '{python} say.py; true'; true"),
        ("SLURM_PROCID", "export RANK=$SLURM_PROCID; {python} say.py; true"),
        ("OMPI_COMM_WORLD_RANK", "export RANK=$OMPI_COMM_WORLD_RANK; {python} say.py; true"),
        (
            "RANK,TORCHELASTIC_RUN_ID",
            "unset TORCHELASTIC_RUN_ID; export TORCHELASTIC_RUN_ID=7; {python} say.py; true",
        ),
    ],
)
def test_ranks_behind_scripts_agree_and_two_launches_differ(
    tmp_path: Path, per_rank: str, script: str
) -> None:
    command = ["sh", "-c", script.format(python=sys.executable)]
    first, second = (names(tmp_path, per_rank, *command) for _ in range(2))
    assert len(first) == len(second) == 2
    assert len(set(first)) == len(set(second)) == 1
    assert first != second


@pytest.mark.slow
def test_launcher_that_has_a_rank_itself_is_found_by_what_it_sets(tmp_path: Path) -> None:
    command = ["sh", "-c", f"{sys.executable} say.py; true"]
    said = [
        names(tmp_path, "RANK,TORCHELASTIC_RUN_ID", *command, RANK="0", SLURM_PROCID="0")
        for _ in range(2)
    ]
    assert all(first.split("-")[:2] == second.split("-")[:2] for first, second in said)
    assert said[0][0].split("-")[:2] != said[1][0].split("-")[:2]


def test_program_without_ranks_has_a_name_of_its_own_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    first, second = launch_name(), launch_name()
    assert first != second
    assert first.startswith(f"{os.getpid()}-")
