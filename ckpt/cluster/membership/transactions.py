"""Every transaction of membership, and what its outcome means. Pure.

Each is harmless when it is done twice, since its own result makes its conditions fail and is recognised by reading; and when
it is done late, since it compares the revision of what it replaces.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ckpt.cluster.membership import names
from ckpt.cluster.membership.api import Following, Leading, Lost, Published, Ticket
from ckpt.cluster.membership.records import (
    Leader,
    Member,
    Scope,
    Suspicion,
    View,
    decode_epoch,
    decode_holdings,
    decode_node,
)
from ckpt.cluster.membership.suspects import confirmed
from ckpt.errors import CkptError, ConflictError, FencedError
from ckpt.keyspace.base import (
    OPS_MAX,
    Compare,
    Delete,
    Equals,
    Exists,
    Keys,
    KeyValue,
    Leased,
    Outcome,
    Put,
    Transaction,
    Unchanged,
)

REMOVES_MAX = OPS_MAX - 10


def join(ticket: Ticket, info: bytes, agent: str = "") -> Transaction:
    """Become a member, under a lease that was granted for it; ``agent`` may live under that lease too."""
    key = names.node_key(ticket.node)
    return Transaction((Unchanged(key, 0),), _joins(ticket, info, agent), (Keys(key, values=False),))


def take_on(ticket: Ticket, info: bytes, agent: str = "") -> Transaction:
    """Go on with a membership that another process began."""
    key = names.node_key(ticket.node)
    return Transaction((Leased(key, ticket.lease_id),), _joins(ticket, info, agent), (Keys(key, values=False),))


def _joins(ticket: Ticket, info: bytes, agent: str) -> tuple[Put, ...]:
    own = Put(names.node_key(ticket.node), info, ticket.lease_id)
    word = (Put(names.said_key(names.agent_fact(agent), ticket.node), b"", ticket.lease_id),) if agent else ()
    return (own, *word)


def joined(outcome: Outcome, ticket: Ticket) -> None:
    """Raises ConflictError where the node id belongs to another lease, FencedError where the membership is over."""
    found = outcome.found[0]
    if outcome.held or (found and found[0].lease_id == ticket.lease_id):
        return
    if found:
        raise ConflictError(f"another member has this node id. node={ticket.node} join under a new one")
    raise FencedError(f"this membership is over. node={ticket.node} join under a new node id")


def look(ticket: Ticket) -> Transaction:
    """What each keepalive reads: whether the node's own key is there, and whether the epoch changed."""
    return Transaction(reads=(Keys(names.node_key(ticket.node), values=False), Keys(names.EPOCH, values=False)))


def written(ticket: Ticket, said: Sequence[str]) -> Transaction:
    """Read what a node has written, to put it under another lease. ``said``: its keys besides its own one and the leader's."""
    own = (names.node_key(ticket.node), names.LEADER, *said)
    return Transaction(reads=tuple(Keys(key) for key in own))


def put_under(ticket: Ticket, lease_id: int, found: Outcome) -> Transaction:
    """Put what ``written`` found under another lease, in one, if the node lives under its old one and none of it has changed.

    Once it has been done it changes the revision of each key, so whichever try lands later does nothing.
    """
    me = ticket.node.encode()
    mine = [one for part in found.found for one in part if one.key != names.LEADER or one.value == me]
    return Transaction(
        (Leased(names.node_key(ticket.node), ticket.lease_id), *(Unchanged(one.key, one.changed) for one in mine)),
        tuple(Put(one.key, one.value, lease_id) for one in mine),
    )


def lives_under(found: Outcome) -> int:
    """The lease of the node's own key in what ``written`` found; 0: it is no member any more."""
    own = found.found[0]
    return own[0].lease_id if own else 0


def stop_leading(ticket: Ticket) -> Transaction:
    """Lead no more, where this node does."""
    return Transaction((Equals(names.LEADER, ticket.node.encode()),), (Delete(names.LEADER),))


def take_back(ticket: Ticket, said: Iterable[str]) -> Iterable[Transaction]:
    """Delete what a node has written, itself first: the way out of a lease that others live under. Its id never comes back."""
    keys = (names.node_key(ticket.node), *said)
    for first in range(0, len(keys), REMOVES_MAX):
        yield Transaction(then=tuple(Delete(key) for key in keys[first : first + REMOVES_MAX]))


def read(scope: Scope) -> Transaction:
    """A job at one revision."""
    return Transaction(reads=names.ALL_KEYS if scope is Scope.ALL else names.HEAD_KEYS)


