"""The Slurm script: valid, its launch parses, and it runs: with stand-ins for ``srun`` and ``scontrol``, all else real."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from etcd_server import require
from launches import launch_of
from servers.process import free_port

import ckpt

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SCRIPT = ROOT / "integrations" / "slurm" / "train.sbatch"
HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
JOB = "4711"
BEGUN = 30
STEPS = 100_000
WAIT_S = 300.0


class Allocation:
    """A job's allocation of three hosts, on this machine. ``start`` runs the script there, as often as it is queued."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = next(port for port in iter(free_port, 0) if port % 2 == 0)
        self.starts = 0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: object, program: Path = HERE / "programs" / "counting.py") -> subprocess.Popen[bytes]:
        path = os.pathsep.join([str(HERE / "slurm_standins"), str(Path(sys.executable).parent), os.environ["PATH"]])
        # It runs as a user's program does, not in place and without keepers as most of the suite.
        outside = {name: value for name, value in os.environ.items() if name not in ("CKPT_KEEPER", "CKPT_IN_PLACE")}
        environment = {
            **outside,
            "PATH": path, "STANDIN_FOLDER": str(self.folder), "OMP_NUM_THREADS": "1",
            "SLURM_JOB_ID": JOB, "SLURM_JOB_NAME": "train", "SLURM_JOB_NODELIST": " ".join(HOSTS),
            "SLURM_RESTART_COUNT": str(self.starts), "NODES": "2", "RANKS": "1", "PORT": str(self.port),
            "MAKE_SECRETS": str(ROOT / "integrations" / "kubernetes" / "make-secrets.sh"),
            "CKPT_CONF": "plaintext=1,last_call_timeout=2",
        }  # fmt: skip
        with (self.folder / "job.txt").open("ab") as out:
            self.process = subprocess.Popen(
                ["bash", SCRIPT, program, self.folder, *map(str, arguments)], env=environment, cwd=self.folder,
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
        self.starts += 1
        return self.process

    def wait_step(self, step: int) -> None:
        until_s = time.monotonic() + WAIT_S
        while self.steps() < step:
            assert self.process is not None and self.process.poll() is None, self.output()
            assert time.monotonic() < until_s, self.output()
            time.sleep(0.05)

    def steps(self) -> int:
        path = self.folder / "steps-0.txt"
        return max(map(int, path.read_text().split()), default=0) if path.exists() else 0

    def output(self) -> str:
        return "\n".join(f"--- {path}\n{path.read_text()[-4000:]}" for path in sorted(self.folder.rglob("*.txt")))

    def members(self) -> list[int]:
        """Every process that runs for this allocation."""
        mark = f"STANDIN_FOLDER={self.folder}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdecimal() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:  # it has ended
                continue
        return found


@pytest.fixture
def allocation(tmp_path: Path) -> Iterator[Allocation]:
    require()
    require("openssl")
    made = Allocation(tmp_path)
    try:
        yield made
    finally:
        while members := made.members():
            for pid in members:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            if made.process is not None:
                made.process.poll()
            time.sleep(0.02)


def test_script_is_valid_bash_and_asks_slurm_for_what_it_relies_on() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True, timeout=30)
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", SCRIPT.read_text(), re.MULTILINE))
    assert asked["ntasks-per-node"] == "1", "one agent on each node"
    assert {"no-kill", "requeue"} <= asked.keys()
    told, seconds = re.fullmatch(r"(\w:\w+)@(\d+)", asked["signal"]).groups()  # type: ignore[union-attr]
    assert told == "B:TERM" and int(seconds) > 60


@pytest.mark.slow
def test_job_that_is_told_of_its_end_stops_durable_is_queued_again_and_goes_on(allocation: Allocation) -> None:
    process = allocation.start(STEPS)
    allocation.wait_step(BEGUN)
    process.send_signal(signal.SIGTERM)
    assert process.wait(WAIT_S) in (1, 128 + signal.SIGTERM), allocation.output()
    assert (allocation.folder / "requeued").read_text().split() == [JOB]
    stopped = allocation.steps()
    newest = ckpt.Checkpointer(str(allocation.folder / "store")).latest()
    assert newest is not None and newest.step == stopped, allocation.output()

    process = allocation.start(stopped + 200)  # less is to be done now, so that it ends
    assert process.wait(WAIT_S) == 0, allocation.output()
    assert (allocation.folder / "requeued").read_text().split() == [JOB]
    steps = [*map(int, (allocation.folder / "steps-0.txt").read_text().split())]
    assert steps == [*range(1, stopped + 201)], "no step was done twice"
    assert not (allocation.folder / f".ckpt-{JOB}").exists(), (
        "secrets stay while the job may be queued again, not longer"
    )


@pytest.mark.slow
def test_every_nodes_agent_is_started_with_options_that_parse(allocation: Allocation, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import time\ntime.sleep(600)\n")
    allocation.start("--lr", "0.1", program=program)
    found: dict[str, list[str]] = {}
    until_s = time.monotonic() + WAIT_S
    while len(found) < len(HOSTS):
        assert time.monotonic() < until_s, allocation.output()
        for pid in allocation.members():
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
                host = re.search(rb"SLURMD_NODENAME=([\d.]+)", Path(f"/proc/{pid}/environ").read_bytes())
            except OSError:  # it has ended
                continue
            if host and any(word.endswith("/ckpt") for word in words[:2]) and "run" in words[:3]:
                found[host[1].decode()] = ["ckpt", *words[words.index("run") :]]
        time.sleep(0.05)
    for host, words in found.items():
        args, settings = launch_of(words)
        assert settings is not None and settings.nodes is not None, shlex.join(words)
        assert settings.nodes.domain == f"core.rack-{host[-1]}"
        assert (settings.nodes.nodes_max, settings.nodes.job) == (2, f"train-{JOB}")
        assert args.training_script_args == [str(tmp_path), "--lr", "0.1"]
