"""The decisions of one read: which store to ask next, when to hedge, and when to give up. Pure.

The caller asks a store, records the answer in the race, and calls ``decide`` again.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ckpt.backends.replicated.policy import Quorum, ReplicationLimits, backoff_s


class ReadResult(enum.Enum):
    """The result of asking one store."""

    RIGHT = "right"
    WRONG = "wrong bytes"
    SHORT = "ends too early"
    MISSING = "not there"
    SILENT = "no answer"


class ReadFailure(enum.Enum):
    """Why a read has no bytes to deliver."""

    NOT_FOUND = "not-found"
    DAMAGED = "damaged"
    UNAVAILABLE = "unavailable"


@dataclass(frozen=True, slots=True)
class PendingRead:
    """A read in flight.

    After ``late_s`` another store is asked too (the hedge). At ``lost_s`` it counts as SILENT.
    """

    late_s: float
    lost_s: float


@dataclass(frozen=True, slots=True)
class ReadRace:
    """The state of one read.

    ``order``: the stores, nearest first. ``usable``: stores whose circuit is closed. ``pending``:
    reads in flight by store. ``rounds``: rounds begun; a new round asks the silent stores again, at
    ``retry_at_s``.
    """

    quorum: Quorum
    order: tuple[int, ...]
    usable: frozenset[int]
    pending: Mapping[int, PendingRead]
    results: Mapping[int, ReadResult]
    rounds: int = 1
    retry_at_s: float | None = None


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
    """No store has right bytes."""

    failure: ReadFailure


def begin_read(quorum: Quorum, order: tuple[int, ...], usable: frozenset[int]) -> ReadRace:
    """A read that has not asked any store yet."""
    return ReadRace(quorum, order, usable, {}, {})


def with_asked(race: ReadRace, index: int, *, late_s: float, lost_s: float) -> ReadRace:
    """The race after asking store ``index``; the times are as in PendingRead."""
    return replace(race, pending={**race.pending, index: PendingRead(late_s, lost_s)})


def with_result(race: ReadRace, index: int, result: ReadResult) -> ReadRace:
    """The race after the answer of store ``index``, or without one if the result is SILENT."""
    pending = {other: read for other, read in race.pending.items() if other != index}
    return replace(race, pending=pending, results={**race.results, index: result})


def decide(
    race: ReadRace, now_s: float, *, limits: ReplicationLimits, jitter: float
) -> tuple[ReadRace, AskStore | WaitForRead | DeliverRead | GiveUpRead]:
    """The next move, and the race after it. ``jitter`` is a random number in [0, 1)."""
    if right := [index for index, result in race.results.items() if result is ReadResult.RIGHT]:
        return race, DeliverRead(right[0])
    for index, read in race.pending.items():
        if now_s >= read.lost_s:
            race = with_result(race, index, ReadResult.SILENT)
    missing = {index for index, result in race.results.items() if result is ReadResult.MISSING}
    # A damaged copy shows that the object existed, whatever the missing copies prove.
    never_stored = race.quorum.proves_absent(missing) and not _damaged(race)
    unasked = [
        index for index in race.order if index not in race.pending and index not in race.results
    ]
    if never_stored:
        # Copies beyond the quorum are still searched for, but only where asking is cheap: after a
        # loss of W stores the last copy is one of them.
        unasked = [index for index in unasked if index in race.usable]
    late_times = [read.late_s for read in race.pending.values() if now_s < read.late_s]
    # Ask the next store at once if one store lacks the object, otherwise when all pending reads are
    # late (the hedge).
    if unasked and (missing or not late_times):
        return race, AskStore(unasked[0])
    if race.pending and (late_times or not never_stored):
        times = (
            late_times
            if unasked or never_stored
            else [read.lost_s for read in race.pending.values()]
        )
        # The earliest moment at which this decision could change.
        return race, WaitForRead(min(times))
    return _end_round(race, now_s, limits=limits, jitter=jitter)


def _end_round(
    race: ReadRace, now_s: float, *, limits: ReplicationLimits, jitter: float
) -> tuple[ReadRace, AskStore | WaitForRead | GiveUpRead]:
    """The move when every store worth asking has answered or is late.

    Fails, or retries the silent stores.
    """
    failure = _failure(race)
    silent = [index for index in race.order if race.results.get(index) is ReadResult.SILENT]
    if failure is not ReadFailure.UNAVAILABLE or not silent or race.rounds >= limits.tries_max:
        return race, GiveUpRead(failure)
    if race.retry_at_s is None:
        retry_at_s = now_s + backoff_s(
            limits.retry_s_first, limits.retry_s_max, race.rounds, jitter
        )
        return replace(race, retry_at_s=retry_at_s), WaitForRead(retry_at_s)
    if now_s < race.retry_at_s:
        return race, WaitForRead(race.retry_at_s)
    results = {
        index: result for index, result in race.results.items() if result is not ReadResult.SILENT
    }
    race = replace(race, results=results, rounds=race.rounds + 1, retry_at_s=None)
    return race, AskStore(silent[0])


def _failure(race: ReadRace) -> ReadFailure:
    missing = {index for index, result in race.results.items() if result is ReadResult.MISSING}
    incomplete = (
        len(race.results) < race.quorum.stores or ReadResult.SILENT in race.results.values()
    )
    if _damaged(race):
        # A store without an answer may still hold right bytes.
        return ReadFailure.UNAVAILABLE if incomplete else ReadFailure.DAMAGED
    return ReadFailure.NOT_FOUND if race.quorum.proves_absent(missing) else ReadFailure.UNAVAILABLE


def _damaged(race: ReadRace) -> bool:
    return any(result in (ReadResult.WRONG, ReadResult.SHORT) for result in race.results.values())
