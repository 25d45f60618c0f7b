"""Does what a schedule says to a running job, and undoes it; says what it did to whom, and when."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from kit.machines import Cluster, Machine
from kit.nemesis.clock import Clock
from kit.nemesis.disks import Disk
from kit.nemesis.etcd import Etcd
from kit.nemesis.history import Pause, Silence
from kit.nemesis.schedule import CLOCK_JUMP_S, ON_STORE, Act
from kit.networks import Network

Undo = Callable[[], object]
LIVING_MIN = 2
"""A machine is killed only where so many are left: the job's minimum."""

_STOPS_MAX = 50


class Seen(Protocol):
    """Who is who now."""

    def placed(self) -> Sequence[str]:
        """Machines in the order of their ranks."""
        ...

    def leading(self) -> str:
        """The machine that leads the membership; "" where nobody does."""
        ...


def now_ns() -> int:
    """The clock of all that is noted."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Acts:
    """See the module. ``start``: starts one more machine on a host."""

    def __init__(
        self,
        cluster: Cluster,
        lan: Network,
        etcd: Etcd,
        seen: Seen,
        *,
        hosts: Sequence[int],
        others: Sequence[int],
        clocks: dict[int, Clock],
        disks: Sequence[Disk],
        start: Callable[[int], Machine],
    ) -> None:
        self._cluster = cluster
        self._lan = lan
        self._etcd = etcd
        self._seen = seen
        self._hosts = hosts
        self._others = others
        """Hosts that are no machine's: etcd's."""
        self._clocks = clocks
        self._disks = disks
        """Of each store."""
        self._start = start
        self._on: dict[int, Machine] = {host: start(host) for host in hosts}
        self._in_force: set[tuple[str, int]] = set()
        """Kinds, each on a host; 0: on etcd or a store."""
        self._lost: Counter[tuple[int, int]] = Counter()
        """For how many acts what a host sends to another is lost."""
        self.pauses: list[Pause] = []
        self.silences: list[Silence] = []
        self.killed: set[str] = set()

    def machine(self, name: str) -> Machine | None:
        """The one of that name that lives; None: it doesn't."""
        return next((one for one in self._living if one.name == name), None)

    def start_again(self, hosts: Sequence[int]) -> None:
        """All programs have ended: start new ones on some hosts, in place of all others."""
        self._on = {host: self._start(host) for host in hosts}

    def ends(self) -> dict[str, int]:
        """How the programs that live, or lived to their end, ended."""
        return {one.name: one.process.returncode for one in self._living if one.process is not None}

    @property
    def count(self) -> int:
        """How many machines live."""
        return len(self._living)

    @property
    def _living(self) -> list[Machine]:
        return [one for one in self._on.values() if one.name not in self.killed]

    def do(self, act: Act) -> tuple[str, Undo | None]:
        """Begin it: what was done, in words, and how to undo it. What can't be done now is left
        out, and says so."""
        if act.whom:
            machine = self._whom(act)
            if machine is None:
                return "left out: no such machine now", None
            on = self._host(machine)
        else:
            machine, on = None, 0
        if (act.kind, on) in self._in_force:
            return "left out: it is in force already", None
        if machine is not None:
            words, undo = self._act(act, machine)
        else:
            words, undo = (self._store_act if act.kind in ON_STORE else self._etcd_act)(act)
        if undo is None:
            return words, None
        self._in_force.add((act.kind, on))

        def undone() -> object:
            self._in_force.discard((act.kind, on))
            return undo()

        return words, undone

    # ---- machines

    def _host(self, machine: Machine) -> int:
        return next(host for host, one in self._on.items() if one is machine)

    def _whom(self, act: Act) -> Machine | None:
        placed = self._seen.placed()
        leading = self._seen.leading()
        wanted = {
            "root": placed[:1],
            "placed": placed[1:],
            "standby": [one.name for one in self._living if one.name not in placed],
            "leader": [leading],
        }[act.whom]
        found = [one for name in wanted if (one := self.machine(name)) is not None]
        return found[act.number % len(found)] if found else None

    def _act(self, act: Act, machine: Machine) -> tuple[str, Undo | None]:
        host, name = self._host(machine), machine.name
        match act.kind:
            case "kill-node":
                return self._kill(machine, host)
            case "kill-trainer" | "kill-keeper":
                pid = machine.keeper() if act.kind == "kill-keeper" else trainer_of(machine)
                with contextlib.suppress(ProcessLookupError):
                    if pid:
                        os.kill(pid, signal.SIGKILL)
                        return f"{name} pid={pid}", None
                return f"left out: {name} has none now", None
            case "pause-node" | "pause-keeper" | "pause-trainer":
                return self._pause(machine, act.kind.removeprefix("pause-"))
            case "cut":
                self._lan.pull(host)
                return f"{name} host={host}", self._silence(name, partial(self._lan.plug, host))
            case "deaf" | "mute" | "apart":
                return self._lose(act, host, name)
            case "clock":
                ahead_s = CLOCK_JUMP_S * (1 if act.number % 2 else -1)
                self._clocks[host].set(ahead_s)
                return f"{name} {ahead_s:+d} s", partial(self._clocks[host].set, 0)
        raise ValueError(f"no act. kind={act.kind}")

    def _kill(self, machine: Machine, host: int) -> tuple[str, Undo | None]:
        if len(self._living) <= LIVING_MIN:
            return "left out: too few machines live", None
        self.killed.add(machine.name)
        machine.kill()

        def again() -> str:
            self._on[host] = self._start(host)
            return self._on[host].name

        return f"{machine.name} host={host}", again

    def _pause(self, machine: Machine, what: str) -> tuple[str, Undo | None]:
        from_ns = now_ns()
        stopped: set[int] = set()
        for _ in range(
            _STOPS_MAX
        ):  # until nobody is left who could have started another one meanwhile
            pids = {
                "node": machine.members,
                "keeper": lambda: [machine.keeper()],
                "trainer": lambda: [trainer_of(machine)],
            }
            fresh = {pid for pid in pids[what]() if pid} - stopped
            if not fresh:
                break
            for pid in fresh:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
            stopped |= fresh
        if not stopped:
            return f"left out: {machine.name} has none now", None

        def wake() -> None:
            for pid in sorted(stopped & set(machine.members())):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            self.pauses.append(Pause(machine.name, what, from_ns, now_ns()))

        return f"{machine.name} pids={sorted(stopped)}", wake

    def _lose(self, act: Act, host: int, name: str) -> tuple[str, Undo | None]:
        rest = [other for other in (*self._hosts, *self._others) if other != host]
        if act.kind == "apart":
            machines = [other for other in self._hosts if other != host]
            other = machines[act.number % len(machines)]
            ways = [(host, other), (other, host)]
            words = f"{name} host={host} and host {other}"
        else:
            ways = [(other, host) if act.kind == "deaf" else (host, other) for other in rest]
            words = f"{name} host={host}"
        for way in ways:
            if not self._lost[way]:
                self._lan.lose(*way)
            self._lost[way] += 1

        def undo() -> None:
            for way in ways:
                self._lost[way] -= 1
                if not self._lost[way]:
                    self._lan.deliver(*way)

        return words, undo if act.kind == "apart" else self._silence(name, undo)

    def _silence(self, name: str, undo: Undo) -> Undo:
        """Note that a machine is cut off, from now until it is undone."""
        from_ns = now_ns()

        def undone() -> None:
            self.silences.append(Silence(name, from_ns, now_ns()))
            undo()

        return undone

    # ---- stores

    def _store_act(self, act: Act) -> tuple[str, Undo | None]:
        disk = self._disks[act.number % len(self._disks)]
        match act.kind:
            case "store-stall":
                disk.stall(act.last_s)
                return disk.folder.name, disk.resume
            case "store-full":
                disk.fill()
                return disk.folder.name, disk.free
        raise ValueError(f"no act. kind={act.kind}")

    # ---- etcd

    def _etcd_act(self, act: Act) -> tuple[str, Undo | None]:
        members = self._etcd.members
        one = members[act.number % len(members)]
        match act.kind:
            case "etcd-kill-leader" | "etcd-kill":
                one = self._etcd.leader() if act.kind == "etcd-kill-leader" else one
                one.kill()
                return one.name, partial(self._etcd.start, one)
            case "etcd-freeze":
                one.send(signal.SIGSTOP)
                return one.name, partial(one.send, signal.SIGCONT)
            case "etcd-freeze-all":
                for member in members:
                    member.send(signal.SIGSTOP)
                return "all", lambda: [member.send(signal.SIGCONT) for member in members]
            case "etcd-cut":
                self._lan.pull(one.host)
                return one.name, partial(self._lan.plug, one.host)
            case "etcd-restart-all":
                for member in members:
                    member.kill()
                return "all", lambda: [self._etcd.start(member) for member in members]
        raise ValueError(f"no act. kind={act.kind}")


def trainer_of(machine: Machine) -> int:
    """The process that trains there, or is about to: the supervisor's child that is no keeper; 0
    for none."""
    if machine.process is None:
        return 0
    keeper = machine.keeper()
    for pid in machine.members():
        with contextlib.suppress(OSError):
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
            if parent == machine.process.pid and pid != keeper:
                return pid
    return 0
