"""How patient a group of stores is: every limit of time and number in one place. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Limits, in seconds where the name says so.

    A read asks the next store once the first is later than in 95 of 100 reads: between ``hedge_s_min`` and ``hedge_s_max``,
    ``hedge_s_first`` where nothing was measured. A put that reached its quorum waits for the others ``grace_share`` times as
    long as the quorum took, between ``grace_s_min`` and ``grace_s_max``. A call is taken for hung after ``stall_s`` and the
    time that its bytes take at ``bytes_per_s_min``. ``call_s`` is the same for calls without bytes. A store that failed
    ``failures_max`` times in a row, hung, or is full, is left alone and looked at again after ``probe_s_first``, then twice
    as long each time, up to ``probe_s_max``. One operation asks a store ``tries_max`` times, ``retry_s_first`` apart at first.
    """

    hedge_s_min: float = 0.05
    hedge_s_first: float = 1.0
    hedge_s_max: float = 10.0
    grace_share: float = 1.0
    grace_s_min: float = 0.1
    grace_s_max: float = 10.0
    stall_s: float = 30.0
    bytes_per_s_min: float = 1 << 20
    call_s: float = 20.0
    failures_max: int = 3
    probe_s_first: float = 1.0
    probe_s_max: float = 60.0
    tries_max: int = 3
    retry_s_first: float = 0.1
    retry_s_max: float = 5.0
    keys_max: int = 4096
    """Keys remembered as missing in one store; beyond that a scrub must find them."""


def stall_s(pace: Pace, size_bytes: int) -> float:
    """How long a call that moves ``size_bytes`` may take before it counts as hung."""
    return pace.stall_s + size_bytes / pace.bytes_per_s_min


def give_up_s(pace: Pace, size_bytes: int) -> float:
    """How long a put goes on without its quorum: long enough for one more store to be tried after one hung."""
    return 2 * stall_s(pace, size_bytes)


def grace_s(pace: Pace, quorum_s: float) -> float:
    """How long a put waits for the stragglers when its quorum took ``quorum_s``."""
    return min(pace.grace_s_max, max(pace.grace_s_min, pace.grace_share * quorum_s))


def backoff_s(first_s: float, most_s: float, tries: int, jitter: float) -> float:
    """The pause before the next try after ``tries`` failed ones: doubling, then multiplied by 0.5 to 1.5.

    ``jitter`` is a random number in [0, 1): many callers that failed together must not come back together.
    """
    return min(most_s, first_s * float(2 ** min(tries - 1, 30))) * (0.5 + jitter)
