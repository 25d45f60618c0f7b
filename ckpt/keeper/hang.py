"""Does a rank still complete steps? Pure.

A step is late when it takes far longer than the job's own steps. The first step (it compiles), pauses and debuggers are
exempt: there a long wait means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ckpt.link.board import Phase

PATIENCE = 10.0
"""How many times its longest recent step a job may take for one."""

CHECKS_PER_TIMEOUT = 8
CHECK_S_MIN, CHECK_S_MAX = 0.1, 5.0


@dataclass(frozen=True, slots=True)
class Pulse:
    """What the board says of one rank, and whether a debugger holds its process."""

    rank: int
    phase: Phase
    first_step_done: bool
    completed: int
    idle_s: float
    longest_step_s: float
    traced: bool = False


def timeout_s(pulses: Sequence[Pulse], *, floor_s: float) -> float:
    """How long a step of this job may take: the floor, or more where the job's own steps are long."""
    return max(floor_s, PATIENCE * max((pulse.longest_step_s for pulse in pulses), default=0.0))


def hung(pulses: Sequence[Pulse], *, floor_s: float) -> tuple[int, ...]:
    """The ranks that stand still, those furthest behind first; none where ``floor_s`` is 0.

    Nobody counts while any rank is exempt: the others may be waiting for it, which is no fault of theirs.
    """
    if not floor_s or not pulses:
        return ()
    limit_s = timeout_s(pulses, floor_s=floor_s)
    training = [pulse for pulse in pulses if pulse.phase is not Phase.FINISHED]
    if any(pulse.phase is not Phase.TRAINING or not pulse.first_step_done or pulse.traced for pulse in training):
        return ()
    late = [pulse for pulse in training if pulse.idle_s > limit_s]
    return tuple(pulse.rank for pulse in sorted(late, key=lambda pulse: (pulse.completed, -pulse.idle_s)))


def check_s(floor_s: float) -> float:
    """How often to look."""
    return min(CHECK_S_MAX, max(CHECK_S_MIN, floor_s / CHECKS_PER_TIMEOUT))
