"""How quick a store is, learned from its own answers. Pure."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from ckpt.errors import CkptError, UnavailableError, UsageError

# How patient a group of stores is: every limit of time and number in one place. Pure.


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicationLimits:
    """Limits, in seconds where the name says so.

    A read asks the next store once the first is later than in 95 of 100 reads: between
    ``hedge_s_min`` and ``hedge_s_max``, ``hedge_s_first`` where nothing was measured. A put that
    reached its quorum waits for the others ``grace_share`` times as long as the quorum took,
    between ``grace_s_min`` and ``grace_s_max``. A call is taken for hung after ``stall_s`` and the
    time that its bytes take at ``bytes_per_s_min``. ``call_timeout_s`` is the same for calls
    without bytes. A store that failed ``failures_max`` times in a row, hung, or is full, is left
    alone and looked at again after ``probe_s_first``, then twice as long each time, up to
    ``probe_s_max``. One operation asks a store ``tries_max`` times, ``retry_s_first`` apart at
    first.
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


def stall_s(limits: ReplicationLimits, size_bytes: int) -> float:
    """How long a call that moves ``size_bytes`` may take before it counts as hung."""
    return limits.stall_s + size_bytes / limits.bytes_per_s_min


def give_up_s(limits: ReplicationLimits, size_bytes: int) -> float:
    """How long a put goes on without its quorum: long enough for one more store to be tried after
    one hung."""
    return 2 * stall_s(limits, size_bytes)


def grace_s(limits: ReplicationLimits, quorum_s: float) -> float:
    """How long a put waits for the stragglers when its quorum took ``quorum_s``."""
    return min(limits.grace_s_max, max(limits.grace_s_min, limits.grace_share * quorum_s))


def backoff_s(first_s: float, most_s: float, tries: int, jitter: float) -> float:
    """The pause before the next try after ``tries`` failed ones: doubling, then multiplied by 0.5
    to 1.5.

    ``jitter`` is a random number in [0, 1): many callers that failed together must not come back
    together.
    """
    return min(most_s, first_s * float(2 ** min(tries - 1, 30))) * (0.5 + jitter)


# Whether a store is asked at all: a circuit that opens when the store fails and closes when it
# answers. Pure.
#
# CLOSED ──failed often, stalled, refused──▶ OPEN ──it is time──▶ HALF_OPEN ──failed──▶ OPEN, for
# twice as long
#    ▲                                                                │
#    └────────────────────────── answered ────────────────────────────┘


