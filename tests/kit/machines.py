"""Several "machines" on this one: each with a runtime folder of its own, one rank, and everything
that belongs to it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from kit.jobs import LOOK_S, POLL_S, WAIT_S, Job, Results, plain, wait_for
from kit.template import Program, run

TTL_S = 2.0
"""After how long a silent node is lost here: the shortest that etcd grants."""


@dataclass(eq=False)
class Machine:
    """One node: the program that was started there, and all that runs below it."""

    name: str
    folder: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def mark(self) -> bytes:
        return f"CKPT_RUNTIME_DIR={self.folder / 'runtime'}".encode()

    def has(self, pid: int) -> bool:
        """Whether a living process is one of this machine's."""
        try:
            return self.mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return False

    def members(self) -> list[int]:
        """Every living process of this machine."""
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
        return [pid for pid in pids if self.has(pid)]

    def stop(self) -> None:
        """Everything stands still: so that several machines can be killed at the same moment."""
        for pid in self.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

    def kill(self) -> None:
        """Everything at once, as if the power failed; nothing is said to anybody."""
        while members := self.members():
            for pid in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if self.process is not None:
                self.process.poll()
            time.sleep(POLL_S)
        if self.process is not None:
            self.process.wait()

    def keeper(self) -> int:
        """Its keeper's process; 0 for none."""
        for path in (self.folder / "runtime").glob("*/job.json"):
            with contextlib.suppress(OSError, ValueError):
                pid = int(json.loads(path.read_text())["pid"])
                if self.has(pid):
                    return pid
        return 0

    def output(self) -> str:
        """What its program and its keeper said."""
        texts = [self.folder / "output.txt", *self.folder.glob("runtime/*/keeper.log")]
        return "\n".join(f"--- {path}\n{_last_lines(path)}" for path in texts if path.exists())


def _last_lines(path: Path) -> str:
    """The end of a log, which its keeper may remove at this moment."""
    try:
        return path.read_text(errors="replace")[-5000:]
    except FileNotFoundError:
        return "removed by its keeper"


class Cluster:
    """The machines of one job. ``where``: the membership, an etcd address or a file."""

    def __init__(
        self,
        folder: Path,
        *,
        nodes: str,
        where: str = "",
        secret: Path | None = None,
        mirrors: int = 1,
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        least, _, most = nodes.partition(":")
        self._spec = {
            "where": where or str(folder / "members.db"),
            "job": "job",
            "nodes_min": int(least),
            "nodes_max": int(most or least),
            "last_call_s": 1.0,
            "shrink_wait_s": 0.5,
            "grow_wait_s": 2.0,
            "ttl_s": TTL_S,
            "mirrors": mirrors,
            **({"secret": str(secret)} if secret is not None else {}),
        }
        self.machines: list[Machine] = []
        self.results = folder / "out"
        self.results.mkdir(exist_ok=True)

    def start(
        self,
        *arguments: object,
        program: str = "steady.py",
        before: Sequence[str] = (),
        host: str = "",
        more: Mapping[str, object] | None = None,
        cwd: Path | None = None,
    ) -> Machine:
        """Start the program on one more machine. ``before``: what puts it there; ``host``: its
        address there; ``more``: what its launcher says besides; ``cwd``: where it starts."""
        number = len(self.machines)
        machine = Machine(f"m{number}", self.folder / f"m{number}")
        machine.folder.mkdir()
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "LOCAL_WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "RANK": str(number),
            "WORLD_SIZE": str(self._spec["nodes_max"]),
            "CKPT_NODES": json.dumps(
                {
                    **self._spec,
                    "domain": machine.name,
                    "host": host,
                    "plaintext": bool(host),
                    **(more or {}),
                }
            ),
            "CKPT_RUNTIME_DIR": str(machine.folder / "runtime"),
            "CKPT_STATE_DIR": str(machine.folder / "state"),
            **({"GLOO_SOCKET_IFNAME": "eth0"} if host else {}),
        }
        with (machine.folder / "output.txt").open("ab") as output:
            machine.process = Program(
                [*before, *plain(program, self.results, *arguments)],
                env=environment,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.machines.append(machine)
        return machine

    @property
    def job(self) -> Job:
        """The program's files, as if it ran on one machine."""
        process = self.machines[0].process
        assert process is not None
        return Job(process, self.results)

    def of_rank(self, rank: int) -> Machine:
        """The machine that holds a rank now."""
        pid = self.job.trainer(rank)
        found = next((machine for machine in self.machines if machine.has(pid)), None)
        assert found is not None, f"nobody holds rank {rank}\n{self.output()}"
        return found

    def wait_steps(self, completed: int) -> None:
        """Until rank 0 took so many steps."""
        job = self.job
        wait_for(
            lambda: job.completed >= completed or self.ended(),
            f"{completed} steps",
            say=self.output,
        )
        assert job.completed >= completed, self.output()

    def ended(self) -> bool:
        """Whether no program runs any more."""
        return all(
            machine.process is None or machine.process.poll() is not None
            for machine in self.machines
        )

    def nodes_of(self, machine: Machine) -> list[dict[str, object]]:
        """What ``ckpt standby`` says there of the job's nodes."""
        environment = {**os.environ, "CKPT_RUNTIME_DIR": str(machine.folder / "runtime")}
        done = run(
            [sys.executable, "-m", "ckpt", "standby", "--json"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
        assert done.returncode in (0, 11), done.stderr
        return [node for job in json.loads(done.stdout)["jobs"] for node in job["nodes"]]

    def wait_end(self, wait_s: float = WAIT_S, *, hurry: bool = False) -> dict[str, int]:
        """How each machine's program ended, once all did. ``hurry``: without pauses from here
        on."""
        if hurry:
            (self.results / "hurry").touch()
        wait_for(self.ended, "the end of all programs", wait_s=wait_s, say=self.output)
        return {
            one.name: int(one.process.returncode)
            for one in self.machines
            if one.process is not None
        }

    def wait_gone(self, wait_s: float = WAIT_S) -> None:
        """Until nothing of any machine lives."""
        wait_for(
            lambda: not any(one.members() for one in self.machines),
            "the end of keepers",
            wait_s=wait_s,
            say=self.output,
            poll_s=LOOK_S,
        )

    def output(self) -> str:
        return "\n".join(f"===== {one.name}\n{one.output()}" for one in self.machines)

    def kill_all(self) -> None:
        """After a test, however it went."""
        for machine in self.machines:
            machine.kill()


@contextlib.contextmanager
def cluster(folder: Path, **how: object) -> Iterator[Cluster]:
    """A cluster, and its end."""
    made = Cluster(folder, **how)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.kill_all()


def calm(factory: pytest.TempPathFactory, nodes: int, arguments: Sequence[object]) -> Results:
    """The same job undisturbed, on as many nodes as hold ranks. Computed once for all tests,
    whichever process runs them.

    Without the pauses between steps, which change nothing in what is computed.
    """
    shared = (
        factory.getbasetemp().parent
        if "PYTEST_XDIST_WORKER" in os.environ
        else factory.getbasetemp()
    )
    folder = shared / f"calm-{nodes}-{'-'.join(str(one).lstrip('-') for one in arguments)}"
    with (shared / "calm.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            with cluster(folder, nodes=str(nodes)) as made:
                for _ in range(nodes):
                    made.start(*arguments, "--step-s", 0)
                assert set(made.wait_end().values()) == {0}, made.output()
                made.wait_gone()
            (folder / "done").touch()
    return Results(folder / "out")
