"""The rules of replication: limits, circuits, quorums, and the order of stores in a read. Pure."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from ckpt.errors import CkptError, UnavailableError, UsageError

# ---- Limits: every limit of time and number in one place.


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicationLimits:
    """Limits of a group of stores, in seconds if the name says so.

    * *Hedge*: a read asks a second store once the first is later than 95 of 100 reads, between
      ``hedge_s_min`` and ``hedge_s_max``; after ``hedge_s_first`` if nothing was measured.
    * *Grace*: a put that reached its quorum waits for the other stores ``grace_share`` times as
      long as the quorum took, between ``grace_s_min`` and ``grace_s_max``.
    * *Stall*: a call counts as hung after ``stall_s`` plus the time of its bytes at
      ``bytes_per_s_min``. ``call_s`` is the same for calls without bytes.
    * *Circuit*: a store that failed ``failures_max`` times in a row, hung, or is full is not used.
      It is probed after ``probe_s_first``, then after twice as long each time, up to
      ``probe_s_max``.
    * *Retry*: one operation asks a store ``tries_max`` times, with pauses from ``retry_s_first`` up
      to ``retry_s_max``.
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
    """Keys remembered as missing per store; a scrub must find the ones beyond that."""


def stall_s(limits: ReplicationLimits, size_bytes: int) -> float:
    """Time after which a call that moves ``size_bytes`` counts as hung."""
    return limits.stall_s + size_bytes / limits.bytes_per_s_min


def give_up_s(limits: ReplicationLimits, size_bytes: int) -> float:
    """Time after which a put without a quorum fails.

    Long enough to try one more store after one hung.
    """
    return 2 * stall_s(limits, size_bytes)


def grace_s(limits: ReplicationLimits, quorum_s: float) -> float:
    """Time that a put waits for stragglers if its quorum took ``quorum_s``."""
    return min(limits.grace_s_max, max(limits.grace_s_min, limits.grace_share * quorum_s))


def backoff_s(first_s: float, most_s: float, tries: int, jitter: float) -> float:
    """The pause after ``tries`` failed ones: doubled each time, then multiplied by 0.5 to 1.5.

    ``jitter`` is a random number in [0, 1). It spreads callers that failed together, so that they
    do not retry together.
    """
    return min(most_s, first_s * float(2 ** min(tries - 1, 30))) * (0.5 + jitter)


# ---- Circuit: whether a store is asked at all. It opens when the store fails and closes when the
# store answers.
#
# CLOSED ──failed often, stalled, refused──▶ OPEN ──probe due──▶ HALF_OPEN ──failed──▶ OPEN
#    ▲                                                               │      (for twice as long)
#    └─────────────────────────── answered ──────────────────────────┘


class CircuitState(enum.Enum):
    """CLOSED: asked as usual. OPEN: left alone. HALF_OPEN: one probe is in flight."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class CircuitEvent(enum.Enum):
    """An observation of a store."""

    ANSWERED = "answered"
    """It did what was asked, or said clearly that there is no such object."""
    FAILED = "failed"
    """It did not answer, or answered with a transient error."""
    REFUSED = "refused"
    """It is full or denies access: asking again at once cannot help."""
    STALLED = "stalled"
    """A call has been in flight for too long."""
    PROBED = "probed"
    """A probe was sent."""


@dataclass(frozen=True, slots=True)
class Circuit:
    """Whether a store is asked, and its failures.

    ``failures``: in a row while closed. ``openings``: in a row without an answer. ``next_s``: when
    to probe.
    """

    state: CircuitState = CircuitState.CLOSED
    failures: int = 0
    openings: int = 0
    next_s: float = 0.0

    @property
    def usable(self) -> bool:
        """Whether the store is asked as usual."""
        return self.state is CircuitState.CLOSED


def advance(
    circuit: Circuit, event: CircuitEvent, now_s: float, *, limits: ReplicationLimits, jitter: float
) -> Circuit:
    """The circuit after ``event``. ``jitter`` is a random number in [0, 1)."""
    match event, circuit.state:
        case CircuitEvent.ANSWERED, _:
            return Circuit()
        case CircuitEvent.PROBED, CircuitState.CLOSED:
            return circuit
        case CircuitEvent.PROBED, _:
            # A probe may hang like any call. After this time another one is due.
            return replace(circuit, state=CircuitState.HALF_OPEN, next_s=now_s + limits.probe_s_max)
        case CircuitEvent.FAILED, CircuitState.CLOSED if circuit.failures + 1 < limits.failures_max:
            return replace(circuit, failures=circuit.failures + 1)
        case _, CircuitState.OPEN:
            # A failure of a call that was in flight at the opening is no new information: it must
            # not lengthen the pause.
            return circuit
        case _:
            openings = circuit.openings + 1
            pause_s = backoff_s(limits.probe_s_first, limits.probe_s_max, openings, jitter)
            return Circuit(CircuitState.OPEN, 0, openings, now_s + pause_s)


def probe_due(circuit: Circuit, now_s: float) -> bool:
    """Whether the store should be probed now."""
    return not circuit.usable and now_s >= circuit.next_s


def probe_now(circuit: Circuit, now_s: float) -> Circuit:
    """The same circuit, to be probed now if it is open."""
    return replace(circuit, next_s=now_s) if circuit.state is CircuitState.OPEN else circuit


# ---- Quorum: how many stores must hold an object, and how many must lack it before it is known to
# have never been acknowledged.


@dataclass(frozen=True, slots=True)
class Quorum:
    """``write`` of ``stores`` hold every acknowledged object. Only the stores in ``counting``
    count.

    ``silent``: stores that counted and did not answer at the last check. What they acknowledge
    counts. That they lack an object proves nothing, since they may have been emptied meanwhile.
    """

    stores: int
    write: int
    counting: frozenset[int]
    silent: frozenset[int] = frozenset()

    @property
    def voters(self) -> frozenset[int]:
        """The stores whose acknowledgement counts."""
        return self.counting | self.silent

    def is_write_quorum(self, indexes: AbstractSet[int]) -> bool:
        """Whether an object that ``indexes`` hold is durable.

        With the stores that hold it or may still take it: whether it can become durable.
        """
        return len(self.voters & indexes) >= self.write

    def proves_absent(self, indexes: AbstractSet[int]) -> bool:
        """Whether an object that ``indexes`` lack was never acknowledged.

        Then too few other stores are left that could hold it.
        """
        return self.is_read_quorum(indexes)

    def is_read_quorum(self, indexes: AbstractSet[int]) -> bool:
        """Whether at least one of ``indexes`` holds any given acknowledged object.

        At most ``stores - write`` stores lack an acknowledged object, so one more store must have
        it.
        """
        return len(self.counting & indexes) >= self.stores - self.write + 1


def quorum_of(stores: int, write: int | None) -> Quorum:
    """The quorum of that many stores, all counting; ``write`` None means the majority.

    Raises UsageError unless 1 <= write <= stores < 2 * write: two write quorums must share a store.
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
    """The same quorum in which only ``full`` count, and ``silent`` for what they acknowledge.

    Raises UsageError for an index out of range.
    """
    counting = frozenset(full)
    unanswering = frozenset(silent) - counting
    if bad := sorted((counting | unanswering) - frozenset(range(quorum.stores))):
        raise UsageError(
            f"no store has this index. indexes={bad} stores={quorum.stores}; indexes count from 0"
        )
    return Quorum(quorum.stores, quorum.write, counting, unanswering)


