"""How each store gets the bytes of a put, so that none can read the caller's memory after the put returned. Pure."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from ckpt.backends.replicated.pace import Pace, grace_s
from ckpt.backends.replicated.quorum import Quorum


class How(enum.Enum):
    """Ways to hand over bytes."""

    AS_IS = "as they are"
    """Nobody can change them: a store may read them as long as it likes."""
    LENT = "lent"
    """The caller's own memory. The store asks, before the object gets its name, whether it was taken back meanwhile."""
    COPIED = "copied"
    """A copy of ours, waited for where memory is short."""
    SPARED = "copied if there is room"
    """The same, but later where memory is short: nobody waits for a slow store."""
    LATER = "later"
    """Not now: the store is caught up from another one."""


@dataclass(frozen=True, slots=True)
class Taker:
    """A store to be written to: circuit closed, room in its queue, takes lent memory, how long this put would take it."""

    usable: bool
    room: bool
    borrows: bool
    expected_s: float | None


def feed(takers: Sequence[Taker], quorum: Quorum, *, immutable: bool, pace: Pace) -> tuple[How, ...]:
    """How each of ``takers`` gets the bytes, by place. ``immutable``: nobody can change the caller's buffers.

    Lent memory saves the copy, but a store that is slower than the grace would be cut off each time, after much work.
    """
    limit_s = _limit_s(takers, quorum, pace)

    def how(one: Taker) -> How:
        slow = one.expected_s is not None and one.expected_s > limit_s
        if not one.usable or not one.room:
            return How.LATER
        if immutable:
            return How.AS_IS
        if slow:
            return How.SPARED
        return How.LENT if one.borrows else How.COPIED

    return tuple(how(one) for one in takers)


def _limit_s(takers: Sequence[Taker], quorum: Quorum, pace: Pace) -> float:
    """How long a store may take to be done before the grace is over."""
    counting = [takers[place] for place in sorted(quorum.takers) if takers[place].usable]
    times = sorted(one.expected_s or 0.0 for one in counting)
    if len(times) < quorum.write:
        return float("inf")
    quorum_s = times[quorum.write - 1]
    return quorum_s + grace_s(pace, quorum_s)
