"""Whether a rank still completes steps. Pure.

A step is late if it takes far longer than the job's own steps. The first step of an attempt has a
limit of its own, since it may compile: the user's, or far longer than the first steps of earlier
attempts of this launch took on the same nodes. What precedes it, building, has one as well, for
each stretch between two milestones; nothing is learned of it, since a restart may take another way
through it. Pauses and debuggers are exempt: a long wait means nothing there. A stopped process
(SIGSTOP) is not exempt, whatever its phase, because nothing that it does takes time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckpt.values import TrainerPhase

STEP_TIME_FACTOR = 10.0
"""A step may take this many times the longest recent step of the job."""

CHECKS_PER_TIMEOUT = 8
CHECK_S_MIN, CHECK_S_MAX = 0.1, 5.0


LOOK_GAPS_MAX = 2.0
"""The most that the gap between two observations counts, in usual gaps. In a longer one the
observer itself stood still."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What was observed of all ranks at ``at_s``, and for how long (``idle_s``, the observer's own
    awake time) it has not changed.

    ``marks`` by rank: anything that changes with each step. No clock of the observed processes
    counts: after a machine slept, or a group of processes was frozen, all of them would seem to
    hang.
    """

    at_s: float
    marks: Mapping[int, object]
    idle_s: Mapping[int, float]


def observe(
    before: Observation | None, marks: Mapping[int, object], *, now_s: float, check_s: float
) -> Observation:
    """The next observation. The time since the last one counts if both see the same, and at most
    LOOK_GAPS_MAX usual gaps of it."""
    if before is None:
        return Observation(now_s, marks, dict.fromkeys(marks, 0.0))
    # Capped: in a longer gap the observer itself stood still, and the ranks may have as well.
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

    ``stopped``: the process is stopped by a signal, and only another signal lets it run again.
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
    """How long a step of this job may take: the floor, or more if the job's own steps are long."""
    return max(
        floor_s, STEP_TIME_FACTOR * max((pulse.longest_step_s for pulse in pulses), default=0.0)
    )


def start_limit_s(longest_s: float | None, *, floor_s: float, start_s: float) -> float:
    """How long an attempt's first step may take; 0: without limit. ``longest_s``: the longest of
    earlier attempts, which ran the same code on the same nodes; None: it is not known.
    """
    if longest_s is None or not start_s:
        return start_s
    return min(start_s, max(floor_s, STEP_TIME_FACTOR * longest_s))


def first_step_s(pulses: Sequence[Pulse]) -> float | None:
    """How long ranks have been standing in their first step; None: none is in it."""
    waits = [pulse.idle_s for pulse in pulses if _in_first_step(pulse)]
    return max(waits, default=None)


def building_s(pulses: Sequence[Pulse]) -> float | None:
    """How long all ranks that are not training yet have been in the same place; None: none is
    there, or another rank is exempt, for which they may be waiting."""
    if any(_exempt(pulse) for pulse in pulses):
        return None
    return min((pulse.idle_s for pulse in pulses if _builds(pulse)), default=None)


def _builds(pulse: Pulse) -> bool:
    return pulse.phase in (TrainerPhase.STARTING, TrainerPhase.BUILDING)


def _exempt(pulse: Pulse) -> bool:
    return pulse.traced or pulse.phase in (TrainerPhase.PAUSED, TrainerPhase.DEBUGGING)


def _in_first_step(pulse: Pulse) -> bool:
    return pulse.phase is TrainerPhase.TRAINING and not pulse.first_step_done and not pulse.traced


def hung_ranks(
    pulses: Sequence[Pulse], *, floor_s: float, start_s: float = 0.0, build_s: float = 0.0
) -> tuple[int, ...]:
    """The ranks that stand still, the furthest behind first; none if ``floor_s`` is 0. ``start_s``:
    the limit of the first step (0: none); ``build_s``: that of what precedes it.

    While a rank is exempt none is reported: the others may be waiting for it. A stopped process is
    never exempt.
    """
    if not floor_s or not pulses:
        return ()
    limit_s = timeout_s(pulses, floor_s=floor_s)
    training = [pulse for pulse in pulses if pulse.phase is not TrainerPhase.FINISHED]
    # A stopped process first: it holds up all others, which may be exempt or not late yet.
    halted = [
        pulse for pulse in training if pulse.stopped and not pulse.traced and pulse.idle_s > limit_s
    ]
    if halted:
        return tuple(pulse.rank for pulse in halted)
    if any(pulse.phase is not TrainerPhase.TRAINING or pulse.traced for pulse in training):
        waited_s = building_s(training)
        if not build_s or waited_s is None or waited_s <= build_s:
            return ()
        built = [pulse for pulse in training if _builds(pulse)]
        return tuple(pulse.rank for pulse in sorted(built, key=lambda pulse: -pulse.idle_s))
    starting = [pulse for pulse in training if not pulse.first_step_done]
    if starting:
        if not start_s or min(pulse.idle_s for pulse in starting) <= start_s:
            return ()
        return tuple(pulse.rank for pulse in sorted(starting, key=lambda pulse: -pulse.idle_s))
    # The rank furthest behind is the likely cause; the others wait for it in a collective.
    late = [pulse for pulse in training if pulse.idle_s > limit_s]
    return tuple(
        pulse.rank for pulse in sorted(late, key=lambda pulse: (pulse.completed, -pulse.idle_s))
    )


def check_interval_s(floor_s: float) -> float:
    """How often to observe."""
    return min(CHECK_S_MAX, max(CHECK_S_MIN, floor_s / CHECKS_PER_TIMEOUT))
