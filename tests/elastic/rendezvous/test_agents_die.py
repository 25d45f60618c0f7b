"""Agents as processes that are killed: whoever it is, the others go on."""

from __future__ import annotations

import itertools
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
from kit.agents import WAIT_S, wait_for
from kit.jobs import PROGRAMS
from kit.template import Program

PROGRAM = PROGRAMS / "agent.py"
_jobs = itertools.count()


class Process:
    """One agent."""

    def __init__(self, command: list[str]) -> None:
        self._process = Program(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._said: queue.Queue[dict] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self.hear()["ready"]

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._said.put(json.loads(line))

    def hear(self) -> dict:
        """The next thing it says."""
        return self._said.get(timeout=WAIT_S)

    @property
    def silent(self) -> bool:
        return self._said.empty()

    def ask(self) -> dict:
        """What it knows now; not while it waits for a round."""
        assert self._process.stdin is not None
        self._process.stdin.write("?\n")
        self._process.stdin.flush()
        return self.hear()

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()

    def end(self) -> int:
        """End it well; its status."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait(WAIT_S)

    def forget(self) -> None:
        """After the test."""
        self.kill()
        self._reader.join(WAIT_S)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()


@pytest.fixture
def start(driver: str, endpoint: str) -> Iterator[Callable[..., Process]]:
    """Starts agents of one job."""
    made: list[Process] = []
    job = f"killed {os.getpid()}/{next(_jobs)}"
    config = {
        "ttl": {"embedded": "4", "etcd": "5"}[driver],
        "last_call_timeout": "0.5",
        "shrink_timeout": "30",
    }

    def make(nodes_min: int = 2, nodes_max: int = 2) -> Process:
        made.append(
            Process(
                [
                    sys.executable,
                    str(PROGRAM),
                    endpoint,
                    job,
                    str(nodes_min),
                    str(nodes_max),
                    json.dumps(config),
                ]
            )
        )
        return made[-1]

    yield make
    for one in made:
        one.forget()


@pytest.mark.slow
@pytest.mark.parametrize("leads", [True, False])
def test_a_spare_takes_the_rank_of_an_agent_that_was_killed(
    start: Callable[..., Process], leads: bool
) -> None:
    agents = [start() for _ in range(2)]
    seats = [one.hear() for one in agents]
    assert sorted(seat["rank"] for seat in seats) == [0, 1]
    wait_for(lambda: any(one.ask()["leads"] for one in agents), "somebody leads")
    spare = start()
    wait_for(lambda: agents[0].ask()["fresh"] == 1, "the spare waits")
    assert all(one.silent for one in (*agents, spare))
    doomed = next(one for one in agents if one.ask()["leads"] == leads)
    other = next(one for one in agents if one is not doomed)
    doomed.kill()
    assert other.hear() == {"asked": True}
    assert other.hear()["rank"] == seats[agents.index(other)]["rank"]
    assert spare.hear()["rank"] == seats[agents.index(doomed)]["rank"]
    assert other.end() == 0


@pytest.mark.slow
def test_an_agent_that_was_killed_comes_back_as_another_one(start: Callable[..., Process]) -> None:
    agents = [start() for _ in range(2)]
    assert {one.hear()["world"] for one in agents} == {2}
    agents[0].kill()
    again = start()
    assert agents[1].hear() == {"asked": True}
    assert {agents[1].hear()["world"], again.hear()["world"]} == {2}


@pytest.mark.slow
def test_who_dies_while_it_waits_is_in_no_round(start: Callable[..., Process]) -> None:
    first = start(2, 2)
    first.kill()
    agents = [start() for _ in range(2)]
    assert sorted(one.hear()["rank"] for one in agents) == [0, 1]
