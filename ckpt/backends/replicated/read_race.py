"""Whom a read asks next, when it asks a second one beside the first, and what it says in the end. Pure.

The effect asks, tells what was found, and asks ``decide`` again.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ckpt.backends.replicated.policy import Pace, Quorum, backoff_s


class Found(enum.Enum):
    """What one store had."""

    RIGHT = "right"
    WRONG = "wrong bytes"
    SHORT = "ends too early"
    MISSING = "not there"
    SILENT = "no answer"


class Verdict(enum.Enum):
    """Why there is nothing to deliver."""

    NOT_FOUND = "not-found"
    DAMAGED = "damaged"
    UNAVAILABLE = "unavailable"


@dataclass(frozen=True, slots=True)
class Asked:
    """A question on its way: to whom, when it is late enough to ask another one, when it counts as unanswered."""

    late_s: float
    lost_s: float


@dataclass(frozen=True, slots=True)
class ReadRace:
    """One read. ``order``: whom to ask, nearest first; ``usable``: whose circuit is closed; ``rounds`` begun."""

    quorum: Quorum
    order: tuple[int, ...]
    usable: frozenset[int]
    asked: Mapping[int, Asked]
    found: Mapping[int, Found]
    rounds: int = 1
    again_s: float | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask this store now."""

    place: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait for an answer until this time, then decide again."""

    until_s: float


@dataclass(frozen=True, slots=True)
class Deliver:
    """The bytes of this store are right."""

    place: int


@dataclass(frozen=True, slots=True)
class Lost:
    """No store has right bytes, and why."""

    verdict: Verdict


def begin(quorum: Quorum, order: tuple[int, ...], usable: frozenset[int]) -> ReadRace:
    """A read that has asked nobody yet."""
    return ReadRace(quorum, order, usable, {}, {})


def asked(race: ReadRace, place: int, *, late_s: float, lost_s: float) -> ReadRace:
    """``place`` was asked; the two times are as in Asked."""
    return replace(race, asked={**race.asked, place: Asked(late_s, lost_s)})


def heard(race: ReadRace, place: int, found: Found) -> ReadRace:
    """``place`` answered, or will not."""
    left = {other: when for other, when in race.asked.items() if other != place}
    return replace(race, asked=left, found={**race.found, place: found})


def decide(race: ReadRace, now_s: float, *, pace: Pace, jitter: float) -> tuple[ReadRace, Ask | Wait | Deliver | Lost]:
    """What to do now, and the race as it is then. ``jitter`` is a random number in [0, 1)."""
    if right := [place for place, found in race.found.items() if found is Found.RIGHT]:
        return race, Deliver(right[0])
    for place, when in race.asked.items():
        if now_s >= when.lost_s:
            race = heard(race, place, Found.SILENT)
    missing = {place for place, found in race.found.items() if found is Found.MISSING}
    nowhere = race.quorum.absent(missing) and not _damaged(race)
    fresh = [place for place in race.order if place not in race.asked and place not in race.found]
    if nowhere:
        # A copy beyond the quorum is still looked for, where looking costs little.
        fresh = [place for place in fresh if place in race.usable]
    in_time = [when.late_s for when in race.asked.values() if now_s < when.late_s]
    if fresh and (missing or not in_time):
        return race, Ask(fresh[0])
    if race.asked and (in_time or not nowhere):
        times = in_time if fresh or nowhere else [when.lost_s for when in race.asked.values()]
        return race, Wait(min(times))
    return _end(race, now_s, pace=pace, jitter=jitter)


def _end(race: ReadRace, now_s: float, *, pace: Pace, jitter: float) -> tuple[ReadRace, Ask | Wait | Lost]:
    """All who are worth asking have answered or are late."""
    verdict = _verdict(race)
    silent = [place for place in race.order if race.found.get(place) is Found.SILENT]
    if verdict is not Verdict.UNAVAILABLE or not silent or race.rounds >= pace.tries_max:
        return race, Lost(verdict)
    if race.again_s is None:
        again_s = now_s + backoff_s(pace.retry_s_first, pace.retry_s_max, race.rounds, jitter)
        return replace(race, again_s=again_s), Wait(again_s)
    if now_s < race.again_s:
        return race, Wait(race.again_s)
    found = {place: what for place, what in race.found.items() if what is not Found.SILENT}
    race = replace(race, found=found, rounds=race.rounds + 1, again_s=None)
    return race, Ask(silent[0])


def _verdict(race: ReadRace) -> Verdict:
    missing = {place for place, found in race.found.items() if found is Found.MISSING}
    silent = len(race.found) < race.quorum.stores or Found.SILENT in race.found.values()
    if _damaged(race):
        return Verdict.UNAVAILABLE if silent else Verdict.DAMAGED
    return Verdict.NOT_FOUND if race.quorum.absent(missing) else Verdict.UNAVAILABLE


def _damaged(race: ReadRace) -> bool:
    return any(found in (Found.WRONG, Found.SHORT) for found in race.found.values())
