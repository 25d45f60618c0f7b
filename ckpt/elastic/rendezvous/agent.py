"""One agent among those of its job: joins, stays joined, sees, and leads when nobody else does.

A thread of its own does all of that, as long as the process lives and whatever happens; the agent's
main thread reads what it saw. The agents' keys lie in a job of their own: the membership's, and
below it ``said/seat/<node>`` what each does, ``closed`` why no round will come any more, and
``rounds/`` the stores of rounds. While a keeper runs here, they lie under its lease.
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

from ckpt.cluster.membership import transactions as moves
from ckpt.cluster.membership import transactions as names
from ckpt.cluster.membership.outcomes import Published
from ckpt.cluster.membership.member import KeyspaceMembership
from ckpt.cluster.membership.open import open_keyspace
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

# Under whose lease an agent lives: its own, or that of the keeper on its node, so that a node has
# one lease.
#
# Keepers learn from their launcher which agent that is, and say under their own lease that it may
# live there. Nobody but the keeper keeps that lease alive, so that one that hangs is missed as
# ever. When the keeper is lost, so is the agent's membership for a moment: it joins anew, under a
# lease of its own. When the keeper leaves, it takes back what it said, and its lease lasts as
# long as a lease does: that is how long the agent has to put its keys under one of its own.


def newest_offer(words: tuple[KeyValue, ...], keepers: tuple[KeyValue, ...]) -> KeyValue | None:
    """The newest of a keeper's ``words`` that name this agent, if it is a member still: one that
    was taken out won't renew."""
    newest = max(words, key=lambda one: one.created, default=None)
    if newest is None or names.node_key(offering_node(newest)) not in {one.key for one in keepers}:
        return None
    return newest


def offering_node(word: KeyValue) -> str:
    """The node that said it."""
    return word.key.rpartition("/")[2]


class AgentLease:
    """See the module. ``keepers``: the keys of the keepers' job, in the service in which ``member``
    is. For one thread."""

    def __init__(self, keepers: Keyspace, member: KeyspaceMembership, agent: str) -> None:
        self._keepers = keepers
        self._member = member
        self._words = names.fact_keys(names.agent_fact(agent))
        self._keeper = ""
        """The node that offered its lease last."""

    @property
    def shared(self) -> bool:
        """Whether this agent lives under a keeper's lease, so that it has to look in time whether
        that is still offered."""
        return self._member.borrowed_lease_id != 0

    def look(self, *, runs: bool) -> None:
        """Move where that is right now. ``runs``: workers run here, whose keeper will stay for a
        while.

        Raises FencedError where the agent is no member, UnavailableError.
        """
        word = self._offered()
        if word is None:
            self._member.use_own_lease()
        elif runs or self.shared:
            self._member.borrow_lease(word.lease_id)

    def _offered(self) -> KeyValue | None:
        own = (Keys(names.node_key(self._keeper), values=False),) if self._keeper else ()
        words, *known = self._keepers.transact(Transaction(reads=(self._words, *own))).found
        if not words:
            return None
        newest = max(words, key=lambda one: one.created)
        if not known or offering_node(newest) != self._keeper:
            self._keeper = offering_node(newest)
            key = Keys(names.node_key(self._keeper), values=False)
            known = list(self._keepers.transact(Transaction(reads=(key,))).found)
        return newest_offer(words, known[0])


LOOK_S = 2.0
"""How often an agent looks when nothing seems to happen."""
VIEW_S = 5.0
"""How often one that only follows reads all where nothing is said to have changed: each of N agents
reads of all N."""
RETRY_S = 0.2
ROUND_TTL_S = 3600.0
"""How long a round's store is kept after its last agent."""
RENEW_S = 300.0
JOIN_THREAD_S = 30.0

CLOSED = "closed"
STATUS_FACT = "seat"
_READS = (*names.ALL_KEYS, names.fact_keys(STATUS_FACT), Keys(CLOSED))
_VIEW_READS = len(names.ALL_KEYS)


