"""The agents of one job, each with all that is below it as a "node" of this machine: started,
killed as if the power failed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from measure import family
from recovery_nodes_marks import MarksFiles

POLL_S = 0.003
START_WAIT_S = 180.0
"""Agents that do not train after so long are in order to be looked at."""


class HungError(Exception):
    """The job did not get to where it should in time."""


class Agent:
    """One agent and everything below it: found by an environment variable that all of it
    inherits."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], folder: Path
    ) -> None:
        folder.mkdir()
        runtime = folder / "runtime"
        self.mark = f"CKPT_RUNTIME_DIR={runtime}\0"
        self.output = folder / "output.txt"
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **environment, "CKPT_RUNTIME_DIR": str(runtime)},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def members(self) -> list[int]:
        """Every living process of it."""
        return family(self.mark)

    def kill(self) -> None:
        """SIGKILL for all of it, nothing is said to anybody; returns when nothing lives."""
        while members := self.members():
            for pid in members:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(POLL_S)
        self.process.wait()


class Agents:
    """The agents of one job; a context manager, after which nothing of them lives."""

    def __init__(
        self,
        launcher: Sequence[str],
        program: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
    ) -> None:
        self._command = [sys.executable, *launcher, *program]
        self._folder = folder
        self._environment = environment
        self.agents: list[Agent] = []
        self.marks = MarksFiles(folder / "out")

    def __enter__(self) -> Agents:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for agent in self.agents:
            agent.kill()

    def start(self) -> Agent:
        """One more agent."""
        agent = Agent(self._command, self._environment, self._folder / f"agent{len(self.agents)}")
        self.agents.append(agent)
        return agent

    def holder(self, rank: int) -> Agent:
        """The agent that has a rank."""
        pid = self.marks.trainer(rank)
        return next(agent for agent in self.agents if pid in agent.members())

    def wait(
        self, until: Callable[[], bool], what: str, *, wait_s: float, lost: Agent | None = None
    ) -> None:
        """Wait for a condition. Raises HungError where it is not true in time or the agents that
        are left end before."""
        deadline_s = time.monotonic() + wait_s
        while not until():
            left = [agent for agent in self.agents if agent is not lost]
            if all(agent.process.poll() is not None for agent in left):
                raise HungError(f"all agents ended before {what}; see {self._folder}")
            if time.monotonic() > deadline_s:
                raise HungError(f"not within {wait_s:.0f} s: {what}; see {self._folder}")
            time.sleep(POLL_S)

    def stop(self, lost: Agent) -> None:
        """Let the job end well. Raises HungError where it does not."""
        (self._folder / "out" / "stop").touch()
        left = [agent for agent in self.agents if agent is not lost]
        ended = [agent.process for agent in left]
        self.wait_ended(ended)
        if statuses := [process.returncode for process in ended if process.returncode != 0]:
            raise HungError(f"agents failed at the end. statuses={statuses}; see {self._folder}")

    def wait_ended(
        self, ended: Sequence[subprocess.Popen[bytes]], *, wait_s: float = START_WAIT_S
    ) -> None:
        """Until these have all ended. Raises HungError where they don't in time."""
        deadline_s = time.monotonic() + wait_s
        while not all(process.poll() is not None for process in ended):
            if time.monotonic() > deadline_s:
                raise HungError(f"the job does not end; see {self._folder}")
            time.sleep(POLL_S)
