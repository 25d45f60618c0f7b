"""One job of three nodes and a standby, what schedules do to it one after the other, and the
history of all that happened."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

import ckpt
from ckpt.backends.replicated.open import open_stores
from ckpt.errors import CkptError
from ckpt.format.records import Commit, Open, Record, decode_record
from ckpt.log.journal import Journal
from kit.jobs import wait_for
from kit.machines import Cluster, Machine, cluster
from kit.nemesis.acts import Acts, Undo, now_ns
from kit.nemesis.clock import Clock
from kit.nemesis.disks import disk
from kit.nemesis.etcd import Etcd, etcd
from kit.nemesis.history import Committed, Content, History, Opened, Pair, Pause
from kit.nemesis.schedule import Act, Schedule
from kit.nemesis.watch import EtcdWatch, LogWatch, Trainers, etcd_watch, steps_of
from kit.networks import Network, network
from kit.programs.exact_state import Exact, reference
from kit.template import run

MACHINES = (1, 2, 3, 4)
ETCD_HOSTS = (5, 6, 7)
OBSERVER = 8
"""Hosts of the network."""
JOB = "exact"

NODES = "2:3"
BEGUN_STEPS = 5
RECOVER_S = 300.0
"""A job that is not further than before this long after everything is healed counts as stuck."""

LAUNCHES_MAX = 3
LAUNCHED = MACHINES[:2]
"""A trainer that dies when its function has returned ends the job on all nodes, and launchers start
it again: on two nodes, as many as it needs, for one that comes later would come after the end."""

TRAIL_MAX = 1 << 14
LOOK_S = 0.02

STALL_LOOK_S = 0.05
STALL_S = 1.0
"""A machine that others use too stands still at times: who has not run for so long is taken to have
slept with all."""


class Nemesis:
    """See the module. Everything that it starts ends with the stack.

    ``stores``: how many folders have what becomes durable. With several etcd gives out the places
    of their log.
    """

    def __init__(
        self, schedules: Sequence[Schedule], folder: Path, ending: ExitStack, *, stores: int
    ) -> None:
        self.schedules = schedules
        self._ttl_s = schedules[0].ttl_s
        self._clock_jumps = any(act.kind == "clock" for one in schedules for act in one.acts)
        self._folder = folder
        self.said: list[str] = []
        secret = folder / "secret"
        secret.touch(mode=0o600)
        secret.write_text(os.urandom(32).hex())
        self._lan: Network = ending.enter_context(network(OBSERVER))
        self._etcd: Etcd = ending.enter_context(etcd(folder / "etcd", self._lan, ETCD_HOSTS))
        watching = etcd_watch(folder / "changes.jsonl", self._lan, OBSERVER, self._etcd, "job")
        self._watch: EtcdWatch = ending.enter_context(watching)
        self._cluster: Cluster = ending.enter_context(
            cluster(folder / "cluster", nodes=NODES, where=self._etcd.where, secret=secret)
        )
        self._stores = [self._cluster.results / f"store-{number}" for number in range(stores)]
        disks = [
            ending.enter_context(disk(store, folder / f"{store.name}.img"))
            for store in self._stores
        ]
        if stores > 1:
            self._begin_log()
        watches = [LogWatch(store / "log", number) for number, store in enumerate(self._stores)]
        self._logs = [ending.enter_context(watch) for watch in watches]
        self._trainers = Trainers(self._cluster.results / "events")
        self._clocks = {host: Clock(folder / f"clock-{host}") for host in MACHINES}
        self._began_s = time.monotonic()
        self._acts = Acts(
            self._cluster,
            self._lan,
            self._etcd,
            self._watch,
            hosts=MACHINES,
            others=ETCD_HOSTS,
            clocks=self._clocks,
            disks=disks,
            start=self._start,
        )

    def play(self) -> History:
        """Everything, to the end of the job."""
        over = threading.Event()
        noting = threading.Thread(target=self._note_stalls, args=(over,), daemon=True)
        noting.start()
        try:
            return self._play()
        finally:
            over.set()
            noting.join()

    def _note_stalls(self, over: threading.Event) -> None:
        """A machine that stood still as a whole, as one that is shared may, had all its nodes
        paused."""
        before_ns = now_ns()
        while not over.wait(STALL_LOOK_S):
            if (at_ns := now_ns()) - before_ns > STALL_S * 1e9:
                self.said.append(f"{at_ns} all stood still for {(at_ns - before_ns) / 1e9:.1f} s")
                self._acts.pauses += [
                    Pause(one.name, "node", before_ns, at_ns) for one in self._cluster.machines
                ]
            before_ns = at_ns

    def _play(self) -> History:
        self._wait(
            lambda: (
                self._trainers.completed >= BEGUN_STEPS and self._watch.living() >= len(MACHINES)
            ),
            "the job's begin",
        )
        for schedule in self.schedules:
            self._say(f"begin {schedule}")
            self._began_s = time.monotonic()
            self._strike(schedule)
            self._recover()
        # One that came after the end would wait for others for ever.
        self._wait(lambda: self._watch.living() >= self._acts.count, "all machines")
        self._finish(finish := self._trainers.completed + 4 * BEGUN_STEPS)
        self._cluster.wait_gone()
        self._watch.wait_all(self._etcd)
        return self._history(finish)

    def _recover(self) -> None:
        """All is healed: it trains again."""
        self._say("all is healed")
        reached = self._trainers.completed
        self._wait(lambda: self._trainers.completed > reached + BEGUN_STEPS, "new steps")
        self._say("recovered")

    def _finish(self, finish: int) -> None:
        """Let it end, once so many steps are taken."""
        new = self._cluster.results / "finish.new"
        new.write_text(str(finish))
        new.replace(self._cluster.results / "finish")
        for _ in range(LAUNCHES_MAX):
            wait_for(
                self._cluster.ended, "the end of all programs", wait_s=RECOVER_S, say=self.describe
            )
            ends = self._acts.ends()
            if not any(ends.values()):
                break
            self._say(
                "a trainer was lost after its function had returned, so all end: launched again. "
                f"{ends}"
            )
            self._acts.start_again(LAUNCHED)
        self._say(f"the job is over after {finish} steps")

    def _begin_log(self) -> None:
        program = Path(__file__).parents[1] / "programs" / "log_by_etcd.py"
        done = run(
            [
                *self._lan.command(OBSERVER),
                sys.executable,
                str(program),
                JOB,
                *map(str, self._stores),
            ],
            env={**os.environ, "CKPT_SEQUENCER": self._etcd.where},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout.startswith("etcd:"), (
            f"etcd gives out no places\n{done.stdout}\n{done.stderr}"
        )

    def describe(self) -> str:
        """For who has to understand a failure."""
        seeds = f"{self.schedules[0].seed}-{self.schedules[-1].seed}"
        again = (
            f"CKPT_SEED={seeds} CKPT_CHAIN={len(self.schedules)} CKPT_TTL_S={self._ttl_s:g} "
            f"CKPT_STORES={len(self._stores)} does it again"
        )
        return "\n".join([again, *self.said, f"folder={self._folder}", self._cluster.output()])

    # ---- what is done

    def _strike(self, schedule: Schedule) -> None:
        waiting = list(schedule.acts)
        undos: list[tuple[float, Act, Undo]] = []
        while waiting or undos:
            at_s = time.monotonic() - self._began_s
            for undo in [one for one in undos if one[0] <= at_s]:
                undos.remove(undo)
                done = undo[2]()
                self._say(
                    f"end {undo[1].kind} {undo[1].whom} {done if isinstance(done, str) else ''}"
                )
            if waiting and waiting[0].at_s <= at_s:
                act = waiting.pop(0)
                words, after = self._acts.do(act)
                self._say(f"{act.kind} {act.whom}: {words}")
                if after is not None:
                    undos.append((time.monotonic() - self._began_s + act.last_s, act, after))
            self._check_lives()
            time.sleep(LOOK_S)

    def _start(self, host: int) -> Machine:
        before = self._lan.command(host)
        if self._clock_jumps:  # a clock that can costs time at each look
            before = [*before, *self._clocks[host].command()]
        more = {"ttl_s": self._ttl_s}
        return self._cluster.start(
            "--every",
            20,
            "--stores",
            len(self._stores),
            program="exact.py",
            before=before,
            host=self._lan.address(host),
            more=more,
        )

    def _say(self, text: str) -> None:
        self.said.append(
            f"{time.monotonic() - self._began_s:6.2f} s {now_ns()} step "
            f"{self._trainers.completed:4d}  {text}"
        )
        print(self.said[-1], flush=True)

    def _wait(self, until: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + RECOVER_S
        while not until():
            self._check_lives()
            assert time.monotonic() < deadline_s, (
                f"not within {RECOVER_S:.0f} s: {what}\n{self.describe()}"
            )
            time.sleep(LOOK_S)

    def _check_lives(self) -> None:
        for machine in self._cluster.machines:
            if machine.name not in self._acts.killed and machine.process is not None:
                status = machine.process.poll()
                assert status is None, (
                    f"{machine.name} ended with {status} before the job was over\n{self.describe()}"
                )

    # ---- what was

    def _history(self, finish: int) -> History:
        trainers = self._trainers.poll()
        digests = {
            (number, key): digest
            for number, log in enumerate(self._logs)
            for key, digest in log.look().items()
        }
        sightings = [one for log in self._logs for one in log.sightings]
        records, hole = self._records()
        checkpointer = ckpt.Checkpointer([str(store) for store in self._stores])
        infos = checkpointer.snapshots()
        newest = checkpointer.latest()
        highest = max(
            finish, *(one.step + 1 for one in trainers.steps), *(one.step for one in infos)
        )
        return History(
            changes=tuple(self._watch.changes()),
            entered=tuple(trainers.entered),
            steps=tuple(trainers.steps),
            beats=tuple(trainers.beats),
            log=tuple(records),
            hole=hole,
            sightings=tuple(sightings),
            log_digests=digests,
            stores=len(self._stores),
            snapshots=frozenset((one.epoch, one.step) for one in infos),
            newest=(newest.epoch, newest.step) if newest is not None else None,
            contents={
                pair: read_back(checkpointer, pair) for pair in dict.fromkeys(_pairs(records))
            },
            finals=self._finals(),
            pauses=tuple(self._acts.pauses),
            silences=tuple(self._acts.silences),
            reference=tuple(reference(highest)),
            finish=finish,
            ends=self._acts.ends(),
            ttl_s=self._ttl_s,
        )

    def _records(self) -> tuple[list[Opened | Committed], str]:
        """The log, each record's bytes as they lie in a store; and why its end can't be read.

        Where etcd gives out its places all stores have the same at one place, or nothing: another
        check sees to that.
        """
        paths = {
            path.name: path for store in self._stores for path in (store / "log").glob("*.json")
        }
        found = [decode_record(path.read_bytes()) for _, path in sorted(paths.items())]
        backend = open_stores([str(store) for store in self._stores], emit=lambda event: None)
        unsure = Journal.open(backend).refresh().stale_reason
        backend.close()
        return [one for record in found if (one := _said(record)) is not None], str(
            unsure
        ) if unsure else ""

    def _finals(self) -> dict[int, Content]:
        found = {}
        for path in self._cluster.results.glob("final-*.json"):
            end = json.loads(path.read_text())
            rank = int(path.stem.removeprefix("final-"))
            found[rank] = Content(end["step"], end["value"], steps_of(end["trail"]))
        return found


def read_back(checkpointer: ckpt.Checkpointer, pair: Pair) -> Content | str:
    """A snapshot as anybody reads it, or why that can't be."""
    exact, trail = Exact(), torch.zeros(TRAIL_MAX, dtype=torch.int64)
    state = {"model": exact.model, "optimizer": exact.optimizer, "progress": {"trail": trail}}
    try:
        info = checkpointer.restore(state, epoch=pair[0], step=pair[1])
    except CkptError as error:
        return str(error)
    return Content(info.step, exact.value(), tuple(trail[: info.step].tolist()))


@contextmanager
def nemesis(schedules: Sequence[Schedule], folder: Path, *, stores: int) -> Iterator[Nemesis]:
    """A run that has begun, and its end."""
    with ExitStack() as ending:
        yield Nemesis(schedules, folder, ending, stores=stores)


def _said(record: Record) -> Opened | Committed | None:
    match record.body:
        case Open(epoch, resume, membership):
            return Opened(
                record.seq,
                epoch,
                (resume.epoch, resume.step) if resume is not None else None,
                (membership.line, membership.number) if membership is not None else None,
            )
        case Commit(snapshot, _, _):
            return Committed(record.seq, record.epoch, (snapshot.epoch, snapshot.step))
    return None


def _pairs(records: list[Opened | Committed]) -> list[Pair]:
    return [one.pair for one in records if isinstance(one, Committed)]
