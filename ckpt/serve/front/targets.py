"""The replicas as one front, or one client, knows them: who serves, how they answer, what they do.

No input or output: it is told what the group's records say and what became of requests, and is
asked which replica gets the next one. Used in one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from ckpt.serve.front.health import (
    HealthSignal,
    ReplicaHealth,
    after,
    suspects,
    usable_replicas,
)
from ckpt.serve.front.policies import Policy, ReplicaLoad
from ckpt.serve.group.records import GroupView, ReplicaRecord

SMOOTHING = 0.2
"""The weight of the newest answer in a replica's rate."""


class _Cancellable(Protocol):
    def cancel(self) -> object: ...


@dataclass(slots=True, eq=False)
class ReplicaTarget:
    """One replica. ``rate``: answers per second, as observed; 0: none yet. ``attempts``: tries that
    are under way and may be repeated elsewhere. ``present``: whether the group has its record."""

    record: ReplicaRecord
    serving: bool = False
    present: bool = True
    health: ReplicaHealth = field(default_factory=ReplicaHealth)
    outstanding: int = 0
    outstanding_bytes: int = 0
    rate: float = 0.0
    attempts: set[_Cancellable] = field(default_factory=set)

    @property
    def name(self) -> str:
        """Its name in the group."""
        return self.record.name

    def begun(self, size_bytes: int) -> int:
        """Count a request that is sent to it; how many are outstanding with it."""
        self.outstanding += 1
        self.outstanding_bytes += size_bytes
        return self.outstanding

    def ended(self, size_bytes: int) -> None:
        """Count that as over."""
        self.outstanding -= 1
        self.outstanding_bytes -= size_bytes

    def took(self, seconds: float, outstanding: int) -> None:
        """Learn from an answer that took so long with so many outstanding: by Little's law the
        replica answered ``outstanding / seconds`` in a second."""
        rate = outstanding / max(seconds, 1e-6)
        self.rate = rate if not self.rate else self.rate + SMOOTHING * (rate - self.rate)


class ReplicaTargets:
    """All replicas of a group. ``clock``: monotonic seconds; ``draw``: a random number below 1."""

    def __init__(
        self, policy: Policy, *, clock: Callable[[], float], draw: Callable[[], float]
    ) -> None:
        self._policy = policy
        self._clock = clock
        self._draw = draw
        self._targets: dict[str, ReplicaTarget] = {}
        self._turn = 0
        self.promotions = 0
        """How often a replica came to serve in the place of another one."""
        self.suspects: frozenset[str] = frozenset()
        """The replicas that others are to replace. May be read in any thread."""

    def __iter__(self) -> Iterator[ReplicaTarget]:
        """All replicas that the group has, or that requests are outstanding with."""
        return iter(self._targets.values())

    def see(self, view: GroupView) -> None:
        """Take in the group's records.

        If they name nobody who serves, those who served last are asked on: a service that lost its
        data, or leases that ran out while it was away, say nothing about replicas that answer.
        """
        serving = {replica.name for replica in view.serving}
        served_before = {target.name for target in self._targets.values() if target.serving}
        for name, record in view.replicas.items():
            target = self._targets.get(name)
            if target is None:
                target = self._targets[name] = ReplicaTarget(record)
            if target.record.address != record.address:
                target.health, target.rate = ReplicaHealth(), 0.0
            target.record, target.present = record, True
        for name, target in list(self._targets.items()):
            target.present = name in view.replicas
            if serving:
                target.serving = name in serving
            if not target.present and not target.serving and not target.outstanding:
                del self._targets[name]
        if serving and served_before - serving:
            self.promotions += len(serving - served_before)

    def signal(self, target: ReplicaTarget, signal: HealthSignal) -> None:
        """Learn what became of a request or a probe.

        Of a replica that is dead, the tries that may be repeated are cancelled and go elsewhere:
        when it dies, and at each further probe, since it is tried again if all are dead.
        """
        before = target.health
        target.health = after(before, signal, now_s=self._clock())
        if target.health.dead and (signal == "probe-failed" or not before.dead):
            for attempt in list(target.attempts):
                attempt.cancel()
        if target.health != before:
            self.look_at_health()

    def look_at_health(self) -> None:
        """Bring ``suspects`` up to date: ejections end by time alone."""
        present = {
            target.name: target.health for target in self._targets.values() if target.present
        }
        self.suspects = suspects(present, now_s=self._clock())

    def usable(self, generation: str | None = None) -> list[ReplicaTarget]:
        """The replicas that may get the next request, of those that have ``generation``."""
        able = {
            target.name: target.health
            for target in self._targets.values()
            if target.serving and has_generation(target.record, generation)
        }
        return [self._targets[name] for name in usable_replicas(able, now_s=self._clock())]

    def generations(self) -> list[str]:
        """The generations that serving replicas have in memory."""
        serving = [target.record for target in self._targets.values() if target.serving]
        return sorted({name for record in serving for name in record.kept})

    def choose(self, able: Collection[ReplicaTarget]) -> ReplicaTarget:
        """Which of these gets the next request, by the policy."""
        targets = list(able)
        turn, self._turn = self._turn, self._turn + 1
        return targets[self._policy(self.loads(targets), turn, self._draw())]

    def loads(self, targets: Collection[ReplicaTarget]) -> list[ReplicaLoad]:
        """What policies decide by. A replica without an answer yet has the others' mean rate."""
        rates = [target.rate for target in targets if target.rate]
        usual = sum(rates) / len(rates) if rates else 0.0
        return [
            ReplicaLoad(
                target.name,
                target.outstanding,
                target.outstanding_bytes,
                # Nobody has answered yet: nothing says that anybody would wait.
                target.rate or usual or 1e9,
            )
            for target in targets
        ]

    def paths(self) -> frozenset[str]:
        """The paths whose requests may be repeated, as all serving replicas declare them."""
        declared = [
            set(target.record.repeatable) for target in self._targets.values() if target.serving
        ]
        return frozenset(set.intersection(*declared)) if declared else frozenset()


def has_generation(record: ReplicaRecord, generation: str | None) -> bool:
    """Whether a replica can compute with that generation; None: with the one that it serves."""
    return generation is None or generation == record.generation or generation in record.kept
