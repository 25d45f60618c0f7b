"""How quick a store is, learned from its own answers. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ckpt.backends.replicated.pace import Pace

SMALL_BYTES = 64 << 10
"""Calls below this size say how long a request takes, larger ones how many bytes a second flow."""

SHARE = 0.2
"""Weight of the newest measurement."""

RATIOS_MAX = 64
"""Measurements kept to know what is unusual."""

HALF_LIFE_S = 60.0
"""A store that was not asked for this long is tried as if it were twice as quick: it may have become so."""

BYTES_PER_S_MIN = 1.0
_TOOK_S_MIN = 1e-6


@dataclass(frozen=True, slots=True)
class Speed:
    """``latency_s`` of a small call and ``bytes_per_s`` of a large one (None: not measured).

    ``ratios``: how much longer than expected the last calls took. ``late`` is what 95 of 100 of them stay below.
    """

    latency_s: float | None = None
    bytes_per_s: float | None = None
    ratios: tuple[float, ...] = ()
    late: float = 2.0


def expected_s(speed: Speed, size_bytes: int) -> float | None:
    """How long a call that moves ``size_bytes`` takes; None where nothing was measured."""
    if speed.latency_s is None and speed.bytes_per_s is None:
        return None
    moving_s = 0.0 if speed.bytes_per_s is None else size_bytes / speed.bytes_per_s
    return (speed.latency_s or 0.0) + moving_s


def measured(speed: Speed, size_bytes: int, took_s: float) -> Speed:
    """The speed after a call that moved ``size_bytes`` in ``took_s``."""
    took_s = max(took_s, _TOOK_S_MIN)
    before_s = expected_s(speed, size_bytes)
    if before_s:
        ratios = (*speed.ratios[-RATIOS_MAX + 1 :], took_s / before_s)
        speed = replace(speed, ratios=ratios, late=_late(ratios))
    if size_bytes < SMALL_BYTES:
        return replace(speed, latency_s=_mixed(speed.latency_s, took_s))
    # A call may be quicker than the latency so far; a quarter of it then counts as moving bytes.
    moving_s = max(took_s - (speed.latency_s or 0.0), took_s / 4)
    return replace(speed, bytes_per_s=_mixed(speed.bytes_per_s, max(size_bytes / moving_s, BYTES_PER_S_MIN)))


def at_least(speed: Speed, size_bytes: int, waited_s: float) -> Speed:
    """The speed after a call that was given up: it would have taken longer than ``waited_s``."""
    before_s = expected_s(speed, size_bytes)
    return speed if before_s is not None and before_s > waited_s else measured(speed, size_bytes, 2 * waited_s)


def hedge_s(speed: Speed, size_bytes: int, pace: Pace) -> float:
    """After how long another store is asked too."""
    usual_s = expected_s(speed, size_bytes)
    if usual_s is None:
        return pace.hedge_s_first
    return min(pace.hedge_s_max, max(pace.hedge_s_min, usual_s * speed.late))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A store that could be asked: whether its circuit is closed, how long it would take, and since when it wasn't asked."""

    place: int
    usable: bool
    expected_s: float | None
    idle_s: float


def nearest(candidates: Sequence[Candidate], *, prefer: Sequence[int]) -> tuple[int, ...]:
    """The places in the order in which to ask: well ones first, then as ``prefer`` says, then the quickest.

    A store that was never asked counts as quickest, so that each is measured once.
    """

    def rank(one: Candidate) -> tuple[bool, int, float, int]:
        wanted = prefer.index(one.place) if one.place in prefer else len(prefer)
        waits_s = 0.0 if one.expected_s is None else one.expected_s * 0.5 ** min(one.idle_s / HALF_LIFE_S, 500.0)
        return not one.usable, wanted, waits_s, one.place

    return tuple(one.place for one in sorted(candidates, key=rank))


def _mixed(before: float | None, new: float) -> float:
    return new if before is None else (1 - SHARE) * before + SHARE * new


def _late(ratios: Sequence[float]) -> float:
    """What 95 of 100 stay below; while there are few, twice the usual at least."""
    late = sorted(ratios)[int(0.95 * (len(ratios) - 1) + 0.5)]
    return max(late, 2.0) if len(ratios) < RATIOS_MAX // 4 else max(late, 1.0)
