"""Whether all nodes of an epoch still answer at it: what lets them go on while the membership's
server does not answer. Pure.

The node of rank 0 calls the roll over and over; each node answers while that epoch is its newest
and it was told of no loss. A call says which earlier one everybody answered. Let call n say that
all answered k: then this node's answer to k came before call n was made, and when call n is
answered by all, each of them was there after that moment. From it on this node may act as long as a
lease lasts. So a node that goes over to another epoch, or is cut off, stops all others within the
time in which their leases would have ended, however long words were on the way; and times of
different machines are never compared.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

CALLS_PER_TTL = 6
KEPT = 4 * CALLS_PER_TTL
"""How many of the last calls a node remembers: those of a few leases."""


@dataclass(frozen=True, slots=True)
class LivenessRound:
    """What one node knows of the roll of one epoch. Times are its own, of the clock that leases
    use.

    ``number``: of the last call, made or answered; ``missing``: where it calls itself, who has not
    answered which call; ``answered``: the last one that everybody answered. ``said_s``: when this
    node answered a call; ``since_s``: a moment of its own after which everybody who answers that
    call was there.
    """

    attempt: int = 0
    number: int = 0
    missing: Mapping[int, frozenset[str]] = field(default_factory=dict)
    answered: int = 0
    said_s: Mapping[int, float] = field(default_factory=dict)
    since_s: Mapping[int, float] = field(default_factory=dict)

    def until_s(self, *, ttl_s: float, margin_s: float) -> float:
        """Until when this node may act for that all answered; 0: it may not for that reason."""
        since_s = self.since_s.get(self.answered)
        return since_s + ttl_s - margin_s if since_s is not None else 0.0


def next_call(
    roll: LivenessRound, attempt: int, others: Collection[str], now_s: float
) -> LivenessRound:
    """The next call goes out to ``others``, from the node of rank 0. Nobody else there: nothing is
    learned from it."""
    if roll.attempt != attempt:
        roll = LivenessRound(attempt)
    number = roll.number + 1
    missing = {one: names for one, names in roll.missing.items() if one > number - KEPT}
    return replace(
        roll,
        number=number,
        missing={**missing, number: frozenset(others)},
        since_s=_noted(roll.since_s, number, roll.answered, now_s),
    )


def answer_received(roll: LivenessRound, attempt: int, number: int, node: str) -> LivenessRound:
    """``node`` answers a call of this node; whoever answers was there after all earlier calls as
    well."""
    if attempt != roll.attempt or number > roll.number:
        return roll
    missing = {
        one: names - {node} if one <= number else names for one, names in roll.missing.items()
    }
    done = max((one for one, names in missing.items() if not names), default=0)
    return replace(
        roll,
        missing={one: names for one, names in missing.items() if one > done},
        answered=max(roll.answered, done),
    )


def answer_call(
    roll: LivenessRound, attempt: int, number: int, answered: int, now_s: float
) -> LivenessRound:
    """This node answers a call, now; ``answered``: the call that everybody answered, as the caller
    says."""
    if roll.attempt != attempt:
        roll = LivenessRound(attempt)
    if number <= roll.number:
        return roll
    since_s = roll.since_s
    if answered in roll.said_s:
        since_s = _noted(since_s, number, answered, roll.said_s[answered])
    return replace(
        roll,
        number=number,
        answered=max(roll.answered, answered),
        since_s=since_s,
        said_s=_noted(roll.said_s, number, answered, now_s),
    )


def _noted(
    times_s: Mapping[int, float], number: int, answered: int, time_s: float
) -> Mapping[int, float]:
    """With the time of one more call. Of older ones the last few stay, and the one that everybody
    answered."""
    kept = {one: at_s for one, at_s in times_s.items() if one > number - KEPT or one == answered}
    return {**kept, number: time_s}
