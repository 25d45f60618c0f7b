"""Which replica gets the next request. Pure.

A policy is a function of what one front knows: the requests that it has sent to each replica and
that are not answered yet, how fast each answers, and one random number. Sources: round robin and
least connections as load balancers have them; two choices from M. Mitzenmacher, "The power of two
choices in randomized load balancing", IEEE TPDS 12(10), 2001, which is also the supermarket model
of ``supermarket_tail``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from ckpt.errors import UsageError


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """What a front knows of one replica.

    ``outstanding``: requests sent to it and not answered; ``outstanding_bytes``: theirs.
    ``capacity``: answers per second, as observed; ``bytes_per_s``: of the way to it. A replica that
    answered nothing yet has the others' average, or 1.
    """

    name: str
    outstanding: int = 0
    outstanding_bytes: int = 0
    capacity: float = 1.0
    bytes_per_s: float = 1e9


Policy = Callable[[Sequence[ReplicaLoad], int, float], int]
"""Replicas (at least one), how many requests were placed before, and a random number in [0, 1):
the index of the replica that gets the next request."""


def round_robin(loads: Sequence[ReplicaLoad], turn: int, draw: float) -> int:
    """Each in its turn, whatever it has to do."""
    return turn % len(loads)


def least_loaded(loads: Sequence[ReplicaLoad], turn: int, draw: float) -> int:
    """The replica with the fewest requests outstanding; among equals a random one."""
    return _least([load.outstanding for load in loads], draw)


def two_choices(loads: Sequence[ReplicaLoad], turn: int, draw: float) -> int:
    """Two different replicas at random, and of these the one with fewer requests outstanding.

    Nearly as good as ``least_loaded``, and better with several fronts: fronts that see the same
    replica idle do not all send to it.
    """
    number = len(loads)
    if number == 1:
        return 0
    first, second = divmod(int(draw * number * (number - 1)), number - 1)
    second += second >= first  # the second is any but the first
    return min(first, second, key=lambda index: (loads[index].outstanding, index != first))


def expected_wait(loads: Sequence[ReplicaLoad], turn: int, draw: float) -> int:
    """The replica that is expected to be done first: L_i / C_i + D_i / B_i with this request.

    The form of the load equation in ``article_loads`` whose terms are both seconds.
    """
    return _least(
        [
            (load.outstanding + 1) / load.capacity + load.outstanding_bytes / load.bytes_per_s
            for load in loads
        ],
        draw,
    )


POLICIES: dict[str, Policy] = {
    "two-choices": two_choices,
    "least-loaded": least_loaded,
    "expected-wait": expected_wait,
    "round-robin": round_robin,
}
"""By the name that the command line takes; the first is the default."""


def _least(values: Sequence[float], draw: float) -> int:
    least = min(values)
    equal = [index for index, value in enumerate(values) if value == least]
    return equal[int(draw * len(equal))]


def article_loads(loads: Sequence[ReplicaLoad]) -> tuple[float, ...]:
    """The next load of each node by the recurrence that this project started from, as written:

        L_i(t) = (Σ_j L_j(t-1) / C_j) / N  +  (C_i / B_i) · Σ_j D_j(t-1) / B_j

    L: ``outstanding``, C: ``capacity``, D: ``outstanding_bytes``, B: ``bytes_per_s``, N nodes. It
    adds seconds to a number without that dimension, and its first term is the same for all nodes:
    as a policy it would send everything to the node with the least C / B. ``expected_wait`` is what
    a front can balance by.
    """
    waiting = sum(load.outstanding / load.capacity for load in loads) / len(loads)
    moving = sum(load.outstanding_bytes / load.bytes_per_s for load in loads)
    return tuple(waiting + load.capacity / load.bytes_per_s * moving for load in loads)


def supermarket_tail(load: float, *, choices: int, length_max: int = 64) -> tuple[float, ...]:
    """The share of servers with at least 1, 2, ... requests where each request joins the shortest
    of ``choices`` random queues: load^((d^k - 1) / (d - 1)), and load^k for one choice.

    ``load``: arrivals per server and mean service time, 0 ≤ load < 1. The limit for many servers
    (Mitzenmacher 2001, theorem 1). Ends where the share falls below 1e-12. Raises UsageError.
    """
    if not 0 <= load < 1 or choices < 1:
        raise UsageError(
            f"queues have a limit for 0 <= load < 1 and one choice or more. load={load} "
            f"choices={choices}"
        )
    exponents = (
        length if choices == 1 else (choices**length - 1) // (choices - 1)
        for length in range(1, length_max + 1)
    )
    # As a float an exponent may be too large; its share is 0 long before.
    return tuple(
        takewhile(
            lambda share: share >= 1e-12,
            (load ** min(exponent, 10**300) for exponent in exponents),
        )
    )
