"""The transactions of the membership protocol, and what their results mean. Pure.

Each transaction is harmless when it is done twice: its own effect makes its conditions fail, and
reading recognises that effect. It is also harmless when it arrives late, since it compares the
revision of what it replaces. So a missing answer is dealt with by repeating the call, at another
endpoint too.

Keys lie below ``/ckpt/<job>/``, which the keyspace adds::

    key                   value                                                  deleted with
    epoch                 the newest EpochRecord                                 (never)
    leader                the id of the node that leads                          its node's lease
    nodes/<id>            the node's NodeInfo                                    its node's lease
    said/<fact>/<id>      a fact about a node: ``holdings``, ``agent.<agent>``   its node's lease
    suspects/<id>/<by>    the suspicion of the witness ``by`` against <id>       the witness's lease
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ckpt.cluster.membership.decide import confirmed_suspects
from ckpt.cluster.membership.outcomes import Following, Leading, NotPublished, Published, Ticket
from ckpt.cluster.membership.records import (
    Leader,
    Member,
    StateInventory,
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

# ---- keys

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
"""Epoch and leader as one range: no other key sorts between the two."""
ALL_KEYS = (
    *HEAD_KEYS,
    keys_under(NODES),
    keys_under(f"{FACTS}{INVENTORY_FACT}/"),
    keys_under(SUSPICIONS),
)


def node_key(node: str) -> str:
    """The key of a node's NodeInfo."""
    return NODES + node


def agent_fact(agent: str) -> str:
    """The fact by which a node lets that agent live under its lease.

    Raises UsageError for an invalid agent name.
    """
    if not is_node_id(agent):
        raise UsageError(
            f"not the name of an agent (1 to 64 of 0-9 a-z A-Z _ -). agent={agent[:80]!r}"
        )
    return f"agent.{agent}"


def fact_key(fact: str, node: str) -> str:
    """The key of a fact about one node. Raises UsageError for an invalid fact name."""
    return f"{fact_keys(fact).start}{node}"


def fact_keys(fact: str) -> Keys:
    """The keys of a fact about all nodes. Raises UsageError for an invalid fact name."""
    if not _FACT_RE.fullmatch(fact):
        raise UsageError(
            f"not the name of a fact (1 to 100 of 0-9 a-z A-Z _ . -). fact={fact[:120]!r}"
        )
    return keys_under(f"{FACTS}{fact}/")


def suspicion_key(node: str, by: str) -> str:
    """The key of the suspicion of ``by`` against ``node``.

    Raises UsageError for an invalid node id.
    """
    if not is_node_id(node):
        raise UsageError(f"not a node id. node={node[:80]!r}")
    return f"{SUSPICIONS}{node}/{by}"


# ---- membership: joining, keeping, moving, leaving

REMOVES_MAX = OPS_MAX - 10
"""Deletes of one transaction, which leaves room for its other operations."""


def join(ticket: Ticket, info: bytes, agent: str = "") -> Transaction:
    """Become a member under a lease granted before; ``agent`` may live under that lease too."""
    key = node_key(ticket.node)
    return Transaction(
        (Unchanged(key, 0),), _own_puts(ticket, info, agent), (Keys(key, values=False),)
    )


def resume(ticket: Ticket, info: bytes, agent: str = "") -> Transaction:
    """Take on a membership that another process began."""
    key = node_key(ticket.node)
    return Transaction(
        (Leased(key, ticket.lease_id),), _own_puts(ticket, info, agent), (Keys(key, values=False),)
    )


def _own_puts(ticket: Ticket, info: bytes, agent: str) -> tuple[Put, ...]:
    own = Put(node_key(ticket.node), info, ticket.lease_id)
    if not agent:
        return (own,)
    return own, Put(fact_key(agent_fact(agent), ticket.node), b"", ticket.lease_id)


def check_joined(result: TransactionResult, ticket: Ticket) -> None:
    """Raises ConflictError if another lease has this node id, FencedError if the membership to be
    taken on is over.
    """
    own = result.found[0]
    if result.succeeded or (own and own[0].lease_id == ticket.lease_id):
        return  # the second: an earlier try, whose answer was lost, did it
    if own:
        raise ConflictError(
            f"another member has this node id. node={ticket.node} join under a new one"
        )
    raise FencedError(f"this membership is over. node={ticket.node} join under a new node id")


