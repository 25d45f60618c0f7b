"""A small history that is right, with which tests begin before they spoil it. Pure.

Two epochs: the first with ranks 0 and 1 on machines m0 and m1 took steps 0 to 4, of which 4 were
durable; then m1 was lost, and the second, with m0 and m2, went on from step 4 to 8.
"""

from __future__ import annotations

from dataclasses import replace

from ckpt.cluster.membership.records import (
    EpochRecord,
    NodeInfo,
    NodePlacement,
    encode_epoch,
    encode_node,
)
from kit.nemesis.history import (
    Beat,
    Change,
    Committed,
    Content,
    Entered,
    History,
    Opened,
    Step,
    Trainer,
)

S = 1_000_000_000
REFERENCE = tuple(range(1000, 1020))
"""The value after so many undisturbed steps."""

FIRST = (Trainer(1, 0, 2, "m0", 10), Trainer(1, 1, 2, "m1", 11))
SECOND = (Trainer(2, 0, 2, "m0", 20), Trainer(2, 1, 2, "m2", 22))
LOST_AT = 10 * S
"""When m1's lease ran out."""

TTL_S = 2.0


def node(name: str) -> bytes:
    """What a machine's node says of itself."""
    return encode_node(NodeInfo(node=f"n-{name}", host="host", slots=1, domain=name))


def epoch(number: int, *machines: str, leader: str = "m0") -> bytes:
    """An epoch's record."""
    places = tuple(NodePlacement(f"n-{name}", 1) for name in machines)
    return encode_epoch(
        EpochRecord(
            job="job", number=number, places=places, leader=f"n-{leader}", nodes_min=2, nodes_max=2
        )
    )


def changes() -> tuple[Change, ...]:
    """The membership's."""
    return (
        *(Change(2 + n, S, f"nodes/n-m{n}", node(f"m{n}"), 100 + n) for n in range(3)),
        Change(5, S, "leader", b"n-m0", 100),
        Change(6, 2 * S, "epoch", epoch(1, "m0", "m1")),
        Change(7, LOST_AT, "nodes/n-m1", None),
        Change(8, LOST_AT + S, "epoch", epoch(2, "m0", "m2")),
    )


def steps(who: Trainer, begin: int, end: int, *, at_s: float) -> tuple[Step, ...]:
    """One after the other, 0.1 s each, in the log's epoch of the same number."""
    return tuple(
        Step(
            who,
            who.attempt,
            step,
            int((at_s + 0.1 * n) * S),
            int((at_s + 0.1 * n + 0.05) * S),
            REFERENCE[step + 1],
        )
        for n, step in enumerate(range(begin, end))
    )


def right() -> History:
    """The history."""
    line = (1,) * 4 + (2,) * 4
    return History(
        changes=changes(),
        entered=(
            *(Entered(who, 1, 2 * S, None, 0, REFERENCE[0], ()) for who in FIRST),
            *(Entered(who, 2, 12 * S, (1, 4), 4, REFERENCE[4], (1,) * 4) for who in SECOND),
        ),
        steps=(
            *(one for who in FIRST for one in steps(who, 0, 5, at_s=3.0)),
            *(one for who in SECOND for one in steps(who, 4, 8, at_s=13.0)),
        ),
        beats=(
            *(Beat(who, 4 * S, 6 * S) for who in FIRST),
            *(Beat(who, 13 * S, 15 * S) for who in SECOND),
        ),
        log=(
            Opened(0, 1, None),
            Committed(1, 1, (1, 4)),
            Opened(2, 2, (1, 4)),
            Committed(3, 2, (2, 8)),
        ),
        log_digests={(0, f"{seq}.json"): f"d{seq}" for seq in range(4)},
        snapshots=frozenset({(1, 4), (2, 8)}),
        newest=(2, 8),
        contents={
            (1, 4): Content(4, REFERENCE[4], (1,) * 4),
            (2, 8): Content(8, REFERENCE[8], line),
        },
        finals={rank: Content(8, REFERENCE[8], line) for rank in range(2)},
        ends={"m0": 0, "m2": 0},
        reference=REFERENCE,
        finish=8,
        ttl_s=TTL_S,
    )


def with_steps(history: History, *more: Step) -> History:
    """The same, and these steps."""
    return replace(history, steps=(*history.steps, *more))
