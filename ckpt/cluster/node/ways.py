"""What a node needs from those who make it: a membership, whom it tells what, and how it is reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from ckpt.cluster.membership.api import Facts, Membership
from ckpt.cluster.membership.records import EpochRecord
from ckpt.cluster.mesh.connections import Heard, Lines
from ckpt.cluster.mesh.messages import Meet, Word
from ckpt.cluster.node.note import Note


class Member(Membership, Facts, Protocol):
    """A driver of the membership: both of its seams."""


@dataclass(frozen=True, slots=True)
class Epoch:
    """An epoch as it concerns this node, complete: where its ranks meet is known.

    ``addresses`` of the lines by node, those of standbys too; ``peers``: where nodes lend their memory; ``domains``: what fails
    together. ``meet``: None where this node has no ranks, or the job ends. ``me``: this node's id in it.
    """

    record: EpochRecord
    note: Note
    addresses: Mapping[str, str]
    peers: Mapping[str, str]
    domains: Mapping[str, str]
    meet: Meet | None
    me: str = ""

    @property
    def number(self) -> int:
        """Its number."""
        return self.record.number

    @property
    def standbys(self) -> tuple[str, ...]:
        """The nodes that lend memory and have no ranks."""
        return tuple(sorted(node for node in self.peers if node not in self.record.ranks))


@dataclass(frozen=True, slots=True)
class Told:
    """What a node tells its keeper, from threads of its own."""

    epoch: Callable[[Epoch], object]
    members: Callable[[Epoch], object]
    """The epoch that was told goes on with other standbys, or was there before this node, which is one."""
    out: Callable[[str], object]
    """This node is no member any more, so nothing of it may go on; it joins again by itself."""
    word: Callable[[str, Word], object]
    up: Callable[[str], object]
    down: Callable[[str, str], object]
    """A line to another node is up, or broke, with why."""
    acts: Callable[[float], None] = lambda until_s: None
    """Its lease was prolonged: until when, of CLOCK_BOOTTIME in seconds, it may act."""


@dataclass(frozen=True, slots=True)
class Ways:
    """How a node is reached. ``lines`` to others, for a node of that name; ``meeting``: where the trainers of an epoch meet.

    ``agent``: the launcher's own on this machine, which may live under this node's lease; "" where there is none.
    """

    lines: Callable[[str, Heard], Lines]
    meeting: Callable[[], tuple[str, int]]
    agent: str = ""
