"""Views of small jobs, made by hand."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from ckpt.cluster.membership.decide import (
    MembershipDecision,
    MembershipOptions,
    NewEpoch,
    WaitTimers,
    decide,
    update_timers,
)
from ckpt.cluster.membership.records import (
    EpochRecord,
    Leader,
    Member,
    NodeInfo,
    NodePlacement,
    StateInventory,
    Suspicion,
    View,
    ViewScope,
)


def view_of(
    nodes: Collection[str],
    *,
    places: Sequence[str] | None = None,
    number: int = 4,
    leader: str | None = "",
    suspicions: Collection[tuple[str, str]] = (),
    holdings: Mapping[str, Mapping[int, int]] | None = None,
    domains: Mapping[str, str] | None = None,
    slots: Mapping[str, int] | None = None,
) -> View:
    """``nodes`` live; ``places`` is the epoch, None: there is none. ``suspicions`` are pairs (who,
    by whom)."""
    slots = slots or {}
    world = sum(slots.get(node, 2) for node in places or ())
    members = tuple(
        Member(
            NodeInfo(
                node=node,
                host=f"host-{node}",
                domain=(domains or {}).get(node, ""),
                slots=slots.get(node, 2),
            ),
            lease_id=n + 1,
            joined_revision=n + 1,
            inventory=StateInventory(world, dict(holdings[node]))
            if holdings and node in holdings
            else None,
        )
        for n, node in enumerate(sorted(nodes))
    )
    epoch = None
    if places is not None:
        epoch = EpochRecord(
            job="j",
            number=number,
            places=tuple(NodePlacement(node, slots.get(node, 2)) for node in places),
            leader="z",
            nodes_min=1,
            nodes_max=99,
        )
    leads = min(nodes, default=None) if leader == "" else leader
    return View(
        job="j",
        revision=50,
        scope=ViewScope.ALL,
        leader=Leader(leads, 9) if leads is not None else None,
        epoch=epoch,
        epoch_revision=7 if epoch else 0,
        members=members,
        suspicions=tuple(Suspicion(node, by, "reset") for node, by in suspicions),
    )


def decided(
    view: View, options: MembershipOptions, *, now_s: float = 100.0, since_s: float = 0.0
) -> MembershipDecision:
    """What is decided at ``now_s`` where all has been as it is since ``since_s``."""
    noticed = update_timers(WaitTimers(), view, options, since_s)
    return decide(view, noticed, options, now_s)


def after(view: View, decision: NewEpoch) -> View:
    """The view once the decision was published."""
    members = tuple(member for member in view.members if member.node not in decision.remove)
    return View(
        job=view.job,
        revision=view.revision + 1,
        scope=view.scope,
        leader=view.leader,
        epoch=decision.record,
        epoch_revision=view.revision + 1,
        members=members,
        suspicions=view.suspicions,
    )
