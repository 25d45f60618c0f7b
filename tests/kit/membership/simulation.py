"""A job under faults, from one seed: the real decisions, transactions and lease arithmetic over a
service that loses messages.

With every other seed each host has a landlord besides, which offers its lease for a while; then
nodes live under that.

Each node is two tasks, as two threads would be: one keeps its lease alive, one looks, leads and
decides. A task is stopped in the middle of a call by running others first; so a pause, a lost
answer and a request that lands late happen anywhere.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from ckpt.cluster.membership import transactions as names
from ckpt.cluster.membership.decide import (
    MembershipOptions,
    NewEpoch,
    WaitTimers,
    decide,
    update_timers,
)
from ckpt.cluster.membership.leases import LeaseState
from ckpt.cluster.membership.member import KeyspaceMembership
from ckpt.cluster.membership.outcomes import Leading, NotPublished, Published
from ckpt.cluster.membership.records import EpochRecord, NodeInfo, View, decode_epoch, encode_epoch
from ckpt.errors import CkptError, FencedError, UnavailableError
from ckpt.keyspace.base import Grant, Keys, Put, Transaction, TransactionResult
from kit.membership.memory_keyspace import MemoryServer

T = TypeVar("T")

CALL_S = 0.4
DEPTH_MAX = 5
FAULTS_S = 30.0
SETTLE_S = 20.0


class Death(BaseException):
    """The process was killed while it waited for an answer."""


class Service(MemoryServer):
    """The service, which checks at each change what must hold."""

    def __init__(self, world: MembershipSimulation) -> None:
        super().__init__(lambda: world.now_s)
        self._world = world
        self.epochs: list[EpochRecord] = []
        self.on_put = self._seen

    def expire(self) -> None:
        ended = [lease_id for lease_id, (_, end_s) in self.leases.items() if end_s <= self.clock()]
        for process in self._world.processes:
            own = self.keys.get(names.node_key(process.node))
            if own is not None and own.lease_id in ended:
                standing = process.member.lease_status()
                assert standing.state is not LeaseState.VALID, (
                    f"a lease expired while its holder acts: {process} {standing}"
                )
        super().expire()

    def _seen(self, put: Put) -> None:
        if put.key == names.EPOCH:
            record = decode_epoch(put.value)
            newest = self.epochs[-1].number if self.epochs else 0
            assert record.number > newest, "an epoch does not exceed the one before"
            assert self.keys[names.LEADER].value == record.leader.encode(), (
                "somebody published who does not lead"
            )
            assert names.node_key(record.leader) in self.keys, "somebody published who is no member"
            self.epochs.append(record)


@dataclass
class Landlord:
    """A lease of another job's node on the same host: others may live under it while it is
    offered."""

    lease_id: int = 0
    offered: bool = False
    lives: bool = False

    def tick(self, world: MembershipSimulation) -> None:
        """Come, go in good order, or hang; else renew."""
        fate = world.lodging_dice.random()
        if not self.lives:
            if world.faulty and fate < 0.3:
                self.lease_id, self.offered, self.lives = (
                    world.lodging_dice.getrandbits(60) + 1,
                    True,
                    True,
                )
                world.service.grant(self.lease_id, world.ttl_s)
        elif not world.faulty or fate < 0.05:
            world.service.renew(self.lease_id)
            self.offered = self.lives = False
        elif fate < 0.1:
            self.lives = False  # what it said goes with its lease
        else:
            world.service.renew(self.lease_id)
        self.offered = self.offered and self.lease_id in world.service.leases


@dataclass(eq=False)
class Process:
    """One start of one node."""

    world: MembershipSimulation
    node: str
    slots: int
    offset_s: float
    rate: float
    member: KeyspaceMembership = field(init=False)
    noticed: WaitTimers = field(default_factory=WaitTimers)
    lease_id: int = 0
    alive: bool = True
    paused_until_s: float = 0.0
    cut_until_s: float = 0.0

    def __post_init__(self) -> None:
        keyspace = SimKeyspace(self.world, self)
        self.member = KeyspaceMembership(
            keyspace, "j", ttl_s=self.world.ttl_s, clock=self.clock, threads=False
        )

    def clock(self) -> float:
        """This machine's clock: it began at another time and runs at another speed."""
        return self.offset_s + self.world.now_s * self.rate

    def join(self) -> None:
        try:
            ticket = self.member.join(
                NodeInfo(node=self.node, host=self.node.split("-")[0], slots=self.slots)
            )
        except CkptError:
            self.world.restart(self, soon=True)
            return
        self.lease_id = ticket.lease_id
        self.world.at(self.world.now_s, self, self.keep)
        self.world.at(self.world.now_s, self, self.control)

    def keep(self) -> None:
        """One keepalive, as the thread does it."""
        if self.member.lease_status().state is LeaseState.LOST:
            self.world.restart(self, soon=True)
            return
        self.member.keepalive.round()
        wait_s = (self.member.keepalive.next_keepalive_s - self.clock()) / self.rate
        self.world.at(self.world.now_s + max(0.01, wait_s), self, self.keep)

    def control(self) -> None:
        """Look, lead, decide; suspect."""
        dice = self.world.dice
        try:
            view = self.member.view()
            if self.member.lead(view) == Leading():
                self._lead()
            self._suspect(view)
            self._lodge()
        except (UnavailableError, FencedError):
            self.noticed = WaitTimers()
        self.world.at(self.world.now_s + dice.uniform(0.2, 0.8), self, self.control)

    def _lodge(self) -> None:
        """Live under the landlord's lease while that is offered."""
        landlord = self.world.landlords.get(self.node.split("-")[0])
        if landlord is None:
            return
        if landlord.offered:
            self.member.borrow_lease(landlord.lease_id)
        else:
            self.member.use_own_lease()

    def _lead(self) -> None:
        view = self.member.view()
        if view.leader is None or view.leader.node != self.node:
            return
        job = self.world.options(self.world.dice)
        self.noticed = update_timers(self.noticed, view, job, self.clock())
        decision = decide(view, self.noticed, job, self.clock())
        if not isinstance(decision, NewEpoch):
            return
        done = self.member.publish(decision.record, view, remove=decision.remove)
        bytes_held = [encode_epoch(record) for record in self.world.service.epochs]
        data = encode_epoch(decision.record)
        assert not isinstance(done, Published) or data in bytes_held, (
            "published, but it is not there"
        )
        assert not isinstance(done, NotPublished) or data not in bytes_held, "lost, but it is there"

    def _suspect(self, view: View) -> None:
        dice = self.world.dice
        for member in view.members:
            process = self.world.of(member.node)
            silent = (
                process is None or not process.alive or process.paused_until_s > self.world.now_s
            )
            if member.node != self.node and dice.random() < (0.5 if silent else self.world.slander):
                self.member.suspect(member.node, "silent" if silent else "slander")
        for word in view.suspicions:
            process = self.world.of(word.node)
            if (
                word.by == self.node
                and process is not None
                and process.alive
                and dice.random() < 0.5
            ):
                self.member.suspect(word.node, None)


