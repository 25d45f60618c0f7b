"""What is done to one job, and when: all of it drawn from a seed beforehand. Pure."""

from __future__ import annotations

import random
from dataclasses import dataclass

TTL_S = 2.0
"""After how long a silent node is lost: the shortest that etcd grants."""
CLOCK_JUMP_S = 3600

WHOM = ("root", "placed", "standby", "leader")
"""Which machine, as things are when the act begins: that of rank 0, another that holds ranks, one
that holds none, that which leads the membership."""

ACTS = {
    "kill-node": 4,
    "kill-trainer": 3,
    "kill-keeper": 3,
    "pause-node": 4,
    "pause-keeper": 3,
    "pause-trainer": 2,
    "cut": 6,
    "deaf": 2,
    "mute": 2,
    "apart": 2,
    "clock": 4,
    "etcd-kill": 2,
    "etcd-kill-leader": 3,
    "etcd-freeze": 2,
    "etcd-freeze-all": 2,
    "etcd-cut": 2,
    "etcd-restart-all": 2,
    "store-stall": 4,
    "store-full": 2,
}
"""What is done, and how often in proportion.

``cut``: the link of a machine is down. ``deaf``: all that is sent to it is lost, while what it
sends arrives; ``mute``: the other way. ``apart``: it and one other can't reach each other, while
both reach all else. ``clock``: its wall clock jumps. ``store-stall``: what is written to a store
waits; ``store-full``: no byte is left on it.
"""

ONCE = frozenset({"kill-trainer", "kill-keeper"})
"""Over as soon as they are done; all others are undone after ``last_s``, a killed node by one that
is started in its place."""

ON_TRAINER = frozenset({"kill-trainer", "pause-trainer"})
"""Only machines that hold ranks have one."""

ON_STORE = frozenset(kind for kind in ACTS if kind.startswith("store"))
ON_ETCD = frozenset(kind for kind in ACTS if kind.startswith("etcd"))


@dataclass(frozen=True, slots=True)
class Act:
    """One act. ``whom``: one of ``WHOM``; "" where it is etcd's or a store's. ``number`` chooses where several
    may be meant."""

    at_s: float
    kind: str
    whom: str = ""
    last_s: float = 0.0
    number: int = 0

    def __str__(self) -> str:
        whom = f" {self.whom}" if self.whom else ""
        last = f" for {self.last_s:.1f} s" if self.last_s else ""
        return f"{self.at_s:5.1f} s {self.kind}{whom}{last}"


@dataclass(frozen=True, slots=True)
class Schedule:
    """All acts, in the order in which they begin. Their times count from when the job trains."""

    seed: int
    ttl_s: float
    acts: tuple[Act, ...]

    def __str__(self) -> str:
        return "\n".join(
            [f"seed={self.seed} ttl={self.ttl_s:g}", *(f"  {act}" for act in self.acts)]
        )


def longest_s(ttl_s: float) -> float:
    """How long an act lasts at most: longer than it takes until a lost node's ranks are given away,
    in most cases."""
    return 2 * ttl_s + 2


def draw(seed: int, *, ttl_s: float = TTL_S, acts_min: int = 4, acts_max: int = 8) -> Schedule:
    """The schedule of a seed. Acts overlap, but no two of one kind on the same are in force at
    once."""
    dice = random.Random(seed)
    at_s = 0.5
    acts: list[Act] = []
    for _ in range(dice.randint(acts_min, acts_max)):
        kind = dice.choices(list(ACTS), list(ACTS.values()))[0]
        whom = (
            ""
            if kind in ON_ETCD | ON_STORE
            else dice.choice(WHOM[:2] if kind in ON_TRAINER else WHOM)
        )
        last_s = 0.0 if kind in ONCE else round(dice.uniform(1.0, longest_s(ttl_s)), 1)
        acts.append(Act(round(at_s, 1), kind, whom, last_s, dice.randrange(100)))
        # Now and then at once: what meets a recovery that has just begun.
        at_s += dice.uniform(0.0, 0.6) if dice.random() < 0.3 else dice.uniform(1.0, 4.5)
    return Schedule(seed, ttl_s, tuple(acts))
