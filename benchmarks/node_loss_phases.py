"""Where the time of a recovery went: what keepers wrote in their logs and ranks in their marks, cut
into phases.

Keepers stamp their lines with the machine's clock, ranks with CLOCK_MONOTONIC; on one machine the
difference is a number.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from recovery_nodes_marks import Recovered

PHASES = ("detect", "publish", "fork", "build", "gather", "open", "fetch", "step", "redo")
"""In this order, each from the end of the one before:

detect    a witness told the membership that the node is gone, another node leads, or (silent) its
lease was seen to be over publish   the epoch's record is in the membership fork      what is left
of the old trainers is dead, the last new one runs build     the user's: from the start of the
function to its first ``track``, the process group included gather    rank 0's keeper has asked all
nodes what they hold open      the log has the epoch; which snapshot it goes on from is known fetch
the last rank has its state step      rank 0 completed a step redo      and one that nobody had
completed before
"""

_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3}) [A-Z]+ \[rank -?\d+\] (.*)")
_PUBLISHED = re.compile(r"epoch (\d+): (.*)")
_MIRRORED = re.compile(r"before epoch \d+ all nodes had (?:epoch \d+ step (\d+)|None) on others")


@dataclass(frozen=True, slots=True)
class Said:
    """One line of a keeper. ``at_s``: CLOCK_MONOTONIC."""

    at_s: float
    text: str


def said_in(logs: Iterable[Path]) -> list[Said]:
    """All that keepers wrote, in order of time."""
    behind_s = time.time() - time.monotonic()
    found = []
    for path in logs:
        for line in path.read_text(errors="replace").splitlines():
            if (match := _LINE.fullmatch(line)) is not None:
                stamp_s = datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S").astimezone().timestamp()
                found.append(Said(stamp_s + int(match[2]) / 1e3 - behind_s, match[3]))
    return sorted(found, key=lambda one: one.at_s)


@dataclass(frozen=True, slots=True)
class Account:
    """One recovery. ``epochs``: how many were published on the way; ``mirrored``: the last step
    that was on other nodes."""

    phases_s: dict[str, float]
    epochs: int
    why: str
    mirrored: int

    @property
    def total_s(self) -> float:
        """From the loss to the first new step."""
        return sum(self.phases_s.values())


def account(said: Sequence[Said], found: Recovered, lost_s: float) -> Account:
    """The phases from ``lost_s`` on. A stamp that is missing, or earlier than the one before, ends
    its phase at once."""
    during = [one for one in said if lost_s <= one.at_s <= found.new_s]
    published = [
        (one.at_s, match[2]) for one in during if (match := _PUBLISHED.match(one.text)) is not None
    ]
    published_s = published[-1][0] if published else lost_s
    told = [
        one.at_s
        for one in during
        if "is suspected: " in one.text or one.text.startswith("this node leads")
    ]
    restored_s = found.last_s("restored")
    ends = {
        "detect": min([*told, *(at_s for at_s, _ in published)], default=lost_s),
        "publish": published_s,
        "fork": found.last_s("started"),
        "build": found.last_s("grouped"),
        "gather": _last(during, r"\d+ nodes hold", restored_s),
        "open": _last(during, r"epoch \d+ is open", restored_s),
        "fetch": restored_s,
        "step": found.first_s,
        "redo": found.new_s,
    }
    phases_s, before_s = {}, lost_s
    for name in PHASES:
        end_s = max(before_s, ends[name])
        phases_s[name], before_s = end_s - before_s, end_s
    mirrored = [
        int(match[1] or 0) for one in during if (match := _MIRRORED.match(one.text)) is not None
    ]
    return Account(
        phases_s, len(published), published[-1][1] if published else "", max(mirrored, default=-1)
    )


def _last(during: Sequence[Said], pattern: str, before_s: float) -> float:
    return max(
        (one.at_s for one in during if one.at_s <= before_s and re.match(pattern, one.text)),
        default=0.0,
    )
