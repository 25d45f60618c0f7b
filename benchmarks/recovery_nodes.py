"""Kill one agent with all that is below it: ckpt beside torchrun's c10d rendezvous with DCP.
``recovery.py --nodes`` runs it.

    python benchmarks/recovery.py --nodes             about six minutes; torchrun's defaults, whose time is their timeouts, once
    python benchmarks/recovery.py --nodes --quick     a smoke test: the fastest of both, once; no figures to quote

Agents are process trees of this machine. torchrun never loses the agent that hosts its store: a job
does not survive that. What is restored is compared with what was there at that step; exits with 1
where it differs. Prints a table and writes bench-out/recovery_nodes.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from measure import warm_memory
from recovery_nodes_agents import START_WAIT_S, Agent, Agents, HungError
from recovery_nodes_marks import recovered, wrong_states
from recovery_nodes_table import Lost, print_table, summary
from report import machine

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "tests"))

from kit.servers.process import ServerProcess, free_port  # noqa: E402

OFFSET = 7
"""A kill comes this many steps after a checkpoint of the rival's,"""
STEPS_MIN = 30
"""and so many after the start at least."""

LISTENING = "0A"
"""A socket's state, as the kernel spells it."""

NEVER_S = 120.0
"""A job that has taken no new step after so long is not coming back."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way to start a job and to lose a node of it.

    ``agents`` are started with ``--nnodes=nodes``; ``conf``: ``--rdzv-conf``. ``returns``: the
    agent is started again at once. ``slow``: its time is made of timeouts, so that one round says
    it.
    """

    name: str
    nodes: str
    agents: int
    conf: str
    backend: str
    returns: bool = False
    slow: bool = False
    shares_store: bool = False

    @property
    def ours(self) -> bool:
        return self.backend != "c10d"


TUNED = "keep_alive_interval=1,keep_alive_max_attempt=2,last_call_timeout=1"
"""The least that c10d takes, but for one attempt: a node would be late for that whenever the
machine is busy."""

