"""Programs that a test starts: their processes, their losses, what they leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kit.template import Program

PROGRAMS = Path(__file__).parent / "programs"
SOAK = os.environ.get("CKPT_SOAK") == "1"
SEED = os.environ.get("CKPT_SEED", "1")
WAIT_S = 120.0 if not SOAK else 1200.0
"""No single wait of a test takes longer; against hangs only. Long campaigns wait for long runs."""

POLL_S = 0.003

LOOK_S = 0.03
"""How often all processes of the system are looked through: that takes milliseconds itself."""


def plain(program: str, *arguments: object) -> list[str]:
    """The command that runs one of ``programs/`` in a plain process."""
    return [sys.executable, str(PROGRAMS / program), *map(str, arguments)]


def ranks(program: str, *arguments: object, restarts: int = 0) -> list[str]:
    """The command that runs one of ``programs/`` on two ranks under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [*launcher, f"--max-restarts={restarts}", *plain(program, *arguments)[1:]]


def wait_for(
    until: Callable[[], bool],
    what: str,
    *,
    wait_s: float = WAIT_S,
    say: Callable[[], str] = str,
    poll_s: float = POLL_S,
) -> None:
    """Wait for a condition. Fails the test where it does not come true in time; ``say`` adds what
    people need then. ``poll_s``: longer for what is dear to look at."""
    deadline_s = time.monotonic() + wait_s
    while not until():
        if time.monotonic() > deadline_s:
            pytest.fail(f"not within {wait_s:.0f} s: {what}\n{say()}")
        time.sleep(poll_s)


def is_a_jobs(name: str) -> bool:
    """Whether a name in shared memory is of training; what replicas share is of serving tests that
    run beside."""
    return "ckpt" in name and not name.startswith("ckpt-reads-")


@dataclass
class Losses:
    """A loss file as it grows: all that was computed for each step. A step done again has several
    entries."""

    path: Path
    of_step: dict[int, list[str]] = field(default_factory=dict)
    _read_bytes: int = 0

    def poll(self) -> Losses:
        """Take in the whole lines that were appended since the last call."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._read_bytes)
                text = file.read()
            text = text[: text.rfind(b"\n") + 1]
            self._read_bytes += len(text)
            for line in text.decode().splitlines():
                step, loss = line.split()
                self.of_step.setdefault(int(step), []).append(loss)
        return self

    @property
    def completed(self) -> int:
        """How many steps were taken, each counted once."""
        return max(self.of_step, default=-1) + 1

    @property
    def redone(self) -> int:
        return sum(len(losses) - 1 for losses in self.of_step.values())


class Results:
    """What a program wrote into ``folder``, as the files in ``programs/`` say."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.losses = [Losses(folder / f"losses-{rank}.txt") for rank in range(2)]

    def finals(self, rank: int = 0) -> dict[str, str]:
        """Digests of all state at the end."""
        found: dict[str, str] = json.loads((self.folder / f"final-{rank}.json").read_text())
        return found


class Job(Results):
    """One started program, and what it writes."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        super().__init__(folder)
        self.process = process

    def output(self) -> str:
        """What it said, all processes together: the end of it."""
        return (self.folder / "output.txt").read_text(errors="replace")[-8000:]

    @property
    def completed(self) -> int:
        """Steps that rank 0 took so far."""
        return self.losses[0].poll().completed

    def wait_steps(self, completed: int) -> None:
        """Wait until rank 0 took that many steps. Fails where the program ends before."""

        def there() -> bool:
            if self.completed >= completed:
                return True
            assert self.process.poll() is None, (
                f"ended early. status={self.process.returncode}\n{self.output()}"
            )
            return False

        wait_for(there, f"{completed} steps", say=self.output)

    def wait_end(self, wait_s: float = WAIT_S) -> int:
        """The exit status, or minus a signal."""
        wait_for(
            lambda: self.process.poll() is not None,
            "the program's end",
            wait_s=wait_s,
            say=self.output,
        )
        return int(self.process.returncode)

    def trainer(self, rank: int = 0) -> int:
        """The process that runs a rank's training, as it said itself; 0 before it said so."""
        return self._pids(rank).get("trainer", 0)

    def supervisor(self, rank: int = 0) -> int:
        """The process above it."""
        return self._pids(rank).get("supervisor", 0)

    def attempts(self, rank: int = 0) -> int:
        """How often a rank's training function was entered."""
        path = self.folder / f"attempts-{rank}.txt"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def _pids(self, rank: int) -> dict[str, int]:
        path = self.folder / f"pids-{rank}.json"
        found: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}
        return found


