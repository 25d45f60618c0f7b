"""Real torchrun on several "nodes" of this machine, each with a runtime folder of its own; whole
nodes are killed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kit.agents import TESTS, Etcd
from kit.jobs import LOOK_S, PROGRAMS, Fleet, Job, wait_for
from kit.template import run

from ckpt.errors import FencedError

PLAIN = PROGRAMS / "plain.py"
STEADY = PROGRAMS / "steady.py"
TORCHRUN = ["-m", "torch.distributed.run", "--rdzv-backend=ckpt"]
WAIT_S = 240.0


class Node:
    """One "node": an agent, and all that is below it."""

    def __init__(self, fleet: Fleet, job: Job) -> None:
        self.fleet, self.job = fleet, job

    @property
    def output(self) -> str:
        return self.job.output()

    def has(self, pid: int) -> bool:
        return self.fleet.is_member(pid)

    def runs(self, script: Path) -> bool:
        """Whether a worker was started here."""
        return any(_command(pid)[2:3] == [str(script)] for pid in self.fleet.members())


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return []


@pytest.fixture
def start(
    tmp_path: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Node]]:
    """Starts nodes: ``start(launcher options, script, *arguments)``; what they started is gone
    afterwards."""
    for name in ("CKPT_KEEPER", "CKPT_IN_PLACE", "CKPT_NODES"):
        monkeypatch.delenv(name, raising=False)
    made: list[Fleet] = []

    def make(launcher: list[str], script: Path, *arguments: object) -> Node:
        folder = tmp_path / f"node{len(made)}"
        folder.mkdir()
        made.append(Fleet(folder))
        paths = os.pathsep.join([str(TESTS.parent), str(plugin)])
        env = {"PYTHONPATH": paths, "CKPT_STATE_DIR": str(tmp_path / "state")}
        return Node(
            made[-1],
            made[-1].start([sys.executable, *launcher, str(script), *map(str, arguments)], env=env),
        )

    yield make
    for fleet in made:
        fleet.kill_all()


def finished(nodes: list[Node]) -> list[int]:
    """The exit statuses of all agents."""
    return [node.job.wait_end(WAIT_S) for node in nodes]


def lines(folder: Path, rank: int) -> list[list[str]]:
    path = folder / f"plain-{rank}.txt"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def say(nodes: list[Node]) -> Callable[[], str]:
    return lambda: "\n".join(node.output for node in nodes)


@pytest.mark.slow
def test_an_undecorated_program_goes_on_when_an_agent_was_killed_and_came_back(
    start: Callable[..., Node], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    launcher = [
        *TORCHRUN,
        "--rdzv-id=plain",
        "--nnodes=2",
        "--nproc-per-node=1",
        "--max-restarts=3",
        "--rdzv-conf=ttl=1,join_timeout=200",
    ]
    nodes = [start(launcher, PLAIN, out, 200) for _ in range(2)]
    wait_for(lambda: len(lines(out, 1)) > 5, "both train", wait_s=WAIT_S, say=say(nodes))
    pid = int(
        [line for line in (out / "pids.txt").read_text().splitlines() if line.startswith("0 ")][
            -1
        ].split()[1]
    )
    dead = next(node for node in nodes if node.has(pid))
    dead.fleet.kill_all()
    done = [len(lines(out, rank)) for rank in range(2)]
    nodes = [next(node for node in nodes if node is not dead), start(launcher, PLAIN, out, 200)]
    assert finished(nodes) == [0, 0], say(nodes)()
    for rank in range(2):
        assert all(line[1:3] == ["2", "2"] for line in lines(out, rank))
        assert [int(line[0]) for line in lines(out, rank)[-200:]] == list(range(200))
        assert len(lines(out, rank)) >= 200 + done[rank]


def losses(folder: Path, rank: int) -> int:
    path = folder / f"losses-{rank}.txt"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.slow
def test_a_warm_standby_takes_over_and_the_other_agents_notice_nothing(
    start: Callable[..., Node], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    launcher = [
        "-m",
        "ckpt",
        "run",
        "--ttl=2",
        "--rdzv-id=kept",
        "--nnodes=2",
        "--nproc-per-node=1",
    ]
    nodes = [start(launcher, STEADY, out, 120, "--step-s", 0.5) for _ in range(3)]
    _lose_a_node(nodes, out, 120, warm=True)


@pytest.mark.slow
def test_a_standby_that_waits_takes_over_over_etcd(
    start: Callable[..., Node], tmp_path: Path, etcd: Etcd
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    secret = tmp_path / "job.secret"
    run([sys.executable, "-m", "ckpt", "key", "new", str(secret)], check=True, capture_output=True)
    launcher = [
        *TORCHRUN,
        f"--rdzv-endpoint={etcd.endpoint}",
        "--rdzv-id=kept too",
        "--nnodes=2",
        "--nproc-per-node=1",
        f"--rdzv-conf=ttl=5,standby=wait,secret={secret}",
    ]
    nodes = [start(launcher, STEADY, out, 120, "--step-s", 0.5) for _ in range(3)]
    _lose_a_node(nodes, out, 120, warm=False)


@pytest.mark.slow
def test_a_decorated_job_has_one_lease_a_node_also_after_a_keeper_was_killed(
    start: Callable[..., Node], tmp_path: Path, etcd: Etcd
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    secret = tmp_path / "job.secret"
    run([sys.executable, "-m", "ckpt", "key", "new", str(secret)], check=True, capture_output=True)
    before = set(etcd.leases())
    launcher = [
        *TORCHRUN,
        f"--rdzv-endpoint={etcd.endpoint}",
        "--rdzv-id=one lease",
        "--nnodes=2",
        "--nproc-per-node=1",
        f"--rdzv-conf=ttl=5,secret={secret}",
    ]
    nodes = [start(launcher, STEADY, out, 160, "--step-s", 0.5) for _ in range(2)]

    def theirs() -> set[int]:
        return set(etcd.leases()) - before

    def settled(but: set[int]) -> bool:
        return len(theirs()) == 2 and theirs() - but != set()

    wait_for(lambda: losses(out, 1) > 4, "both train", wait_s=WAIT_S, say=say(nodes))
    wait_for(
        lambda: settled(set()), "one lease a node", wait_s=WAIT_S, say=say(nodes), poll_s=LOOK_S
    )
    leases, done = theirs(), losses(out, 1)
    wait_for(
        lambda: losses(out, 1) > done + 16,
        "they go on for longer than a lease",
        wait_s=WAIT_S,
        say=say(nodes),
    )
    assert theirs() == leases
    assert "joins again" not in say(nodes)()
    assert nodes[1].fleet.send(nodes[1].fleet.keeper(Path("out/store")), signal.SIGKILL)
    wait_for(
        lambda: settled(leases),
        "one lease a node with the next keeper",
        wait_s=WAIT_S,
        say=say(nodes),
        poll_s=LOOK_S,
    )
    (out / "hurry").touch()
    assert finished(nodes) == [0, 0], say(nodes)()
    assert "asked-back" not in say(nodes)()
    wait_for(lambda: not theirs(), "no lease is left", wait_s=WAIT_S, poll_s=LOOK_S)


def _lose_a_node(nodes: list[Node], out: Path, steps: int, *, warm: bool) -> None:
    """Kill the node of rank 1; the standby has to bring it to an end, with the supervisor of rank 0
    still the same."""
    trainer = nodes[0].job  # reads what ranks say of themselves, wherever they are
    job = Job(trainer.process, out)
    wait_for(lambda: losses(out, 1) > 4, "both train", wait_s=WAIT_S, say=say(nodes))
    wait_for(
        lambda: sum(node.runs(STEADY) for node in nodes) == (3 if warm else 2),
        "the workers run",
        wait_s=WAIT_S,
        say=say(nodes),
        poll_s=LOOK_S,
    )
    supervisor = job.supervisor(0)
    dead = next(node for node in nodes if node.has(job.trainer(1)))
    rest = [node for node in nodes if node is not dead]
    dead.fleet.kill_all()
    assert losses(out, 1) < steps
    (out / "hurry").touch()
    assert finished(rest) == [0, 0], say(rest)()
    assert job.supervisor(0) == supervisor
    taken = [int(line.split()[0]) for line in (out / "losses-1.txt").read_text().splitlines()]
    assert sorted(set(taken)) == list(range(steps))
    for node in rest:
        node.fleet.wait_gone(WAIT_S)


@pytest.mark.slow
def test_two_agents_of_one_job_on_one_machine_need_no_folders_of_their_own(
    start: Callable[..., Node], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    launcher = ["-m", "ckpt", "run", "--rdzv-id=trial", "--nnodes=2", "--nproc-per-node=1"]
    first = start(launcher, STEADY, out, 40)
    command = [sys.executable, *launcher, str(STEADY), str(out), "40"]
    env = {
        name: value
        for name, value in _environment(first).items()
        if name in ("PYTHONPATH", "CKPT_STATE_DIR")
    }
    second = Node(first.fleet, first.fleet.start(command, "second", env=env))
    assert finished([first, second]) == [0, 0], say([first, second])()
    assert losses(out, 0) == losses(out, 1) == 40


def _environment(node: Node) -> dict[str, str]:
    text = Path(f"/proc/{node.job.process.pid}/environ").read_bytes().decode()
    return dict(line.split("=", 1) for line in text.split("\0") if "=" in line)


@pytest.mark.slow
def test_job_that_another_one_fenced_ends_and_is_not_started_again_to_fence_it_back(
    start: Callable[..., Node], tmp_path: Path
) -> None:
    outs = [tmp_path / name for name in ("first", "second")]
    nodes = []
    for number, out in enumerate(outs):
        out.mkdir()
        launcher = [
            *("-m", "ckpt", "run", f"--rdzv-id=over-one-store-{number}"),
            *("--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3"),
            "--rdzv-conf=ttl=1,last_call_timeout=0",
        ]
        store = outs[0] / "store"
        arguments = (600, "--step-s", 0.2, "--every", 5, "--store", store)
        nodes.append(start(launcher, STEADY, out, *arguments))
        wait_for(lambda out=out: losses(out, 0) > 5, "it trains", wait_s=WAIT_S, say=say(nodes))
    fenced, other = nodes
    assert fenced.job.wait_end(WAIT_S) == FencedError.exit_code, say(nodes)()
    assert "no restart follows" in fenced.output
    done = losses(outs[1], 0)
    (outs[1] / "hurry").touch()
    assert other.job.wait_end(WAIT_S) == 0, say(nodes)()
    assert done > 5 and "FencedError" not in other.output