class SimKeyspace:
    """A process's way to the service."""

    def __init__(self, world: MembershipSimulation, process: Process) -> None:
        self._world = world
        self._process = process

    def transact(self, transaction: Transaction) -> TransactionResult:
        return self._call(lambda: self._world.service.transact(transaction))

    def grant(self, lease_id: int, ttl_s: float) -> Grant:
        return self._call(lambda: self._world.service.grant(lease_id, ttl_s))

    def renew(self, lease_id: int) -> float:
        return self._call(lambda: self._world.service.renew(lease_id))

    def revoke(self, lease_id: int) -> None:
        self._call(lambda: self._world.service.revoke(lease_id))

    def wait(self, ranges: tuple[Keys, ...], after: int, *, timeout_s: float) -> bool:
        raise NotImplementedError

    def close(self) -> None:
        pass

    def _call(self, do: Callable[[], T]) -> T:
        world, process = self._world, self._process
        began_s = world.now_s
        world.pass_time(process, world.dice.expovariate(100.0))
        fate = world.dice.random() if world.faulty else 1.0
        if world.now_s < process.cut_until_s or fate < 0.04:
            world.pass_time(process, began_s + CALL_S - world.now_s)
            raise UnavailableError("the request was lost")
        if fate < 0.06:
            world.late(world.now_s + world.dice.expovariate(0.3), do)
            world.pass_time(process, began_s + CALL_S - world.now_s)
            raise UnavailableError("the request is still on its way")
        done = do()
        if fate < 0.10:
            world.pass_time(process, began_s + CALL_S - world.now_s)
            raise UnavailableError("the answer was lost")
        world.pass_time(process, world.dice.expovariate(100.0))
        return done


