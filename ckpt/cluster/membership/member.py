"""Membership over any keyspace: asks, does the transactions of ``moves``, and repeats what may be
repeated.

A node has a lease of its own, or lives under that of a node of another job of the same service
(``live_under``): then that one alone is kept alive. Who lends its lease so (``join(agent=)``) does
not end it when it leaves.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace

from ckpt.cluster.membership import leases
from ckpt.cluster.membership import transactions as moves
from ckpt.cluster.membership import transactions as names
from ckpt.cluster.membership.api import (
    Following,
    Leading,
    LeaseStatus,
    MembershipUnknown,
    NotPublished,
    Published,
    Ticket,
)
from ckpt.cluster.membership.leases import (
    KeepaliveAnswer,
    Lease,
    LeaseGone,
    LeaseSeen,
    LeaseSilent,
    LeaseState,
    Renewed,
)
from ckpt.cluster.membership.records import (
    REASON_CHARS_MAX,
    EpochRecord,
    NodeInfo,
    View,
    ViewScope,
    decode_epoch,
    encode_epoch,
    encode_node,
)
from ckpt.errors import (
    CkptError,
    ConflictError,
    FencedError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from ckpt.keyspace.base import Keys, Keyspace, Transaction, TransactionResult

# Keeps one node's lease alive, on a thread of its own that no error ends.
#
# Each keepalive renews the lease and then reads, linearizably, that the node's own key is still
# there and which epoch holds: an answer from a server that is cut off from the others proves
# nothing. A node that lives under another's lease only reads.

_WAIT_S_MIN = 0.01
_JOIN_S = 30.0


class Keepalive:
    """See the module. ``clock`` is CLOCK_BOOTTIME in seconds. ``start`` makes the thread; without
    it, call ``round``.

    ``acts`` is told, in the thread, until when the node may act, each time that this was prolonged;
    it is quick, and raises nothing.
    """

    def __init__(
        self,
        keyspace: Keyspace,
        ticket: Ticket,
        lease: Lease,
        clock: Callable[[], float],
        *,
        on_act_until: Callable[[float], None] = lambda until_s: None,
    ) -> None:
        self._keyspace = keyspace
        self._acts = on_act_until
        self.ticket = ticket
        self._clock = clock
        self._lock = threading.Lock()
        self._lease = lease
        self._under = {ticket.lease_id}
        self._epoch = (0, 0)
        self._placed = False
        self._trouble = ""
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin."""
        name = f"ckpt-lease-{self.ticket.node[:8]}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End. The lease is left as it is; nothing is acted on any more under it."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(_JOIN_S)
        with self._lock:
            self._lease = leases.apply_answer(self._lease, LeaseGone("this node left"))

    def retire(self) -> None:
        """End soon, waiting for nothing: the one that ``heir`` made goes on."""
        self._stopping.set()

    def successor(self, ticket: Ticket, lease: Lease) -> Keepalive:
        """One that goes on for the same node under another lease, and knows what this one does."""
        made = Keepalive(self._keyspace, ticket, lease, self._clock, on_act_until=self._acts)
        with self._lock:
            made._epoch, made._placed = self._epoch, self._placed
        return made

    def expect_lease(self, lease_id: int) -> None:
        """The node's key may be found under that lease as well from now on: it is on its way there.
        0: it is not."""
        self._under = {self.ticket.lease_id, lease_id} - {0}

    @property
    def borrowed(self) -> bool:
        """Whether another one keeps the lease alive."""
        return self._lease.borrowed

    @property
    def next_keepalive_s(self) -> float:
        """When the next keepalive is due."""
        with self._lock:
            return self._lease.next_keepalive_s

    def status(self) -> LeaseStatus:
        """What the node may do now."""
        with self._lock:
            lease = self._lease
            return LeaseStatus(
                lease.state(self._clock()),
                lease.act_until_s,
                self._epoch[0],
                self._placed,
                lease.why or self._trouble,
            )

    def epoch(self) -> tuple[int, int]:
        """The newest epoch that this node saw, and its revision; zeros: none."""
        with self._lock:
            return self._epoch

    def record_epoch(self, record: EpochRecord, revision: int) -> None:
        """Note an epoch that this node read."""
        with self._lock:
            if revision > self._epoch[1]:
                self._epoch = (record.number, revision)
                self._placed = self.ticket.node in {place.node for place in record.places}

    def mark_lost(self, why: str) -> None:
        """Note that this node is no member any more, however that was learned."""
        self._hear(LeaseGone(why))

    def round(self) -> None:
        """One keepalive, and what its answer means."""
        sent_s = self._clock()
        self._hear(self._ask(sent_s))

    def _ask(self, sent_s: float) -> KeepaliveAnswer:
        try:
            left_s = 0.0 if self.borrowed else self._keyspace.renew(self.ticket.lease_id)
            if left_s <= 0 and not self.borrowed:
                return LeaseGone("the lease has expired")
            own, epoch = self._keyspace.transact(moves.read_keepalive(self.ticket)).found
            if not own or own[0].lease_id not in self._under:
                return LeaseGone("this node was taken out")
            if epoch and epoch[0].changed != self.epoch()[1]:
                self._read_epoch()
            return LeaseSeen(sent_s) if self.borrowed else Renewed(sent_s, left_s)
        except UnavailableError as error:
            return LeaseSilent(sent_s, str(error))

    def _read_epoch(self) -> None:
        (found,) = self._keyspace.transact(Transaction(reads=(Keys(names.EPOCH),))).found
        trouble = ""
        if found:
            try:
                self.record_epoch(decode_epoch(found[0].value), found[0].changed)
            except CkptError as error:  # no reason to be taken for dead; whoever asks for the view gets the error itself
                trouble = str(error)
        with self._lock:
            self._trouble = trouble

    def _hear(self, answer: KeepaliveAnswer) -> None:
        with self._lock:
            before_s = self._lease.act_until_s
            self._lease = leases.apply_answer(self._lease, answer)
            until_s = self._lease.act_until_s
        if until_s > before_s:
            self._acts(until_s)

    def _run(self) -> None:
        if not self.borrowed:
            self._acts(self._lease.act_until_s)  # quick, and raises nothing: see Keepalive
        while not self._stopping.wait(max(_WAIT_S_MIN, self.next_keepalive_s - self._clock())):
            sent_s = self._clock()
            try:
                self.round()
            except Exception as error:  # noqa: BLE001 - a thread's border: whatever it was, the lease must be kept alive
                self._hear(LeaseSilent(sent_s, f"{type(error).__name__}: {error}"))
            if self.status().state is LeaseState.LOST:
                return


