"""Whether a store is asked at all: a circuit that opens when the store fails and closes when it answers. Pure.

CLOSED ──failed often, stalled, refused──▶ OPEN ──it is time──▶ HALF_OPEN ──failed──▶ OPEN, for twice as long
   ▲                                                                │
   └────────────────────────── answered ────────────────────────────┘
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from ckpt.backends.replicated.pace import Pace, backoff_s


class Phase(enum.Enum):
    """CLOSED: asked as usual. OPEN: left alone. HALF_OPEN: one call is on its way to see whether it answers again."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Sign(enum.Enum):
    """What was seen of a store."""

    ANSWERED = "answered"
    """It did what was asked, or said clearly that it has no such thing."""
    FAILED = "failed"
    """It did not answer, or with an error that may pass."""
    REFUSED = "refused"
    """It is full or denies: asking again at once cannot help."""
    STALLED = "stalled"
    """A call is under way for too long."""
    PROBED = "probed"
    """A call was sent to see whether it answers again."""


@dataclass(frozen=True, slots=True)
class Circuit:
    """``failures`` in a row while closed; ``openings`` in a row without an answer; ``next_s``: when to probe."""

    phase: Phase = Phase.CLOSED
    failures: int = 0
    openings: int = 0
    next_s: float = 0.0

    @property
    def usable(self) -> bool:
        """Whether the store is asked as usual."""
        return self.phase is Phase.CLOSED


def step(circuit: Circuit, sign: Sign, now_s: float, *, pace: Pace, jitter: float) -> Circuit:
    """The circuit after ``sign``. ``jitter`` is a random number in [0, 1)."""
    match sign, circuit.phase:
        case Sign.ANSWERED, _:
            return Circuit()
        case Sign.PROBED, Phase.CLOSED:
            return circuit
        case Sign.PROBED, _:
            # A probe may hang like any call; after this time another one may go.
            return replace(circuit, phase=Phase.HALF_OPEN, next_s=now_s + pace.probe_s_max)
        case Sign.FAILED, Phase.CLOSED if circuit.failures + 1 < pace.failures_max:
            return replace(circuit, failures=circuit.failures + 1)
        case _, Phase.OPEN:
            # What was under way when it opened says nothing new.
            return circuit
        case _:
            openings = circuit.openings + 1
            pause_s = backoff_s(pace.probe_s_first, pace.probe_s_max, openings, jitter)
            return Circuit(Phase.OPEN, 0, openings, now_s + pause_s)


def probe_due(circuit: Circuit, now_s: float) -> bool:
    """Whether somebody should look whether the store answers again."""
    return not circuit.usable and now_s >= circuit.next_s


def hastened(circuit: Circuit, now_s: float) -> Circuit:
    """The same circuit, to be probed now where it is open."""
    return replace(circuit, next_s=now_s) if circuit.phase is Phase.OPEN else circuit
