"""Every transaction of membership, and what its outcome means. Pure.

Each is harmless when it is done twice, since its own result makes its conditions fail and is
recognised by reading; and when it is done late, since it compares the revision of what it replaces.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ckpt.cluster.membership.api import Following, Leading, NotPublished, Published, Ticket
from ckpt.cluster.membership.decide import confirmed_suspects
from ckpt.cluster.membership.records import (
    Leader,
    Member,
    Suspicion,
    View,
    ViewScope,
    decode_epoch,
    decode_inventory,
    decode_node,
    is_node_id,
)
from ckpt.errors import CkptError, ConflictError, FencedError, UsageError
from ckpt.keyspace.base import (
    OPS_MAX,
    Compare,
    Delete,
    Equals,
    Exists,
    Keys,
    KeyValue,
    Leased,
    Put,
    Transaction,
    TransactionResult,
    Unchanged,
)

# Where each fact of a job lies below ``/ckpt/<job>/``. Pure.
#
# epoch                      the newest epoch's record                            no lease leader
# the id of the node that leads                        its node's lease nodes/<id>
# what a node says of itself                           its lease said/<fact>/<id>           what
# it says besides: ``holdings``, ``agent.x``      its lease suspects/<id>/<by>         a witness's
# word                                     the witness's lease

EPOCH = "epoch"
LEADER = "leader"
NODES = "nodes/"
FACTS = "said/"
SUSPICIONS = "suspects/"
INVENTORY_FACT = "holdings"

_FACT_RE = re.compile(r"[0-9A-Za-z_.-]{1,100}", re.ASCII)


def keys_under(prefix: str, *, values: bool = True) -> Keys:
    """All keys that begin with ``prefix``, which ends with a slash."""
    return Keys(prefix, prefix[:-1] + "0", values)  # "0" follows "/"


HEAD_KEYS = (Keys(EPOCH, LEADER + "\0"),)
"""Epoch and leader, and nothing else: no other name lies between."""
ALL_KEYS = (
    *HEAD_KEYS,
    keys_under(NODES),
    keys_under(f"{FACTS}{INVENTORY_FACT}/"),
    keys_under(SUSPICIONS),
)


def node_key(node: str) -> str:
    """Where a node says what it is."""
    return NODES + node


def agent_fact(agent: str) -> str:
    """What a node says to let that agent live under its lease. Raises UsageError for a name that
    can't be one."""
    if not is_node_id(agent):
        raise UsageError(
            f"not the name of an agent (1 to 64 of 0-9 a-z A-Z _ -). agent={agent[:80]!r}"
        )
    return f"agent.{agent}"


def fact_key(fact: str, node: str) -> str:
    """Where a node says a fact. Raises UsageError for a name that can't be one."""
    return f"{fact_keys(fact).start}{node}"


def fact_keys(fact: str) -> Keys:
    """Where all nodes say it. Raises UsageError for a name that can't be one."""
    if not _FACT_RE.fullmatch(fact):
        raise UsageError(
            f"not the name of a fact (1 to 100 of 0-9 a-z A-Z _ . -). fact={fact[:120]!r}"
        )
    return keys_under(f"{FACTS}{fact}/")


def suspicion_key(node: str, by: str) -> str:
    """Where ``by`` says that it suspects ``node``."""
    if not is_node_id(node):
        raise UsageError(f"not a node id. node={node[:80]!r}")
    return f"{SUSPICIONS}{node}/{by}"


REMOVES_MAX = OPS_MAX - 10


def join(ticket: Ticket, info: bytes, agent: str = "") -> Transaction:
    """Become a member, under a lease that was granted for it; ``agent`` may live under that lease
    too."""
    key = node_key(ticket.node)
    return Transaction(
        (Unchanged(key, 0),), _joins(ticket, info, agent), (Keys(key, values=False),)
    )


def resume(ticket: Ticket, info: bytes, agent: str = "") -> Transaction:
    """Go on with a membership that another process began."""
    key = node_key(ticket.node)
    return Transaction(
        (Leased(key, ticket.lease_id),), _joins(ticket, info, agent), (Keys(key, values=False),)
    )


def _joins(ticket: Ticket, info: bytes, agent: str) -> tuple[Put, ...]:
    own = Put(node_key(ticket.node), info, ticket.lease_id)
    word = (Put(fact_key(agent_fact(agent), ticket.node), b"", ticket.lease_id),) if agent else ()
    return (own, *word)


