"""What is known of one run when it is over: facts alone, from which the checker tells whether it
was right. No I/O.

Times are of CLOCK_BOOTTIME in nanoseconds: all machines of a test are this one, and share it. A
pair is an epoch of the log and a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a key in etcd, below the job's root, as a watch told it; ``value`` None:
    deleted."""

    revision: int
    at_ns: int
    key: str
    value: bytes | None
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Trainer:
    """One process that trained: in which epoch of the membership, as which rank, where."""

    attempt: int
    rank: int
    world: int
    machine: str
    pid: int


@dataclass(frozen=True, slots=True)
class Entered:
    """A trainer goes on from ``pair`` (None: from nothing), in an epoch of the log, holding a
    state."""

    who: Trainer
    epoch: int
    at_ns: int
    pair: Pair | None
    step: int
    value: int
    trail: tuple[int, ...]
    clean: bool = True


@dataclass(frozen=True, slots=True)
class Step:
    """A trainer took a step, from number ``step`` on; ``value``: of the state after it."""

    who: Trainer
    epoch: int
    step: int
    began_ns: int
    ended_ns: int
    value: int


@dataclass(frozen=True, slots=True)
class Beat:
    """A trainer lived, and its node's board said that it may act until then."""

    who: Trainer
    at_ns: int
    until_ns: int


@dataclass(frozen=True, slots=True)
class Opened:
    """A record of the log: an epoch, what it goes on from, and line and number of the membership
    epoch in whose name it was opened."""

    seq: int
    epoch: int
    resume: Pair | None
    membership: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Committed:
    """A record of the log: a snapshot, and in which epoch its writer was."""

    seq: int
    writer: int
    pair: Pair


@dataclass(frozen=True, slots=True)
class Sighting:
    """Of an object of a store's log, while the job ran: its digest when that was first seen; None:
    it was gone."""

    at_ns: int
    store: int
    key: str
    digest: str | None


@dataclass(frozen=True, slots=True)
class Content:
    """A state: of a snapshot as it was read back, or of a rank at its end."""

    step: int
    value: int
    trail: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pause:
    """Processes of a machine were stopped: ``what`` is "node", "keeper" or "trainer"."""

    machine: str
    what: str
    from_ns: int
    to_ns: int


@dataclass(frozen=True, slots=True)
class Silence:
    """A machine heard nobody, or nobody heard it: no question of its had an answer."""

    machine: str
    from_ns: int
    to_ns: int


@dataclass(frozen=True, kw_only=True)
class History:
    """One run.

    ``stores``: how many there are; ``log_digests``: what each has of the log in the end, by its
    number and the key. ``log``: the counted and the void, in order of ``seq``; ``hole``: why its
    end can't be read. ``snapshots``: what the store's own reader lists; ``contents``: each read
    back, or why it can't be. ``reference``: the value after each number of undisturbed steps.
    ``finish``: how many steps there had to be. ``ends``: how programs that nobody killed ended.
    """

    changes: tuple[Change, ...] = ()
    entered: tuple[Entered, ...] = ()
    steps: tuple[Step, ...] = ()
    beats: tuple[Beat, ...] = ()
    log: tuple[Opened | Committed, ...] = ()
    hole: str = ""
    sightings: tuple[Sighting, ...] = ()
    log_digests: Mapping[tuple[int, str], str] = field(default_factory=dict)
    stores: int = 1
    snapshots: frozenset[Pair] = frozenset()
    newest: Pair | None = None
    contents: Mapping[Pair, Content | str] = field(default_factory=dict)
    finals: Mapping[int, Content] = field(default_factory=dict)
    pauses: tuple[Pause, ...] = ()
    silences: tuple[Silence, ...] = ()
    ends: Mapping[str, int] = field(default_factory=dict)
    reference: tuple[int, ...] = ()
    finish: int = 0
    ttl_s: float = 2.0
