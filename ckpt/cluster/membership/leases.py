"""The arithmetic of one node's lease. Pure: the caller's clock goes in, what may be done and until
when comes out.

A lease is kept alive at a third of its TTL. Its holder counts from when it *sent* the keepalive
that was acknowledged last, by its own clock, so that it stops before anybody else may think that it
has stopped. Silence proves nothing: the holder goes on asking and acts until its time is over. An
answer that says that nothing is left is loss, whatever its status code says.

A lease can be another's: who lives under it does not keep it alive, looks once in its TTL whether
it is still there, and has no time in which it may act on its own word.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from ckpt.errors import UsageError

KEEPALIVES_PER_TTL = 3
RETRIES_PER_TTL = 12
"""After silence the next keepalive goes sooner."""


@dataclass(frozen=True, slots=True)
class Renewed:
    """The keepalive sent at ``sent_s`` was answered: ``ttl_s`` were left. The node's own key was
    seen after it."""

    sent_s: float
    ttl_s: float


@dataclass(frozen=True, slots=True)
class LeaseSeen:
    """The look at ``sent_s`` found the node's own key under a lease that another one keeps
    alive."""

    sent_s: float


@dataclass(frozen=True, slots=True)
class LeaseSilent:
    """The keepalive sent at ``sent_s`` had no answer, or an error that may pass."""

    sent_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class LeaseGone:
    """The lease or the node's own key does not exist any more: it expired, or somebody took the
    node out."""

    reason: str


KeepaliveAnswer = Renewed | LeaseSeen | LeaseSilent | LeaseGone


class LeaseState(enum.Enum):
    """What a lease lets its holder do."""

    VALID = "sure"
    """Act."""
    LAPSED = "lapsed"
    """Do nothing: others may think that it expired. A keepalive may still bring it back."""
    LOST = "lost"
    """Never act under it again: join anew, under another node id."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A lease as its holder knows it. ``acknowledged_s``: when the last keepalive that was
    acknowledged was sent.

    ``borrowed``: another one holds it, and this is how who lives under it knows it.
    """

    lease_id: int
    ttl_s: float
    margin_s: float
    acknowledged_s: float
    tried_s: float
    silent: int = 0
    lost: str | None = None
    why: str = ""
    borrowed: bool = False

    @property
    def act_until_s(self) -> float:
        """Until when its holder may act, by the holder's clock."""
        return self.acknowledged_s + self.ttl_s - self.margin_s

    @property
    def next_keepalive_s(self) -> float:
        """When the next keepalive is due, or the next look."""
        parts = RETRIES_PER_TTL if self.silent else 1 if self.borrowed else KEEPALIVES_PER_TTL
        return self.tried_s + self.ttl_s / parts

    def state(self, now_s: float) -> LeaseState:
        """What it lets its holder do now."""
        if self.lost is not None:
            return LeaseState.LOST
        return LeaseState.VALID if now_s < self.act_until_s else LeaseState.LAPSED


def granted_lease(lease_id: int, *, ttl_s: float, margin_s: float, sent_s: float) -> Lease:
    """A lease whose grant was asked for at ``sent_s``. Raises UsageError where the margin leaves no
    time to act."""
    if not 0.0 < ttl_s < float("inf"):
        raise UsageError(f"not the life of a lease. ttl_s={ttl_s}")
    if not 0.0 <= margin_s < ttl_s * (1 - 1 / KEEPALIVES_PER_TTL):
        raise UsageError(
            f"the margin leaves no time to act between two keepalives. margin_s={margin_s} "
            f"ttl_s={ttl_s}"
        )
    return Lease(lease_id, ttl_s, margin_s, acknowledged_s=sent_s, tried_s=sent_s)


def borrowed_lease(lease_id: int, *, ttl_s: float, margin_s: float, now_s: float) -> Lease:
    """A lease that another one keeps alive: who lives under it never knows how long it has."""
    return Lease(
        lease_id, ttl_s, margin_s, acknowledged_s=float("-inf"), tried_s=now_s, borrowed=True
    )


def apply_answer(lease: Lease, answer: KeepaliveAnswer) -> Lease:
    """The lease after an answer. What is lost stays lost, and no answer, however late, takes time
    away."""
    if lease.lost is not None:
        return lease
    match answer:
        case LeaseGone(why):
            return replace(lease, lost=why, why=why)
        case Renewed(_, ttl_s) if ttl_s <= 0:
            return replace(lease, lost="the lease has expired", why="the lease has expired")
        case Renewed(sent_s, ttl_s):
            # A server may grant more than was asked for, or restore less: the holder counts on the
            # smaller.
            counted_s = sent_s - max(0.0, lease.ttl_s - ttl_s)
            acknowledged_s = max(lease.acknowledged_s, counted_s)
            return replace(
                lease,
                acknowledged_s=acknowledged_s,
                tried_s=max(lease.tried_s, sent_s),
                silent=0,
                why="",
            )
        case LeaseSeen(sent_s):
            return replace(lease, tried_s=max(lease.tried_s, sent_s), silent=0, why="")
        case LeaseSilent(sent_s, why):
            return replace(
                lease, tried_s=max(lease.tried_s, sent_s), silent=lease.silent + 1, why=why
            )


def default_margin_s(ttl_s: float) -> float:
    """How long before a lease can run out its holder stops acting, where nobody says otherwise:
    clocks differ."""
    return ttl_s / 10


def call_timeout_s(ttl_s: float) -> float:
    """How long one call may take: well under the time between two keepalives, so that another
    endpoint can still be tried."""
    return ttl_s / (2 * KEEPALIVES_PER_TTL)