def check_joined(outcome: TransactionResult, ticket: Ticket) -> None:
    """Raises ConflictError where the node id belongs to another lease, FencedError where the
    membership is over."""
    found = outcome.found[0]
    if outcome.succeeded or (found and found[0].lease_id == ticket.lease_id):
        return
    if found:
        raise ConflictError(
            f"another member has this node id. node={ticket.node} join under a new one"
        )
    raise FencedError(f"this membership is over. node={ticket.node} join under a new node id")


def read_keepalive(ticket: Ticket) -> Transaction:
    """What each keepalive reads: whether the node's own key is there, and whether the epoch
    changed."""
    return Transaction(reads=(Keys(node_key(ticket.node), values=False), Keys(EPOCH, values=False)))


def read_written(ticket: Ticket, said: Sequence[str]) -> Transaction:
    """Read what a node has written, to put it under another lease. ``said``: its keys besides its
    own one and the leader's."""
    own = (node_key(ticket.node), LEADER, *said)
    return Transaction(reads=tuple(Keys(key) for key in own))


def move_to_lease(ticket: Ticket, lease_id: int, found: TransactionResult) -> Transaction:
    """Put what ``written`` found under another lease, in one, if the node lives under its old one
    and none of it has changed.

    Once it has been done it changes the revision of each key, so whichever try lands later does
    nothing.
    """
    me = ticket.node.encode()
    mine = [one for part in found.found for one in part if one.key != LEADER or one.value == me]
    return Transaction(
        (
            Leased(node_key(ticket.node), ticket.lease_id),
            *(Unchanged(one.key, one.changed) for one in mine),
        ),
        tuple(Put(one.key, one.value, lease_id) for one in mine),
    )


def lease_of(found: TransactionResult) -> int:
    """The lease of the node's own key in what ``written`` found; 0: it is no member any more."""
    own = found.found[0]
    return own[0].lease_id if own else 0


def stop_leading(ticket: Ticket) -> Transaction:
    """Lead no more, where this node does."""
    return Transaction((Equals(LEADER, ticket.node.encode()),), (Delete(LEADER),))


def remove_written(ticket: Ticket, said: Iterable[str]) -> Iterable[Transaction]:
    """Delete what a node has written, itself first: the way out of a lease that others live under.
    Its id never comes back."""
    keys = (node_key(ticket.node), *said)
    for first in range(0, len(keys), REMOVES_MAX):
        yield Transaction(then=tuple(Delete(key) for key in keys[first : first + REMOVES_MAX]))


def read_view(scope: ViewScope) -> Transaction:
    """A job at one revision."""
    return Transaction(reads=ALL_KEYS if scope is ViewScope.ALL else HEAD_KEYS)


def view_of(job: str, scope: ViewScope, outcome: TransactionResult) -> View:
    """The view in what was read. Raises IntegrityError or FormatVersionError where the epoch can't
    be read.

    What a member wrote and nobody can read counts for nothing; its key is told.
    """
    head = {one.key: one for one in outcome.found[0]}
    unreadable: list[str] = []
    held = head.get(EPOCH)
    epoch = decode_epoch(held.value) if held is not None else None
    leads = head.get(LEADER)
    nodes, holds, suspects = outcome.found[1:] if scope is ViewScope.ALL else ((), (), ())
    holdings = {}
    for one in holds:
        try:
            holdings[one.key.rpartition("/")[2], one.lease_id] = decode_inventory(one.value)
        except CkptError:
            unreadable.append(one.key)
    members = []
    for one in nodes:
        try:
            info = decode_node(one.value)
        except CkptError:
            unreadable.append(one.key)
            continue
        if node_key(info.node) == one.key and one.lease_id:
            members.append(
                Member(info, one.lease_id, one.created, holdings.get((info.node, one.lease_id)))
            )
        else:
            unreadable.append(one.key)
    return View(
        job=job,
        revision=outcome.revision,
        scope=scope,
        leader=None
        if leads is None
        else Leader(leads.value.decode(errors="replace"), leads.changed),
        epoch=epoch,
        epoch_revision=0 if held is None else held.changed,
        members=tuple(sorted(members, key=lambda member: member.node)),
        suspicions=tuple(_suspicion(one) for one in suspects),
        unreadable=tuple(sorted(unreadable)),
    )


def _suspicion(one: KeyValue) -> Suspicion:
    _, node, by = one.key.split("/")
    return Suspicion(node, by, one.value.decode(errors="replace"))


