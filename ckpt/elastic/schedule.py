"""When snapshots are due. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ckpt.errors import UsageError

AUTO_S = 30.0
"""The meaning of ``every="auto"``, until the interval is measured from cost and failure rate."""

_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True, slots=True)
class EverySteps:
    """Due at each boundary whose number of completed steps is a multiple of ``steps``."""

    steps: int


@dataclass(frozen=True, slots=True)
class EverySeconds:
    """Due when ``seconds`` have passed since the last one, by rank 0's monotonic clock."""

    seconds: float


Schedule = EverySteps | EverySeconds


def parse_duration(text: str, *, name: str) -> float:
    """Seconds in ``"30s"``, ``"500ms"``, ``"5m"``, ``"2h"`` or ``"1d"``.

    Raises UsageError naming ``name`` and the forms.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|min|m|h|d)\s*", text)
    if not match or float(match[1]) <= 0:
        raise UsageError(
            f"not a duration. {name}={text!r}; write a number above 0 and ms, s, m, h or d, as in "
            "'30s'"
        )
    return float(match[1]) * _UNITS_S[match[2]]


def parse_every(every: int | str) -> Schedule:
    """The schedule of a user's ``every=``: steps (int), a duration, or ``"auto"``.

    Raises UsageError otherwise.
    """
    if isinstance(every, bool) or not isinstance(every, (int, str)):
        raise UsageError(
            f"every is a number of steps or a duration. every={every!r}; write 50, '30s' or 'auto'"
        )
    if isinstance(every, int):
        if every < 1:
            raise UsageError(f"every counts steps from 1 on. every={every}")
        return EverySteps(every)
    return EverySeconds(AUTO_S if every == "auto" else parse_duration(every, name="every"))


def is_due(schedule: Schedule, completed: int, *, since: int | None = None) -> bool:
    """Whether a snapshot is due at this boundary by the schedule alone, so that every rank knows
    it.

    ``since`` is the previous boundary (default: one step before): a loop may count several steps
    at once.
    """
    if not isinstance(schedule, EverySteps):
        return False
    before = completed - 1 if since is None else since
    return completed // schedule.steps > max(0, before) // schedule.steps


def next_due(schedule: Schedule, completed: int) -> int | None:
    """The next boundary after ``completed`` that is due so; None for schedules by time."""
    if not isinstance(schedule, EverySteps):
        return None
    return (completed // schedule.steps + 1) * schedule.steps
