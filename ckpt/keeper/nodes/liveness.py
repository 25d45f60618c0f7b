"""Whether all nodes of an epoch still answer in it, so that they may act although the membership is
silent. Pure.

The node of rank 0 makes numbered calls; each node answers while that epoch is its newest and its
membership is not lost. A call also carries the number of an earlier call that all nodes answered.
Let call n say that all answered k: then this node's answer to k was sent before call n was made,
and if call n is answered by all, each of them was in the epoch after that moment. From that moment
on this node may act for as long as a lease lasts. So a node that moves to another epoch, or is cut
off, stops all others within the time in which their leases would have ended, no matter how long
messages take; and times of different machines are never compared.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

CALLS_PER_TTL = 6
KEPT = 4 * CALLS_PER_TTL
"""How many of the last calls a node remembers: those of a few leases."""


@dataclass(frozen=True, slots=True)
class LivenessRound:
    """What one node knows of the calls of one epoch. Times are its own, of the clock that leases
    use.

    ``number``: the last call, made or answered. ``last``, on the node that calls: the last call
    that each other node answered, 0 for none. ``answered``: the last call that all answered.
    ``said_s``: by call, when this node answered it. ``since_s``: by call, a moment of this node
    after which all nodes that answered the call were in the epoch.
    """

    attempt: int = 0
    number: int = 0
    last: Mapping[str, int] = field(default_factory=dict)
    answered: int = 0
    said_s: Mapping[int, float] = field(default_factory=dict)
    since_s: Mapping[int, float] = field(default_factory=dict)

    def until_s(self, *, ttl_s: float, margin_s: float) -> float:
        """Until when this node may act because all answered; 0: it may not for that reason."""
        since_s = self.since_s.get(self.answered)
        return since_s + ttl_s - margin_s if since_s is not None else 0.0


def next_call(
    now: LivenessRound, attempt: int, others: Collection[str], now_s: float
) -> LivenessRound:
    """Make the next call to ``others``, on the node of rank 0. With no others a call proves
    nothing."""
    if now.attempt != attempt:
        now = LivenessRound(attempt, last=dict.fromkeys(others, 0))
    number = now.number + 1
    return replace(
        now,
        number=number,
        since_s=_with_time(now.since_s, number, now.answered, now_s),
    )


def answers_received(now: LivenessRound, attempt: int, answers: Mapping[str, int]) -> LivenessRound:
    """Other nodes answered calls of this node: by node, the last that it answered. So it was in the
    epoch after all earlier calls as well. O(nodes): to be called for many at once."""
    if attempt != now.attempt:
        return now
    newer = {
        node: number
        for node, number in answers.items()
        if now.last.get(node, number) < number <= now.number
    }
    if not newer:
        return now
    last = {**now.last, **newer}
    complete = min(last.values())
    # Of a call that is too old no time is known any more: it proves nothing.
    answered = complete if complete in now.since_s else now.answered
    return replace(now, last=last, answered=max(now.answered, answered))


def answer_call(
    now: LivenessRound, attempt: int, number: int, answered: int, now_s: float
) -> LivenessRound:
    """This node answers a call, now; ``answered``: the call that, as the caller says, all nodes
    answered."""
    if now.attempt != attempt:
        now = LivenessRound(attempt)
    if number <= now.number:
        return now
    since_s = now.since_s
    if answered in now.said_s:
        # Not the time of this call: only its own earlier answer was surely sent before the call was
        # made.
        since_s = _with_time(since_s, number, answered, now.said_s[answered])
    return replace(
        now,
        number=number,
        answered=max(now.answered, answered),
        since_s=since_s,
        said_s=_with_time(now.said_s, number, answered, now_s),
    )


def _with_time(
    times_s: Mapping[int, float], number: int, answered: int, time_s: float
) -> Mapping[int, float]:
    """``times_s`` with the time of one more call. Of older calls the last few stay, and the one
    that all answered."""
    kept = {
        call: at_s for call, at_s in times_s.items() if call > number - KEPT or call == answered
    }
    return {**kept, number: time_s}
