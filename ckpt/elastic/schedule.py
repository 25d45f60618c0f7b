"""When snapshots are due. Pure."""

from __future__ import annotations

import math
import re
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Final

from ckpt.errors import UsageError

AUTO: Final = "auto"
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
    return EverySeconds(AUTO_S if every == AUTO else parse_duration(every, name="every"))


def parse_memory_every(every: int | str) -> int | None:
    """The boundaries between two copies in memory; None for ``"auto"``.

    Raises UsageError for anything else.
    """
    if every == AUTO:
        return None
    if isinstance(every, bool) or not isinstance(every, int) or every < 0:
        raise UsageError(
            f"memory_every counts boundaries. memory_every={every!r}; write 1, 0 for none, or "
            "'auto'"
        )
    return every


def capture_rule(schedule: Schedule, memory_every: int | None) -> str:
    """What each rank decides by itself about when state is captured, as ``name=value`` words: it
    must be equal on all ranks.

    Rank 0 alone decides when a duration is over, and how many boundaries lie between two copies in
    memory; so these are not told apart.
    """
    every = str(schedule.steps) if isinstance(schedule, EverySteps) else "seconds"
    return f"every={every} memory_every={'0' if memory_every == 0 else 'some'}"


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


# ---- how often state is copied into memory, so that it costs little

COPY_SHARE = 0.015
COPY_SHARE_MIN, COPY_SHARE_MAX = 0.01, 0.02
"""What copies may cost of the steps' time: the aim, and what the interval is left alone between."""

COPIES_MEASURED = 5
"""The median of that many copies counts, and of the steps between them."""

COPIES_BEFORE_CHANGE = 3
"""Copies that are measured before the interval changes, and then anew: those of the first steps
touch fresh memory."""


INTERVAL_GROWTH_MAX = 8
"""How much longer the interval becomes at once: a longer one is measured again only after so many
more steps."""


class MemoryPace:
    """How many boundaries lie between two copies in memory (``every``), measured while training
    runs: so many that copies cost about COPY_SHARE of the steps' time.

    A step is timed from the end of one copy to the begin of the next, when devices are done with
    what was queued.
    """

    def __init__(self) -> None:
        self.every = 1
        self.copy_s = self.step_s = 0.0
        """The medians from which ``every`` follows, in seconds."""
        self._copies: deque[float] = deque(maxlen=COPIES_MEASURED)
        self._steps: deque[float] = deque(maxlen=COPIES_MEASURED)
        self._last: tuple[int, float] | None = None

    def copied(self, completed: int, *, began_s: float, ended_s: float) -> bool:
        """State was copied at this boundary; returns whether ``every`` has changed."""
        last, self._last = self._last, (completed, ended_s)
        self._copies.append(ended_s - began_s)
        if last is not None and completed > last[0]:
            self._steps.append((began_s - last[1]) / (completed - last[0]))
        if len(self._copies) < COPIES_BEFORE_CHANGE or not self._steps:
            return False
        self.copy_s, self.step_s = statistics.median(self._copies), statistics.median(self._steps)
        share = self.copy_s / max(self.step_s * self.every, 1e-9)
        if share <= COPY_SHARE_MAX and (share >= COPY_SHARE_MIN or self.every == 1):
            return False
        before = self.every
        wanted = math.ceil(self.copy_s / max(COPY_SHARE * self.step_s, 1e-9))
        self.every = max(1, min(wanted, self.every * INTERVAL_GROWTH_MAX))
        if self.every == before:
            return False
        self._copies.clear()
        self._steps.clear()
        return True

    def interrupted(self) -> None:
        """Something else than steps took place: the time until the next copy counts for nothing."""
        self._last = None