class CircuitState(enum.Enum):
    """CLOSED: asked as usual. OPEN: left alone. HALF_OPEN: one call is on its way to see whether it
    answers again."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class CircuitEvent(enum.Enum):
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
    """``failures`` in a row while closed; ``openings`` in a row without an answer; ``next_s``: when
    to probe."""

    phase: CircuitState = CircuitState.CLOSED
    failures: int = 0
    openings: int = 0
    next_s: float = 0.0

    @property
    def usable(self) -> bool:
        """Whether the store is asked as usual."""
        return self.phase is CircuitState.CLOSED


def advance(
    circuit: Circuit, event: CircuitEvent, now_s: float, *, limits: ReplicationLimits, jitter: float
) -> Circuit:
    """The circuit after ``sign``. ``jitter`` is a random number in [0, 1)."""
    match event, circuit.phase:
        case CircuitEvent.ANSWERED, _:
            return Circuit()
        case CircuitEvent.PROBED, CircuitState.CLOSED:
            return circuit
        case CircuitEvent.PROBED, _:
            # A probe may hang like any call; after this time another one may go.
            return replace(circuit, phase=CircuitState.HALF_OPEN, next_s=now_s + limits.probe_s_max)
        case CircuitEvent.FAILED, CircuitState.CLOSED if circuit.failures + 1 < limits.failures_max:
            return replace(circuit, failures=circuit.failures + 1)
        case _, CircuitState.OPEN:
            # What was under way when it opened says nothing new.
            return circuit
        case _:
            openings = circuit.openings + 1
            pause_s = backoff_s(limits.probe_s_first, limits.probe_s_max, openings, jitter)
            return Circuit(CircuitState.OPEN, 0, openings, now_s + pause_s)


def probe_due(circuit: Circuit, now_s: float) -> bool:
    """Whether somebody should look whether the store answers again."""
    return not circuit.usable and now_s >= circuit.next_s


def probe_now(circuit: Circuit, now_s: float) -> Circuit:
    """The same circuit, to be probed now where it is open."""
    return replace(circuit, next_s=now_s) if circuit.phase is CircuitState.OPEN else circuit


# On how many stores an object must be, and how many must miss it before it is known to be
# nowhere. Pure.


@dataclass(frozen=True, slots=True)
class Quorum:
    """``write`` of ``stores`` hold what was acknowledged; only those at ``counting`` places are
    believed to be complete.

    ``silent``: places that counted, and did not answer when it was last looked. What they take
    counts; what they lack doesn't, since they may have been emptied meanwhile.
    """

    stores: int
    write: int
    counting: frozenset[int]
    silent: frozenset[int] = frozenset()

    @property
    def voters(self) -> frozenset[int]:
        """The places whose acknowledgement counts."""
        return self.counting | self.silent

    def is_write_quorum(self, places: AbstractSet[int]) -> bool:
        """Whether an object that lies on ``places`` is durable; or, of the places that may still
        take it, whether it can be."""
        return len(self.voters & places) >= self.write

    def proves_absent(self, places: AbstractSet[int]) -> bool:
        """Whether an object that ``places`` do not have was never acknowledged: too few others are
        left to hold it."""
        return self.is_read_quorum(places)

    def is_read_quorum(self, places: AbstractSet[int]) -> bool:
        """Whether at least one of ``places`` holds any object that was acknowledged."""
        return len(self.counting & places) >= self.stores - self.write + 1


def quorum_of(stores: int, write: int | None) -> Quorum:
    """The quorum of that many stores, all counting; ``write`` None means the majority.

    Raises UsageError unless 1 <= write <= stores < 2 * write: two quorums must share a store.
    """
    if stores < 1:
        raise UsageError("a replicated store needs stores. stores=0; name at least one")
    write = stores // 2 + 1 if write is None else write
    if not 1 <= write <= stores:
        raise UsageError(
            f"a write quorum lies between 1 and the number of stores. write_quorum={write} "
            f"stores={stores}"
        )
    if 2 * write <= stores:
        raise UsageError(
            f"two write quorums would share no store. write_quorum={write} stores={stores}; "
            f"use {stores // 2 + 1} or more, or leave it out"
        )
    return Quorum(stores, write, frozenset(range(stores)))


def with_counting(quorum: Quorum, full: Iterable[int], silent: Iterable[int] = ()) -> Quorum:
    """The same quorum in which only ``full`` count, and ``silent`` for what they take. Raises
    UsageError for other places."""
    counting = frozenset(full)
    late = frozenset(silent) - counting
    if bad := sorted((counting | late) - frozenset(range(quorum.stores))):
        raise UsageError(
            f"no store has this place. places={bad} stores={quorum.stores}; places count from 0"
        )
    return Quorum(quorum.stores, quorum.write, counting, late)


def most_common_error(errors: Sequence[CkptError]) -> type[CkptError]:
    """The type that most of ``errors`` have, the earliest of equals; UnavailableError where there
    is none."""
    kinds = [type(error) for error in errors]
    return max(kinds, key=kinds.count, default=UnavailableError)


SMALL_BYTES = 64 << 10
"""Calls below this size say how long a request takes, larger ones how many bytes a second flow."""

SHARE = 0.2
"""Weight of the newest measurement."""

RATIOS_MAX = 64
"""Measurements kept to know what is unusual."""

HALF_LIFE_S = 60.0
"""A store that was not asked for this long is tried as if it were twice as quick: it may have
become so."""

BYTES_PER_S_MIN = 1.0
_TOOK_S_MIN = 1e-6


@dataclass(frozen=True, slots=True)
class StoreSpeed:
    """``latency_s`` of a small call and ``bytes_per_s`` of a large one (None: not measured).

    ``ratios``: how much longer than expected the last calls took. ``late`` is what 95 of 100 of
    them stay below.
    """

    latency_s: float | None = None
    bytes_per_s: float | None = None
    ratios: tuple[float, ...] = ()
    late: float = 2.0


def expected_s(speed: StoreSpeed, size_bytes: int) -> float | None:
    """How long a call that moves ``size_bytes`` takes; None where nothing was measured."""
    if speed.latency_s is None and speed.bytes_per_s is None:
        return None
    moving_s = 0.0 if speed.bytes_per_s is None else size_bytes / speed.bytes_per_s
    return (speed.latency_s or 0.0) + moving_s


def with_measurement(speed: StoreSpeed, size_bytes: int, took_s: float) -> StoreSpeed:
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
    return replace(
        speed, bytes_per_s=_mixed(speed.bytes_per_s, max(size_bytes / moving_s, BYTES_PER_S_MIN))
    )


def with_lower_bound(speed: StoreSpeed, size_bytes: int, waited_s: float) -> StoreSpeed:
    """The speed after a call that was given up: it would have taken longer than ``waited_s``."""
    before_s = expected_s(speed, size_bytes)
    return (
        speed
        if before_s is not None and before_s > waited_s
        else with_measurement(speed, size_bytes, 2 * waited_s)
    )


def hedge_s(speed: StoreSpeed, size_bytes: int, limits: ReplicationLimits) -> float:
    """After how long another store is asked too."""
    usual_s = expected_s(speed, size_bytes)
    if usual_s is None:
        return limits.hedge_s_first
    return min(limits.hedge_s_max, max(limits.hedge_s_min, usual_s * speed.late))


@dataclass(frozen=True, slots=True)
class ReadCandidate:
    """A store that could be asked: whether its circuit is closed, how long it would take, and since
    when it wasn't asked."""

    index: int
    usable: bool
    expected_s: float | None
    idle_s: float


def read_order(candidates: Sequence[ReadCandidate], *, prefer: Sequence[int]) -> tuple[int, ...]:
    """The places in the order in which to ask: well ones first, then as ``prefer`` says, then the
    quickest.

    A store that was never asked counts as quickest, so that each is measured once.
    """

    def rank(one: ReadCandidate) -> tuple[bool, int, float, int]:
        wanted = prefer.index(one.index) if one.index in prefer else len(prefer)
        waits_s = (
            0.0
            if one.expected_s is None
            else one.expected_s * 0.5 ** min(one.idle_s / HALF_LIFE_S, 500.0)
        )
        return not one.usable, wanted, waits_s, one.index

    return tuple(one.index for one in sorted(candidates, key=rank))


def _mixed(before: float | None, new: float) -> float:
    return new if before is None else (1 - SHARE) * before + SHARE * new


def _late(ratios: Sequence[float]) -> float:
    """What 95 of 100 stay below; while there are few, twice the usual at least."""
    late = sorted(ratios)[int(0.95 * (len(ratios) - 1) + 0.5)]
    return max(late, 2.0) if len(ratios) < RATIOS_MAX // 4 else max(late, 1.0)
