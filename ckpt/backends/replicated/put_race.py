"""The decisions of one put: when it is done, what it tries again, and when it has failed. Pure.

The caller hands bytes to stores, records their answers in the race, and calls ``decide`` again.
``plan_handover`` decides how each store gets the bytes.
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
    """The state of one store in a put."""

    SENT = "sent"
    ACKED = "acknowledged"
    RETRYING = "failed, to be retried"
    FAILED = "failed"
    HELD_BACK = "not asked"


@dataclass(frozen=True, slots=True)
class PutRace:
    """One put of ``size_bytes``, begun at ``start_s``.

    By store: its state, its failed tries, and when to try again. ``quorum_s``: when the quorum was
    reached.
    """

    quorum: Quorum
    size_bytes: int
    start_s: float
    states: tuple[PutState, ...]
    tries: tuple[int, ...]
    next_s: tuple[float, ...]
    quorum_s: float | None = None

    def in_state(self, *states: PutState) -> frozenset[int]:
        """The stores in one of these states."""
        return frozenset(index for index, state in enumerate(self.states) if state in states)


@dataclass(frozen=True, slots=True)
class SendTo:
    """Hand the bytes to these stores, for the first time or again."""

    indexes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WaitForAck:
    """Wait for an answer until this time, then decide again."""

    until_s: float


@dataclass(frozen=True, slots=True)
class PutDone:
    """The object is durable. The stores in ``behind`` have not acknowledged it yet."""

    behind: frozenset[int]


@dataclass(frozen=True, slots=True)
class PutFailed:
    """The quorum cannot be reached now."""


def begin_put(
    quorum: Quorum, *, size_bytes: int, now_s: float, held_back: frozenset[int]
) -> PutRace:
    """A put that was sent to all stores except those in ``held_back``."""
    states = tuple(
        PutState.HELD_BACK if index in held_back else PutState.SENT
        for index in range(quorum.stores)
    )
    zeros = (0,) * quorum.stores
    return PutRace(quorum, size_bytes, now_s, states, zeros, (now_s,) * quorum.stores)


def with_ack(race: PutRace, index: int, now_s: float) -> PutRace:
    """The race after store ``index`` acknowledged the object."""
    race = replace(race, states=_with(race.states, index, PutState.ACKED))
    if race.quorum_s is None and race.quorum.is_write_quorum(race.in_state(PutState.ACKED)):
        race = replace(race, quorum_s=now_s)
    return race


def with_failure(
    race: PutRace,
    index: int,
    now_s: float,
    *,
    transient: bool,
    limits: ReplicationLimits,
    jitter: float,
) -> PutRace:
    """The race after store ``index`` failed; a ``transient`` failure is retried.

    ``jitter`` is a random number in [0, 1).
    """
    tries = race.tries[index] + 1
    race = replace(race, tries=_with(race.tries, index, tries))
    # Refusals (full, denied) are not retried: asking again at once cannot help.
    if not transient or tries >= limits.tries_max:
        return replace(race, states=_with(race.states, index, PutState.FAILED))
    retry_at_s = now_s + backoff_s(limits.retry_s_first, limits.retry_s_max, tries, jitter)
    return replace(
        race,
        states=_with(race.states, index, PutState.RETRYING),
        next_s=_with(race.next_s, index, retry_at_s),
    )


def with_sent(race: PutRace, indexes: tuple[int, ...]) -> PutRace:
    """The race after the bytes were handed to ``indexes``."""
    return replace(
        race,
        states=tuple(
            PutState.SENT if index in indexes else state for index, state in enumerate(race.states)
        ),
    )


def decide(
    race: PutRace, now_s: float, *, limits: ReplicationLimits
) -> SendTo | WaitForAck | PutDone | PutFailed:
    """The next move.

    Before the quorum: retry stores after transient failures, and ask held-back stores if the others
    cannot reach the quorum, or take longer than a stall. After it: wait for stragglers until the
    grace is over; failed stores are repaired later.
    """
    if race.quorum_s is not None:
        until_s = race.quorum_s + grace_s(limits, race.quorum_s - race.start_s)
        # Stores that failed transiently are not awaited: a repair brings them the object.
        if not race.in_state(PutState.SENT) or now_s >= until_s:
            return PutDone(frozenset(range(race.quorum.stores)) - race.in_state(PutState.ACKED))
        return WaitForAck(until_s)
    give_up_at_s = race.start_s + give_up_s(limits, race.size_bytes)
    held_back_at_s = race.start_s + stall_s(limits, race.size_bytes)
    possible = race.quorum.is_write_quorum(
        race.in_state(PutState.ACKED, PutState.SENT, PutState.RETRYING)
    )
    # Only voters: a store that does not count is filled as a whole before it counts.
    held_back = tuple(sorted(race.in_state(PutState.HELD_BACK) & race.quorum.voters))
    if held_back and (not possible or now_s >= held_back_at_s):
        return SendTo(held_back)
    if not possible or now_s >= give_up_at_s:
        return PutFailed()
    if due := tuple(
        sorted(index for index in race.in_state(PutState.RETRYING) if now_s >= race.next_s[index])
    ):
        return SendTo(due)
    # The earliest moment at which this decision could change.
    times = [race.next_s[index] for index in race.in_state(PutState.RETRYING)]
    return WaitForAck(min([*times, give_up_at_s, *([held_back_at_s] if held_back else [])]))


def _with(values: tuple[_T, ...], index: int, value: _T) -> tuple[_T, ...]:
    return (*values[:index], value, *values[index + 1 :])


# ---- Handover: how each store gets the bytes of a put.
#
# Invariant: no store reads the caller's memory after the put returned. The caller then overwrites
# it, and a hung call would store wrong bytes under the object's key. Hence immutable bytes, a loan
# that is checked before the object gets its name, or a copy.


class Handover(enum.Enum):
    """Ways to hand the bytes of a put to a store."""

    AS_IS = "as they are"
    """The bytes are immutable: a store may read them for as long as it likes."""
    LENT = "lent"
    """The caller's own memory. Before the store names the object it checks that the memory was not
    taken back.
    """
    COPIED = "copied"
    """A copy; the put waits if memory is short."""
    SPARED = "copied if there is room"
    """A copy if there is memory, else LATER: the put does not wait for a slow store."""
    LATER = "later"
    """Not now: the store is repaired from another one."""


@dataclass(frozen=True, slots=True)
class PutTarget:
    """A store to write to.

    ``usable``: its circuit is closed. ``has_room``: its queue is not full. ``borrows``: it takes
    lent memory. ``expected_s``: the expected duration of this put; None if unknown.
    """

    usable: bool
    has_room: bool
    borrows: bool
    expected_s: float | None


def plan_handover(
    targets: Sequence[PutTarget], quorum: Quorum, *, immutable: bool, limits: ReplicationLimits
) -> tuple[Handover, ...]:
    """How each of ``targets`` gets the bytes.

    ``immutable``: the buffers can never change. Lending saves the copy. A store slower than the
    grace is not lent to: each put would be cut off after most of its work was done.
    """
    limit_s = _limit_s(targets, quorum, limits)

    def handover(target: PutTarget) -> Handover:
        slow = target.expected_s is not None and target.expected_s > limit_s
        if not target.usable or not target.has_room:
            return Handover.LATER
        if immutable:
            return Handover.AS_IS
        if slow:
            return Handover.SPARED
        return Handover.LENT if target.borrows else Handover.COPIED

    return tuple(handover(target) for target in targets)


def _limit_s(targets: Sequence[PutTarget], quorum: Quorum, limits: ReplicationLimits) -> float:
    """The longest duration of a put before the grace is over."""
    counting = [targets[index] for index in sorted(quorum.voters) if targets[index].usable]
    times = sorted(target.expected_s or 0.0 for target in counting)
    if len(times) < quorum.write:
        return float("inf")
    quorum_s = times[quorum.write - 1]
    return quorum_s + grace_s(limits, quorum_s)
