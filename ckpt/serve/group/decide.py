"""Who serves in a group, and what an operator's commands make of its records. Pure.

Every process of a group decides alike from the same view and writes what it decided only if the
records are still those of the view. So none of them leads, and none is missed when it dies.
"""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from ckpt.errors import ConflictError, NotFoundError, UsageError
from ckpt.serve.group.records import (
    GroupView,
    OrderRecord,
    ReplicaRecord,
    RolesRecord,
    generation_name,
    parse_generation,
)
from ckpt.values import SnapshotId

BEFORE_ALL = SnapshotId(-1, -1)


# ---- who serves


def decide_roles(
    view: GroupView, *, wanted: int, suspects: Collection[str] = ()
) -> RolesRecord | None:
    """The roles that the group should have; None if it has them.

    A replica that serves goes on serving for as long as it is alive, ready and not drained, so that
    roles change only where they must. A place that is free goes to the ready standby with the
    newest generation. ``suspects`` (replicas that do not answer a front) give their place to one
    that answers, and get one only if nobody else is there: a suspicion may be wrong. If fewer are
    wanted than serve, suspects go first, then the last. ``wanted`` counts only while the group has
    no roles yet.
    """
    before = view.roles or RolesRecord(wanted=wanted)
    drained = tuple(name for name in before.drained if name in view.replicas)
    able = {
        name: replica
        for name, replica in view.replicas.items()
        if replica.state == "ready" and name not in drained
    }
    incumbents = [name for name in before.serving if name in able]
    spare = sorted(able.keys() - set(incumbents))
    spare.sort(key=lambda name: able[name].served or BEFORE_ALL, reverse=True)
    good_spare = [name for name in spare if name not in suspects]
    placed = [name for name in incumbents if name not in suspects]
    room = before.wanted - len(placed)
    if room < 0:
        serving = placed[:room]
    else:
        # Those who answer fill all places that they can; what is left stays with suspects.
        chosen = {*placed, *good_spare[:room]}
        doubtful = [name for name in [*incumbents, *spare] if name in suspects]
        chosen.update(doubtful[: before.wanted - len(chosen)])
        serving = [name for name in [*incumbents, *spare] if name in chosen]
    roles = RolesRecord(wanted=before.wanted, serving=tuple(serving), drained=drained)
    return None if roles == view.roles else roles


# ---- what an operator asks


def scaled(view: GroupView, wanted: int) -> RolesRecord:
    """The roles with another number of replicas that are to serve. Raises UsageError."""
    if wanted < 1:
        raise UsageError(f"at least one replica serves. replicas={wanted}")
    return _settled(view, msgspec.structs.replace(_roles(view), wanted=wanted))


def promoted(view: GroupView, name: str) -> RolesRecord:
    """The roles with the standby ``name`` serving in the place of the last one that serves.

    One that was drained may serve again by this. Raises NotFoundError if there is no such replica,
    and ConflictError if it is not ready.
    """
    replica = _replica(view, name)
    if replica.state != "ready":
        raise ConflictError(
            f"the replica can't serve now. replica={name} state={replica.state}; wait until it is "
            "ready"
        )
    roles = _roles(view)
    others = [one for one in roles.serving if one != name]
    full = len(others) >= roles.wanted and name not in roles.serving
    kept = others[: roles.wanted - 1] if full else others
    serving = roles.serving if name in roles.serving else (*kept, name)
    drained = tuple(one for one in roles.drained if one != name)
    return msgspec.structs.replace(roles, serving=tuple(serving), drained=drained)


def drained(view: GroupView, name: str) -> RolesRecord:
    """The roles without ``name``, which gets no new request until it is promoted.

    A ready standby takes its place in the same write. Raises NotFoundError if there is no such
    replica, and ConflictError if no other replica could serve.
    """
    _replica(view, name)
    roles = _roles(view)
    if name in roles.drained:
        return roles
    wished = msgspec.structs.replace(roles, drained=(*roles.drained, name))
    settled = _settled(view, wished)
    if not settled.serving:
        raise ConflictError(
            f"no other replica is ready, so nobody would serve. replica={name} start one more first"
        )
    return settled


def _settled(view: GroupView, wished: RolesRecord) -> RolesRecord:
    """``wished`` with its places filled as the group would fill them next."""
    after = GroupView(view.revision, replicas=view.replicas, roles=wished)
    return decide_roles(after, wanted=wished.wanted) or wished


def _roles(view: GroupView) -> RolesRecord:
    if view.roles is None:
        raise NotFoundError("the group has no roles yet; start a replica")
    return view.roles


def _replica(view: GroupView, name: str) -> ReplicaRecord:
    replica = view.replicas.get(name)
    if replica is None:
        raise NotFoundError(
            f"no such replica in the group. replica={name} replicas={sorted(view.replicas)}"
        )
    return replica


def follow_order(view: GroupView, follow: str) -> OrderRecord:
    """The next order: all follow that. ``follow`` is checked by the caller."""
    before = view.order or OrderRecord(serial=0)
    return OrderRecord(serial=before.serial + 1, follow=follow)


def stay_order(view: GroupView, generation: str | None) -> OrderRecord:
    """The next order: all serve ``generation`` and stay there; None: the newest that is served.

    Raises UsageError if that is no generation's id, and NotFoundError if nothing is served.
    """
    wished = parse_generation(generation) if generation else newest_served(view)
    return _stay(view, wished)


def rollback_order(view: GroupView) -> OrderRecord:
    """The next order: back to the newest generation before the served one that every serving
    replica has in memory, so that it takes no read.

    Raises NotFoundError that lists what is kept if there is none.
    """
    served = newest_served(view)
    common = set.intersection(*(set(replica.in_memory) for replica in view.serving))
    older = [kept for kept in common if kept < served]
    if not older:
        kept_by = {replica.name: list(replica.kept) for replica in view.serving}
        raise NotFoundError(
            "no generation before the served one is in the memory of all. "
            f"served={generation_name(served)} kept={kept_by}; name one, and those that lack it "
            "read it from the store"
        )
    return _stay(view, max(older))


def newest_served(view: GroupView) -> SnapshotId:
    """The newest generation that a serving replica answers with. Raises NotFoundError if none."""
    served = [replica.served for replica in view.serving if replica.served is not None]
    if not served:
        raise NotFoundError("no replica serves a generation yet")
    return max(served)


def _stay(view: GroupView, generation: SnapshotId) -> OrderRecord:
    before = view.order or OrderRecord(serial=0)
    return msgspec.structs.replace(
        before, serial=before.serial + 1, generation=generation_name(generation)
    )