def lead(ticket: Ticket, view: View | None, witnesses_min: int) -> Transaction:
    """Lead where nobody does, or in place of the leader of ``view`` where enough witnesses there
    suspect it."""
    when: list[Compare] = [Leased(node_key(ticket.node), ticket.lease_id)]
    leader = view.leader if view is not None else None
    if view is None or leader is None or leader.node not in confirmed_suspects(view, witnesses_min):
        when.append(Unchanged(LEADER, 0))
    else:
        when.append(Unchanged(LEADER, leader.revision))
        by = sorted(
            one.by for one in view.suspicions if one.node == leader.node and one.by in view.by_node
        )
        when.extend(Exists(suspicion_key(leader.node, one)) for one in by[:witnesses_min])
    return Transaction(
        tuple(when),
        (Put(LEADER, ticket.node.encode(), ticket.lease_id),),
        (Keys(LEADER), Keys(node_key(ticket.node), values=False)),
    )


def leader_after(outcome: TransactionResult, ticket: Ticket) -> Leading | Following | None:
    """Who leads after ``lead``; None: it changed in between, ask again. Raises FencedError where
    this node is no member."""
    leader, own = outcome.found
    if not outcome.succeeded and not _own(own, ticket):
        raise not_a_member(ticket)
    if outcome.succeeded:
        return Leading()
    if not leader:
        return None
    node = leader[0].value.decode(errors="replace")
    return Leading() if node == ticket.node else Following(node)


def publish(ticket: Ticket, record: bytes, view: View, remove: tuple[str, ...]) -> Transaction:
    """Replace the epoch of ``view``, if its leader is this node and nothing has changed since; and
    delete ``remove``."""
    assert view.leader is not None
    return Transaction(
        (
            Unchanged(LEADER, view.leader.revision),
            Equals(LEADER, ticket.node.encode()),
            Leased(node_key(ticket.node), ticket.lease_id),
            Unchanged(EPOCH, view.epoch_revision),
        ),
        (Put(EPOCH, record), *(Delete(node_key(node)) for node in remove[:REMOVES_MAX])),
        (Keys(EPOCH), Keys(LEADER)),
    )


def publish_outcome(
    outcome: TransactionResult, ticket: Ticket, record: bytes
) -> Published | NotPublished:
    """Whether the epoch holds. One with our bytes is ours: the answer to an earlier try was
    lost."""
    epoch, leader = outcome.found
    if outcome.succeeded:
        return Published(outcome.revision)
    if epoch and epoch[0].value == record:
        return Published(epoch[0].changed)
    if not leader or leader[0].value != ticket.node.encode():
        return NotPublished("this node does not lead any more")
    return NotPublished(
        "another epoch came first, or this node leads anew, or is no member any more"
    )


def remove_members(epoch_revision: int, nodes: tuple[str, ...]) -> Transaction:
    """Delete the memberships that did not fit into the transaction of the epoch, while that epoch
    holds."""
    return Transaction(
        (Unchanged(EPOCH, epoch_revision),),
        tuple(Delete(node_key(node)) for node in nodes[:REMOVES_MAX]),
    )


def put_fact(ticket: Ticket, key: str, value: bytes | None, changed: int) -> Transaction:
    """Write or delete a word of this node that was last changed at ``changed``, so that an older
    try can't land after it."""
    return Transaction(
        (Leased(node_key(ticket.node), ticket.lease_id), Unchanged(key, changed)),
        (Delete(key) if value is None else Put(key, value, ticket.lease_id),),
        (Keys(key), Keys(node_key(ticket.node), values=False)),
    )


def fact_outcome(outcome: TransactionResult, ticket: Ticket, value: bytes | None) -> int | None:
    """None: it is said. Else the revision of what stands there. Raises FencedError where this node
    is no member."""
    word, own = outcome.found
    if outcome.succeeded:
        return None
    if not _own(own, ticket):
        raise not_a_member(ticket)
    there = word[0].value if word else None
    if there == value:
        return None
    return word[0].changed if word else 0


def _own(own: tuple[KeyValue, ...], ticket: Ticket) -> bool:
    return bool(own) and own[0].lease_id == ticket.lease_id


def not_a_member(ticket: Ticket) -> FencedError:
    """What a node that was a member is told."""
    return FencedError(
        f"this node is no member any more. node={ticket.node} join under a new node id"
    )
