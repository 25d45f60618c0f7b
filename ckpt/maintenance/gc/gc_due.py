"""When snapshots are looked through beside a job that trains, and when bytes are deleted. Pure."""

from __future__ import annotations

from dataclasses import dataclass

ROUND_S = 10.0
"""The least time from the end of one round to the next, however often snapshots are committed."""

RESTS = 9.0
"""A round is followed by a rest of so many times its own length, so that stores are asked a tenth of the time at most."""

SWEEPS_PER_GRACE = 24
"""Bytes are deleted so many times in one grace: they stay longer than they must by that part of it at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """What was done so far. Times are monotonic seconds; None: never.

    ``commits``: how many commits the last round that went well has seen. ``began_s``, ``ended_s``: the last round, however it
    went. ``swept_s``: when the last sweep that came to its end was begun.
    """

    commits: int = 0
    began_s: float = 0.0
    ended_s: float | None = None
    swept_s: float | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """Look through the snapshots now, and drop. ``sweep``: delete bytes too."""

    sweep: bool


@dataclass(frozen=True, slots=True)
class Rest:
    """Nothing to do for so many seconds, unless something is committed; None: until something is."""

    seconds: float | None


def next_round(past: Past, now_s: float, *, commits: int, grace_s: float, hurry: bool = False) -> Round | Rest:
    """What to do at ``now_s``, where ``commits`` snapshots were committed so far.

    ``hurry``: the job is over, so that nothing is gained by resting. Nothing is done before the first commit: only then it is
    certain that the job goes on from where it began.
    """
    if commits == 0:
        return Rest(None)
    owed = commits > past.commits
    sweep_s = past.swept_s + sweep_every_s(grace_s) if past.swept_s is not None else now_s
    if hurry:
        # Without a grace what is dropped now can go now; with one it can't, and is for the next run.
        sweep = sweep_s <= now_s or (owed and grace_s <= 0)
        return Round(sweep) if owed or sweep else Rest(None)
    rested_s = now_s if past.ended_s is None else past.ended_s + max(ROUND_S, RESTS * (past.ended_s - past.began_s))
    due_s = max(rested_s, now_s if owed else sweep_s)
    return Rest(due_s - now_s) if due_s > now_s else Round(sweep_s <= now_s)


def sweep_every_s(grace_s: float) -> float:
    """How long after a sweep was begun the next one is due."""
    return max(ROUND_S, grace_s / SWEEPS_PER_GRACE)
