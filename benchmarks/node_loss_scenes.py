"""The losses of ``node_loss.py``: each starts a job of real processes, takes a node away, and
accounts for what followed."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from kit.etcd import EtcdCluster  # noqa: E402
from kit.jobs import wait_for  # noqa: E402
from kit.machines import TTL_S, Cluster, Machine  # noqa: E402
from kit.networks import Network, network  # noqa: E402
from node_loss_phases import Account, account, said_in  # noqa: E402
from recovery_nodes_marks import MarksFiles, recovered, wrong_states  # noqa: E402

PROGRAM = str(HERE / "recovery_nodes_ours.py")
RANKS = 3
KILL_AT = 60
"""Steps before the loss: time for mirrors to be there."""

CLOSED_S = 1.5
"""How soon training goes on where the lost node's sockets closed,"""
SILENT_S = 2.0
"""beyond the TTL where it fell silent,"""
ETCD_S = 4.0
"""and beyond two of them where etcd changes its leader meanwhile."""


@dataclass(frozen=True, slots=True)
class Scene:
    """One kind of loss. ``victim``: whose node: ``other`` is one without rank 0 that does not lead,
    ``leader`` the one that leads, ``root`` that of rank 0. ``bound_s``: from the loss to the first
    new step, without the user's build.
    """

    name: str
    victim: str
    bound_s: float
    standby: bool = True
    silent: bool = False
    etcd: str = ""
    returns: bool = False


SCENES = (
    Scene("killed", "other", CLOSED_S),
    Scene("killed, rank 0's", "root", CLOSED_S),
    Scene("killed, the leader's", "leader", CLOSED_S),
    Scene("no standby: shrinks, grows", "other", CLOSED_S, standby=False, returns=True),
    Scene("silent", "other", TTL_S + SILENT_S, silent=True),
    Scene("silent, the leader's", "leader", TTL_S + SILENT_S, silent=True),
    Scene("killed, a member of etcd dead", "other", CLOSED_S, etcd="member"),
    Scene("killed with etcd's leader", "other", 2 * TTL_S + ETCD_S, etcd="leader"),
)


@dataclass(frozen=True, slots=True)
class Options:
    """How the job trains."""

    mib: int
    every: int
    step_s: float
    build_s: float


@dataclass(frozen=True, slots=True)
class Result:
    """What followed one loss. ``taken_s``: without the user's build; ``wrong``: states that are not
    what they were."""

    name: str
    bound_s: float
    taken_s: float
    account: Account
    redone: int
    mirrored_interval: int
    world: int
    wrong: tuple[str, ...]

    @property
    def broken(self) -> list[str]:
        """What was promised and not kept."""
        found = list(self.wrong)
        if self.taken_s > self.bound_s:
            found.append(
                f"took {self.taken_s:.2f} s besides the build, more than {self.bound_s:g} s"
            )
        if self.redone > self.mirrored_interval:
            found.append(
                f"{self.redone} steps redone, of {self.mirrored_interval} since the last mirrored "
                "pair"
            )
        return found


class Nodes(Cluster):
    """A cluster of tests whose lost nodes are not waited for."""

    def __init__(self, folder: Path, *, nodes: str, where: str, secret: Path) -> None:
        super().__init__(folder, nodes=nodes, where=where, secret=secret)
        self._spec["shrink_wait_s"] = 0.0
        self.marks = MarksFiles(self.results)

    def logs(self) -> list[Path]:
        """The logs of all keepers."""
        return [
            path
            for machine in self.machines
            for path in machine.folder.glob("runtime/*/keeper.log")
        ]

    def holder(self, pid: int) -> Machine:
        """The machine on which a process runs."""
        return next(machine for machine in self.machines if pid in machine.members())

    def leader(self) -> Machine:
        """The machine whose keeper published the last epoch."""
        told = {
            machine: [
                one
                for one in said_in(machine.folder.glob("runtime/*/keeper.log"))
                if _published(one.text)
            ]
            for machine in self.machines
        }
        return max(
            (machine for machine in told if told[machine]),
            key=lambda machine: told[machine][-1].at_s,
        )

    def wait(self, until: Callable[[], bool], what: str) -> None:
        """Until that is so; ends the benchmark where it never is."""
        wait_for(until, what, say=self.output)


