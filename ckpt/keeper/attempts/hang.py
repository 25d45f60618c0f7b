"""Does a rank still complete steps? Pure.

A step is late when it takes far longer than the job's own steps. The first step (it compiles),
pauses and debuggers are exempt: there a long wait means nothing. Not so where the process itself is
stopped (SIGSTOP): nothing that it could be doing takes time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckpt.ipc.board import TrainerPhase

STEP_TIME_FACTOR = 10.0
"""How many times its longest recent step a job may take for one."""

CHECKS_PER_TIMEOUT = 8
CHECK_S_MIN, CHECK_S_MAX = 0.1, 5.0


LOOK_GAPS_MAX = 2.0
"""How much one gap between two looks may count, in times of the usual one: in a longer one the
watcher itself stood still."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What a watcher saw of all ranks at ``at_s``, and since when (``idle_s``, its own awake time)
    nothing of it has changed.

    ``marks`` by rank: anything that changes with each step. No clock of the watched ones counts: a
    machine that slept, or a group that was frozen, would look like a hang of all.
    """

    at_s: float
    marks: Mapping[int, object]
    idle_s: Mapping[int, float]


def observe(
    before: Observation | None, marks: Mapping[int, object], *, now_s: float, check_s: float
) -> Observation:
    """Look again. Time between two looks counts while both see the same, and LOOK_GAPS_MAX usual
    gaps at most."""
    if before is None:
        return Observation(now_s, marks, dict.fromkeys(marks, 0.0))
    gap_s = min(max(0.0, now_s - before.at_s), LOOK_GAPS_MAX * check_s)
    missing = object()
    idle_s = {
        rank: before.idle_s[rank] + gap_s if before.marks.get(rank, missing) == mark else 0.0
        for rank, mark in marks.items()
    }
    return Observation(now_s, marks, idle_s)


@dataclass(frozen=True, slots=True)
class Pulse:
    """What the board says of one rank, how long it stands still, and whether a debugger holds its
    process.

    ``stopped``: the system keeps the process from running, and nobody but the one who stopped it
    will change that.
    """

    rank: int
    phase: TrainerPhase
    first_step_done: bool
    completed: int
    idle_s: float
    longest_step_s: float
    traced: bool = False
    stopped: bool = False


def timeout_s(pulses: Sequence[Pulse], *, floor_s: float) -> float:
    """How long a step of this job may take: the floor, or more where the job's own steps are
    long."""
    return max(
        floor_s, STEP_TIME_FACTOR * max((pulse.longest_step_s for pulse in pulses), default=0.0)
    )


def hung_ranks(pulses: Sequence[Pulse], *, floor_s: float) -> tuple[int, ...]:
    """The ranks that stand still, those furthest behind first; none where ``floor_s`` is 0.

    Nobody counts while any rank is exempt: the others may be waiting for it, which is no fault of
    theirs. A stopped process is never exempt.
    """
    if not floor_s or not pulses:
        return ()
    limit_s = timeout_s(pulses, floor_s=floor_s)
    training = [pulse for pulse in pulses if pulse.phase is not TrainerPhase.FINISHED]
    halted = [
        pulse for pulse in training if pulse.stopped and not pulse.traced and pulse.idle_s > limit_s
    ]
    if halted:
        return tuple(pulse.rank for pulse in halted)
    if any(
        pulse.phase is not TrainerPhase.TRAINING or not pulse.first_step_done or pulse.traced
        for pulse in training
    ):
        return ()
    late = [pulse for pulse in training if pulse.idle_s > limit_s]
    return tuple(
        pulse.rank for pulse in sorted(late, key=lambda pulse: (pulse.completed, -pulse.idle_s))
    )


def check_interval_s(floor_s: float) -> float:
    """How often to look."""
    return min(CHECK_S_MAX, max(CHECK_S_MIN, floor_s / CHECKS_PER_TIMEOUT))
