"""Keeps one node's lease alive, on a thread of its own that no error ends.

Each keepalive renews the lease and then reads, linearizably, that the node's own key is still there and which epoch holds: an
answer from a server that is cut off from the others proves nothing. A node that lives under another's lease only reads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from ckpt.cluster.membership import leases, names
from ckpt.cluster.membership import transactions as moves
from ckpt.cluster.membership.api import Standing, Ticket
from ckpt.cluster.membership.leases import Answer, Gone, Lease, Renewed, Seen, Silent, State
from ckpt.cluster.membership.records import EpochRecord, decode_epoch
from ckpt.errors import CkptError, UnavailableError
from ckpt.keyspace.base import Keys, Keyspace, Transaction

_WAIT_S_MIN = 0.01
_JOIN_S = 30.0


class Keepalive:
    """See the module. ``clock`` is CLOCK_BOOTTIME in seconds. ``start`` makes the thread; without it, call ``round``.

    ``acts`` is told, in the thread, until when the node may act, each time that this was prolonged; it is quick, and raises
    nothing.
    """

    def __init__(
        self, keyspace: Keyspace, ticket: Ticket, lease: Lease, clock: Callable[[], float],
        *, acts: Callable[[float], None] = lambda until_s: None,
    ) -> None:  # fmt: skip
        self._keyspace = keyspace
        self._acts = acts
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
            self._lease = leases.heard(self._lease, Gone("this node left"))

    def retire(self) -> None:
        """End soon, waiting for nothing: the one that ``heir`` made goes on."""
        self._stopping.set()

    def heir(self, ticket: Ticket, lease: Lease) -> Keepalive:
        """One that goes on for the same node under another lease, and knows what this one does."""
        made = Keepalive(self._keyspace, ticket, lease, self._clock, acts=self._acts)
        with self._lock:
            made._epoch, made._placed = self._epoch, self._placed
        return made

    def expect(self, lease_id: int) -> None:
        """The node's key may be found under that lease as well from now on: it is on its way there. 0: it is not."""
        self._under = {self.ticket.lease_id, lease_id} - {0}

    @property
    def borrowed(self) -> bool:
        """Whether another one keeps the lease alive."""
        return self._lease.borrowed

    @property
    def due_s(self) -> float:
        """When the next keepalive is due."""
        with self._lock:
            return self._lease.next_s

    def standing(self) -> Standing:
        """What the node may do now."""
        with self._lock:
            lease = self._lease
            return Standing(
                lease.state(self._clock()), lease.act_until_s, self._epoch[0], self._placed, lease.why or self._trouble
            )

    def epoch(self) -> tuple[int, int]:
        """The newest epoch that this node saw, and its revision; zeros: none."""
        with self._lock:
            return self._epoch

    def saw(self, record: EpochRecord, revision: int) -> None:
        """Note an epoch that this node read."""
        with self._lock:
            if revision > self._epoch[1]:
                self._epoch = (record.number, revision)
                self._placed = self.ticket.node in {place.node for place in record.places}

    def lost(self, why: str) -> None:
        """Note that this node is no member any more, however that was learned."""
        self._hear(Gone(why))

    def round(self) -> None:
        """One keepalive, and what its answer means."""
        sent_s = self._clock()
        self._hear(self._ask(sent_s))

    def _ask(self, sent_s: float) -> Answer:
        try:
            left_s = 0.0 if self.borrowed else self._keyspace.renew(self.ticket.lease_id)
            if left_s <= 0 and not self.borrowed:
                return Gone("the lease has expired")
            own, epoch = self._keyspace.transact(moves.look(self.ticket)).found
            if not own or own[0].lease_id not in self._under:
                return Gone("this node was taken out")
            if epoch and epoch[0].changed != self.epoch()[1]:
                self._read_epoch()
            return Seen(sent_s) if self.borrowed else Renewed(sent_s, left_s)
        except UnavailableError as error:
            return Silent(sent_s, str(error))

    def _read_epoch(self) -> None:
        (found,) = self._keyspace.transact(Transaction(reads=(Keys(names.EPOCH),))).found
        trouble = ""
        if found:
            try:
                self.saw(decode_epoch(found[0].value), found[0].changed)
            except (
                CkptError
            ) as error:  # no reason to be taken for dead; whoever asks for the view gets the error itself
                trouble = str(error)
        with self._lock:
            self._trouble = trouble

    def _hear(self, answer: Answer) -> None:
        with self._lock:
            before_s = self._lease.act_until_s
            self._lease = leases.heard(self._lease, answer)
            until_s = self._lease.act_until_s
        if until_s > before_s:
            self._acts(until_s)

    def _run(self) -> None:
        if not self.borrowed:
            self._acts(self._lease.act_until_s)  # quick, and raises nothing: see Keepalive
        while not self._stopping.wait(max(_WAIT_S_MIN, self.due_s - self._clock())):
            sent_s = self._clock()
            try:
                self.round()
            except Exception as error:  # noqa: BLE001 - a thread's border: whatever it was, the lease must be kept alive
                self._hear(Silent(sent_s, f"{type(error).__name__}: {error}"))
            if self.standing().state is State.LOST:
                return
