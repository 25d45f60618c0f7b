"""What a scrub found and did, as it is told to people and programs."""

from __future__ import annotations

from dataclasses import dataclass, field

from ckpt.log.state import Hole
from ckpt.maintenance.copies import What
from ckpt.values import SnapshotId

TROUBLES_MAX = 10_000
"""How many troubles a report names; all are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """One object that is not as it should be at one store.

    ``offsets`` are those of a pack's chunks that are not right there, none for other objects and for a copy that is gone.
    ``lost``: no store has the object (or one of its chunks) rightly. ``mended``: a right copy was written since.
    """

    key: str
    store: int
    what: What
    message: str
    offsets: tuple[int, ...] = ()
    lost: bool = False
    mended: bool = False


@dataclass(slots=True)
class StoreTally:
    """One store in numbers. ``strays`` are objects that nothing refers to: uploads under way, or what a sweep will delete.

    ``role``: ``ready``; ``headless``: its ``ckpt.json`` is gone or damaged; ``empty``: nothing is there; ``away``: it did not
    answer, then or too often later. ``away`` and ``empty`` ones are not compared, unless an empty one is to be filled.
    """

    url: str
    role: str
    store_id: str = ""
    problem: str = ""
    objects: int = 0
    ok: int = 0
    missing: int = 0
    damaged: int = 0
    unreadable: int = 0
    mended: int = 0
    strays: int = 0
    stray_bytes: int = 0

    def count(self, what: What, copies: int = 1) -> None:
        """So many copies were looked at, and are ``what``."""
        self.objects += copies
        match what:
            case What.OK:
                self.ok += copies
            case What.MISSING:
                self.missing += copies
            case What.DAMAGED:
                self.damaged += copies
            case What.UNREADABLE:
                self.unreadable += copies


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrubReport:
    """Everything that was found. ``complete`` is False where the scrub was stopped: the same scrub goes on from there.

    ``thin``: objects on fewer stores than the write quorum when they were looked at. ``lost``: objects that no store has
    rightly. ``unmended``: copies that still are not right, of objects that some store has. ``hole``: the log can't be read on.
    """

    complete: bool
    job: str
    snapshots: int
    records: int
    moved_bytes: int
    stores: tuple[StoreTally, ...]
    troubles: tuple[Trouble, ...]
    troubles_total: int
    thin: int
    lost: int
    unmended: int
    hole: Hole | None
    untraced: tuple[SnapshotId, ...]
    """Snapshots of which a manifest or part is lost, so that what they refer to can't all be found."""

    @property
    def ok(self) -> bool:
        """Whether every store that is to hold everything now does, as far as it was compared."""
        return self.complete and self.hole is None and not (self.lost or self.unmended or self.away)

    @property
    def away(self) -> int:
        """How many stores did not answer, or hold nothing."""
        return sum(store.role in ("away", "empty") for store in self.stores)

    @property
    def found(self) -> bool:
        """Whether anything was not as it should be, mended since or not."""
        return bool(self.troubles_total or self.hole or self.away)


@dataclass(slots=True)
class Findings:
    """What is being gathered while a scrub runs. Only its own thread changes it."""

    stores: list[StoreTally]
    write_quorum: int
    troubles: list[Trouble] = field(default_factory=list)
    total: int = 0
    thin: int = 0
    lost: int = 0
    unmended: int = 0

    def add(self, trouble: Trouble) -> None:
        """Note a trouble; the counts of lost and unmended objects are the caller's."""
        self.total += 1
        if len(self.troubles) < TROUBLES_MAX:
            self.troubles.append(trouble)
