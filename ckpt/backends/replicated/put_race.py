"""When a put is done, what it tries again, and when it is lost. Pure.

The effect hands bytes to stores, tells what became of it, and asks ``decide`` again.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from ckpt.backends.replicated.policy import (
    Quorum,
    ReplicationLimits,
    backoff_s,
    give_up_s,
    grace_s,
    stall_s,
)

_T = TypeVar("_T")


class PutState(enum.Enum):
    """How far one store is."""

    SENT = "on its way"
    ACKED = "acknowledged"
    RETRYING = "failed, to be tried again"
    FAILED = "failed"
    HELD_BACK = "not asked"


@dataclass(frozen=True, slots=True)
class PutRace:
    """One put of ``size_bytes``, begun at ``start_s``. By place: the side, failed tries, when to
    try again."""

    quorum: Quorum
    size_bytes: int
    start_s: float
    sides: tuple[PutState, ...]
    tries: tuple[int, ...]
    next_s: tuple[float, ...]
    quorum_s: float | None = None

    def in_state(self, *sides: PutState) -> frozenset[int]:
        """The places that are in one of these states."""
        return frozenset(place for place, side in enumerate(self.sides) if side in sides)


@dataclass(frozen=True, slots=True)
class SendTo:
    """Hand the bytes to these stores (once more)."""

    indexes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WaitForAck:
    """Wait for an answer until this time, then decide again."""

    until_s: float


@dataclass(frozen=True, slots=True)
class PutDone:
    """The object is durable. ``behind`` did not acknowledge it yet."""

    behind: frozenset[int]


@dataclass(frozen=True, slots=True)
class PutFailed:
    """The quorum cannot be reached now."""


def begin_put(
    quorum: Quorum, *, size_bytes: int, now_s: float, held_back: frozenset[int]
) -> PutRace:
    """A put that is on its way to all stores but those ``apart``."""
    sides = tuple(
        PutState.HELD_BACK if place in held_back else PutState.SENT
        for place in range(quorum.stores)
    )
    zeros = (0,) * quorum.stores
    return PutRace(quorum, size_bytes, now_s, sides, zeros, (now_s,) * quorum.stores)


def with_ack(race: PutRace, place: int, now_s: float) -> PutRace:
    """``place`` holds the object."""
    race = replace(race, sides=_with(race.sides, place, PutState.ACKED))
    if race.quorum_s is None and race.quorum.is_write_quorum(race.in_state(PutState.ACKED)):
        race = replace(race, quorum_s=now_s)
    return race


def with_failure(
    race: PutRace,
    place: int,
    now_s: float,
    *,
    transient: bool,
    limits: ReplicationLimits,
    jitter: float,
) -> PutRace:
    """``place`` failed; ``passing``: with what may pass soon. ``jitter`` is a random number in [0,
    1)."""
    tries = race.tries[place] + 1
    race = replace(race, tries=_with(race.tries, place, tries))
    if not transient or tries >= limits.tries_max:
        return replace(race, sides=_with(race.sides, place, PutState.FAILED))
    again_s = now_s + backoff_s(limits.retry_s_first, limits.retry_s_max, tries, jitter)
    return replace(
        race,
        sides=_with(race.sides, place, PutState.RETRYING),
        next_s=_with(race.next_s, place, again_s),
    )


def with_sent(race: PutRace, places: tuple[int, ...]) -> PutRace:
    """The bytes were handed to ``places``."""
    return replace(
        race,
        sides=tuple(PutState.SENT if p in places else side for p, side in enumerate(race.sides)),
    )


def decide(
    race: PutRace, now_s: float, *, limits: ReplicationLimits
) -> SendTo | WaitForAck | PutDone | PutFailed:
    """What to do now.

    Once durable, stragglers get the grace, and what failed is left to be caught up. Before, stores
    that were left apart are asked too where the others cannot, or take long to, make up the quorum.
    """
    if race.quorum_s is not None:
        until_s = race.quorum_s + grace_s(limits, race.quorum_s - race.start_s)
        if not race.in_state(PutState.SENT) or now_s >= until_s:
            return PutDone(frozenset(range(race.quorum.stores)) - race.in_state(PutState.ACKED))
        return WaitForAck(until_s)
    lost_s = race.start_s + give_up_s(limits, race.size_bytes)
    apart_s = race.start_s + stall_s(limits, race.size_bytes)
    possible = race.quorum.is_write_quorum(
        race.in_state(PutState.ACKED, PutState.SENT, PutState.RETRYING)
    )
    apart = tuple(sorted(race.in_state(PutState.HELD_BACK) & race.quorum.voters))
    if apart and (not possible or now_s >= apart_s):
        return SendTo(apart)
    if not possible or now_s >= lost_s:
        return PutFailed()
    if due := tuple(
        sorted(place for place in race.in_state(PutState.RETRYING) if now_s >= race.next_s[place])
    ):
        return SendTo(due)
    times = [race.next_s[place] for place in race.in_state(PutState.RETRYING)]
    return WaitForAck(min([*times, lost_s, *([apart_s] if apart else [])]))


def _with(values: tuple[_T, ...], place: int, value: _T) -> tuple[_T, ...]:
    return (*values[:place], value, *values[place + 1 :])


# How each store gets the bytes of a put, so that none can read the caller's memory after the put
# returned. Pure.


class Handover(enum.Enum):
    """Ways to hand over bytes."""

    AS_IS = "as they are"
    """Nobody can change them: a store may read them as long as it likes."""
    LENT = "lent"
    """The caller's own memory. The store asks, before the object gets its name, whether it was
    taken back meanwhile."""
    COPIED = "copied"
    """A copy of ours, waited for where memory is short."""
    SPARED = "copied if there is room"
    """The same, but later where memory is short: nobody waits for a slow store."""
    LATER = "later"
    """Not now: the store is caught up from another one."""


@dataclass(frozen=True, slots=True)
class PutTarget:
    """A store to be written to: circuit closed, room in its queue, takes lent memory, how long this
    put would take it."""

    usable: bool
    has_room: bool
    borrows: bool
    expected_s: float | None


def plan_handover(
    takers: Sequence[PutTarget], quorum: Quorum, *, immutable: bool, limits: ReplicationLimits
) -> tuple[Handover, ...]:
    """How each of ``takers`` gets the bytes, by place. ``immutable``: nobody can change the
    caller's buffers.

    Lent memory saves the copy, but a store that is slower than the grace would be cut off each
    time, after much work.
    """
    limit_s = _limit_s(takers, quorum, limits)

    def how(one: PutTarget) -> Handover:
        slow = one.expected_s is not None and one.expected_s > limit_s
        if not one.usable or not one.has_room:
            return Handover.LATER
        if immutable:
            return Handover.AS_IS
        if slow:
            return Handover.SPARED
        return Handover.LENT if one.borrows else Handover.COPIED

    return tuple(how(one) for one in takers)


def _limit_s(takers: Sequence[PutTarget], quorum: Quorum, pace: ReplicationLimits) -> float:
    """How long a store may take to be done before the grace is over."""
    counting = [takers[place] for place in sorted(quorum.voters) if takers[place].usable]
    times = sorted(one.expected_s or 0.0 for one in counting)
    if len(times) < quorum.write:
        return float("inf")
    quorum_s = times[quorum.write - 1]
    return quorum_s + grace_s(pace, quorum_s)