class MembershipSimulation:
    """One run."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.now_s = 0.0
        self.ttl_s = self.dice.choice([2.0, 3.0, 5.0])
        self.nodes = self.dice.randint(2, 5)
        self.slander = self.dice.choice([0.0, 0.0, 0.02, 0.1])
        self.low = self.dice.randint(1, self.nodes)
        self.high = self.dice.randint(self.low, self.nodes)
        self.faulty = True
        self.service = Service(self)
        self.processes: list[Process] = []
        self.lodging_dice = random.Random(f"landlord {seed}")
        self.landlords = (
            {f"h{number}": Landlord() for number in range(self.nodes)} if seed % 2 else {}
        )
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._starts = itertools.count()
        self._depth = 0
        self._late_until_s = 0.0

    def options(self, dice: random.Random) -> MembershipOptions:
        grows = (
            dice.random() < 0.1 and self.now_s < FAULTS_S + SETTLE_S / 2
        )  # or it may be growing when all is checked
        return MembershipOptions(
            nodes_min=self.low,
            nodes_max=self.high,
            last_call_s=1.0,
            shrink_wait_s=0.5,
            may_grow=grows,
        )

    def of(self, node: str) -> Process | None:
        return next((process for process in self.processes if process.node == node), None)

    def run(self) -> None:
        for number in range(self.nodes):
            self._start(f"h{number}")
        self._push(self.dice.uniform(1, 3), self._fault)
        for landlord in self.landlords.values():
            self._tick(landlord)
        self._until(FAULTS_S)
        self.faulty, self.slander = False, 0.0
        for process in self.processes:
            process.cut_until_s = 0.0
            process.paused_until_s = min(process.paused_until_s, self.now_s)
        # A grant that was long on its way leaves a lease that its node no longer knows of: it runs
        # out by itself.
        self._until(max(self.now_s + SETTLE_S, self._late_until_s + self.ttl_s + 1.0))
        self._check_progress()

    def at(self, when_s: float, process: Process, task: Callable[[], None]) -> None:
        """Let a process do something at a time, if it still lives and is not paused then."""

        def go() -> None:
            if not process.alive:
                return
            if process.paused_until_s > self.now_s:
                self._push(process.paused_until_s, go)
                return
            try:
                task()
            except Death:
                assert not process.alive

        self._push(when_s, go)

    def late(self, when_s: float, do: Callable[[], object]) -> None:
        """Let a request land at a time; nobody hears the answer."""

        def land() -> None:
            try:
                do()
            except CkptError:
                return

        self._late_until_s = max(self._late_until_s, when_s)
        self._push(when_s, land)

    def pass_time(self, process: Process, seconds: float) -> None:
        """Let time pass for a process that waits; others go on, and it may be paused or killed
        meanwhile."""
        until_s = self.now_s + max(0.0, seconds)
        self._run_events(until_s)
        while process.alive and process.paused_until_s > self.now_s:
            self._run_events(process.paused_until_s)
        if not process.alive:
            raise Death

    def restart(self, process: Process, *, soon: bool) -> None:
        """End a process and start its node anew."""
        if process.alive:
            process.alive = False
            if (landlord := self.landlords.get(process.node.split("-")[0])) is not None:
                landlord.lives = landlord.offered = False  # the whole host is gone
            self._push(
                self.now_s + (0.1 if soon else self.dice.uniform(0.1, 8.0)),
                lambda: self._start(process.node.split("-")[0]),
            )

    def _start(self, host: str) -> None:
        process = Process(
            self,
            f"{host}-{next(self._starts)}",
            2,
            self.dice.uniform(0, 1e6),
            self.dice.uniform(0.98, 1.02),
        )
        self.processes.append(process)
        self.at(self.now_s, process, process.join)

    def _push(self, when_s: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._order), do))

    def _run_events(self, until_s: float) -> None:
        self._depth += 1
        while self._events and self._events[0][0] <= until_s and self._depth <= DEPTH_MAX:
            when_s, _, do = heapq.heappop(self._events)
            self.now_s = max(self.now_s, when_s)
            self.service.expire()
            do()
        self._depth -= 1
        self.now_s = max(self.now_s, until_s)

    def _until(self, end_s: float) -> None:
        while self._events and self._events[0][0] <= end_s:
            self._run_events(min(end_s, self._events[0][0]))
        self.now_s = max(self.now_s, end_s)

    def _tick(self, landlord: Landlord) -> None:
        landlord.tick(self)
        self._push(self.now_s + self.ttl_s / 3, lambda: self._tick(landlord))

    def _fault(self) -> None:
        if not self.faulty:
            return
        alive = [process for process in self.processes if process.alive]
        if alive:
            process = self.dice.choice(alive)
            span_s = self.dice.choice([0.5, 0.5, 1.5, 3.0]) * self.ttl_s
            match self.dice.choice(["crash", "pause", "pause", "cut", "cut", "cut many", "leave"]):
                case "crash":
                    self.restart(process, soon=False)
                case "pause":
                    process.paused_until_s = self.now_s + span_s
                case "cut":
                    process.cut_until_s = self.now_s + span_s
                case "cut many":
                    for one in self.dice.sample(alive, self.dice.randint(1, len(alive))):
                        one.cut_until_s = self.now_s + span_s
                case "leave":
                    self._leave(process)
        self._push(self.now_s + self.dice.uniform(0.5, 4.0), self._fault)

    def _leave(self, process: Process) -> None:
        with contextlib.suppress(UnavailableError, Death):
            process.member.leave()
        self.restart(process, soon=False)

    def _check_progress(self) -> None:
        alive = [process for process in self.processes if process.alive]
        assert len(alive) == self.nodes
        newest = self.service.epochs[-1]
        assert {place.node for place in newest.places} <= {process.node for process in alive}, (
            "a dead node holds ranks"
        )
        assert self.low <= len(newest.places) <= self.high
        assert self.service.keys[names.LEADER].value.decode() in {process.node for process in alive}
        assert {key for key in self.service.keys if key.startswith(names.NODES)} == {
            names.node_key(process.node) for process in alive
        }
        own = {process.node: process.member._member()[0].lease_id for process in alive}
        assert {
            one.node: self.service.keys[names.node_key(one.node)].lease_id for one in alive
        } == own
        assert set(self.service.leases) == set(own.values()), "a lease is left"
        for process in alive:
            standing = process.member.lease_status()
            assert standing.state is LeaseState.VALID
            assert standing.epoch == newest.number
            assert standing.placed == (process.node in newest.ranks)