def read_keepalive(ticket: Ticket) -> Transaction:
    """What each keepalive reads, without values: the node's own key, and the epoch's."""
    return Transaction(reads=(Keys(node_key(ticket.node), values=False), Keys(EPOCH, values=False)))


def read_written(ticket: Ticket, facts: Sequence[str]) -> Transaction:
    """Read what a node has written, to move it to another lease.

    ``facts``: its keys beside its own and the leader's.
    """
    return Transaction(reads=tuple(Keys(key) for key in (node_key(ticket.node), LEADER, *facts)))


def move_to_lease(ticket: Ticket, lease_id: int, written: TransactionResult) -> Transaction:
    """Put what ``read_written`` read under another lease, in one transaction, if the node lives
    under its old one.

    Does nothing if any of it changed since. Each key gets a new revision, so only one of several
    tries takes effect.
    """
    me = ticket.node.encode()
    own = [
        entry
        for part in written.found
        for entry in part
        if entry.key != LEADER or entry.value == me
    ]
    return Transaction(
        (
            Leased(node_key(ticket.node), ticket.lease_id),
            *(Unchanged(entry.key, entry.changed) for entry in own),
        ),
        tuple(Put(entry.key, entry.value, lease_id) for entry in own),
    )


def lease_of(written: TransactionResult) -> int:
    """The lease of the node's own key in what ``read_written`` read; 0: no member any more."""
    own = written.found[0]
    return own[0].lease_id if own else 0


def stop_leading(ticket: Ticket) -> Transaction:
    """Give up the lead, if this node has it."""
    return Transaction((Equals(LEADER, ticket.node.encode()),), (Delete(LEADER),))


def remove_written(ticket: Ticket, facts: Iterable[str]) -> Iterable[Transaction]:
    """Delete what a node has written: how it leaves a lease that others live under, or that another
    node owns.

    The node's own key goes first: from then on it is no member, and its id is never used again.
    """
    keys = (node_key(ticket.node), *facts)
    for first in range(0, len(keys), REMOVES_MAX):
        yield Transaction(then=tuple(Delete(key) for key in keys[first : first + REMOVES_MAX]))


def _is_member(own: tuple[KeyValue, ...], ticket: Ticket) -> bool:
    return bool(own) and own[0].lease_id == ticket.lease_id


def not_a_member(ticket: Ticket) -> FencedError:
    """The error of a node that was a member and is none any more."""
    return FencedError(
        f"this node is no member any more. node={ticket.node} join under a new node id"
    )


# ---- the view


def read_view(scope: ViewScope) -> Transaction:
    """Read a job at one revision."""
    return Transaction(reads=ALL_KEYS if scope is ViewScope.ALL else HEAD_KEYS)


def view_of(job: str, scope: ViewScope, result: TransactionResult) -> View:
    """The view in what was read.

    Raises IntegrityError or FormatVersionError if the epoch is unreadable.

    A member's unreadable value counts for nothing; its key is listed in ``View.unreadable``.
    """
    head = {entry.key: entry for entry in result.found[0]}
    epoch, leader = head.get(EPOCH), head.get(LEADER)
    nodes, inventories, suspicions = result.found[1:] if scope is ViewScope.ALL else ((), (), ())
    unreadable: list[str] = []
    members = _members(nodes, _inventories(inventories, unreadable), unreadable)
    return View(
        job=job,
        revision=result.revision,
        scope=scope,
        leader=None
        if leader is None
        else Leader(leader.value.decode(errors="replace"), leader.changed),
        epoch=None if epoch is None else decode_epoch(epoch.value),
        epoch_revision=0 if epoch is None else epoch.changed,
        members=tuple(sorted(members, key=lambda member: member.node)),
        suspicions=tuple(_suspicion(entry) for entry in suspicions),
        unreadable=tuple(sorted(unreadable)),
    )


def _inventories(
    entries: Sequence[KeyValue], unreadable: list[str]
) -> dict[tuple[str, int], StateInventory]:
    """By node and lease: an inventory under another lease is one of an earlier join."""
    inventories = {}
    for entry in entries:
        try:
            inventories[entry.key.rpartition("/")[2], entry.lease_id] = decode_inventory(
                entry.value
            )
        except CkptError:
            unreadable.append(entry.key)
    return inventories


