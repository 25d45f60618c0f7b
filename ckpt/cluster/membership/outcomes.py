"""What membership calls return. Pure.

A call that writes returns its outcome as a value: losing a race is ordinary, and an answer may be
missing.
"""

from __future__ import annotations

from dataclasses import dataclass

from ckpt.cluster.membership.leases import LeaseState


@dataclass(frozen=True, slots=True)
class Ticket:
    """A node's membership: its id and its lease.

    A process that has the ticket can take the membership on: a keeper started after its predecessor
    died does.
    """

    node: str
    lease_id: int


@dataclass(frozen=True, slots=True)
class LeaseStatus:
    """What a node may do.

    It may act while its CLOCK_BOOTTIME, in seconds, is before ``act_until_s``.

    ``epoch`` is the newest that its keepalives saw, 0: none. ``placed``: whether that epoch gives
    it ranks.
    """

    state: LeaseState
    act_until_s: float
    epoch: int
    placed: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Leading:
    """This node leads."""


@dataclass(frozen=True, slots=True)
class Following:
    """Another node leads."""

    node: str


@dataclass(frozen=True, slots=True)
class Published:
    """The epoch holds, since ``revision``."""

    revision: int


@dataclass(frozen=True, slots=True)
class NotPublished:
    """The epoch does not hold: another one came first, or this node does not lead any more.

    Read the view again.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class MembershipUnknown:
    """No answer arrived, so the write may have happened.

    Repeating the same call is harmless and finds out.
    """

    reason: str
