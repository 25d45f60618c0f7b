"""What ranks told in their marks files: read as they grow, and what of it says how a loss went."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Mark:
    """One line of a rank's file. ``at_s``: CLOCK_MONOTONIC; ``step``: complete ones; ``digest`` of
    all the rank's state."""

    name: str
    at_s: float
    pid: int
    rank: int
    world: int
    step: int = 0
    digest: str = ""


class MarksFiles:
    """All ranks' files in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read_bytes: dict[Path, int] = {}
        self._marks: list[Mark] = []

    def poll(self) -> list[Mark]:
        """All marks so far, in order of time."""
        new = False
        for path in self._folder.glob("marks-*.jsonl"):
            with path.open("rb") as file:
                file.seek(self._read_bytes.get(path, 0))
                text = file.read()
            text = text[: text.rfind(b"\n") + 1]
            self._read_bytes[path] = self._read_bytes.get(path, 0) + len(text)
            self._marks += [Mark(**json.loads(line)) for line in text.splitlines()]
            new |= bool(text)
        if new:
            self._marks.sort(key=lambda mark: mark.at_s)
        return self._marks

    def completed(self, rank: int = 0) -> int:
        """The step that a rank completed last; 0 before the first."""
        return next(
            (
                mark.step
                for mark in reversed(self.poll())
                if mark.name == "step" and mark.rank == rank
            ),
            0,
        )

    def trainer(self, rank: int) -> int:
        """The process that took a rank's last step; 0 before the first."""
        return next(
            (
                mark.pid
                for mark in reversed(self.poll())
                if mark.name == "step" and mark.rank == rank
            ),
            0,
        )

    def world(self) -> int:
        """How many ranks took the last step."""
        return next((mark.world for mark in reversed(self.poll()) if mark.name == "step"), 0)


@dataclass(frozen=True, slots=True)
class Recovered:
    """How a loss went. ``reached``: the last step before it; ``restored``: the step from which all
    went on.

    ``new_s``: when rank 0 completed the first step that nobody had completed before; ``first_s``:
    its first step at all. ``theirs``: the marks of the processes that did it.
    """

    reached: int
    restored: int
    first_s: float
    new_s: float
    world: int
    theirs: tuple[Mark, ...]

    @property
    def redone(self) -> int:
        """Completed steps that had to be done again."""
        return self.reached - self.restored

    def last_s(self, name: str) -> float:
        """When the last rank told that mark."""
        return max(mark.at_s for mark in self.theirs if mark.name == name)


def recovered(marks: Sequence[Mark], old: Collection[int]) -> Recovered | None:
    """How the job got on without the processes ``old``; None while it has not."""
    reached = max(
        (mark.step for mark in marks if mark.name == "step" and mark.pid in old), default=0
    )
    steps = [mark for mark in marks if mark.name == "step" and mark.pid not in old]
    new = next((mark for mark in steps if mark.rank == 0 and mark.step > reached), None)
    if new is None:
        return None
    began = next(mark for mark in marks if mark.pid == new.pid and mark.name == "started")
    # All that were started together with it: the last process of each rank that restored before the
    # new step.
    pids = {
        mark.rank: mark.pid for mark in marks if mark.name == "restored" and mark.at_s <= new.at_s
    }
    pids = {rank: pid for rank, pid in pids.items() if rank < new.world and pid not in old}
    theirs = tuple(mark for mark in marks if mark.pid in pids.values())
    restored = min(mark.step for mark in theirs if mark.name == "restored")
    first_s = next(mark.at_s for mark in steps if mark.pid == began.pid)
    return Recovered(reached, restored, first_s, new.at_s, new.world, theirs)


def wrong_states(marks: Sequence[Mark]) -> list[str]:
    """What was restored, or computed again, and is not what was there at that step; empty where all
    is right.

    In a world of another size rank r goes on from the state of the old rank r modulo the old size.
    """
    had: dict[tuple[int, int], str] = {}
    worlds: dict[int, int] = {}
    found = []
    for mark in marks:
        if mark.name == "restored" and mark.step in worlds:
            wanted = had.get((mark.rank % worlds[mark.step], mark.step))
            if wanted != mark.digest:
                found.append(
                    f"rank {mark.rank} of {mark.world} restored step {mark.step}: {mark.digest}, "
                    f"not {wanted}"
                )
        if mark.name != "step":
            continue
        before = had.get((mark.rank, mark.step))
        if before is not None and worlds[mark.step] >= mark.world and before != mark.digest:
            found.append(
                f"rank {mark.rank} of {mark.world} computed step {mark.step}: {mark.digest}, not "
                f"{before}"
            )
        had[mark.rank, mark.step] = mark.digest
        worlds[mark.step] = mark.world
    return found
