"""Under whose lease an agent lives: its own, or that of the keeper on its node, so that a node has one lease.

Keepers learn from their launcher which agent that is, and say under their own lease that it may live there. Nobody but the
keeper keeps that lease alive, so that one that hangs is missed as ever. When the keeper is lost, so is the agent's membership
for a moment: it joins anew, under a lease of its own. When the keeper leaves, it takes back what it said, and its lease lasts
as long as a lease does: that is how long the agent has to put its keys under one of its own.
"""

from __future__ import annotations

from ckpt.cluster.membership import names
from ckpt.cluster.membership.member import KeyedMembership
from ckpt.keyspace.base import Keys, Keyspace, KeyValue, Transaction


def offered(words: tuple[KeyValue, ...], keepers: tuple[KeyValue, ...]) -> KeyValue | None:
    """The newest of a keeper's ``words`` that name this agent, if it is a member still: one that was taken out won't renew."""
    newest = max(words, key=lambda one: one.created, default=None)
    if newest is None or names.node_key(node_of(newest)) not in {one.key for one in keepers}:
        return None
    return newest


def node_of(word: KeyValue) -> str:
    """The node that said it."""
    return word.key.rpartition("/")[2]


class AgentLease:
    """See the module. ``keepers``: the keys of the keepers' job, in the service in which ``member`` is. For one thread."""

    def __init__(self, keepers: Keyspace, member: KeyedMembership, agent: str) -> None:
        self._keepers = keepers
        self._member = member
        self._words = names.said_by_all(names.agent_fact(agent))
        self._keeper = ""
        """The node that offered its lease last."""

    @property
    def shared(self) -> bool:
        """Whether this agent lives under a keeper's lease, so that it has to look in time whether that is still offered."""
        return self._member.borrows != 0

    def look(self, *, runs: bool) -> None:
        """Move where that is right now. ``runs``: workers run here, whose keeper will stay for a while.

        Raises FencedError where the agent is no member, UnavailableError.
        """
        word = self._offered()
        if word is None:
            self._member.live_alone()
        elif runs or self.shared:
            self._member.live_under(word.lease_id)

    def _offered(self) -> KeyValue | None:
        own = (Keys(names.node_key(self._keeper), values=False),) if self._keeper else ()
        words, *known = self._keepers.transact(Transaction(reads=(self._words, *own))).found
        if not words:
            return None
        newest = max(words, key=lambda one: one.created)
        if not known or node_of(newest) != self._keeper:
            self._keeper = node_of(newest)
            key = Keys(names.node_key(self._keeper), values=False)
            known = list(self._keepers.transact(Transaction(reads=(key,))).found)
        return offered(words, known[0])
