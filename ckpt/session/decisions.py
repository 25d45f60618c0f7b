"""The effects of ``agree``: a thread a rank that answers proposals, and on rank 0 makes them.

A world of one needs neither thread nor messages: ``SoloDecisions``. Both give the loop the same
four calls.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec

from ckpt.errors import CkptError, ConflictError, UnavailableError
from ckpt.format.canonical import prepare_decoders
from ckpt.ipc.mailbox import POLL_FIRST_S, POLL_LAST_S, CountingMailbox, wait_for_message
from ckpt.session.agreement import Ack, Skip, SnapshotRequest, Take, boundary_for, merge_requests

DECISION_WAIT_S = 1800.0
"""How long a rank waits for a decision of the leader before it calls the leader dead."""

Decide = Callable[[int], Take | Skip]
"""Asked on rank 0 alone: is a slot free on every rank, beside that many snapshots ordered and not
yet taken?"""

RANKS_PER_S_MAX = 10_000
"""Requests a second that idle ranks may send to the message store in all: their pauses grow with
their number."""


class Decisions(Protocol):
    """What the loop asks at each boundary."""

    def request(self, order: SnapshotRequest) -> None:
        """Ask for a snapshot at the next boundary that no rank has passed. From any rank and
        thread; returns at once."""
        ...

    def announce(self, due: int) -> None:
        """On rank 0, decide about the due boundary ``due`` if that was not done yet; nothing
        elsewhere."""
        ...

    def reached(self, completed: int, *, due: int | None) -> SnapshotRequest | None:
        """Report a boundary; returns what to do there. Waits only where a decision about this
        boundary is still open.

        ``due`` is the due boundary that is to be served here, if any: this one, or an earlier one
        that was no snapshot point.
        """
        ...

    def end(self, completed: int) -> SnapshotRequest | None:
        """Report the loop's last boundary and settle all requests; returns those that take effect
        there."""
        ...

    def close(self) -> None:
        """End the thread."""
        ...


class SoloDecisions:
    """Orders of a world of one: what was requested takes effect at the next boundary."""

    def __init__(self, decide: Decide, on_skipped: Callable[[int, str], None]) -> None:
        self._decide = decide
        self._told = on_skipped
        self._requests: list[SnapshotRequest] = []
        self._lock = threading.Lock()

    def request(self, order: SnapshotRequest) -> None:
        """See ``Decisions``."""
        with self._lock:
            self._requests.append(order)

    def announce(self, due: int) -> None:
        """See ``Decisions``."""

    def reached(self, completed: int, *, due: int | None) -> SnapshotRequest | None:
        """See ``Decisions``."""
        if due is None and not self._requests:
            return None
        match self._decide(0):
            case Skip(why) if not any(order.forced for order in self._requests):
                if due is not None:
                    self._told(completed, why)
                return None  # what rank 0's clock asked for waits for a slot, and training does not
        orders = self._take_requests()
        return merge_requests([*orders, SnapshotRequest()] if due is not None else orders)

    def end(self, completed: int) -> SnapshotRequest | None:
        """See ``Decisions``."""
        orders = self._take_requests()
        return merge_requests(orders) if orders else None

    def _take_requests(self) -> list[SnapshotRequest]:
        with self._lock:
            orders, self._requests = self._requests, []
        return orders

    def close(self) -> None:
        """See ``Decisions``."""


class _Proposal(msgspec.Struct, frozen=True):
    tags: list[str]
    forced: bool
    stop: bool = False

    @classmethod
    def of(cls, order: SnapshotRequest) -> _Proposal:
        return cls(list(order.tags), order.forced, order.stop)

    def order(self) -> SnapshotRequest:
        return SnapshotRequest(tuple(self.tags), self.forced, self.stop)


class _Decision(msgspec.Struct, frozen=True):
    boundary: int
    error: str = ""


class RankDecisions:
    """Orders of one rank among several, over a channel.

    Keys: ``request/<n>`` from anyone (n from the counter ``requests``), ``proposal/<n>`` and
    ``decision/<n>`` from rank 0, ``ack/<n>/<rank>``, ``due/<boundary>`` from rank 0,
    ``ended/<rank>``, ``closed`` from rank 0 (a decision too). Steady state: one ``check`` round
    trip each ``POLL_LAST_S`` seconds beside the training thread, nothing in it.
    """

    def __init__(
        self,
        channel: CountingMailbox,
        decide: Decide,
        on_skipped: Callable[[int, str], None],
        *,
        passed: Callable[[], int] = lambda: -1,
    ) -> None:
        """``passed`` is asked on rank 0: the last boundary that every rank is known to have passed,
        to free old messages."""
        self._channel = channel
        self._passed = passed
        self._pause_s_max = max(POLL_LAST_S, channel.size / RANKS_PER_S_MAX)
        self._decide = decide
        self._told = on_skipped
        self._changed = threading.Condition()
        self._completed = 0
        self._ended = False
        self._hold_at: int | None = None
        self._placed: dict[int, list[SnapshotRequest]] = {}
        self._deciding = 0  # proposals whose boundary is not known yet
        self._announced: set[int] = set()
        self._failure: CkptError | None = None
        self._stop = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="ckpt-orders", daemon=True)
        self._thread.start()

    def request(self, order: SnapshotRequest) -> None:
        """See ``Decisions``."""
        n = self._channel.count("requests", 1)
        self._channel.post(f"request/{n}", msgspec.json.encode(_Proposal.of(order)))

    def announce(self, due: int) -> None:
        """See ``Decisions``."""
        if self._channel.rank != 0 or due in self._announced:
            return
        self._forget_passed()
        self._announced.add(due)
        with self._changed:
            reserved = sum(boundary <= due for boundary in self._placed) + self._deciding
        match self._decide(reserved):
            case Take():
                self._channel.post(f"due/{due}", b"take")
            case Skip(why):
                self._channel.post(f"due/{due}", b"skip")
                self._told(due, why)

    def reached(self, completed: int, *, due: int | None) -> SnapshotRequest | None:
        """See ``Decisions``."""
        orders = self._pass(completed)
        if due is not None:
            self.announce(due)
            if self._word_on(due, completed) == b"take":
                orders.append(SnapshotRequest())
        return merge_requests(orders) if orders else None

    def end(self, completed: int) -> SnapshotRequest | None:
        """See ``Decisions``."""
        self._tell_end(completed)
        deadline = time.monotonic() + DECISION_WAIT_S
        with self._changed:
            while not self._closed and self._failure is None:
                if not self._changed.wait(timeout=max(0.0, deadline - time.monotonic())):
                    raise UnavailableError(
                        f"not all ranks ended their loops. rank={self._channel.rank} "
                        f"completed={completed} "
                        f"timeout_s={DECISION_WAIT_S:g}; look at the other ranks' logs"
                    )
            if self._failure is not None:
                raise self._failure
            # One placed beyond the end was asked for at the last boundary, before anyone knew that
            # it was the last.
            orders = [
                order for boundary in sorted(self._placed) for order in self._placed.pop(boundary)
            ]
        return merge_requests(orders) if orders else None

    def close(self) -> None:
        """See ``Decisions``."""
        self._stop.set()
        self._thread.join()

    def _word_on(self, due: int, completed: int) -> bytes:
        """Rank 0's word on a due boundary. Raises ConflictError where rank 0's loop has ended
        without giving it."""
        key = f"due/{due}"
        try:
            return wait_for_message(
                self._channel,
                key,
                timeout_s=DECISION_WAIT_S,
                awaited=f"rank 0's word on the snapshot due at step {due}",
                stop=lambda: self._failure is not None or self._channel.peek("ended/0") is not None,
            )
        except UnavailableError:
            if self._failure is not None:
                raise self._failure from None
            ended = self._channel.peek("ended/0")
            word = self._channel.peek(key)  # it comes before the end
            if word is not None or ended is None:
                if word is None:
                    raise
                return word
            self._tell_end(completed)
            boundary_for(
                {0: Ack(int(ended), True), self._channel.rank: Ack(completed, True)}
            )  # raises where they differ
            raise

    def _tell_end(self, completed: int) -> None:
        with self._changed:
            self._completed = completed
            self._ended = True
        self._channel.post(f"ended/{self._channel.rank}", str(completed).encode())

    def _pass(self, completed: int) -> list[SnapshotRequest]:
        deadline = time.monotonic() + DECISION_WAIT_S
        with self._changed:
            self._completed = completed
            while (
                self._hold_at is not None and completed >= self._hold_at and self._failure is None
            ):
                if not self._changed.wait(timeout=max(0.0, deadline - time.monotonic())):
                    raise UnavailableError(
                        "rank 0 did not decide about a requested snapshot. "
                        f"rank={self._channel.rank} completed={completed} "
                        f"timeout_s={DECISION_WAIT_S:g}; a rank is dead or far behind: look at its "
                        "log"
                    )
            if self._failure is not None:
                raise self._failure
            return self._due_orders(completed)

    def _due_orders(self, completed: int) -> list[SnapshotRequest]:
        """What was placed at this boundary, or at one before it where the loop counts several steps
        at once."""
        reached = sorted(boundary for boundary in self._placed if boundary <= completed)
        return [order for boundary in reached for order in self._placed.pop(boundary)]

    def _forget_passed(self) -> None:
        """Rank 0: free its words on boundaries that every rank has passed."""
        passed = self._passed()
        for due in [due for due in self._announced if due <= passed]:
            self._announced.remove(due)
            self._channel.forget(f"due/{due}")

    def _run(self) -> None:
        try:
            self._follow()
        except CkptError as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001  a thread's border: the loop raises it at its next boundary
            lost = UnavailableError(
                f"the ranks' message store is gone. rank={self._channel.rank} cause={error!r}"
            )
            lost.__cause__ = error
            self._fail(lost)

    def _fail(self, error: CkptError) -> None:
        with self._changed:
            if not self._stop.is_set():
                self._failure = error
            self._changed.notify_all()

    def _follow(self) -> None:
        n = 0
        served = 0
        pause_s = POLL_FIRST_S
        while not self._stop.is_set():
            if self._channel.rank == 0:
                served = self._propose(n, served)
            body = self._channel.peek(f"proposal/{n}")
            if body is not None:
                self._answer(n, msgspec.json.decode(body, type=_Proposal))
                n += 1
                pause_s = POLL_FIRST_S
                continue
            closing = self._channel.peek("closed") if self._ended else None
            if closing is not None:
                self._check(msgspec.json.decode(closing, type=_Decision))
                with self._changed:
                    self._closed = True
                    self._changed.notify_all()
                return
            self._stop.wait(pause_s)
            pause_s = min(pause_s * 1.5, self._pause_s_max)

    def _propose(self, n: int, served: int) -> int:
        """Rank 0: turn what was requested into proposal ``n``, or close the meeting when every loop
        has ended."""
        asked = self._channel.count("requests")
        if asked == served:
            ends = self._ends() if self._ended else None
            if (
                ends is not None and self._channel.count("requests") == served
            ):  # asked again: none came in between
                self._channel.post("closed", msgspec.json.encode(_place(ends)))
            return served
        orders = [
            msgspec.json.decode(self._wait(f"request/{k}", "a rank's request"), type=_Proposal)
            for k in range(served + 1, asked + 1)
        ]
        merged = merge_requests([order.order() for order in orders])
        if not (merged.forced or self._ended) and isinstance(self._decide(len(self._placed)), Skip):
            return served  # the store is behind: what the clock asked for waits for a slot, and training does not
        for k in range(served + 1, asked + 1):
            self._channel.forget(f"request/{k}")
        with self._changed:
            self._deciding = 1
        self._channel.post(f"proposal/{n}", msgspec.json.encode(_Proposal.of(merged)))
        return asked

    def _answer(self, n: int, proposal: _Proposal) -> None:
        with self._changed:
            ack = Ack(self._completed, self._ended)
            if not self._ended:
                self._hold_at = self._completed + 1
        self._channel.post(
            f"ack/{n}/{self._channel.rank}", msgspec.json.encode([ack.completed, ack.ended])
        )
        if self._channel.rank == 0:
            self._channel.post(f"decision/{n}", msgspec.json.encode(self._decide_boundary(n)))
        decision = msgspec.json.decode(
            self._wait(f"decision/{n}", "rank 0's decision"), type=_Decision
        )
        self._check(decision)
        with self._changed:
            self._placed.setdefault(decision.boundary, []).append(proposal.order())
            self._hold_at = None
            self._deciding = 0
            self._changed.notify_all()

    def _decide_boundary(self, n: int) -> _Decision:
        acks = {
            rank: Ack(
                *msgspec.json.decode(
                    self._wait(f"ack/{n}/{rank}", f"rank {rank}'s answer"), type=tuple[int, bool]
                )
            )
            for rank in range(self._channel.size)
        }
        if n > 0:  # each answered this proposal, so each has read the decision on the last one
            for key in (
                f"proposal/{n - 1}",
                f"decision/{n - 1}",
                *(f"ack/{n - 1}/{rank}" for rank in acks),
            ):
                self._channel.forget(key)
        return _place(acks)

    def _ends(self) -> dict[int, Ack] | None:
        """Where every rank's loop ended, or None while one still runs."""
        ends = {}
        for rank in range(self._channel.size):
            word = self._channel.peek(f"ended/{rank}")
            if word is None:
                return None
            ends[rank] = Ack(int(word), True)
        return ends

    @staticmethod
    def _check(decision: _Decision) -> None:
        if decision.error:
            raise ConflictError(decision.error)

    def _wait(self, key: str, what: str) -> bytes:
        return wait_for_message(
            self._channel, key, timeout_s=DECISION_WAIT_S, awaited=what, stop=self._stop.is_set
        )


def _place(acks: Mapping[int, Ack]) -> _Decision:
    try:
        return _Decision(boundary_for(acks))
    except ConflictError as error:
        return _Decision(0, str(error))


prepare_decoders(_Proposal, _Decision)
