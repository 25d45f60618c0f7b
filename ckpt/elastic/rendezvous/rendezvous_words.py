"""What agents know of each other: who waits, who runs which round, and what a round is. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import msgspec

from ckpt.cluster.membership.records import EpochRecord, Member, View
from ckpt.errors import IntegrityError
from ckpt.format.canonical import ready

WAITING = "waiting"
RUNNING = "running"
ALONE = "alone"


class Seat(msgspec.Struct, frozen=True):
    """What an agent says it does. ``round``: the last one that it was in, 0: none.

    ``waiting`` at the barrier; ``running`` the workers of that round; ``alone``: running workers in no round, as a standby does
    whose keeper is warm, and whoever comes back to a job that its keepers hold together.
    """

    doing: str
    round: int = 0


class _Note(msgspec.Struct, frozen=True):
    lease: int


ready(Seat, _Note)


def encode_seat(seat: Seat) -> bytes:
    """Its bytes."""
    return msgspec.json.encode(seat)


def decode_seat(data: bytes) -> Seat | None:
    """The seat in ``data``, which is not trusted; None where it is none."""
    try:
        return msgspec.json.decode(data, type=Seat)
    except msgspec.MsgspecError:
        return None


def agent_of(node: str) -> str:
    """The agent behind a node id: it joins anew under another id when its membership is lost, and is the same agent."""
    return node.rpartition("-")[0]


@dataclass(frozen=True, slots=True)
class Round:
    """A numbered world of agents, in the order of their ranks. ``lease``: its own, which keeps the keys of its store."""

    number: int
    agents: tuple[str, ...]
    lease: int


def round_note(lease: int) -> str:
    """What an epoch's record holds beside its places."""
    return msgspec.json.encode(_Note(lease)).decode()


def round_of(record: EpochRecord) -> Round:
    """The round that an epoch is. Raises IntegrityError where it is none."""
    try:
        note = msgspec.json.decode(record.note.encode(), type=_Note)
    except msgspec.MsgspecError as error:
        raise IntegrityError(f"an epoch that no agent wrote. job={record.job} epoch={record.number}") from error
    return Round(record.number, tuple(agent_of(place.node) for place in record.places), note.lease)


@dataclass(frozen=True)
class Look:
    """The agents at one revision. ``kept``: keepers hold the job together below them. ``closed``: why, or None."""

    view: View
    seats: Mapping[str, Seat]
    kept: bool = False
    closed: str | None = None

    @cached_property
    def round(self) -> Round | None:
        """The newest round."""
        return None if self.view.epoch is None else round_of(self.view.epoch)

    @cached_property
    def live(self) -> Mapping[str, Member]:
        """The members, by agent: the one that joined last where an older membership has not run out yet."""
        found: dict[str, Member] = {}
        for member in sorted(self.view.members, key=lambda one: one.joined):
            found[agent_of(member.node)] = member
        return found

    def seat(self, agent: str) -> Seat | None:
        """What a living agent does; None: it is gone, or has not said it yet."""
        member = self.live.get(agent)
        return None if member is None else self.seats.get(member.node)

    @cached_property
    def lost(self) -> tuple[str, ...]:
        """The agents of the round that are gone."""
        return tuple(one for one in self._agents if one not in self.live)

    @cached_property
    def back(self) -> tuple[str, ...]:
        """The agents of the round that have left it and wait for another one."""
        return tuple(one for one in self._agents if self._waits(one) and self._been(one))

    @cached_property
    def busy(self) -> tuple[str, ...]:
        """The agents of the round that run it, or are about to."""
        alone = [one for one in self._agents if (seat := self.seat(one)) is not None and seat.doing == ALONE]
        return tuple(one for one in self._agents if one not in {*self.lost, *self.back, *alone})

    @cached_property
    def fresh(self) -> tuple[str, ...]:
        """The agents that wait and are in no round."""
        return tuple(one for one in self.live if one not in self._agents and self._waits(one))

    @property
    def _agents(self) -> tuple[str, ...]:
        return () if self.round is None else self.round.agents

    def _waits(self, agent: str) -> bool:
        seat = self.seat(agent)
        return seat is not None and seat.doing == WAITING

    def _been(self, agent: str) -> bool:
        seat = self.seat(agent)
        return seat is not None and self.round is not None and seat.round >= self.round.number
