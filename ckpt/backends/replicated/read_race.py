"""Whom a read asks next, when it asks a second one beside the first, and what it says in the end.
Pure.

The effect asks, tells what was found, and asks ``decide`` again.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ckpt.backends.replicated.policy import Quorum, ReplicationLimits, backoff_s


class ReadResult(enum.Enum):
    """What one store had."""

    RIGHT = "right"
    WRONG = "wrong bytes"
    SHORT = "ends too early"
    MISSING = "not there"
    SILENT = "no answer"


class ReadFailure(enum.Enum):
    """Why there is nothing to deliver."""

    NOT_FOUND = "not-found"
    DAMAGED = "damaged"
    UNAVAILABLE = "unavailable"


@dataclass(frozen=True, slots=True)
class PendingRead:
    """A question on its way: to whom, when it is late enough to ask another one, when it counts as
    unanswered."""

    late_s: float
    lost_s: float


@dataclass(frozen=True, slots=True)
class ReadRace:
    """One read. ``order``: whom to ask, nearest first; ``usable``: whose circuit is closed;
    ``rounds`` begun."""

    quorum: Quorum
    order: tuple[int, ...]
    usable: frozenset[int]
    asked: Mapping[int, PendingRead]
    found: Mapping[int, ReadResult]
    rounds: int = 1
    again_s: float | None = None


@dataclass(frozen=True, slots=True)
class AskStore:
    """Ask this store now."""

    index: int


@dataclass(frozen=True, slots=True)
class WaitForRead:
    """Wait for an answer until this time, then decide again."""

    until_s: float


@dataclass(frozen=True, slots=True)
class DeliverRead:
    """The bytes of this store are right."""

    index: int


@dataclass(frozen=True, slots=True)
class GiveUpRead:
    """No store has right bytes, and why."""

    failure: ReadFailure


def begin_read(quorum: Quorum, order: tuple[int, ...], usable: frozenset[int]) -> ReadRace:
    """A read that has asked nobody yet."""
    return ReadRace(quorum, order, usable, {}, {})


def with_asked(race: ReadRace, place: int, *, late_s: float, lost_s: float) -> ReadRace:
    """``place`` was asked; the two times are as in Asked."""
    return replace(race, asked={**race.asked, place: PendingRead(late_s, lost_s)})


def with_result(race: ReadRace, place: int, found: ReadResult) -> ReadRace:
    """``place`` answered, or will not."""
    left = {other: when for other, when in race.asked.items() if other != place}
    return replace(race, asked=left, found={**race.found, place: found})


def decide(
    race: ReadRace, now_s: float, *, limits: ReplicationLimits, jitter: float
) -> tuple[ReadRace, AskStore | WaitForRead | DeliverRead | GiveUpRead]:
    """What to do now, and the race as it is then. ``jitter`` is a random number in [0, 1)."""
    if right := [place for place, found in race.found.items() if found is ReadResult.RIGHT]:
        return race, DeliverRead(right[0])
    for place, when in race.asked.items():
        if now_s >= when.lost_s:
            race = with_result(race, place, ReadResult.SILENT)
    missing = {place for place, found in race.found.items() if found is ReadResult.MISSING}
    nowhere = race.quorum.proves_absent(missing) and not _damaged(race)
    fresh = [place for place in race.order if place not in race.asked and place not in race.found]
    if nowhere:
        # A copy beyond the quorum is still looked for, where looking costs little.
        fresh = [place for place in fresh if place in race.usable]
    in_time = [when.late_s for when in race.asked.values() if now_s < when.late_s]
    if fresh and (missing or not in_time):
        return race, AskStore(fresh[0])
    if race.asked and (in_time or not nowhere):
        times = in_time if fresh or nowhere else [when.lost_s for when in race.asked.values()]
        return race, WaitForRead(min(times))
    return _end(race, now_s, pace=limits, jitter=jitter)


def _end(
    race: ReadRace, now_s: float, *, pace: ReplicationLimits, jitter: float
) -> tuple[ReadRace, AskStore | WaitForRead | GiveUpRead]:
    """All who are worth asking have answered or are late."""
    verdict = _verdict(race)
    silent = [place for place in race.order if race.found.get(place) is ReadResult.SILENT]
    if verdict is not ReadFailure.UNAVAILABLE or not silent or race.rounds >= pace.tries_max:
        return race, GiveUpRead(verdict)
    if race.again_s is None:
        again_s = now_s + backoff_s(pace.retry_s_first, pace.retry_s_max, race.rounds, jitter)
        return replace(race, again_s=again_s), WaitForRead(again_s)
    if now_s < race.again_s:
        return race, WaitForRead(race.again_s)
    found = {place: what for place, what in race.found.items() if what is not ReadResult.SILENT}
    race = replace(race, found=found, rounds=race.rounds + 1, again_s=None)
    return race, AskStore(silent[0])


def _verdict(race: ReadRace) -> ReadFailure:
    missing = {place for place, found in race.found.items() if found is ReadResult.MISSING}
    silent = len(race.found) < race.quorum.stores or ReadResult.SILENT in race.found.values()
    if _damaged(race):
        return ReadFailure.UNAVAILABLE if silent else ReadFailure.DAMAGED
    return ReadFailure.NOT_FOUND if race.quorum.proves_absent(missing) else ReadFailure.UNAVAILABLE


def _damaged(race: ReadRace) -> bool:
    return any(found in (ReadResult.WRONG, ReadResult.SHORT) for found in race.found.values())