class Fleet:
    """All programs of one test. They share one runtime folder, and are told from other processes by
    it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runtime = folder / "runtime"
        self._mark = f"CKPT_RUNTIME_DIR={self.runtime}".encode()
        self._started: list[subprocess.Popen[bytes]] = []

    def start(
        self,
        command: Sequence[str],
        name: str = "job",
        *,
        env: Mapping[str, str] | None = None,
        stdin: int = subprocess.DEVNULL,
    ) -> Job:
        """Start a program that works in the folder ``name``; a second one goes on with the first
        one's files."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            **(env or {}),
            "CKPT_RUNTIME_DIR": str(self.runtime),
        }
        with (folder / "output.txt").open("ab") as output:
            process = Program(
                [part.replace("{folder}", str(folder)) for part in command],
                env=environment,
                stdin=stdin,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._started.append(process)
        return Job(process, folder)

    def members(self) -> list[int]:
        """Every living process that was started below this fleet: launchers, supervisors, trainers,
        keepers, workers."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdecimal() and self._mark in (entry / "environ").read_bytes().split(
                    b"\0"
                ):
                    found.append(int(entry.name))
        return found

    def is_member(self, pid: int) -> bool:
        """Whether ``pid`` is one of ours and alive: a number from a file may by now be another
        process's."""
        try:
            return pid > 0 and self._mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return False

    def keeper(self, store: Path) -> int:
        """The keeper of a store, as it says in its folder; 0 where there is none."""
        for path in self.runtime.glob("*/job.json"):
            with contextlib.suppress(OSError, ValueError):
                found = json.loads(path.read_text())
                if str(found["store"]).endswith(str(store)) and self.is_member(int(found["pid"])):
                    return int(found["pid"])
        return 0

    def send(self, pid: int, what: signal.Signals) -> bool:
        """Send a signal to a process of this fleet; False where it is gone. Never hits a stranger
        with a reused number."""
        try:
            handle = os.pidfd_open(pid)
        except OSError:
            return False
        try:
            if not self.is_member(pid):
                return False
            signal.pidfd_send_signal(handle, what)
        except ProcessLookupError:
            return False
        finally:
            os.close(handle)
        return True

    def wait_gone(self, wait_s: float = WAIT_S) -> None:
        """Wait until no process is left, then look that nothing else is: no job's folder, no shared
        memory by name."""
        wait_for(
            lambda: not self.members(),
            "the end of all processes",
            wait_s=wait_s,
            say=self.describe,
            poll_s=LOOK_S,
        )
        left = (
            [str(path.relative_to(self.runtime)) for path in self.runtime.rglob("*")]
            if self.runtime.exists()
            else []
        )
        assert left == [], left
        # Another test may have something of its own there for a moment.
        wait_for(
            lambda: (
                not [path for path in Path("/dev/shm").iterdir() if is_a_jobs(path.name.lower())]
            ),
            "the end of shared memory by name",
            wait_s=wait_s,
            say=lambda: str(sorted(Path("/dev/shm").iterdir())),
        )

    def describe(self) -> str:
        """The processes that are left, for people."""
        lines = []
        for pid in self.members():
            with contextlib.suppress(OSError):
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                lines.append(f"{pid} {state} {command}")
        for path in self.runtime.glob("*/keeper.log"):
            lines.append(f"{path}:\n{path.read_text(errors='replace')[-3000:]}")
        return "\n".join(lines)

    def kill_all(self) -> None:
        """After a test that failed: end what it started."""
        while members := self.members():
            for pid in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(POLL_S)
        for process in self._started:
            process.wait()


def differences(calm: Results, disturbed: Results, *, world_size: int) -> list[str]:
    """Where a disturbed run strays from the undisturbed one, in losses first; empty where they are
    equal to the last bit."""
    wrong = []
    for rank in range(world_size):
        wanted, found = calm.losses[rank].poll().of_step, disturbed.losses[rank].poll().of_step
        wrong += [
            f"rank {rank} misses step {step}" for step in sorted(wanted.keys() - found.keys())
        ]
        for step, values in sorted(found.items()):
            if set(values) != set(wanted.get(step, ())):
                wrong.append(f"rank {rank} step {step}: {values}, undisturbed {wanted.get(step)}")
        ends = calm.finals(rank), disturbed.finals(rank)
        wrong += [
            f"rank {rank}: {name} differs at the end"
            for name in ends[0]
            if ends[0][name] != ends[1].get(name)
        ]
    return wrong[:8]
