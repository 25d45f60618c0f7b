"""What happens in one run, all of it drawn from its seed beforehand. Pure.

At any time one store at most is wrong: it lost what it had, or spoils it. From then on until
everything is mended no other one may. What only keeps a store from answering may meet all of them
at once.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

S3, FORGETFUL, FOLDER = "s3", "forgetful s3", "folder"
"""Kinds of places: a server that keeps its data, one that comes back empty, a folder."""

WORLDS = (
    (S3, S3, FOLDER),
    (S3, FOLDER, S3),
    (S3, FORGETFUL, FOLDER),
    (FORGETFUL, FORGETFUL, FOLDER),
    (S3, S3, FORGETFUL),
)

_PASSING = (
    "errors",
    "denied",
    "no-writes",
    "resets-before",
    "resets-after",
    "cuts",
    "slow",
    "hangs",
    "storm",
    "freeze",
)
PASSING = {
    S3: (*_PASSING, "kill", "kill"),
    FORGETFUL: _PASSING,
    FOLDER: ("full", "ailing", "read-only", "crawling"),
}
"""Faults after which a store has all that it had."""

_HARMS = ("rot", "rot", "lose", "wipe")
HARMS = {
    S3: (*_HARMS, "wipe-bare", "wipe-down", "flips"),
    FORGETFUL: (*_HARMS, "wipe-bare", "wipe-down", "flips"),
    FOLDER: (*_HARMS, "away", "broken"),
}
"""Faults that make a store the wrong one: with ``away`` and ``broken`` it seems to be empty, though
it is not. So does every fault while the log is made: a store that is not there then has nothing
until it is filled."""

HARMLESS_AT_FIRST = frozenset({"slow", "crawling"})
"""Faults that keep no store from having its part when the log is made."""

AT_ONCE = frozenset({"rot", "lose", "wipe"})
"""Over as soon as they are done."""

OPERATIONS = {
    "save": 8,
    "restore": 3,
    "restore-step": 2,
    "look": 2,
    "rewind": 1,
    "reopen": 1,
    "scrub": 2,
    "gc": 3,
    "care": 2,
    "sync": 1,
}
"""What is done, and how often in proportion. ``care``: what a keeper does for stores that were away
or came back empty."""


@dataclass(frozen=True)
class Fault:
    """``at_request``: begins at a place's so-manieth request during the operation, before it where
    None."""

    place: int
    kind: str
    seed: int
    at_request: tuple[int, int] | None = None

    def __str__(self) -> str:
        when = (
            ""
            if self.at_request is None
            else f" at request {self.at_request[1]} of store {self.at_request[0]}"
        )
        return f"{self.kind} of store {self.place}{when}"


@dataclass(frozen=True)
class Step:
    """Some faults end, some begin, and one operation.

    ``quiet``: none is in force, and at most one store lost what it had. ``bearable``: one store at
    most has anything wrong with it, so that what needs no more than a quorum has to succeed.
    """

    operation: str
    seed: int
    ends: tuple[Fault, ...] = ()
    begins: tuple[Fault, ...] = ()
    quiet: bool = False
    bearable: bool = False

    def __str__(self) -> str:
        words = [f"end {fault}" for fault in self.ends] + [
            f"begin {fault}" for fault in self.begins
        ]
        return (
            f"{'quiet ' if self.quiet else 'bearable ' if self.bearable else ''}{self.operation} "
            f"{self.seed}" + "".join(f"; {one}" for one in words)
        )


@dataclass(frozen=True)
class Schedule:
    """One run."""

    seed: int
    world: tuple[str, ...]
    client: str
    encrypted: bool
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        head = (
            f"seed={self.seed} world={self.world} client={self.client} encrypted={self.encrypted}"
        )
        return "\n".join([head, *(f"  {number}: {step}" for number, step in enumerate(self.steps))])


def draw(seed: int, *, steps_min: int = 8, steps_max: int = 14) -> Schedule:
    """The run of a seed."""
    dice = random.Random(seed)
    world = dice.choice(WORLDS)
    weather = _Weather(dice, world, dice.choice((0.3, 0.6, 0.9)))
    steps = [weather.step(number) for number in range(dice.randint(steps_min, steps_max))]
    return Schedule(
        seed,
        world,
        "s3fs" if dice.random() < 0.05 else "obstore",
        dice.random() < 0.25,
        tuple(steps),
    )


class _Weather:
    """The faults in force, as steps are drawn."""

    def __init__(self, dice: random.Random, world: tuple[str, ...], often: float) -> None:
        self._dice = dice
        self._world = world
        self._often = often
        self._active: dict[int, Fault] = {}
        self._wrong: int | None = None
        self._made = False

    def step(self, number: int) -> Step:
        dice = self._dice
        seed = dice.getrandbits(32)
        self._made = number > 1
        if self._wrong is not None and dice.random() < 0.25:
            ends, self._active, self._wrong = tuple(self._active.values()), {}, None
            return Step("mend", seed, ends, quiet=True, bearable=True)
        ends = tuple(fault for fault in self._active.values() if dice.random() < 0.5)
        for fault in ends:
            del self._active[fault.place]
        begins: list[Fault] = []
        while len(begins) < 3 and dice.random() < (self._often if number else 0.2):
            fault = self._fault({fault.place for fault in begins})
            if fault is None:
                break
            begins.append(fault)
        operation = (
            dice.choices(list(OPERATIONS), list(OPERATIONS.values()))[0] if number > 1 else "save"
        )
        quiet = not self._active and not any(fault.at_request for fault in begins)
        ill = {self._wrong} if self._wrong is not None else set()
        ill |= {fault.place for fault in (*begins, *self._active.values())}
        # Who begins a fault that takes long is kept waiting by it.
        ill |= {
            fault.at_request[0]
            for fault in begins
            if fault.at_request and fault.kind.startswith("wipe")
        }
        return Step(operation, seed, ends, tuple(begins), quiet, len(ill) <= 1)

    def _fault(self, busy: set[int]) -> Fault | None:
        dice = self._dice
        free = [
            place
            for place in range(len(self._world))
            if place not in self._active and place not in busy
        ]
        if not free:
            return None
        place = dice.choice(free)
        kind = self._world[place]
        harmful = dice.random() < 0.35
        what = dice.choice((HARMS if harmful else PASSING)[kind])
        harmful |= not self._made and what not in HARMLESS_AT_FIRST
        if harmful and self._wrong not in (None, place):
            return None
        if what == "broken" and not self._made:
            return None  # an address that leads nowhere is the caller's mistake, as long as nothing is there
        proxied = [other for other, one in enumerate(self._world) if one != FOLDER]
        at_request = (dice.choice(proxied), dice.randint(1, 30)) if dice.random() < 0.6 else None
        fault = Fault(place, what, dice.getrandbits(32), at_request)
        if harmful:
            self._wrong = place
        if what not in AT_ONCE:
            self._active[place] = fault
        return fault
