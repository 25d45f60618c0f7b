"""One recovery, from the failure to the first new step, as a list of phases. Pure.

Each phase begins where the one before ended: ``kill`` (all trainers dead), ``fork`` (the slowest
rank's function entered), ``rendezvous`` (its process group made; absent if there is none),
``build`` (its first track call), ``restore``, ``step`` (the first new step complete). ``detect`` is
the time from the death until the keeper knew of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ckpt.events import Fact
from ckpt.keeper.attempts.events import Failure
from ckpt.values import SnapshotId

POINTS = ("entered", "group", "tracked", "restored", "first-step")
NAMES = {
    "entered": "fork",
    "group": "rendezvous",
    "tracked": "build",
    "restored": "restore",
    "first-step": "step",
}


@dataclass(slots=True)
class Recovery:
    """One recovery in progress. Times are CLOCK_MONOTONIC seconds; ``points``: the milestones of
    each rank, by name."""

    attempt: int
    failure: Failure
    completed: int
    known_s: float
    killed_s: float = 0.0
    resume: SnapshotId | None = None
    how: str = ""
    points: dict[int, dict[str, float]] = field(default_factory=dict)

    def reach(self, rank: int, name: str, at_s: float) -> None:
        """A rank reached a milestone; only the first time counts."""
        if name in POINTS:
            self.points.setdefault(rank, {}).setdefault(name, at_s)

    def done(self, ranks: int) -> bool:
        """Whether every rank has completed a step."""
        return sum("first-step" in points for points in self.points.values()) == ranks

    @property
    def steps_lost(self) -> int:
        """Completed steps that must be done again."""
        resumed = self.resume.step if self.resume is not None else 0
        return max(0, self.completed - resumed)

    def phases(self) -> dict[str, float]:
        """Seconds of each phase, in order, without phases that did not occur."""
        began_s = min(self.failure.at_s, self.known_s)
        found = {"detect": self.known_s - began_s, "kill": max(0.0, self.killed_s - self.known_s)}
        last_s = self.killed_s
        for name in POINTS:
            times = [points[name] for points in self.points.values() if name in points]
            if times:
                found[NAMES[name]] = max(0.0, max(times) - last_s)
                last_s = max(last_s, *times)
        return found

    @property
    def seconds(self) -> float:
        """From the failure to the first new step."""
        return sum(self.phases().values())

    def facts(self) -> Mapping[str, Fact]:
        """For events and tools."""
        return {
            "attempt": self.attempt,
            "rank": self.failure.rank,
            "why": self.failure.text,
            "how": self.how,
            "completed": self.completed,
            "resumed": self.resume.step if self.resume is not None else 0,
            "steps_lost": self.steps_lost,
            "seconds": round(self.seconds, 4),
            **{f"{name}_s": round(seconds, 4) for name, seconds in self.phases().items()},
        }

    def line(self) -> str:
        """For people."""
        phases = ", ".join(f"{name} {seconds:.3f}" for name, seconds in self.phases().items())
        at = f"step {self.resume.step}" if self.resume is not None else "the start"
        return (
            f"recovered in {self.seconds:.3f} s: {self.failure.text} with {max(0, self.completed)} "
            f"steps complete; all ranks went on from {at} ({phases}); {self.steps_lost} steps "
            "redone"
        )