def seen(job: str, scope: Scope, outcome: Outcome) -> View:
    """The view in what was read. Raises IntegrityError or FormatVersionError where the epoch can't be read.

    What a member wrote and nobody can read counts for nothing; its key is told.
    """
    head = {one.key: one for one in outcome.found[0]}
    unreadable: list[str] = []
    held = head.get(names.EPOCH)
    epoch = decode_epoch(held.value) if held is not None else None
    leads = head.get(names.LEADER)
    nodes, holds, suspects = outcome.found[1:] if scope is Scope.ALL else ((), (), ())
    holdings = {}
    for one in holds:
        try:
            holdings[one.key.rpartition("/")[2], one.lease_id] = decode_holdings(one.value)
        except CkptError:
            unreadable.append(one.key)
    members = []
    for one in nodes:
        try:
            info = decode_node(one.value)
        except CkptError:
            unreadable.append(one.key)
            continue
        if names.node_key(info.node) == one.key and one.lease_id:
            members.append(Member(info, one.lease_id, one.created, holdings.get((info.node, one.lease_id))))
        else:
            unreadable.append(one.key)
    return View(
        job=job, revision=outcome.revision, scope=scope,
        leader=None if leads is None else Leader(leads.value.decode(errors="replace"), leads.changed),
        epoch=epoch, epoch_revision=0 if held is None else held.changed,
        members=tuple(sorted(members, key=lambda member: member.node)),
        suspicions=tuple(_suspicion(one) for one in suspects), unreadable=tuple(sorted(unreadable)),
    )  # fmt: skip


def _suspicion(one: KeyValue) -> Suspicion:
    _, node, by = one.key.split("/")
    return Suspicion(node, by, one.value.decode(errors="replace"))


def lead(ticket: Ticket, view: View | None, witnesses_min: int) -> Transaction:
    """Lead where nobody does, or in place of the leader of ``view`` where enough witnesses there suspect it."""
    when: list[Compare] = [Leased(names.node_key(ticket.node), ticket.lease_id)]
    leader = view.leader if view is not None else None
    if view is None or leader is None or leader.node not in confirmed(view, witnesses_min):
        when.append(Unchanged(names.LEADER, 0))
    else:
        when.append(Unchanged(names.LEADER, leader.revision))
        by = sorted(one.by for one in view.suspicions if one.node == leader.node and one.by in view.by_node)
        when.extend(Exists(names.suspect_key(leader.node, one)) for one in by[:witnesses_min])
    return Transaction(
        tuple(when), (Put(names.LEADER, ticket.node.encode(), ticket.lease_id),),
        (Keys(names.LEADER), Keys(names.node_key(ticket.node), values=False)),
    )  # fmt: skip


def leads(outcome: Outcome, ticket: Ticket) -> Leading | Following | None:
    """Who leads after ``lead``; None: it changed in between, ask again. Raises FencedError where this node is no member."""
    leader, own = outcome.found
    if not outcome.held and not _own(own, ticket):
        raise no_member(ticket)
    if outcome.held:
        return Leading()
    if not leader:
        return None
    node = leader[0].value.decode(errors="replace")
    return Leading() if node == ticket.node else Following(node)


def publish(ticket: Ticket, record: bytes, view: View, remove: tuple[str, ...]) -> Transaction:
    """Replace the epoch of ``view``, if its leader is this node and nothing has changed since; and delete ``remove``."""
    assert view.leader is not None
    return Transaction(
        (
            Unchanged(names.LEADER, view.leader.revision),
            Equals(names.LEADER, ticket.node.encode()),
            Leased(names.node_key(ticket.node), ticket.lease_id),
            Unchanged(names.EPOCH, view.epoch_revision),
        ),
        (Put(names.EPOCH, record), *(Delete(names.node_key(node)) for node in remove[:REMOVES_MAX])),
        (Keys(names.EPOCH), Keys(names.LEADER)),
    )


def published(outcome: Outcome, ticket: Ticket, record: bytes) -> Published | Lost:
    """Whether the epoch holds. One with our bytes is ours: the answer to an earlier try was lost."""
    epoch, leader = outcome.found
    if outcome.held:
        return Published(outcome.revision)
    if epoch and epoch[0].value == record:
        return Published(epoch[0].changed)
    if not leader or leader[0].value != ticket.node.encode():
        return Lost("this node does not lead any more")
    return Lost("another epoch came first, or this node leads anew, or is no member any more")


def remove_more(epoch_revision: int, nodes: tuple[str, ...]) -> Transaction:
    """Delete the memberships that did not fit into the transaction of the epoch, while that epoch holds."""
    return Transaction(
        (Unchanged(names.EPOCH, epoch_revision),), tuple(Delete(names.node_key(node)) for node in nodes[:REMOVES_MAX])
    )


def say(ticket: Ticket, key: str, value: bytes | None, changed: int) -> Transaction:
    """Write or delete a word of this node that was last changed at ``changed``, so that an older try can't land after it."""
    return Transaction(
        (Leased(names.node_key(ticket.node), ticket.lease_id), Unchanged(key, changed)),
        (Delete(key) if value is None else Put(key, value, ticket.lease_id),),
        (Keys(key), Keys(names.node_key(ticket.node), values=False)),
    )


def said(outcome: Outcome, ticket: Ticket, value: bytes | None) -> int | None:
    """None: it is said. Else the revision of what stands there. Raises FencedError where this node is no member."""
    word, own = outcome.found
    if outcome.held:
        return None
    if not _own(own, ticket):
        raise no_member(ticket)
    there = word[0].value if word else None
    if there == value:
        return None
    return word[0].changed if word else 0


def _own(own: tuple[KeyValue, ...], ticket: Ticket) -> bool:
    return bool(own) and own[0].lease_id == ticket.lease_id


def no_member(ticket: Ticket) -> FencedError:
    """What a node that was a member is told."""
    return FencedError(f"this node is no member any more. node={ticket.node} join under a new node id")
