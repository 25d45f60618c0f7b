"""One agent of a job: joins the membership, stays joined, watches the others, and may lead.

A thread of its own does this as long as the process lives; the agent's main thread reads what it
last saw. The agents' keys are in a job of their own: the membership's, and beside it
``said/seat/<node>`` with each agent's status, ``closed`` with the reason why no round will begin
any more, and ``rounds/`` with the stores of rounds. While a keeper runs on the agent's node, the
keys are under its lease.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ckpt.cluster.membership import transactions
from ckpt.cluster.membership.member import KeyspaceMembership
from ckpt.cluster.membership.open import open_keyspace
from ckpt.cluster.membership.outcomes import Published
from ckpt.cluster.membership.records import EpochRecord, NodeInfo, NodePlacement, ViewScope
from ckpt.elastic.rendezvous.decide import (
    ALONE,
    RUNNING,
    WAITING,
    AgentStatus,
    AgentsView,
    PublishRound,
    RendezvousRound,
    decode_status,
    encode_round_note,
    encode_status,
    next_round,
    update_enough_since,
)
from ckpt.elastic.rendezvous.options import RendezvousSettings
from ckpt.errors import CkptError, FencedError, InternalError, UnavailableError
from ckpt.events import Emit, Event
from ckpt.ipc.cluster_spec import NodesSpec
from ckpt.keyspace.address import EtcdOptions, keyspace_location
from ckpt.keyspace.base import (
    Delete,
    Keys,
    Keyspace,
    KeyValue,
    NoneOf,
    Put,
    Transaction,
    TransactionResult,
)

# ---- the agent's lease: its own, or that of the keeper on its node, so that a node has one lease
#
# Keepers learn from their launcher which agent is theirs, and offer it their lease by a fact under
# that lease. Only the keeper renews it: if the agent did, a keeper that hangs would never be
# missed. If the keeper is lost, the agent's membership is lost with it for a moment: it joins again
# under a lease of its own. If the keeper leaves, it withdraws the offer and renews its lease once:
# the agent has one TTL to move its keys to a lease of its own.


def newest_offer(offers: tuple[KeyValue, ...], keepers: tuple[KeyValue, ...]) -> KeyValue | None:
    """The newest offer by a keeper that is still a member, or None.

    A keeper that was taken out of its membership no longer renews its lease.
    """
    newest = max(offers, key=lambda offer: offer.created, default=None)
    members = {keeper.key for keeper in keepers}
    if newest is None or transactions.node_key(offering_node(newest)) not in members:
        return None
    return newest


def offering_node(offer: KeyValue) -> str:
    """The node that made an offer."""
    return offer.key.rpartition("/")[2]


class AgentLease:
    """Moves the agent's keys between its own lease and its keeper's. For one thread.

    ``keepers`` is the keyspace of the keepers' job, in the same service as ``member``.
    """

    def __init__(self, keepers: Keyspace, member: KeyspaceMembership, agent: str) -> None:
        self._keepers = keepers
        self._member = member
        self._offers = transactions.fact_keys(transactions.agent_fact(agent))
        self._keeper = ""
        """The node that made the last offer."""

    @property
    def shared(self) -> bool:
        """Whether this agent is under a keeper's lease, so that it must check the offer in time."""
        return self._member.borrowed_lease_id != 0

    def look(self, *, runs: bool) -> None:
        """Move to the right lease.

        ``runs``: workers run here, so their keeper will stay for a while.

        Raises FencedError if the agent is no member, UnavailableError.
        """
        offer = self._read_offer()
        if offer is None:
            self._member.use_own_lease()
        elif runs or self.shared:
            self._member.borrow_lease(offer.lease_id)

    def _read_offer(self) -> KeyValue | None:
        # The last keeper's key is read in the same transaction; only another keeper needs a second
        # one.
        own = (Keys(transactions.node_key(self._keeper), values=False),) if self._keeper else ()
        offers, *keepers = self._keepers.transact(Transaction(reads=(self._offers, *own))).found
        if not offers:
            return None
        newest = max(offers, key=lambda offer: offer.created)
        if not keepers or offering_node(newest) != self._keeper:
            self._keeper = offering_node(newest)
            key = Keys(transactions.node_key(self._keeper), values=False)
            keepers = list(self._keepers.transact(Transaction(reads=(key,))).found)
        return newest_offer(offers, keepers[0])


# ---- the agent

LOOK_S = 2.0
"""How often an agent looks if nothing seems to happen."""
VIEW_S = 5.0
"""How often a follower reads everything if no change is reported.

Each of N agents reads about all N.
"""
RETRY_S = 0.2
ROUND_TTL_S = 3600.0
"""How long a round's store is kept after its last agent."""
RENEW_S = 300.0
JOIN_THREAD_S = 30.0