def play(scene: Scene, folder: Path, options: Options) -> list[Result]:
    """Start, lose, account; one result, or two where the node comes back."""
    folder.mkdir()
    secret = folder / "secret"
    secret.touch(mode=0o600)
    secret.write_text(os.urandom(32).hex())
    machines = RANKS + scene.standby
    nodes = str(RANKS) if scene.standby else f"{RANKS - 1}:{RANKS}"
    arguments = (
        "--mib",
        options.mib,
        "--every",
        options.every,
        "--step-s",
        options.step_s,
        "--build-s",
        options.build_s,
    )
    with contextlib.ExitStack() as ending:
        lan = ending.enter_context(network(machines + 1)) if scene.silent else None
        if lan is not None:
            etcd, where = None, ending.enter_context(_etcd_on(lan, machines + 1, folder))
        else:
            etcd = ending.enter_context(EtcdCluster(folder / "etcd", 3))
            where = f"etcd://{','.join(etcd.endpoints)}"
        job = Nodes(folder / "job", nodes=nodes, where=where, secret=secret)
        ending.callback(job.kill_all)

        def start(host: int) -> Machine:
            if lan is None:
                return job.start(*arguments, program=PROGRAM)
            return job.start(
                *arguments, program=PROGRAM, before=lan.command(host), host=lan.address(host)
            )

        hosts = {start(host): host for host in range(1, machines + 1)}
        job.wait(
            lambda: job.marks.world() == RANKS and job.marks.completed() >= KILL_AT,
            f"{KILL_AT} steps",
        )
        job.wait(
            lambda: sum("this node is" in _text(machine) for machine in hosts) == machines,
            "all nodes",
        )
        if scene.etcd == "member":
            assert etcd is not None
            next(member for member in etcd.members if not member.is_leader()).kill()
            reached = job.marks.completed()
            job.wait(
                lambda: job.marks.completed() > reached + 2 * TTL_S / options.step_s,
                "steps with two members",
            )
        victim = _victim(scene, job)
        etcd_leader = etcd.leader() if etcd is not None and scene.etcd == "leader" else None
        lost_s = time.monotonic()
        if etcd_leader is not None:
            etcd_leader.kill()
        if lan is not None:
            lan.pull(hosts[victim])
        else:
            victim.kill()
        found = [_follow(scene.name, scene.bound_s, job, lost_s)]
        if scene.returns:
            found.append(_grow(job, start))
        if lan is None:
            _end_well(job, victim)
    return found


def _follow(
    name: str, bound_s: float, job: Nodes, lost_s: float, old: Sequence[int] = ()
) -> Result:
    """Wait for the first new step, and account for the way there from ``lost_s``."""
    before = old or [mark.pid for mark in job.marks.poll() if mark.at_s <= lost_s]
    job.wait(lambda: recovered(job.marks.poll(), before) is not None, "a new step")
    found = recovered(job.marks.poll(), before)
    assert found is not None
    after = found.reached + 3
    job.wait(
        lambda: job.marks.completed() >= after, f"{after} steps"
    )  # so that logs have all of it
    said = said_in(job.logs())
    (job.folder / f"said{name.replace(' ', '-')}.txt").write_text(
        "".join(f"{one.at_s - lost_s:8.3f} {one.text}\n" for one in said)
    )
    told = account(said, found, lost_s)
    return Result(
        name,
        bound_s,
        told.total_s - told.phases_s["build"],
        told,
        found.redone,
        found.reached - told.mirrored if told.mirrored >= 0 else found.reached,
        found.world,
        tuple(wrong_states(job.marks.poll())),
    )


def _grow(job: Nodes, start: Callable[[int], Machine]) -> Result:
    """The node comes back: the clock runs from the epoch that has it, which waits until the one
    before has lasted a while."""
    before = [mark.pid for mark in job.marks.poll()]
    number = max(
        int(one.text.split(":")[0].split()[1])
        for one in said_in(job.logs())
        if _published(one.text)
    )
    start(RANKS)
    job.wait(
        lambda: job.marks.world() == RANKS and job.marks.trainer(0) not in before,
        "a world that has grown",
    )
    grown = next(one for one in said_in(job.logs()) if one.text.startswith(f"epoch {number + 1}: "))
    return _follow("  and the node is back", CLOSED_S, job, grown.at_s, before)


def _victim(scene: Scene, job: Nodes) -> Machine:
    leader, root = job.leader(), job.holder(job.marks.trainer(0))
    if scene.victim in ("leader", "root"):
        return leader if scene.victim == "leader" else root
    others = [job.holder(job.marks.trainer(rank)) for rank in range(1, RANKS)]
    return next(machine for machine in others if machine is not leader)


def _end_well(job: Nodes, victim: Machine) -> None:
    (job.results / "stop").touch()
    ends = {name: status for name, status in job.wait_end().items() if name != victim.name}
    assert set(ends.values()) == {0}, f"{ends}\n{job.output()}"
    job.wait_gone()


def _published(text: str) -> bool:
    words = text.split(maxsplit=2)
    return len(words) > 1 and words[0] == "epoch" and words[1].endswith(":")


def _text(machine: Machine) -> str:
    return "".join(
        path.read_text(errors="replace") for path in machine.folder.glob("runtime/*/keeper.log")
    )


@contextlib.contextmanager
def _etcd_on(lan: Network, host: int, folder: Path) -> Iterator[str]:
    """An etcd on a host of its own; where it is."""
    binary = shutil.which("etcd")
    assert binary is not None, "looked for at the start"
    url, peer = f"http://{lan.address(host)}:2379", f"http://{lan.address(host)}:2380"
    with (folder / "etcd.log").open("wb") as log:
        process = subprocess.Popen(
            [
                *lan.command(host),
                binary,
                "--data-dir",
                str(folder / "etcd"),
                "--listen-client-urls",
                url,
                "--advertise-client-urls",
                url,
                "--listen-peer-urls",
                peer,
                "--initial-advertise-peer-urls",
                peer,
                "--initial-cluster",
                f"default={peer}",
                "--unsafe-no-fsync",
                "--log-level",
                "error",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        yield f"etcd://{lan.address(host)}:2379"
    finally:
        process.kill()
        process.wait()