def most_common_error(errors: Sequence[CkptError]) -> type[CkptError]:
    """The most frequent type of ``errors``, the earliest of equals.

    UnavailableError if there are none.
    """
    kinds = [type(error) for error in errors]
    return max(kinds, key=kinds.count, default=UnavailableError)


# ---- Speed: learned from a store's own answers, and the order of stores that follows from it.
SMALL_BYTES = 64 << 10
"""Smaller calls measure a request's latency, larger ones the bandwidth."""

SHARE = 0.2
"""Weight of the newest measurement in the moving mean."""

RATIOS_MAX = 64
"""Measurements kept to tell what is unusually slow."""

HALF_LIFE_S = 60.0
"""A store that was idle this long is taken for twice as fast, so that it is tried again and a
recovery is noticed.
"""

BYTES_PER_S_MIN = 1.0
_TOOK_S_MIN = 1e-6


@dataclass(frozen=True, slots=True)
class StoreSpeed:
    """``latency_s`` of a small call and ``bytes_per_s`` of a large one; None if not measured.

    ``ratios``: actual over expected duration of the last calls. ``late``: the ratio that 95 of 100
    of them stay below.
    """

    latency_s: float | None = None
    bytes_per_s: float | None = None
    ratios: tuple[float, ...] = ()
    late: float = 2.0


def expected_s(speed: StoreSpeed, size_bytes: int) -> float | None:
    """Expected duration of a call that moves ``size_bytes``; None if nothing was measured."""
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
        return replace(speed, latency_s=_moving_mean(speed.latency_s, took_s))
    # A call may take less than the mean latency. Then a quarter of its time counts as transfer.
    moving_s = max(took_s - (speed.latency_s or 0.0), took_s / 4)
    return replace(
        speed,
        bytes_per_s=_moving_mean(speed.bytes_per_s, max(size_bytes / moving_s, BYTES_PER_S_MIN)),
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
    """Time after which a read asks a second store too."""
    usual_s = expected_s(speed, size_bytes)
    if usual_s is None:
        return limits.hedge_s_first
    return min(limits.hedge_s_max, max(limits.hedge_s_min, usual_s * speed.late))


@dataclass(frozen=True, slots=True)
class ReadCandidate:
    """A store that a read could ask.

    ``usable``: its circuit is closed. ``expected_s``: expected duration. ``idle_s``: time since it
    was last asked.
    """

    index: int
    usable: bool
    expected_s: float | None
    idle_s: float


def read_order(candidates: Sequence[ReadCandidate], *, prefer: Sequence[int]) -> tuple[int, ...]:
    """The stores in the order in which a read asks them.

    Usable ones first, then as ``prefer`` says, then the fastest. A store that was never asked
    counts as fastest, so that each is measured once.
    """

    def rank(candidate: ReadCandidate) -> tuple[bool, int, float, int]:
        preference = prefer.index(candidate.index) if candidate.index in prefer else len(prefer)
        if candidate.expected_s is None:
            waits_s = 0.0
        else:
            halvings = min(candidate.idle_s / HALF_LIFE_S, 500.0)
            waits_s = candidate.expected_s * 0.5**halvings
        return not candidate.usable, preference, waits_s, candidate.index

    return tuple(candidate.index for candidate in sorted(candidates, key=rank))


def _moving_mean(before: float | None, new: float) -> float:
    return new if before is None else (1 - SHARE) * before + SHARE * new


def _late(ratios: Sequence[float]) -> float:
    """The ratio that 95 of 100 stay below; at least 2 while there are few measurements."""
    late = sorted(ratios)[int(0.95 * (len(ratios) - 1) + 0.5)]
    return max(late, 2.0) if len(ratios) < RATIOS_MAX // 4 else max(late, 1.0)
