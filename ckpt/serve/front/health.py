"""Which replicas a front sends to, from what became of requests and probes. Pure.

A replica is in one of three conditions:

* dead: it refused a connection, or a probe got no answer in time (a stopped process, a hung one).
  It gets nothing until a probe is answered.
* ejected: several requests in a row failed on it. It gets nothing for a while, longer each time.
* usable: all others.

Taking one replica out puts its load on the others. So if more than half of the replicas that are
not dead are ejected, the failures say more about the requests than about the replicas, and no
ejection counts. Ejection of outliers and this panic rule are as in Envoy's load balancer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

PROBE_EVERY_S = 0.5
"""How often each replica is probed."""
PROBE_TIMEOUT_S = 1.0
"""A probe that is not answered for so long has failed."""
FAILURES_MAX = 3
"""So many failures in a row eject a replica."""
EJECTED_S = 1.0
"""How long the first ejection lasts; each further one lasts twice as long."""
EJECTED_S_MAX = 30.0

HealthSignal = Literal["answered", "failed", "refused", "probe-answered", "probe-failed"]
"""What became of a request or a probe. ``answered``: with any status below 500, or with a 503 by
which the replica says that it did not begin. ``failed``: another status of 500 and above, a
connection that broke, or no answer in time. ``refused``: no connection was made."""


@dataclass(frozen=True, slots=True)
class ReplicaHealth:
    """What one front knows of one replica. Times are of the front's monotonic clock.

    ``failures``: in a row, of requests. ``ejections``: in a row, the present one included.
    ``ejected_until_s``: 0 if it never was. ``dead``: why it is; empty: it is not.
    """

    failures: int = 0
    ejections: int = 0
    ejected_until_s: float = 0.0
    dead: str = ""

    def usable(self, now_s: float) -> bool:
        """Whether it is to get requests."""
        return not self.dead and now_s >= self.ejected_until_s


def after(health: ReplicaHealth, signal: HealthSignal, *, now_s: float) -> ReplicaHealth:
    """What is known of a replica after one more signal."""
    match signal:
        case "refused":
            return replace(health, dead="it refused a connection")
        case "probe-failed":
            return replace(health, dead="a probe was not answered")
        case "probe-answered":
            return replace(health, dead="")
        case "failed":
            return _failed(health, now_s)
        case "answered":
            # It was good for as long as the last ejection: that one is forgotten.
            past = now_s >= health.ejected_until_s + ejection_s(health.ejections)
            return replace(health, failures=0, ejections=0 if past else health.ejections)


def _failed(health: ReplicaHealth, now_s: float) -> ReplicaHealth:
    if now_s < health.ejected_until_s:
        # Requests that were under way when it was ejected fail too, and prove nothing more.
        return health
    failures = health.failures + 1
    if failures < FAILURES_MAX:
        return replace(health, failures=failures)
    ejections = health.ejections + 1
    until_s = now_s + ejection_s(ejections)
    return replace(health, failures=0, ejections=ejections, ejected_until_s=until_s)


def ejection_s(ejections: int) -> float:
    """How long the n-th ejection in a row lasts; 0 for none."""
    if not ejections:
        return 0.0
    return min(EJECTED_S_MAX, EJECTED_S * 2.0 ** min(ejections - 1, 16))


def usable_replicas(healths: Mapping[str, ReplicaHealth], *, now_s: float) -> tuple[str, ...]:
    """Which of the serving replicas may get the next request, by name in the mapping's order.

    Never empty unless ``healths`` is: if all are dead, one of them may have come back since its
    last probe, and a request can only gain by asking it.
    """
    alive = [name for name, health in healths.items() if not health.dead]
    if not alive:
        return tuple(healths)
    good = tuple(name for name in alive if healths[name].usable(now_s))
    return good if 2 * len(good) >= len(alive) else tuple(alive)


def suspects(healths: Mapping[str, ReplicaHealth], *, now_s: float) -> frozenset[str]:
    """The replicas that others are to replace: all that this front would not send to.

    ``healths`` has the standbys too, which are probed as well. If none of all these answers, the
    front is more likely the one that is cut off, and it suspects nobody; a lone serving replica
    that hangs beside a standby that answers is suspected.
    """
    if all(health.dead for health in healths.values()):
        return frozenset()
    return frozenset(healths) - frozenset(usable_replicas(healths, now_s=now_s))
