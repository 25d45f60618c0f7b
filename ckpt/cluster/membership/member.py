"""One node's membership of a job, over any keyspace: transactions, retries and the lease.

A node has a lease of its own, or lives under the lease of a node of another job in the same
keyspace (``borrow_lease``): then only that node renews it. A node that lends its lease
(``join(agent=)``) does not end it when it leaves.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace

from ckpt.cluster.membership import leases, transactions
from ckpt.cluster.membership.leases import (
    KeepaliveAnswer,
    Lease,
    LeaseGone,
    LeaseSeen,
    LeaseSilent,
    LeaseState,
    Renewed,
)
from ckpt.cluster.membership.outcomes import (
    Following,
    Leading,
    LeaseStatus,
    MembershipUnknown,
    NotPublished,
    Published,
    Ticket,
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

# ---- keepalive

_WAIT_S_MIN = 0.01
"""Shortest wait between two keepalives: a lease that lapsed does not make the thread spin."""
_JOIN_S = 30.0
"""How long ``stop`` waits for the thread: a keepalive is bounded by the keyspace's own timeouts."""


class Keepalive:
    """Keeps one node's lease alive, on a thread of its own that no error ends. Thread-safe.

    Each keepalive renews the lease, and then reads the node's own key and the epoch's. It counts
    only if the reads were answered too: they are linearizable, and an etcd leader that is cut off
    from the others may still renew. A node that lives under another node's lease only reads.

    ``clock`` is CLOCK_BOOTTIME in seconds. ``start`` starts the thread; without it, call ``round``
    when ``next_keepalive_s`` is reached. ``on_act_until`` is called, in the thread, with the time
    until which the node may act, whenever that moves forward; it must be quick and never raise.
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
        self._on_act_until = on_act_until
        self.ticket = ticket
        self._clock = clock
        self._lock = threading.Lock()
        self._lease = lease
        self._lease_ids = {ticket.lease_id}
        """The leases that the node's key may be under: two while it moves to another one."""
        self._epoch = (0, 0, False)
        """Of the newest that was read: number, revision, whether this node is placed in it."""
        self._revision = 0
        """The greatest that the keyspace has answered with."""
        self._epoch_problem = ""
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread; once."""
        name = f"ckpt-lease-{self.ticket.node[:8]}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread. The lease stays as it is; its status is LOST from now on."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(_JOIN_S)
        with self._lock:
            self._lease = leases.apply_answer(self._lease, LeaseGone("this node left"))

    def retire(self) -> None:
        """End the thread soon, without waiting: a successor keeps the node's lease alive."""
        self._stopping.set()

    def successor(self, ticket: Ticket, lease: Lease) -> Keepalive:
        """A keepalive of the same node under another lease, which knows the same epoch."""
        successor = Keepalive(
            self._keyspace, ticket, lease, self._clock, on_act_until=self._on_act_until
        )
        with self._lock:
            successor._epoch, successor._revision = self._epoch, self._revision
        return successor

    def expect_lease(self, lease_id: int) -> None:
        """Accept the node's key under ``lease_id`` too: it is being moved there. 0: it is not."""
        self._lease_ids = {self.ticket.lease_id, lease_id} - {0}

    @property
    def borrowed(self) -> bool:
        """Whether another node renews the lease."""
        return self._lease.borrowed

    @property
    def next_keepalive_s(self) -> float:
        """When the next keepalive is due."""
        with self._lock:
            return self._lease.next_keepalive_s

    def status(self) -> LeaseStatus:
        """What the node may do now. Makes no call."""
        with self._lock:
            lease = self._lease
            return LeaseStatus(
                lease.state(self._clock()),
                lease.act_until_s,
                self._epoch[0],
                self._epoch[2],
                lease.reason or self._epoch_problem,
            )

    def epoch(self) -> tuple[int, int]:
        """The number and the revision of the newest epoch that this node has read; zeros: none."""
        with self._lock:
            return self._epoch[:2]

    def read(self, transaction: Transaction) -> TransactionResult:
        """Do a transaction. Raises FencedError, and the status is LOST, if the keyspace went back
        to an earlier revision than it has answered with: its data come from a backup.

        What this node knows is then of a history that did not happen: revisions that it waits for
        come again with other changes, or never.
        """
        with self._lock:
            before = self._revision
        result = self._keyspace.transact(transaction)
        if result.revision < before:
            reason = (
                "the membership's data went back to an earlier revision. "
                f"revision={result.revision} before={before}"
            )
            self.mark_lost(reason)
            raise FencedError(f"{reason} join under a new node id")
        with self._lock:
            self._revision = max(self._revision, result.revision)
        return result

    def record_epoch(self, record: EpochRecord, revision: int) -> None:
        """Remember an epoch that this node has read."""
        with self._lock:
            if revision > self._epoch[1]:
                placed = self.ticket.node in {place.node for place in record.places}
                self._epoch = (record.number, revision, placed)

    def mark_lost(self, reason: str) -> None:
        """Set the status to LOST: another call found that this node is no member any more."""
        self._apply(LeaseGone(reason))

    def round(self) -> None:
        """Make one keepalive and apply its answer."""
        sent_s = self._clock()
        self._apply(self._keep_alive(sent_s))

    def _keep_alive(self, sent_s: float) -> KeepaliveAnswer:
        try:
            left_s = 0.0 if self.borrowed else self._keyspace.renew(self.ticket.lease_id)
            if left_s <= 0 and not self.borrowed:
                return LeaseGone("the lease has expired")
            # After the renewal: a leader of etcd that is cut off may still renew a lease, but it
            # can't answer a linearizable read.
            own, epoch = self.read(transactions.read_keepalive(self.ticket)).found
            if not own or own[0].lease_id not in self._lease_ids:
                return LeaseGone("this node was removed")
            if epoch and epoch[0].changed != self.epoch()[1]:
                self._read_epoch()
            return LeaseSeen(sent_s) if self.borrowed else Renewed(sent_s, left_s)
        except FencedError as error:
            return LeaseGone(str(error))
        except UnavailableError as error:
            return LeaseSilent(sent_s, str(error))

    def _read_epoch(self) -> None:
        read = Transaction(reads=(Keys(transactions.EPOCH),))
        (entries,) = self._keyspace.transact(read).found
        problem = ""
        if entries:
            try:
                self.record_epoch(decode_epoch(entries[0].value), entries[0].changed)
            except CkptError as error:
                # An unreadable epoch does not end this node's lease; ``view`` raises the error.
                problem = str(error)
        with self._lock:
            self._epoch_problem = problem

    def _apply(self, answer: KeepaliveAnswer) -> None:
        with self._lock:
            before_s = self._lease.act_until_s
            self._lease = leases.apply_answer(self._lease, answer)
            until_s = self._lease.act_until_s
        if until_s > before_s:
            self._on_act_until(until_s)

    def _run(self) -> None:
        if not self.borrowed:
            self._on_act_until(self._lease.act_until_s)
        while not self._stopping.wait(max(_WAIT_S_MIN, self.next_keepalive_s - self._clock())):
            sent_s = self._clock()
            try:
                self.round()
            except Exception as error:  # noqa: BLE001 - whatever it was, the lease must be kept alive
                self._apply(LeaseSilent(sent_s, f"{type(error).__name__}: {error}"))
            if self.status().state is LeaseState.LOST:
                return


