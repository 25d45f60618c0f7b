"""What a node can do in a job's membership, and what it is told. The seam that the rest of ckpt is
written against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from ckpt.cluster.membership.leases import LeaseState
from ckpt.cluster.membership.records import EpochRecord, NodeInfo, View, ViewScope


@dataclass(frozen=True, slots=True)
class Ticket:
    """A node's membership: whoever has it can take it on, a keeper that follows a dead one too."""

    node: str
    lease_id: int


@dataclass(frozen=True, slots=True)
class LeaseStatus:
    """What a node may do. Times are CLOCK_BOOTTIME in seconds; ``epoch`` is the newest that its
    keepalives saw, 0: none.

    It may act while its clock is before ``act_until_s``. ``placed``: whether that epoch gives it
    ranks.
    """

    state: LeaseState
    act_until_s: float
    epoch: int
    placed: bool
    why: str = ""


@dataclass(frozen=True, slots=True)
class Leading:
    """This node leads."""


@dataclass(frozen=True, slots=True)
class Following:
    """Another one does."""

    node: str


@dataclass(frozen=True, slots=True)
class Published:
    """The epoch holds."""

    revision: int


@dataclass(frozen=True, slots=True)
class NotPublished:
    """It does not: somebody else came first, or this node does not lead any more. Look again."""

    reason: str


@dataclass(frozen=True, slots=True)
class MembershipUnknown:
    """No answer came: it may have been done. Repeating the same call is harmless, and tells."""

    reason: str


class Membership(Protocol):
    """One node in one job. No node is special: each can do all of it. Safe to be called from
    several threads.

    Calls that read raise UnavailableError where no answer came. Calls that write say ``Unknown``,
    or raise UnavailableError where repeating is all that can be done. FencedError: this node is no
    member (any more).
    """

    def join(self, info: NodeInfo, *, lease_id: int = 0, agent: str = "") -> Ticket:
        """Become a member, and stay one: the lease is kept alive from now on.

        ``agent``: another one on this machine that may put its keys, of another job, under this
        lease too; that is said under ``names.agent_fact``. Such a lease is not ended when this node
        leaves: it runs out by itself. ``lease_id``: take on the membership of that ticket, whose
        process is known to be dead. After UnavailableError join under a new node id: this one may
        have joined. Raises ConflictError where the node id is another's, FencedError where the
        membership to be taken on is over, UnavailableError.
        """
        ...

    def lease_status(self) -> LeaseStatus:
        """What this node may do now. Asks nobody; costs nothing."""
        ...

    def view(self, scope: ViewScope = ViewScope.ALL) -> View:
        """The job at one revision, read linearizably. Raises IntegrityError where the epoch can't
        be read."""
        ...

    def wait_change(
        self, after: int, *, timeout_s: float, scope: ViewScope = ViewScope.ALL
    ) -> bool:
        """Whether something within ``scope`` may have changed after revision ``after``; waits for
        it up to ``timeout_s``.

        True at once where this node is no member any more. A wait is an economy, not a promise:
        look now and then all the same.
        """
        ...

    def lead(self, view: View | None = None) -> Leading | Following | MembershipUnknown:
        """Try to lead: where nobody does, or in place of the leader of ``view`` where witnesses
        there confirm its death."""
        ...

    def publish(
        self, record: EpochRecord, view: View, *, remove: tuple[str, ...] = ()
    ) -> Published | NotPublished | MembershipUnknown:
        """Make ``record`` the epoch and end the membership of ``remove``, if leader and epoch are
        still those of ``view``."""
        ...

    def leave(self, *, keep: bool = False) -> None:
        """End the membership. ``keep``: end only this process's part, for another one that takes
        the ticket on."""
        ...


class MemberFacts(Protocol):
    """What members say besides, each under its own lease. Errors as in Membership."""

    def put_fact(self, fact: str, value: bytes | None) -> None:
        """Say something under this node's lease, in place of what it said before; None: take it
        back."""
        ...

    def read_facts(self, fact: str) -> Mapping[str, bytes]:
        """What each node says about it."""
        ...

    def suspect(self, node: str, why: str | None) -> None:
        """Say that ``node`` may be dead; None: take it back. A witness can suspect a few at a time;
        its oldest word goes."""
        ...