LEASE_TTL_S = 5.0
SUSPICIONS_MAX = 16
"""How many nodes one witness can suspect at a time."""
FACT_BYTES_MAX = 64 << 10
RACES_MAX = 8
"""How often something that changed in between is tried again."""


def boottime_s() -> float:
    """The clock of leases: seconds since boot, also while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class KeyspaceMembership:
    """See Membership and Facts. One node of ``job`` in ``keyspace``, which it closes in the end.

    ``margin_s``: how long before its lease can run out a node stops acting; None: a tenth of the
    TTL. ``threads``: keep the lease alive; without it the caller calls ``keepalive.round`` when it
    is due. ``acts``: see Keepalive.
    """

    def __init__(
        self,
        keyspace: Keyspace,
        job: str,
        *,
        ttl_s: float = LEASE_TTL_S,
        margin_s: float | None = None,
        witnesses_min: int = 2,
        clock: Callable[[], float] = boottime_s,
        threads: bool = True,
        on_act_until: Callable[[float], None] = lambda until_s: None,
    ) -> None:
        self._keyspace = keyspace
        self._job = job
        self._ttl_s = ttl_s
        self._margin_s = leases.default_margin_s(ttl_s) if margin_s is None else margin_s
        self._witnesses_min = witnesses_min
        self._clock = clock
        self._threads = threads
        self._acts = on_act_until
        self._lock = threading.Lock()
        self._writing = threading.RLock()
        """Held while something is written: what was said before a move to another lease moves too,
        and nothing between."""
        self._joined: tuple[Ticket, Keepalive] | None = None
        self._agent = ""
        self._said: dict[str, None] = {}
        """The keys that this node may have written, beside its own one and the leader's."""
        self._target: Lease | None = None
        """Where a move went of which no answer came: it is made again before anything else is
        written."""
        self._suspected: OrderedDict[str, None] = OrderedDict()

    @property
    def keepalive(self) -> Keepalive:
        """What keeps this node's lease alive. Raises FencedError before it joined."""
        return self._member()[1]

    @property
    def borrowed_lease_id(self) -> int:
        """The lease of another one that this node lives under; 0: none."""
        with self._lock:
            joined = self._joined
        return joined[0].lease_id if joined is not None and joined[1].borrowed else 0

    def join(self, info: NodeInfo, *, lease_id: int = 0, agent: str = "") -> Ticket:
        """See Membership."""
        data = encode_node(info)
        word = {names.fact_key(names.agent_fact(agent), info.node): None} if agent else {}
        with self._writing:
            with self._lock:
                before = self._joined
            if before is not None:
                if before[1].status().state is not LeaseState.LOST:
                    raise UsageError(
                        f"this node is a member already. node={before[0].node} leave first"
                    )
                self._end(*before)  # it may live on where the node was taken out, and hold the lead
            ticket, keepalive = self._begin(info, data, lease_id, agent)
            with self._lock:
                self._joined = (ticket, keepalive)
                self._suspected.clear()
            self._agent, self._said, self._target = agent, word, None
        if self._threads:
            keepalive.start()
        return ticket

    def _begin(
        self, info: NodeInfo, data: bytes, lease_id: int, agent: str
    ) -> tuple[Ticket, Keepalive]:
        ticket = Ticket(info.node, lease_id or secrets.randbits(62) + 1)
        sent_s = self._clock()
        ttl_s = self._keyspace.renew(lease_id) if lease_id else self._grant(ticket)
        if ttl_s <= 0:
            raise FencedError(f"this membership is over. node={info.node} join under a new node id")
        lease = leases.granted_lease(
            ticket.lease_id, ttl_s=ttl_s, margin_s=self._margin_s, sent_s=sent_s
        )
        try:
            move = (
                moves.resume(ticket, data, agent) if lease_id else moves.join(ticket, data, agent)
            )
            moves.check_joined(self._keyspace.transact(move), ticket)
        except NotFoundError as error:
            raise FencedError(
                f"the lease ran out before the node had joined. node={info.node} join anew"
            ) from error
        except ConflictError:
            if not lease_id:
                self._keyspace.revoke(ticket.lease_id)
            raise
        return ticket, Keepalive(
            self._keyspace, ticket, lease, self._clock, on_act_until=self._acts
        )

    def borrow_lease(self, lease_id: int) -> bool:
        """Put all that this node wrote under a lease that another one of this service keeps alive,
        and give its own back.

        False: that lease is over, and nothing was changed. It is never out of the membership
        meanwhile, and joined when it did. From now on ``standing`` is never SURE: nobody here knows
        how long that lease has. Raises FencedError where this node is no member, UnavailableError:
        what became of it is found out before anything else is written.
        """
        with self._writing:
            ticket, _ = self._settled()
            if ticket.lease_id == lease_id:
                return True
            return self._move(
                leases.borrowed_lease(
                    lease_id, ttl_s=self._ttl_s, margin_s=self._margin_s, now_s=self._clock()
                )
            )

    def use_own_lease(self) -> None:
        """The way back: under a new lease of its own, where it lives under another's. Errors as
        ``live_under``."""
        with self._writing:
            ticket, keepalive = self._settled()
            if not keepalive.borrowed:
                return
            sent_s = self._clock()
            own = Ticket(ticket.node, secrets.randbits(62) + 1)
            ttl_s = self._grant(own)
            lease = leases.granted_lease(
                own.lease_id, ttl_s=ttl_s, margin_s=self._margin_s, sent_s=sent_s
            )
            if not self._move(lease):
                raise UnavailableError(
                    f"the new lease ran out before it was used. node={ticket.node} repeat"
                )

    def lease_status(self) -> LeaseStatus:
        """See Membership."""
        with self._lock:
            joined = self._joined
        if joined is None:
            return LeaseStatus(LeaseState.LOST, 0.0, 0, False, "this node has not joined")
        standing = joined[1].status()
        if self._target is None or standing.state is LeaseState.LOST:
            return standing
        return replace(
            standing,
            state=LeaseState.LAPSED,
            act_until_s=float("-inf"),
            why="on its way to another lease",
        )

    def view(self, scope: ViewScope = ViewScope.ALL) -> View:
        """See Membership."""
        view = moves.view_of(self._job, scope, self._keyspace.transact(moves.read_view(scope)))
        with self._lock:
            joined = self._joined
        if joined is not None and view.epoch is not None:
            joined[1].record_epoch(view.epoch, view.epoch_revision)
        return view

    def wait_change(
        self, after: int, *, timeout_s: float, scope: ViewScope = ViewScope.ALL
    ) -> bool:
        """See Membership."""
        with self._lock:
            joined = self._joined
        if joined is not None and joined[1].status().state is LeaseState.LOST:
            return True
        ranges = names.ALL_KEYS if scope is ViewScope.ALL else names.HEAD_KEYS
        return self._keyspace.wait(ranges, after, timeout_s=timeout_s)

    def lead(self, view: View | None = None) -> Leading | Following | MembershipUnknown:
        """See Membership."""
        with self._writing:
            try:
                ticket, _ = self._settled()
                for _ in range(RACES_MAX):
                    outcome = self._leased(moves.lead(ticket, view, self._witnesses_min))
                    if (who := moves.leader_after(outcome, ticket)) is not None:
                        return who
            except UnavailableError as error:
                return MembershipUnknown(str(error))
        return MembershipUnknown("the leader changed every time")

    def publish(
        self, record: EpochRecord, view: View, *, remove: tuple[str, ...] = ()
    ) -> Published | NotPublished | MembershipUnknown:
        """See Membership. Raises UsageError for a record that does not follow from the view."""
        with self._writing:
            try:
                ticket, keepalive = self._settled()
            except UnavailableError as error:
                return MembershipUnknown(str(error))
            return self._publish(record, view, remove, ticket, keepalive)

    def _publish(
        self,
        record: EpochRecord,
        view: View,
        remove: tuple[str, ...],
        ticket: Ticket,
        keepalive: Keepalive,
    ) -> Published | NotPublished | MembershipUnknown:
        data = encode_epoch(record)
        if record.job != self._job or record.leader != ticket.node:
            raise UsageError(
                f"not this node's epoch. job={record.job} leader={record.leader} node={ticket.node}"
            )
        if view.epoch is not None and record.number <= view.epoch.number:
            raise UsageError(
                f"an epoch must exceed the one before. epoch={record.number} "
                f"before={view.epoch.number}"
            )
        if record.number < keepalive.epoch()[0]:
            return NotPublished(
                f"a greater epoch was seen. epoch={record.number} seen={keepalive.epoch()[0]}"
            )
        if view.leader is None or view.leader.node != ticket.node:
            return NotPublished("this node does not lead in that view")
        try:
            done = moves.publish_outcome(
                self._keyspace.transact(moves.publish(ticket, data, view, remove)), ticket, data
            )
            if isinstance(done, NotPublished):
                return done
            keepalive.record_epoch(record, done.revision)
            for first in range(moves.REMOVES_MAX, len(remove), moves.REMOVES_MAX):
                self._keyspace.transact(moves.remove_members(done.revision, remove[first:]))
        except UnavailableError as error:
            return MembershipUnknown(str(error))
        return done

    def put_fact(self, fact: str, value: bytes | None) -> None:
        """See Facts."""
        if value is not None and len(value) > FACT_BYTES_MAX:
            raise UsageError(
                f"too large to be said. size_bytes={len(value)} limit_bytes={FACT_BYTES_MAX}"
            )
        with self._writing:
            self._write(names.fact_key(fact, self._member()[0].node), value)

    def read_facts(self, fact: str) -> Mapping[str, bytes]:
        """See Facts."""
        keys = names.fact_keys(fact)
        (found,) = self._keyspace.transact(Transaction(reads=(keys,))).found
        return {one.key.rpartition("/")[2]: one.value for one in found}

    def suspect(self, node: str, why: str | None) -> None:
        """See Facts."""
        with self._writing:
            self._suspect(node, why, by=self._member()[0].node)

    def _suspect(self, node: str, why: str | None, *, by: str) -> None:
        if node == by:
            raise UsageError(f"a node can't suspect itself. node={node} leave instead")
        key = names.suspicion_key(node, by)
        self._write(key, None if why is None else why[:REASON_CHARS_MAX].encode(errors="replace"))
        dropped = None
        with self._lock:
            self._suspected.pop(node, None)
            if why is not None:
                self._suspected[node] = None
            if len(self._suspected) > SUSPICIONS_MAX:
                dropped, _ = self._suspected.popitem(last=False)
        if dropped is not None:
            self._write(names.suspicion_key(dropped, by), None)

    def leave(self, *, keep: bool = False) -> None:
        """See Membership. Raises UnavailableError where the lease could not be ended: it runs out
        by itself."""
        with self._writing:
            with self._lock:
                joined, self._joined = self._joined, None
            try:
                if joined is not None:
                    joined[1].stop()
                    if not keep:
                        self._end(*joined)
            finally:
                self._keyspace.close()

    def _end(self, ticket: Ticket, keepalive: Keepalive) -> None:
        """End a membership now: with its lease, or, where others live under that or it is
        another's, key by key."""
        target = self._target
        if self._agent:
            with suppress(
                UnavailableError
            ):  # for the last time: who lives under it has that long to move out
                self._keyspace.renew(ticket.lease_id)
        if self._agent or keepalive.borrowed or target is not None:
            self._keyspace.transact(moves.stop_leading(ticket))
            for transaction in moves.remove_written(ticket, self._said):
                self._keyspace.transact(transaction)
        if not self._agent and not keepalive.borrowed:
            self._keyspace.revoke(ticket.lease_id)
        if target is not None and not target.borrowed:
            self._keyspace.revoke(target.lease_id)

    def _settled(self) -> tuple[Ticket, Keepalive]:
        """This node as it writes: a move whose answer was lost is made again first. Errors as
        ``live_under``."""
        if self._target is not None:
            self._move(self._target)
        return self._member()

    def _move(self, lease: Lease) -> bool:
        """Have all that this node wrote under that lease; False: it does not exist."""
        ticket, keepalive = self._member()
        self._target = lease
        keepalive.expect_lease(lease.lease_id)
        for _ in range(RACES_MAX):
            found = self._keyspace.transact(moves.read_written(ticket, tuple(self._said)))
            under = moves.lease_of(found)
            if under == lease.lease_id:  # an earlier try did it
                self._moved(ticket, keepalive, lease)
                return True
            if under != ticket.lease_id:
                self._target = None
                keepalive.mark_lost("this node was taken out")
                raise moves.not_a_member(ticket)
            try:
                done = self._keyspace.transact(
                    moves.move_to_lease(ticket, lease.lease_id, found)
                ).succeeded
            except NotFoundError:
                self._target = None
                keepalive.expect_lease(0)
                return False
            if done:
                self._moved(ticket, keepalive, lease)
                return True
        raise UnavailableError(
            f"what this node wrote changed every time. node={ticket.node} repeat later"
        )

    def _moved(self, ticket: Ticket, keepalive: Keepalive, lease: Lease) -> None:
        now = Ticket(ticket.node, lease.lease_id)
        heir = keepalive.successor(now, lease)
        with self._lock:
            self._joined = (now, heir)
        self._target = None
        if self._threads:
            heir.start()
        keepalive.retire()
        if not keepalive.borrowed:
            with suppress(UnavailableError):  # it runs out by itself
                self._keyspace.revoke(ticket.lease_id)

    def _member(self) -> tuple[Ticket, Keepalive]:
        with self._lock:
            joined = self._joined
        if joined is None:
            raise FencedError("this node has not joined, or has left. join first")
        return joined

    def _grant(self, ticket: Ticket) -> float:
        return self._keyspace.grant(ticket.lease_id, self._ttl_s).ttl_s

    def _leased(self, transaction: Transaction) -> TransactionResult:
        """A transaction that puts something under this node's lease. Raises FencedError where that
        has run out."""
        ticket, keepalive = self._member()
        try:
            return self._keyspace.transact(transaction)
        except NotFoundError as error:
            keepalive.mark_lost("the lease has expired")
            raise FencedError(
                f"this node is no member any more. node={ticket.node} join under a new node id"
            ) from error

    def _write(self, key: str, value: bytes | None) -> None:
        with self._writing:
            ticket, _ = self._settled()
            self._said[key] = None
            changed: int | None = 0
            for _ in range(RACES_MAX):
                changed = moves.fact_outcome(
                    self._leased(moves.put_fact(ticket, key, value, changed or 0)), ticket, value
                )
                if changed is None:
                    if value is None:
                        del self._said[key]
                    return
        raise UnavailableError(f"what stands there changed every time. key={key} repeat later")