LEASE_TTL_S = 5.0
SUSPICIONS_MAX = 16
"""How many nodes one witness can suspect at a time."""
FACT_BYTES_MAX = 64 << 10
RACES_MAX = 8
"""How often a write is tried again because another one came in between."""


def boottime_s() -> float:
    """The clock of leases: seconds since boot, also while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class KeyspaceMembership:
    """One node of ``job`` in ``keyspace``, which it closes when it leaves. Thread-safe.

    All nodes are alike: each can lead. Calls that read raise UnavailableError if no answer came.
    Calls that write return MembershipUnknown, or raise UnavailableError if all that the caller can
    do is to repeat. FencedError: this node is no member, or no longer.

    ``margin_s``: how long before its lease can expire a node stops acting; None: a tenth of the
    TTL. ``threads``: keep the lease alive in a thread; without it the caller calls
    ``keepalive.round`` when it is due. ``on_act_until``: see Keepalive.

    It has more attributes than our limit: lease settings, and the state of one join, which every
    write needs under one lock.
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
        self._on_act_until = on_act_until
        self._lock = threading.Lock()
        self._writing = threading.RLock()
        """Held during each write, so that a move to another lease takes along all keys that were
        written before it, and none is written during it."""
        self._joined: tuple[Ticket, Keepalive] | None = None
        self._agent = ""
        self._facts: dict[str, None] = {}
        """The keys that this node may have written, beside its own and the leader's. A key is added
        before it is written: a write without an answer may have happened."""
        self._target: Lease | None = None
        """The target of a move that got no answer. It is repeated before anything else is written,
        or a key could be left behind under the old lease."""
        self._suspected: OrderedDict[str, None] = OrderedDict()

    @property
    def keepalive(self) -> Keepalive:
        """The keepalive of this node's lease. Raises FencedError before it joined."""
        return self._member()[1]

    @property
    def borrowed_lease_id(self) -> int:
        """The lease of another node that this one lives under; 0: none."""
        with self._lock:
            joined = self._joined
        return joined[0].lease_id if joined is not None and joined[1].borrowed else 0

    def join(self, info: NodeInfo, *, lease_id: int = 0, agent: str = "") -> Ticket:
        """Become a member, and stay one: the lease is kept alive from now on.

        ``agent``: an agent on this machine that may put its keys, of another job, under this lease
        too; it finds that in the fact ``agent_fact(agent)``. Such a lease is not revoked when this
        node leaves: it expires by itself. ``lease_id``: take on the membership of that ticket,
        whose process must be dead.

        After UnavailableError join under a new node id: this one may have joined. Raises
        ConflictError if another member has the node id, FencedError if the membership to be taken
        on is over, UsageError if this node is a member already.
        """
        data = encode_node(info)
        facts = (
            {transactions.fact_key(transactions.agent_fact(agent), info.node): None}
            if agent
            else {}
        )
        with self._writing:
            with self._lock:
                before = self._joined
            if before is not None:
                if before[1].status().state is not LeaseState.LOST:
                    raise UsageError(
                        f"this node is a member already. node={before[0].node} leave first"
                    )
                # Removal by an epoch leaves the lease alive, and the lead under it.
                self._end(*before)
            ticket, keepalive = self._begin(info, data, lease_id, agent)
            with self._lock:
                self._joined = (ticket, keepalive)
                self._suspected.clear()
            self._agent, self._facts, self._target = agent, facts, None
        if self._threads:
            keepalive.start()
        return ticket

    def _begin(
        self, info: NodeInfo, data: bytes, lease_id: int, agent: str
    ) -> tuple[Ticket, Keepalive]:
        # The id of a new lease is drawn here: a grant without an answer can be repeated.
        ticket = Ticket(info.node, lease_id or secrets.randbits(62) + 1)
        sent_s = self._clock()  # before the call: the lease may begin to run at any moment after it
        ttl_s = self._keyspace.renew(lease_id) if lease_id else self._grant(ticket)
        if ttl_s <= 0:
            raise FencedError(f"this membership is over. node={info.node} join under a new node id")
        lease = leases.granted_lease(
            ticket.lease_id, ttl_s=ttl_s, margin_s=self._margin_s, sent_s=sent_s
        )
        try:
            build = transactions.resume if lease_id else transactions.join
            result = self._keyspace.transact(build(ticket, data, agent))
            transactions.check_joined(result, ticket)  # a repeated try counts as joined
        except NotFoundError as error:
            raise FencedError(
                f"the lease ran out before the node had joined. node={info.node} join anew"
            ) from error
        except ConflictError:
            if not lease_id:
                self._keyspace.revoke(ticket.lease_id)
            raise
        return ticket, Keepalive(
            self._keyspace, ticket, lease, self._clock, on_act_until=self._on_act_until
        )

    def borrow_lease(self, lease_id: int) -> bool:
        """Move all keys of this node under a lease that another node renews, and revoke its own.

        False: that lease is over, and nothing was changed. The move is one transaction: the node
        stays a member all the time, with the revision at which it joined. From now on its status is
        LAPSED at best, since the remaining time of that lease is unknown here. Raises FencedError
        if this node is no member, UnavailableError: the next write finds out what became of it.
        """
        with self._writing:
            ticket, _ = self._finish_move()
            if ticket.lease_id == lease_id:
                return True
            return self._move(
                leases.borrowed_lease(
                    lease_id, ttl_s=self._ttl_s, margin_s=self._margin_s, now_s=self._clock()
                )
            )

    def use_own_lease(self) -> None:
        """Move all keys back under a new lease of this node's own, if it lives under another
        node's.

        Raises as ``borrow_lease``.
        """
        with self._writing:
            ticket, keepalive = self._finish_move()
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
        """What this node may do now. Makes no call."""
        with self._lock:
            joined = self._joined
        if joined is None:
            return LeaseStatus(LeaseState.LOST, 0.0, 0, False, "this node has not joined")
        status = joined[1].status()
        if self._target is None or status.state is LeaseState.LOST:
            return status
        # The keys may be under the new lease already, of which nothing is known yet.
        return replace(
            status,
            state=LeaseState.LAPSED,
            act_until_s=float("-inf"),
            reason="on its way to another lease",
        )

    def view(self, scope: ViewScope = ViewScope.ALL) -> View:
        """The job at one revision, read linearizably.

        Raises IntegrityError if the epoch is unreadable, FencedError if this node is a member of a
        history that the keyspace has lost: it must join anew.
        """
        with self._lock:
            joined = self._joined
        read = self._keyspace.transact if joined is None else joined[1].read
        result = read(transactions.read_view(scope))
        view = transactions.view_of(self._job, scope, result)
        if joined is not None and view.epoch is not None:
            joined[1].record_epoch(view.epoch, view.epoch_revision)
        return view

    def wait_change(
        self, after: int, *, timeout_s: float, scope: ViewScope = ViewScope.ALL
    ) -> bool:
        """Wait up to ``timeout_s`` until something in ``scope`` may have changed after revision
        ``after``; says whether it may.

        True at once if this node is no member any more. Waiting saves reads, and promises nothing:
        read the view now and then all the same.
        """
        with self._lock:
            joined = self._joined
        if joined is not None and joined[1].status().state is LeaseState.LOST:
            return True  # no change would come of its own: the caller must join anew
        ranges = transactions.ALL_KEYS if scope is ViewScope.ALL else transactions.HEAD_KEYS
        return self._keyspace.wait(ranges, after, timeout_s=timeout_s)

    def lead(self, view: View | None = None) -> Leading | Following | MembershipUnknown:
        """Try to lead: if no node does, or in place of the leader of ``view`` if witnesses there
        confirm its death."""
        with self._writing:
            try:
                ticket, _ = self._finish_move()
                for _ in range(RACES_MAX):
                    result = self._transact_leased(
                        transactions.lead(ticket, view, self._witnesses_min)
                    )
                    if (leader := transactions.leader_after(result, ticket)) is not None:
                        return leader
            except UnavailableError as error:
                return MembershipUnknown(str(error))
        return MembershipUnknown("the leader changed every time")

    def stop_leading(self) -> None:
        """Give up the lead, if this node has it. Raises UnavailableError, FencedError."""
        ticket, _ = self._member()
        self._keyspace.transact(transactions.stop_leading(ticket))

    def publish(
        self, record: EpochRecord, view: View, *, remove: tuple[str, ...] = ()
    ) -> Published | NotPublished | MembershipUnknown:
        """Make ``record`` the epoch and end the membership of ``remove``.

        Only if leader and epoch are still those of ``view``. Raises UsageError for a record that
        does not follow from the view.
        """
        with self._writing:
            try:
                ticket, keepalive = self._finish_move()
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
        # The keepalives may have read an epoch that is newer than the view.
        if record.number < keepalive.epoch()[0]:
            return NotPublished(
                f"a greater epoch was seen. epoch={record.number} seen={keepalive.epoch()[0]}"
            )
        if view.leader is None or view.leader.node != ticket.node:
            return NotPublished("this node does not lead in that view")
        try:
            result = self._keyspace.transact(transactions.publish(ticket, data, view, remove))
            outcome = transactions.publish_outcome(result, ticket, data)
            if isinstance(outcome, NotPublished):
                return outcome
            keepalive.record_epoch(record, outcome.revision)
            # One transaction has a limited number of operations. The epoch, which is in the first
            # one, already fences the members that the later ones delete.
            for first in range(transactions.REMOVES_MAX, len(remove), transactions.REMOVES_MAX):
                self._keyspace.transact(
                    transactions.remove_members(outcome.revision, remove[first:])
                )
        except UnavailableError as error:
            return MembershipUnknown(str(error))
        return outcome

    def put_fact(self, fact: str, value: bytes | None) -> None:
        """Write a fact about this node under its lease, in place of its value before; None: delete
        it."""
        if value is not None and len(value) > FACT_BYTES_MAX:
            raise UsageError(
                f"a fact is too large. size_bytes={len(value)} limit_bytes={FACT_BYTES_MAX}"
            )
        with self._writing:
            self._write(transactions.fact_key(fact, self._member()[0].node), value)

    def read_facts(self, fact: str) -> Mapping[str, bytes]:
        """The value of a fact for each node that has written it."""
        keys = transactions.fact_keys(fact)
        (entries,) = self._keyspace.transact(Transaction(reads=(keys,))).found
        return {entry.key.rpartition("/")[2]: entry.value for entry in entries}

    def suspect(self, node: str, reason: str | None) -> None:
        """State that ``node`` may be dead; None: withdraw that.

        A node can suspect SUSPICIONS_MAX others at a time; one more withdraws the oldest suspicion.
        """
        with self._writing:
            self._suspect(node, reason, by=self._member()[0].node)

    def _suspect(self, node: str, reason: str | None, *, by: str) -> None:
        if node == by:
            raise UsageError(f"a node can't suspect itself. node={node} leave instead")
        key = transactions.suspicion_key(node, by)
        value = None if reason is None else reason[:REASON_CHARS_MAX].encode(errors="replace")
        self._write(key, value)
        dropped = None
        with self._lock:
            # In the order of their last statement, so that the oldest one can be withdrawn.
            self._suspected.pop(node, None)
            if reason is not None:
                self._suspected[node] = None
            if len(self._suspected) > SUSPICIONS_MAX:
                dropped, _ = self._suspected.popitem(last=False)
        if dropped is not None:
            self._write(transactions.suspicion_key(dropped, by), None)

    def leave(self, *, keep: bool = False) -> None:
        """End the membership. ``keep``: end only this process's part; another one takes the ticket
        on.

        Raises UnavailableError if the lease could not be revoked: it expires by itself.
        """
        with self._writing:
            with self._lock:
                joined, self._joined = self._joined, None
            # From here on the status is LOST, before the lease ends for the others.
            try:
                if joined is not None:
                    joined[1].stop()
                    if not keep:
                        self._end(*joined)
            finally:
                self._keyspace.close()

    def _end(self, ticket: Ticket, keepalive: Keepalive) -> None:
        """End a membership now: by its lease, or key by key if an agent may live under the lease,
        or if another node owns it."""
        target = self._target
        if self._agent:
            # Renewed for the last time: an agent that lives under it has a TTL to move out.
            with suppress(UnavailableError):
                self._keyspace.renew(ticket.lease_id)
        # With a move under way the keys may be under either lease, so they are deleted one by one.
        if self._agent or keepalive.borrowed or target is not None:
            self._keyspace.transact(transactions.stop_leading(ticket))
            for transaction in transactions.remove_written(ticket, self._facts):
                self._keyspace.transact(transaction)
        if not self._agent and not keepalive.borrowed:
            self._keyspace.revoke(ticket.lease_id)
        if target is not None and not target.borrowed:
            self._keyspace.revoke(target.lease_id)

    def _finish_move(self) -> tuple[Ticket, Keepalive]:
        """Repeat a move that got no answer, before anything else is written. Raises as
        ``borrow_lease``."""
        if self._target is not None:
            self._move(self._target)
        return self._member()

    def _move(self, lease: Lease) -> bool:
        """Put all keys of this node under that lease; False: it does not exist."""
        ticket, keepalive = self._member()
        self._target = lease
        # Before the transaction, or a keepalive in between would find the key under a lease that it
        # does not know, and report the node as lost.
        keepalive.expect_lease(lease.lease_id)
        for _ in range(RACES_MAX):
            written = self._keyspace.transact(transactions.read_written(ticket, tuple(self._facts)))
            current = transactions.lease_of(written)
            if current == lease.lease_id:  # an earlier try did it
                self._complete_move(ticket, keepalive, lease)
                return True
            if current != ticket.lease_id:
                self._target = None
                keepalive.mark_lost("this node was removed")
                raise transactions.not_a_member(ticket)
            try:
                moved = self._keyspace.transact(
                    transactions.move_to_lease(ticket, lease.lease_id, written)
                ).succeeded
            except NotFoundError:  # no such lease: the keys are where they were
                self._target = None
                keepalive.expect_lease(0)
                return False
            if moved:
                self._complete_move(ticket, keepalive, lease)
                return True
        raise UnavailableError(
            f"gave up after {RACES_MAX} conflicting writes. node={ticket.node} repeat later"
        )

    def _complete_move(self, ticket: Ticket, keepalive: Keepalive, lease: Lease) -> None:
        moved = Ticket(ticket.node, lease.lease_id)
        successor = keepalive.successor(moved, lease)
        with self._lock:
            self._joined = (moved, successor)
        self._target = None
        # The old keepalive ends after the new one runs: the node is never without.
        if self._threads:
            successor.start()
        keepalive.retire()
        if not keepalive.borrowed:
            with suppress(UnavailableError):  # then it expires by itself
                self._keyspace.revoke(ticket.lease_id)

    def _member(self) -> tuple[Ticket, Keepalive]:
        with self._lock:
            joined = self._joined
        if joined is None:
            raise FencedError("this node has not joined, or has left. join first")
        return joined

    def _grant(self, ticket: Ticket) -> float:
        return self._keyspace.grant(ticket.lease_id, self._ttl_s).ttl_s

    def _transact_leased(self, transaction: Transaction) -> TransactionResult:
        """Do a transaction that puts a key under this node's lease. Raises FencedError if the lease
        has expired."""
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
            ticket, _ = self._finish_move()
            self._facts[key] = None
            changed: int | None = 0
            for _ in range(RACES_MAX):
                result = self._transact_leased(
                    transactions.put_fact(ticket, key, value, changed or 0)
                )
                changed = transactions.fact_outcome(result, ticket, value)
                if changed is None:
                    if value is None:
                        del self._facts[key]
                    return
        raise UnavailableError(
            f"gave up after {RACES_MAX} conflicting writes. key={key} repeat later"
        )
