"""Lease arithmetic: when a keepalive is due, and until when the holder of a lease may act. Pure.

A lease is renewed three times per TTL. The holder counts from the moment at which it *sent* the
last keepalive that was acknowledged, by its own clock, and stops acting a margin before the TTL is
over. So it has always stopped before another node can take it for dead, whatever the network
delays. A missing answer proves nothing: the holder keeps asking, and acts until its time is over.
An answer that reports no time left means that the lease is lost, whatever its status code says.

A node can also live under a lease that another node renews. It only checks once per TTL that the
lease exists, and never knows how long it may act.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from ckpt.errors import UsageError

KEEPALIVES_PER_TTL = 3
RETRIES_PER_TTL = 12
"""After a keepalive without an answer the next one follows sooner."""


@dataclass(frozen=True, slots=True)
class Renewed:
    """The keepalive sent at ``sent_s`` was acknowledged with ``ttl_s`` left, and the node's own key
    was read after it.
    """

    sent_s: float
    ttl_s: float


@dataclass(frozen=True, slots=True)
class LeaseSeen:
    """The check sent at ``sent_s`` found the node's own key under another node's lease."""

    sent_s: float


@dataclass(frozen=True, slots=True)
class LeaseSilent:
    """The keepalive sent at ``sent_s`` got no answer, or an error that may pass."""

    sent_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class LeaseGone:
    """The lease or the node's own key is gone: it expired, or an epoch removed the node."""

    reason: str


KeepaliveAnswer = Renewed | LeaseSeen | LeaseSilent | LeaseGone


class LeaseState(enum.Enum):
    """What a lease lets its holder do."""

    VALID = "sure"
    """Act."""
    LAPSED = "lapsed"
    """Do nothing: other nodes may consider it expired. A later keepalive can make it valid again.
    """
    LOST = "lost"
    """Never act under it again: join anew, under another node id."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A lease as its holder knows it; all times are of the holder's clock, in seconds.

    ``acknowledged_s``: when the last acknowledged keepalive was sent. ``asked_s``: when the last
    keepalive was sent. ``unanswered``: how many keepalives in a row got no answer. ``lost_reason``:
    why it is over; None: it is not. ``borrowed``: another node renews it.
    """

    lease_id: int
    ttl_s: float
    margin_s: float
    acknowledged_s: float
    asked_s: float
    unanswered: int = 0
    lost_reason: str | None = None
    reason: str = ""
    borrowed: bool = False

    @property
    def act_until_s(self) -> float:
        """Until when its holder may act, by the holder's clock."""
        return self.acknowledged_s + self.ttl_s - self.margin_s

    @property
    def next_keepalive_s(self) -> float:
        """When the next keepalive (of a borrowed lease: the next check) is due."""
        parts = RETRIES_PER_TTL if self.unanswered else 1 if self.borrowed else KEEPALIVES_PER_TTL
        return self.asked_s + self.ttl_s / parts

    def state(self, now_s: float) -> LeaseState:
        """What it lets its holder do at ``now_s``."""
        if self.lost_reason is not None:
            return LeaseState.LOST
        return LeaseState.VALID if now_s < self.act_until_s else LeaseState.LAPSED


def granted_lease(lease_id: int, *, ttl_s: float, margin_s: float, sent_s: float) -> Lease:
    """A lease whose grant was requested at ``sent_s``.

    Raises UsageError if the margin leaves no time to act.
    """
    if not 0.0 < ttl_s < float("inf"):
        raise UsageError(f"the TTL of a lease is positive and finite. ttl_s={ttl_s}")
    # The time to act after a keepalive must exceed the time until the next one, or the lease lapses
    # in between.
    if not 0.0 <= margin_s < ttl_s * (1 - 1 / KEEPALIVES_PER_TTL):
        raise UsageError(
            f"the margin leaves no time to act between two keepalives. margin_s={margin_s} "
            f"ttl_s={ttl_s}"
        )
    return Lease(lease_id, ttl_s, margin_s, acknowledged_s=sent_s, asked_s=sent_s)


def borrowed_lease(lease_id: int, *, ttl_s: float, margin_s: float, now_s: float) -> Lease:
    """A lease that another node renews. It is never VALID here: its remaining time is unknown."""
    return Lease(
        lease_id, ttl_s, margin_s, acknowledged_s=float("-inf"), asked_s=now_s, borrowed=True
    )


def apply_answer(lease: Lease, answer: KeepaliveAnswer) -> Lease:
    """The lease after an answer.

    A lost lease stays lost, and no answer, however late, shortens the time to act.
    """
    if lease.lost_reason is not None:
        return lease
    match answer:
        case LeaseGone(reason):
            return replace(lease, lost_reason=reason, reason=reason)
        case Renewed(_, ttl_s) if ttl_s <= 0:
            # etcd answers a keepalive of an expired lease with TTL 0; its client raises nothing.
            expired = "the lease has expired"
            return replace(lease, lost_reason=expired, reason=expired)
        case Renewed(sent_s, ttl_s):
            # A server may grant more than was requested, or restore less: the holder counts on the
            # smaller.
            counted_s = sent_s - max(0.0, lease.ttl_s - ttl_s)
            return replace(
                lease,
                acknowledged_s=max(lease.acknowledged_s, counted_s),
                asked_s=max(lease.asked_s, sent_s),
                unanswered=0,
                reason="",
            )
        case LeaseSeen(sent_s):
            return replace(lease, asked_s=max(lease.asked_s, sent_s), unanswered=0, reason="")
        case LeaseSilent(sent_s, reason):
            return replace(
                lease,
                asked_s=max(lease.asked_s, sent_s),
                unanswered=lease.unanswered + 1,
                reason=reason,
            )


def default_margin_s(ttl_s: float) -> float:
    """How long before a lease can expire its holder stops acting: covers clocks that run several
    percent apart.
    """
    return ttl_s / 10


def call_timeout_s(ttl_s: float) -> float:
    """How long one call may take: half the time between two keepalives, so that another endpoint
    can still be asked.
    """
    return ttl_s / (2 * KEEPALIVES_PER_TTL)