CLOSED = "closed"
STATUS_FACT = "seat"
_READS = (*transactions.ALL_KEYS, transactions.fact_keys(STATUS_FACT), Keys(CLOSED))
_VIEW_READS = len(transactions.ALL_KEYS)


class RendezvousAgent:
    """One agent; ``start`` begins its thread, ``leave`` ends it for good.

    The class has more than 12 attributes: one thread writes them and the main thread reads them,
    under one condition variable. The pure decisions are in ``decide``.
    """

    def __init__(self, settings: RendezvousSettings, emit: Emit) -> None:
        host = "".join(
            letter if letter.isalnum() or letter in "_-" else "-" for letter in socket.gethostname()
        )
        self.name = f"{host[:30] or 'node'}-{os.urandom(6).hex()}"
        self.keyspace = keyspace_of(settings.agents_spec)
        self._settings = settings
        self._emit = emit
        self._keepers = keyspace_of(settings.nodes) if settings.nodes is not None else None
        spec = settings.agents_spec
        self._member = KeyspaceMembership(self.keyspace, spec.job, ttl_s=spec.ttl_s)
        shares = self._keepers is not None and settings.shares_service
        self._lease = (
            AgentLease(self._keepers, self._member, self.name) if self._keepers and shares else None
        )
        self._changed = threading.Condition()
        self._publishing = threading.Lock()
        self._view: AgentsView | None = None
        self._view_until_s = 0.0
        """Until when the last view may be used, unless a change is reported."""
        self._status = AgentStatus(WAITING)
        self._published: AgentStatus | None = None
        self._node = ""
        self._joins = 0
        self._begun = False
        self._kept = False
        self._enough_since_s: float | None = None
        self._renewed_s = 0.0
        self._lost_since_s: float | None = None
        self._began_s = time.monotonic()
        self._stopped = False
        self._warned = ""
        self.own_round: RendezvousRound | None = None
        """The round whose workers run here."""
        self.refusal = ""
        """Why this agent cannot become a member: the rendezvous was closed before it arrived."""
        self.problem: CkptError | None = None
        """Why nothing can be seen at the moment."""
        self._thread: threading.Thread | None = None

    # ---- called in the main thread

    def start(self) -> None:
        """Start the thread. Idempotent."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="ckpt-rendezvous", daemon=True)
            self._thread.start()

    def latest_view(self) -> AgentsView | None:
        """What was seen last."""
        return self._view

    @property
    def lost_for_s(self) -> float:
        """How long an agent of the round has been missing."""
        since_s = self._lost_since_s
        return 0.0 if since_s is None else time.monotonic() - since_s

    def next_view(self, before: AgentsView | None, timeout_s: float) -> AgentsView | None:
        """What was seen after ``before``; None if nothing was within ``timeout_s``."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._view is not before or bool(self.refusal), timeout_s
            )
            return self._view if self._view is not before else None

    def wait_for_round(self, last: int) -> None:
        """Publish that this agent waits for a round after the one numbered ``last``."""
        self.own_round = None
        self._set_status(AgentStatus(WAITING, last))

    def run_round(self, round_: RendezvousRound) -> None:
        """Publish that this agent runs the workers of a round.

        Whether keepers hold the job is found out again.
        """
        self.own_round = round_
        self._kept = False
        self._set_status(AgentStatus(RUNNING, round_.number))

    def run_unranked(self) -> None:
        """Publish that this agent runs workers without a round."""
        self.own_round = None
        self._set_status(AgentStatus(ALONE, self._status.round))

    def closed_reason(self) -> str | None:
        """Why the rendezvous is closed, as of now; None if it is open. Raises UnavailableError."""
        if self._stopped and self._keepers is None:
            return "its only agent has ended"
        (found,) = self._ask(Transaction(reads=(Keys(CLOSED),))).found
        return found[0].value.decode(errors="replace") if found else None

    def close(self, reason: str) -> None:
        """Allow no further round.

        Raises UnavailableError if the service does not answer within ``close_s``.
        """
        until_s = time.monotonic() + self._settings.close_s
        while True:
            try:
                self._ask(Transaction(then=(Put(CLOSED, reason.encode()),)))
                return
            except UnavailableError:
                if time.monotonic() > until_s:
                    raise
                time.sleep(RETRY_S)

    def leave(self) -> None:
        """End the membership. Idempotent; the agent is unusable afterwards."""
        with self._changed:
            if self._stopped:
                return
            self._stopped = True
            self._changed.notify_all()
        try:
            self._member.leave()
        except CkptError as error:
            self._report("leave-failed", f"the agent's membership ends by itself: {error}")
        finally:
            if self._thread is not None:
                self._thread.join(JOIN_THREAD_S)
            if self._keepers is not None:
                self._keepers.close()
            else:
                self._remove_file()

    def _remove_file(self) -> None:
        """A single node has its file alone."""
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self._settings.agents_spec.where}{suffix}").unlink(missing_ok=True)

    # ---- the thread

    def _run(self) -> None:
        while not self._stopped:
            try:
                if not self._node and not self._join():
                    self._pause(RETRY_S)
                    continue
                agents = self._current_view()
                self._publish_status()
                self._show(agents)
                until_s = self._lead(agents)
                self._renew()
                until_s = min(until_s, self._share_lease(agents))
                left_s = until_s - time.monotonic()
                if left_s <= 0 or self.keyspace.wait(
                    _READS, agents.view.revision, timeout_s=left_s
                ):
                    self._view_until_s = 0.0
            except FencedError as error:
                with suppress(FencedError):  # it left meanwhile
                    self._on_membership_lost(error)
            except CkptError as error:
                self._on_problem(error)
                self._pause(RETRY_S)
            except Exception as error:  # noqa: BLE001  a thread's border
                self._on_problem(InternalError(f"the rendezvous failed. cause={error!r}"))
                self._pause(LOOK_S)

    def _join(self) -> bool:
        """Become a member. False: not yet."""
        if not self._begun and not self._may_begin():
            return False
        self._joins += 1
        node = f"{self.name}-{self._joins}"
        settings = self._settings
        host = socket.gethostname()
        self._member.join(
            NodeInfo(
                node=node,
                host=host,
                slots=1,
                domain=settings.agents_spec.domain,
                address=settings.host,
            )
        )
        self._node, self._published, self._view_until_s = node, None, 0.0
        self._publish_status()
        return True

    def _may_begin(self) -> bool:
        """Whether the rendezvous is open.

        A closed one opens again once it has no members, which is awaited for some time.
        """
        open_again = Transaction(
            (NoneOf(transactions.keys_under(transactions.NODES)),),
            (Delete(CLOSED),),
            (Keys(CLOSED),),
        )
        (found,) = self.keyspace.transact(open_again).found
        if not found:
            self._begun = True
            return True
        # The keys of dead members last that long, if etcd changes its leader meanwhile.
        wait_s = 2 * self._settings.agents_spec.ttl_s + 2.0
        if time.monotonic() - self._began_s > wait_s:
            with self._changed:
                self.refusal = found[0].value.decode(errors="replace")
                self._changed.notify_all()
        return False

    def _current_view(self) -> AgentsView:
        """A fresh view, or the last one if this agent only follows and no change was reported."""
        agents = self._view
        if agents is not None and self._follows(agents) and time.monotonic() < self._view_until_s:
            return agents
        agents = self._read()
        self._view_until_s = time.monotonic() + VIEW_S
        return agents

    def _follows(self, agents: AgentsView) -> bool:
        """Whether an old view will do: keepers hold the job, and another agent leads."""
        leader = agents.view.leader
        return (
            agents.kept_by_keepers
            and self._status.doing != WAITING
            and leader is not None
            and leader.node != self._node
        )

    def _share_lease(self, agents: AgentsView) -> float:
        """Use the keeper's lease while there is one; returns until when that is right."""
        now_s = time.monotonic()
        if self._lease is None or not (agents.kept_by_keepers or self._lease.shared):
            return now_s + LOOK_S
        self._lease.look(runs=self._status.doing != WAITING)
        return now_s + (
            min(LOOK_S, self._settings.agents_spec.ttl_s / 3) if self._lease.shared else LOOK_S
        )

    def _read(self) -> AgentsView:
        result = self.keyspace.transact(Transaction(reads=_READS))
        job = self._settings.agents_spec.job
        view = transactions.view_of(
            job,
            ViewScope.ALL,
            TransactionResult(result.succeeded, result.revision, result.found[:_VIEW_READS]),
        )
        if self._node not in view.by_node:
            raise FencedError(f"this agent is no longer a member. node={self._node}")
        facts, closed = result.found[_VIEW_READS:]
        statuses = {
            fact.key.rpartition("/")[2]: status
            for fact in facts
            if (status := decode_status(fact.value)) is not None
        }
        reason = closed[0].value.decode(errors="replace") if closed else None
        return AgentsView(view, statuses, kept_by_keepers=self._is_kept(), closed=reason)

    def _is_kept(self) -> bool:
        """Whether keepers hold the job.

        Once seen, that is true until this agent runs another round.
        """
        if self._kept or self._keepers is None:
            return self._kept
        reads = (transactions.keys_under(transactions.NODES, values=False),)
        kept = bool(self._keepers.transact(Transaction(reads=reads)).found[0])

        if self._status.doing != WAITING:
            self._kept = kept
        return kept

    def _show(self, agents: AgentsView) -> None:
        with self._changed:
            self._view = agents
            if not agents.lost:
                self._lost_since_s = None
            elif self._lost_since_s is None:
                self._lost_since_s = time.monotonic()
            self.problem = None
            self._warned = ""
            self._changed.notify_all()

    def _lead(self, agents: AgentsView) -> float:
        """Act as the leader if this agent is; returns until when there is nothing to do."""
        now_s = time.monotonic()
        if agents.view.leader is None:
            self._member.lead(agents.view)
            return now_s
        if agents.view.leader.node != self._node:
            self._enough_since_s = None
            return now_s + LOOK_S
        rules = self._settings.rules
        self._enough_since_s = update_enough_since(self._enough_since_s, agents, rules, now_s)
        decision = next_round(agents, self._enough_since_s, rules, now_s)
        if not isinstance(decision, PublishRound):
            return min(decision.until_s, now_s + LOOK_S)
        self._publish(agents, decision.places, decision.reason)
        return now_s

    def _publish(self, agents: AgentsView, places: tuple[NodePlacement, ...], reason: str) -> None:
        before, rules = agents.round, self._settings.rules
        lease = secrets.randbits(62) + 1
        self.keyspace.grant(lease, ROUND_TTL_S)
        record = EpochRecord(
            job=self._settings.agents_spec.job,
            number=1 if before is None else before.number + 1,
            places=places,
            leader=self._node,
            nodes_min=min(rules.agents_min, len(places)),
            nodes_max=rules.agents_max,
            note=encode_round_note(lease, self._ends_after(agents)),
        )
        if not isinstance(self._member.publish(record, agents.view), Published):
            return  # the next view shows the result
        self._report("round", f"round {record.number}: {reason}")
        if before is not None and not agents.kept_by_keepers:  # no agent runs it any more
            self.keyspace.revoke(before.lease)

    def _ends_after(self, agents: AgentsView) -> int:
        """See ``RendezvousRound``. While keepers hold the job together, nothing begins anew."""
        if self._keepers is None:
            return -1
        if agents.kept_by_keepers:
            return -1 if agents.round is None else agents.round.ends_after
        reads = (Keys(transactions.EPOCH, values=False),)
        (found,) = self._keepers.transact(Transaction(reads=reads)).found
        return found[0].changed if found else 0

    def _renew(self) -> None:
        own_round = self.own_round
        if own_round is not None and time.monotonic() - self._renewed_s > RENEW_S:
            self.keyspace.renew(own_round.lease)
            self._renewed_s = time.monotonic()

    # ---- helpers

    def _ask(self, transaction: Transaction) -> TransactionResult:
        """A transaction in the main thread.

        Works also after the end of the membership, which closed its keyspace.
        """
        if not self._stopped:
            return self.keyspace.transact(transaction)
        keyspace = keyspace_of(self._settings.agents_spec)
        try:
            return keyspace.transact(transaction)
        finally:
            keyspace.close()

    def _set_status(self, status: AgentStatus) -> None:
        self._status = status
        try:
            self._publish_status()
        except CkptError:  # the thread publishes it later
            return

    def _publish_status(self) -> None:
        with self._publishing:
            status = self._status
            if self._node and status != self._published:
                self._member.put_fact(STATUS_FACT, encode_status(status))
                self._published = status

    def _on_membership_lost(self, error: FencedError) -> None:
        if self._stopped:
            return
        self._report(
            "agent-out",
            f"this agent lost its job's membership, and joins again: {error}",
            alarm=True,
        )
        if self._node:
            self._member.keepalive.mark_lost(str(error))
        self._node = ""  # within REJOIN_S its place is safe; after that others may take it

    def _on_problem(self, error: CkptError) -> None:
        self._view_until_s = 0.0
        if self._stopped:
            return
        with self._changed:
            self.problem = error
            self._changed.notify_all()
        if str(error) != self._warned:
            self._warned = str(error)
            self._report(
                "rendezvous-waits",
                f"the agents' membership is unreachable, trying again: {error}",
                alarm=True,
            )

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped, seconds)

    def _report(self, kind: str, text: str, *, alarm: bool = False) -> None:
        self._emit(Event(kind, text, alarm=alarm))


def keyspace_of(spec: NodesSpec) -> Keyspace:
    """The keyspace of a job of nodes. Raises UsageError."""
    where = keyspace_location(spec)
    if isinstance(where, EtcdOptions):
        where = replace(where, call_s=min(where.call_s, spec.ttl_s / 4))
    return open_keyspace(where, spec.job)