CONTESTANTS = (
    Contestant("ckpt, standby, etcd", "2", 3, "", "etcd"),
    Contestant("ckpt, standby, file", "2", 3, "", "file"),
    Contestant("ckpt, nobody returns", "2:3", 3, "", "etcd"),
    Contestant("c10d, agent restarted, tuned", "2", 2, TUNED, "c10d", returns=True),
    Contestant("c10d, nobody returns, tuned", "2:3", 3, TUNED, "c10d"),
    Contestant("c10d, agent restarted", "2", 2, "", "c10d", returns=True, slow=True),
    Contestant("c10d, nobody returns", "2:3", 3, "", "c10d", slow=True),
    Contestant(
        "c10d, agent restarted, as is",
        "2",
        2,
        "",
        "c10d",
        returns=True,
        slow=True,
        shares_store=True,
    ),
)
QUICK = (CONTESTANTS[0].name, CONTESTANTS[1].name, "c10d, agent restarted, tuned")
AS_IS = CONTESTANTS[-1].name


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    contestants = [one for one in CONTESTANTS if one.name in options.only]
    if shutil.which("etcd") is None:
        print(
            "etcd is not installed (Debian: apt-get install etcd-server): left out", file=sys.stderr
        )
        contestants = [one for one in contestants if one.backend != "etcd"]
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that no agent outlives this process
    options.out.mkdir(exist_ok=True)
    found: dict[str, list[Lost]] = {one.name: [] for one in contestants}
    loads = []
    for number in range(options.rounds):
        turn = number % max(1, len(contestants))
        for one in (*contestants[turn:], *contestants[:turn]):
            if one.slow and number >= options.slow_rounds:
                continue
            loads.append(os.getloadavg()[0])
            found[one.name].append(
                run(one, options, random.Random(f"{options.seed}/{number}/{one.name}"))
            )
            print(
                f"{number + 1}/{options.rounds} {one.name}: {found[one.name][-1]}",
                file=sys.stderr,
                flush=True,
            )
    document = {
        "machine": {**machine(), "load": f"{min(loads):.1f} to {max(loads):.1f}"},
        "plan": {
            name: getattr(options, name)
            for name in ("mib", "every", "step_s", "rounds", "slow_rounds", "seed")
        },
        "contestants": {
            one.name: {**asdict(one), **summary(found[one.name])} for one in contestants
        },
    }
    path = options.json or options.out / f"recovery_nodes{'_quick' if options.quick else ''}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    print_table(document)
    print(f"wrote {path}")
    wrong = [text for losses in found.values() for loss in losses for text in loss.wrong]
    for text in wrong or ["every state that was restored is what was there at that step"]:
        print(f"WRONG: {text}" if wrong else text)
    never = [
        one.name
        for one in contestants
        if one.ours and any(loss.new_s is None for loss in found[one.name])
    ]
    return 1 if wrong or never else 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="recovery.py --nodes", description=__doc__.splitlines()[0]
    )
    names = [one.name for one in CONTESTANTS]
    parser.add_argument(
        "--quick", action="store_true", help="the fastest of both, one kill: does it still run?"
    )
    parser.add_argument("--only", nargs="+", choices=names, help="leave the others out")
    parser.add_argument(
        "--as-is",
        action="store_true",
        help=f"and {AS_IS!r}, which takes two minutes to never come back",
    )
    parser.add_argument("--mib", type=int, default=10, help="a rank's state")
    parser.add_argument(
        "--every",
        type=int,
        default=10,
        help="steps between two durable checkpoints, of all contestants",
    )
    parser.add_argument(
        "--step-s", type=float, default=0.05, help="the least time that a step takes"
    )
    parser.add_argument(
        "--rounds", type=int, help="fresh starts of each contestant, each of which loses one node"
    )
    parser.add_argument(
        "--slow-rounds", type=int, default=1, help="of those whose time is made of timeouts"
    )
    parser.add_argument(
        "--seed", type=int, default=random.randrange(1 << 30), help="of the moments of the kills"
    )
    parser.add_argument(
        "--json", type=Path, help="where the samples go; by default into the folder of --out"
    )
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.only = options.only or (
        QUICK if options.quick else [one for one in names if options.as_is or one != AS_IS]
    )
    return options


def run(one: Contestant, options: argparse.Namespace, chance: random.Random) -> Lost:
    """One fresh start of one contestant, which loses one node."""
    folder = Path(tempfile.mkdtemp(prefix="recovery-nodes-", dir=options.out)).resolve()
    (folder / "out").mkdir()
    script = HERE / f"recovery_nodes_{'ours' if one.ours else 'dcp'}.py"
    program = [str(script), str(folder / "out"), f"--mib={options.mib}", f"--every={options.every}"]
    environment = {
        "PYTHONPATH": os.pathsep.join(
            filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH")))
        ),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "CKPT_STATE_DIR": str(folder / "state"),
        # Shared among attempts, the agent's store leads a restart to dead addresses, where it can
        # wait forever.
        **({} if one.shares_store else {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}),
    }
    with ExitStack() as ending:
        port = free_port()
        endpoint = ending.enter_context(_etcd(folder)) if one.backend == "etcd" else ""
        launcher = _launcher(one, folder, endpoint if one.ours else f"127.0.0.1:{port}")
        program.append(f"--step-s={options.step_s}")
        agents = ending.enter_context(Agents(launcher, program, folder, environment))
        lost = _lose(one, agents, options, chance, port)
    if lost.new_s is not None and not lost.wrong:
        shutil.rmtree(folder)
    return lost


def _launcher(one: Contestant, folder: Path, endpoint: str) -> list[str]:
    conf = one.conf
    if one.ours:
        how = [
            "-m",
            "ckpt",
            "run",
            "--rdzv-id=bench",
            "--standby=warm",
            f"--rdzv-endpoint={endpoint}",
        ]
        if endpoint:
            secret = folder / "secret"
            secret.touch(mode=0o600)
            secret.write_text(os.urandom(32).hex())
            how.append(f"--secret={secret}")
    else:
        how = [
            "-m",
            "torch.distributed.run",
            "--rdzv-id=bench",
            "--rdzv-backend=c10d",
            "--max-restarts=100",
        ]
        how += [f"--rdzv-endpoint={endpoint}"]
        if conf:
            how.append("--monitor-interval=0.01")
    return [
        *how,
        f"--nnodes={one.nodes}",
        "--nproc-per-node=1",
        *([f"--rdzv-conf={conf}"] if conf else []),
    ]