class RendezvousAgent:
    """See the module. ``start`` begins; ``leave`` ends it for good."""

    def __init__(self, settings: RendezvousSettings, tell: Emit) -> None:
        host = "".join(
            letter if letter.isalnum() or letter in "_-" else "-" for letter in socket.gethostname()
        )
        self.name = f"{host[:30] or 'node'}-{os.urandom(6).hex()}"
        self.keyspace = keyspace_of(settings.agents_spec)
        self._settings = settings
        self._tell = tell
        self._keepers = keyspace_of(settings.nodes) if settings.nodes is not None else None
        meet = settings.agents_spec
        self._member = KeyspaceMembership(self.keyspace, meet.job, ttl_s=meet.ttl_s)
        shares = self._keepers is not None and settings.shares_service
        self._lease = (
            AgentLease(self._keepers, self._member, self.name) if self._keepers and shares else None
        )
        self._changed = threading.Condition()
        self._saying = threading.Lock()
        self._look: AgentsView | None = None
        self._look_until_s = 0.0
        """Until when it holds, unless something changes."""
        self._seat = AgentStatus(WAITING)
        self._said: AgentStatus | None = None
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
        """Why this agent can't become a member: the rendezvous was closed before it came."""
        self.problem: CkptError | None = None
        """What is in the way of seeing anything."""
        self._thread: threading.Thread | None = None

    # ---- the main thread's

    def start(self) -> None:
        """Begin, unless that was done."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="ckpt-rendezvous", daemon=True)
            self._thread.start()

    @property
    def status(self) -> AgentStatus:
        """What this agent does."""
        return self._seat

    def latest_view(self) -> AgentsView | None:
        """What was seen last."""
        return self._look

    @property
    def lost_for_s(self) -> float:
        """How long an agent of the round is missing."""
        since_s = self._lost_since_s
        return 0.0 if since_s is None else time.monotonic() - since_s

    def next_view(self, before: AgentsView | None, timeout_s: float) -> AgentsView | None:
        """What was seen after ``before``; None: nothing else, for so long."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._look is not before or bool(self.refusal), timeout_s
            )
            return self._look if self._look is not before else None

    def wait_for_round(self, last: int) -> None:
        """Wait for a round after the one numbered ``last``."""
        self.own_round = None
        self._sit(AgentStatus(WAITING, last))

    def run_round(self, round_: RendezvousRound) -> None:
        """Run the workers of a round; who keeps them is found out anew."""
        self.own_round = round_
        self._kept = False
        self._sit(AgentStatus(RUNNING, round_.number))

    def run_unranked(self) -> None:
        """Run workers that are in no round."""
        self.own_round = None
        self._sit(AgentStatus(ALONE, self._seat.round))

    def closed_reason(self) -> str | None:
        """Why the rendezvous is closed, as of now; None: it isn't. Raises UnavailableError."""
        if self._stopped and self._keepers is None:
            return "its only agent has ended"
        (found,) = self._ask(Transaction(reads=(Keys(CLOSED),))).found
        return found[0].value.decode(errors="replace") if found else None

    def close(self, why: str) -> None:
        """Have no round come any more. Raises UnavailableError where nobody answers as long as that
        may take."""
        until_s = time.monotonic() + self._settings.close_s
        while True:
            try:
                self._ask(Transaction(then=(Put(CLOSED, why.encode()),)))
                return
            except UnavailableError:
                if time.monotonic() > until_s:
                    raise
                time.sleep(RETRY_S)

    def leave(self) -> None:
        """End the membership. Idempotent; the agent can't be used after it."""
        with self._changed:
            if self._stopped:
                return
            self._stopped = True
            self._changed.notify_all()
        try:
            self._member.leave()
        except CkptError as error:
            self._say("leave-failed", f"the agent's membership ends by itself: {error}")
        finally:
            if self._thread is not None:
                self._thread.join(JOIN_THREAD_S)
            if self._keepers is not None:
                self._keepers.close()
            else:
                self._remove_file()

    def _remove_file(self) -> None:
        """One node alone met nobody in its file."""
        for more in ("", "-wal", "-shm"):
            Path(f"{self._settings.agents_spec.where}{more}").unlink(missing_ok=True)

    # ---- the thread

    def _run(self) -> None:
        while not self._stopped:
            try:
                if not self._node and not self._join():
                    self._pause(RETRY_S)
                    continue
                look = self._newest()
                self._say_seat()
                self._show(look)
                until_s = self._lead(look)
                self._renew()
                until_s = min(until_s, self._share_lease(look))
                left_s = until_s - time.monotonic()
                if left_s <= 0 or self.keyspace.wait(_READS, look.view.revision, timeout_s=left_s):
                    self._look_until_s = 0.0
            except FencedError as error:
                with suppress(FencedError):  # it left meanwhile
                    self._lose(error)
            except CkptError as error:
                self._hinder(error)
                self._pause(RETRY_S)
            except Exception as error:  # noqa: BLE001  a thread's border
                self._hinder(InternalError(f"the rendezvous failed. cause={error!r}"))
                self._pause(LOOK_S)

    def _join(self) -> bool:
        """Become a member. False: not now."""
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
        self._node, self._said, self._look_until_s = node, None, 0.0
        self._say_seat()
        return True

    def _may_begin(self) -> bool:
        """A rendezvous that was closed is open again when nobody of it is left; that is waited for,
        not for ever."""
        open_again = Transaction(
            (NoneOf(names.keys_under(names.NODES)),), (Delete(CLOSED),), (Keys(CLOSED),)
        )
        (found,) = self.keyspace.transact(open_again).found
        if not found:
            self._begun = True
            return True
        patience_s = 2 * self._settings.agents_spec.ttl_s + 2.0
        if time.monotonic() - self._began_s > patience_s:
            with self._changed:
                self.refusal = found[0].value.decode(errors="replace")
                self._changed.notify_all()
        return False

    def _newest(self) -> AgentsView:
        """What there is to see: what was seen before where nothing is said to have changed and this
        agent only follows."""
        look = self._look
        if look is not None and self._follows(look) and time.monotonic() < self._look_until_s:
            return look
        look = self._read()
        self._look_until_s = time.monotonic() + VIEW_S
        return look

    def _follows(self, look: AgentsView) -> bool:
        """Whether nothing here hangs on what is seen late: keepers hold the job together, and
        another agent leads."""
        leader = look.view.leader
        return (
            look.kept_by_keepers
            and self._seat.doing != WAITING
            and leader is not None
            and leader.node != self._node
        )

    def _share_lease(self, look: AgentsView) -> float:
        """Live under the keeper's lease while there is one; until when that is right."""
        now_s = time.monotonic()
        if self._lease is None or not (look.kept_by_keepers or self._lease.shared):
            return now_s + LOOK_S
        self._lease.look(runs=self._seat.doing != WAITING)
        return now_s + (
            min(LOOK_S, self._settings.agents_spec.ttl_s / 3) if self._lease.shared else LOOK_S
        )

    def _read(self) -> AgentsView:
        outcome = self.keyspace.transact(Transaction(reads=_READS))
        job = self._settings.agents_spec.job
        view = moves.view_of(
            job,
            ViewScope.ALL,
            TransactionResult(outcome.succeeded, outcome.revision, outcome.found[:_VIEW_READS]),
        )
        if self._node not in view.by_node:
            raise FencedError(f"this agent is no member any more. node={self._node}")
        said, closed = outcome.found[_VIEW_READS:]
        seats = {
            one.key.rpartition("/")[2]: seat
            for one in said
            if (seat := decode_status(one.value)) is not None
        }
        why = closed[0].value.decode(errors="replace") if closed else None
        return AgentsView(view, seats, kept_by_keepers=self._is_kept(), closed=why)

    def _is_kept(self) -> bool:
        """Whether keepers hold the job together. Once they do, they do until this agent runs
        another round."""
        if self._kept or self._keepers is None:
            return self._kept
        reads = (names.keys_under(names.NODES, values=False),)
        there = bool(self._keepers.transact(Transaction(reads=reads)).found[0])
        if self._seat.doing != WAITING:
            self._kept = there
        return there

    def _show(self, look: AgentsView) -> None:
        with self._changed:
            self._look = look
            if not look.lost:
                self._lost_since_s = None
            elif self._lost_since_s is None:
                self._lost_since_s = time.monotonic()
            self.problem = None
            self._warned = ""
            self._changed.notify_all()

    def _lead(self, look: AgentsView) -> float:
        """Do what the leader does, if this is the one; until when nothing is to be done."""
        now_s = time.monotonic()
        if look.view.leader is None:
            self._member.lead(look.view)
            return now_s
        if look.view.leader.node != self._node:
            self._enough_since_s = None
            return now_s + LOOK_S
        rules = self._settings.rules
        self._enough_since_s = update_enough_since(self._enough_since_s, look, rules, now_s)
        decision = next_round(look, self._enough_since_s, rules, now_s)
        if not isinstance(decision, PublishRound):
            return min(decision.until_s, now_s + LOOK_S)
        self._publish(look, decision.places, decision.reason)
        return now_s

    def _publish(self, look: AgentsView, places: tuple[NodePlacement, ...], why: str) -> None:
        before, rules = look.round, self._settings.rules
        lease = secrets.randbits(62) + 1
        self.keyspace.grant(lease, ROUND_TTL_S)
        record = EpochRecord(
            job=self._settings.agents_spec.job,
            number=1 if before is None else before.number + 1,
            places=places,
            leader=self._node,
            nodes_min=min(rules.agents_min, len(places)),
            nodes_max=rules.agents_max,
            note=encode_round_note(lease),
        )
        if not isinstance(self._member.publish(record, look.view), Published):
            return  # what came of it is seen
        self._say("round", f"round {record.number}: {why}")
        if before is not None and not look.kept_by_keepers:  # nobody runs it any more
            self.keyspace.revoke(before.lease)

    def _renew(self) -> None:
        mine = self.own_round
        if mine is not None and time.monotonic() - self._renewed_s > RENEW_S:
            self.keyspace.renew(mine.lease)
            self._renewed_s = time.monotonic()

    # ---- small parts

    def _ask(self, transaction: Transaction) -> TransactionResult:
        """In the main thread; also after the end of the membership, which closed what it used."""
        if not self._stopped:
            return self.keyspace.transact(transaction)
        keyspace = keyspace_of(self._settings.agents_spec)
        try:
            return keyspace.transact(transaction)
        finally:
            keyspace.close()

    def _sit(self, seat: AgentStatus) -> None:
        self._seat = seat
        try:
            self._say_seat()
        except CkptError:  # the thread says it later
            return

    def _say_seat(self) -> None:
        with self._saying:
            seat = self._seat
            if self._node and seat != self._said:
                self._member.put_fact(STATUS_FACT, encode_status(seat))
                self._said = seat

    def _lose(self, error: FencedError) -> None:
        if self._stopped:
            return
        self._say(
            "agent-out",
            f"this agent is out of its job's membership, and joins anew: {error}",
            alarm=True,
        )
        if self._node:
            self._member.keepalive.mark_lost(str(error))
        self._node = ""  # others may take its place if it does not come back at once

    def _hinder(self, error: CkptError) -> None:
        self._look_until_s = 0.0
        if self._stopped:
            return
        with self._changed:
            self.problem = error
            self._changed.notify_all()
        if str(error) != self._warned:
            self._warned = str(error)
            self._say(
                "rendezvous-waits",
                f"the agents' membership can't be reached, tried again: {error}",
                alarm=True,
            )

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped, seconds)

    def _say(self, kind: str, text: str, *, alarm: bool = False) -> None:
        self._tell(Event(kind, text, alarm=alarm))


def keyspace_of(spec: NodesSpec) -> Keyspace:
    """The keys of a job of nodes. Raises UsageError."""
    where = keyspace_location(spec)
    if isinstance(where, EtcdOptions):
        where = replace(where, call_s=min(where.call_s, spec.ttl_s / 4))
    return open_keyspace(where, spec.job)