def _members(
    entries: Sequence[KeyValue],
    inventories: dict[tuple[str, int], StateInventory],
    unreadable: list[str],
) -> list[Member]:
    members = []
    for entry in entries:
        try:
            info = decode_node(entry.value)
        except CkptError:
            unreadable.append(entry.key)
            continue
        # A key without a lease would never go away, and its node could not be found dead.
        if node_key(info.node) == entry.key and entry.lease_id:
            inventory = inventories.get((info.node, entry.lease_id))
            members.append(Member(info, entry.lease_id, entry.created, inventory))
        else:
            unreadable.append(entry.key)
    return members


def _suspicion(entry: KeyValue) -> Suspicion:
    _, node, by = entry.key.split("/")
    return Suspicion(node, by, entry.value.decode(errors="replace"))


# ---- leading and publishing


def lead(ticket: Ticket, view: View | None, witnesses_min: int) -> Transaction:
    """Become the leader if there is none, or in place of the leader of ``view`` if enough witnesses
    suspect it there.

    A dead leader can't remove itself. Since the transaction compares the suspicions too, its lease
    need not expire first.
    """
    when: list[Compare] = [Leased(node_key(ticket.node), ticket.lease_id)]
    leader = view.leader if view is not None else None
    if view is None or leader is None or leader.node not in confirmed_suspects(view, witnesses_min):
        when.append(Unchanged(LEADER, 0))
    else:
        when.append(Unchanged(LEADER, leader.revision))
        witnesses = sorted(
            suspicion.by
            for suspicion in view.suspicions
            if suspicion.node == leader.node and suspicion.by in view.by_node
        )
        when.extend(Exists(suspicion_key(leader.node, by)) for by in witnesses[:witnesses_min])
    return Transaction(
        tuple(when),
        (Put(LEADER, ticket.node.encode(), ticket.lease_id),),
        (Keys(LEADER), Keys(node_key(ticket.node), values=False)),
    )


def leader_after(result: TransactionResult, ticket: Ticket) -> Leading | Following | None:
    """Who leads after ``lead``; None: it changed in between, so try again.

    Raises FencedError if this node is no member.
    """
    leader, own = result.found
    if result.succeeded:
        return Leading()
    if not _is_member(own, ticket):
        raise not_a_member(ticket)
    if not leader:
        return None
    node = leader[0].value.decode(errors="replace")
    return Leading() if node == ticket.node else Following(node)


def publish(ticket: Ticket, record: bytes, view: View, remove: tuple[str, ...]) -> Transaction:
    """Replace the epoch of ``view`` and delete the nodes of ``remove``.

    Only if this node leads as in ``view`` and is a member, and the epoch is unchanged: so no two
    epochs follow the same one.
    """
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
    result: TransactionResult, ticket: Ticket, record: bytes
) -> Published | NotPublished:
    """Whether the epoch holds.

    An epoch with exactly these bytes is ours: the answer to an earlier try was lost.
    """
    epoch, leader = result.found
    if result.succeeded:
        return Published(result.revision)
    if epoch and epoch[0].value == record:
        return Published(epoch[0].changed)
    if not leader or leader[0].value != ticket.node.encode():
        return NotPublished("this node does not lead any more")
    return NotPublished(
        "another epoch came first, or this node leads anew, or is no member any more"
    )


def remove_members(epoch_revision: int, nodes: tuple[str, ...]) -> Transaction:
    """Delete members that did not fit into the transaction of the epoch that removed them, while
    that epoch holds.
    """
    return Transaction(
        (Unchanged(EPOCH, epoch_revision),),
        tuple(Delete(node_key(node)) for node in nodes[:REMOVES_MAX]),
    )


# ---- facts and suspicions


def put_fact(ticket: Ticket, key: str, value: bytes | None, changed: int) -> Transaction:
    """Write a key of this node, or delete it (None), if it was last changed at ``changed``: an
    older try can't land later.
    """
    return Transaction(
        (Leased(node_key(ticket.node), ticket.lease_id), Unchanged(key, changed)),
        (Delete(key) if value is None else Put(key, value, ticket.lease_id),),
        (Keys(key), Keys(node_key(ticket.node), values=False)),
    )


def fact_outcome(result: TransactionResult, ticket: Ticket, value: bytes | None) -> int | None:
    """None: it is written. Else the key's revision, to try again with.

    Raises FencedError if this node is no member.
    """
    fact, own = result.found
    if result.succeeded:
        return None
    if not _is_member(own, ticket):
        raise not_a_member(ticket)
    if (fact[0].value if fact else None) == value:
        return None
    return fact[0].changed if fact else 0