def _lose(
    one: Contestant, agents: Agents, options: argparse.Namespace, chance: random.Random, port: int
) -> Lost:
    """Start all, kill one, and watch."""
    marks = agents.marks
    agents.start()
    if not one.ours:  # it hosts the store, and is not the one to be lost
        agents.wait(lambda: _listens(port), "the store", wait_s=START_WAIT_S)
    for _ in range(1, one.agents):
        agents.start()
    world = one.agents if one.nodes == "2:3" else 2
    agents.wait(
        lambda: marks.world() == world and marks.completed() >= STEPS_MIN,
        "steps",
        wait_s=START_WAIT_S,
    )
    if one.ours and one.agents > world:
        agents.wait(
            lambda: all(_ready(agent) for agent in agents.agents),
            "the standby",
            wait_s=START_WAIT_S,
        )
    warm_memory(world * (options.mib << 20), scratch=options.out)
    before = marks.completed()
    agents.wait(
        lambda: marks.completed() > before and marks.completed() % options.every == OFFSET,
        "a moment",
        wait_s=60,
    )
    time.sleep(chance.uniform(0.0, options.step_s))
    holders = [agents.holder(rank) for rank in range(world)]
    victim = next(agent for agent in reversed(holders) if one.ours or agent is not agents.agents[0])
    old = {mark.pid for mark in marks.poll()}
    began_s = time.monotonic()
    victim.kill()
    if one.returns:
        agents.start()
    try:
        agents.wait(
            lambda: recovered(marks.poll(), old) is not None,
            "a new step",
            wait_s=NEVER_S,
            lost=victim,
        )
        found = recovered(marks.poll(), old)
        assert found is not None
        after = found.reached + options.every + OFFSET
        agents.wait(
            lambda: marks.completed() >= after, "steps after that", wait_s=START_WAIT_S, lost=victim
        )
        agents.stop(victim)
    except HungError as error:
        print(f"{one.name}: {error}", file=sys.stderr)
        return Lost(None, None, None, 0, tuple(wrong_states(marks.poll())))
    return Lost(
        found.new_s - began_s,
        found.first_s - began_s,
        found.redone,
        found.world,
        tuple(wrong_states(marks.poll())),
    )


def _ready(agent: Agent) -> bool:
    """Whether its keeper is among the job's nodes."""
    logs = agent.output.parent.glob("runtime/*/keeper.log")
    return any("this node is" in path.read_text(errors="replace") for path in logs)


def _listens(port: int) -> bool:
    """Whether a process listens at that port of this machine; no connection is made."""
    tables = (Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6"))
    fields = (line.split() for table in tables for line in table)
    return any(one[1].endswith(f":{port:04X}") and one[3] == LISTENING for one in fields)


@contextmanager
def _etcd(folder: Path) -> Iterator[str]:
    """One etcd on loopback; its address."""
    client, peer, health = (f"http://127.0.0.1:{free_port()}" for _ in range(3))
    server = ServerProcess(
        [
            "etcd",
            "--name",
            "one",
            "--data-dir",
            str(folder / "etcd"),
            "--listen-client-urls",
            client,
            "--advertise-client-urls",
            client,
            "--listen-peer-urls",
            peer,
            "--initial-advertise-peer-urls",
            peer,
            "--initial-cluster",
            f"one={peer}",
            "--listen-metrics-urls",
            health,
            "--unsafe-no-fsync",
            "--log-level",
            "error",
        ],
        ready_url=f"{health}/health",
        log=folder / "etcd.log",
        env={},
    )
    try:
        server.wait_ready()
        yield client.removeprefix("http://")
    finally:
        server.kill()
