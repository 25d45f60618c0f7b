"""How ranks carry out ``agreement``: on each rank a thread answers proposals, on rank 0 it also
makes them.

A world of one rank needs neither thread nor messages: ``SoloDecisions``. Both give the loop the
same calls. No collective is used: it would block the step, fix the order of calls against the
user's own collectives, and hang if a rank is dead.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec

from ckpt.errors import CkptError, ConflictError, UnavailableError, UsageError
from ckpt.format.canonical import prepare_decoders
from ckpt.ipc.mailbox import POLL_FIRST_S, POLL_LAST_S, CountingMailbox, wait_for_message
from ckpt.session.agreement import Ack, Skip, SnapshotRequest, Take, boundary_for, merge_requests

DECISION_WAIT_S = 1800.0
"""How long a rank waits for rank 0's decision before it takes rank 0 for dead."""

Decide = Callable[[int], Take | Skip]
"""On rank 0: whether a slot is free on every rank, beside that many snapshots decided and not yet
taken.
"""

RANKS_PER_S_MAX = 10_000
"""Requests a second that all idle ranks together may send to the message store: their pauses grow
with their number.
"""


RULE_WAIT_S = 600.0
"""How long a rank waits until rank 0 has said its rule: it may still be starting."""


def check_capture_rule(mailbox: CountingMailbox, rule: str) -> None:
    """Before the first step: ranks that capture state by different rules would share no snapshot.

    ``rule``: what this rank decides by itself about when state is captured, as ``name=value``
    words; "" on all ranks: there is nothing to compare. Rank 0 says its rule, the others wait for
    it. Raises UsageError on a rank whose rule is another one.
    """
    if mailbox.size == 1 or not rule:
        return
    if mailbox.rank == 0:
        mailbox.post("capture-rule", rule.encode())
        return
    first = wait_for_message(
        mailbox, "capture-rule", timeout_s=RULE_WAIT_S, awaited="rank 0's rule of snapshots"
    ).decode()
    if first != rule:
        raise UsageError(
            "ranks would capture state at different steps, so they would share no snapshot. "
            f"rank_0=({first}) rank_{mailbox.rank}=({rule}); give all ranks the same every= and "
            "memory_every="
        )


class Decisions(Protocol):
    """What the loop asks at each boundary."""

    def request(self, request: SnapshotRequest) -> None:
        """Ask for a snapshot at the next boundary that no rank has passed. From any rank and
        thread; returns at once.
        """
        ...

    def announce(self, due: int) -> None:
        """On rank 0: decide about the due boundary ``due``, if that was not done yet. Nothing on
        other ranks.
        """
        ...

    def reached(self, completed: int, *, due: int | None) -> SnapshotRequest | None:
        """Report a boundary; returns what to do there. Waits only if a decision about this boundary
        is still open.

        ``due`` is the due boundary to serve here, if any: this one, or an earlier one at which no
        snapshot could be taken.
        """
        ...

    def end(self, completed: int) -> SnapshotRequest | None:
        """Report the loop's last boundary and settle all requests; returns those that take effect
        there.
        """
        ...

    def close(self) -> None:
        """End the thread. Idempotent."""
        ...


class SoloDecisions:
    """Decisions of a world of one rank: a request takes effect at the next boundary."""

    def __init__(self, decide: Decide, on_skipped: Callable[[int, str], None]) -> None:
        self._decide = decide
        self._on_skipped = on_skipped
        self._requests: list[SnapshotRequest] = []
        self._lock = threading.Lock()

    def request(self, request: SnapshotRequest) -> None:
        with self._lock:
            self._requests.append(request)

    def announce(self, due: int) -> None:
        pass

    def reached(self, completed: int, *, due: int | None) -> SnapshotRequest | None:
        if due is None and not self._requests:
            return None
        match self._decide(0):
            case Skip(reason) if not any(request.forced for request in self._requests):
                if due is not None:
                    self._on_skipped(completed, reason)
                return None  # a request by time waits for a slot; training does not
        requests = self._take_requests()
        return merge_requests([*requests, SnapshotRequest()] if due is not None else requests)

    def end(self, completed: int) -> SnapshotRequest | None:
        requests = self._take_requests()
        return merge_requests(requests) if requests else None

    def _take_requests(self) -> list[SnapshotRequest]:
        with self._lock:
            requests, self._requests = self._requests, []
        return requests

    def close(self) -> None:
        pass


class _Proposal(msgspec.Struct, frozen=True):
    tags: list[str]
    forced: bool
    stop: bool = False

    @classmethod
    def of(cls, request: SnapshotRequest) -> _Proposal:
        return cls(list(request.tags), request.forced, request.stop)

    def request(self) -> SnapshotRequest:
        return SnapshotRequest(tuple(self.tags), self.forced, self.stop)


class _Decision(msgspec.Struct, frozen=True):
    boundary: int
    error: str = ""


class RankDecisions:
    """Decisions of one rank among several, over a mailbox.

    Keys: ``request/<n>`` from any rank (n from the counter ``requests``); ``proposal/<n>`` and
    ``decision/<n>`` from rank 0; ``ack/<n>/<rank>``; ``due/<boundary>`` from rank 0;
    ``ended/<rank>``; ``closed`` from rank 0, which is a decision too. Steady state: one round trip
    each ``POLL_LAST_S`` seconds beside the training thread, and none in it.

    Over the limit of attributes: what the polling thread and the training thread share lies under
    one lock, which two classes would have to pass around.
    """

    def __init__(
        self,
        mailbox: CountingMailbox,
        decide: Decide,
        on_skipped: Callable[[int, str], None],
        *,
        passed: Callable[[], int] = lambda: -1,
    ) -> None:
        """``passed`` is asked on rank 0: the last boundary that every rank is known to have passed,
        to free old messages.
        """
        self._mailbox = mailbox
        self._passed = passed
        self._pause_s_max = max(POLL_LAST_S, mailbox.size / RANKS_PER_S_MAX)
        self._decide = decide
        self._on_skipped = on_skipped
        self._changed = threading.Condition()
        self._completed = 0
        self._ended = False
        self._hold_at: int | None = None  # the loop waits here for the open decision
        self._placed: dict[int, list[SnapshotRequest]] = {}
        self._deciding = 0  # a proposal is open: its boundary is not known yet
        self._announced: set[int] = set()
        self._failure: CkptError | None = None
        self._stop = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="ckpt-orders", daemon=True)
        self._thread.start()

    def request(self, request: SnapshotRequest) -> None:
        n = self._mailbox.count("requests", 1)
        self._mailbox.post(f"request/{n}", msgspec.json.encode(_Proposal.of(request)))

    def announce(self, due: int) -> None:
        if self._mailbox.rank != 0 or due in self._announced:
            return
        self._forget_passed()
        self._announced.add(due)
        with self._changed:
            reserved = sum(boundary <= due for boundary in self._placed) + self._deciding
        match self._decide(reserved):
            case Take():
                self._mailbox.post(f"due/{due}", b"take")
            case Skip(reason):
                self._mailbox.post(f"due/{due}", b"skip")
                self._on_skipped(due, reason)

    def reached(self, completed: int, *, due: int | None) -> SnapshotRequest | None:
        requests = self._pass(completed)
        if due is not None:
            self.announce(due)
            if self._decision_on(due, completed) == b"take":
                requests.append(SnapshotRequest())
        return merge_requests(requests) if requests else None

    def end(self, completed: int) -> SnapshotRequest | None:
        self._post_end(completed)
        deadline = time.monotonic() + DECISION_WAIT_S
        with self._changed:
            while not self._closed and self._failure is None:
                if not self._changed.wait(timeout=max(0.0, deadline - time.monotonic())):
                    raise UnavailableError(
                        f"not all ranks ended their loops. rank={self._mailbox.rank} "
                        f"completed={completed} "
                        f"timeout_s={DECISION_WAIT_S:g}; look at the other ranks' logs"
                    )
            if self._failure is not None:
                raise self._failure
            # A request may be placed beyond the end: its rank asked at the last boundary, before
            # the ranks knew that it was the last.
            requests = [
                request
                for boundary in sorted(self._placed)
                for request in self._placed.pop(boundary)
            ]
        return merge_requests(requests) if requests else None

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _decision_on(self, due: int, completed: int) -> bytes:
        """Rank 0's decision about a due boundary. Raises ConflictError if rank 0's loop ended
        without one.
        """
        key = f"due/{due}"
        try:
            return wait_for_message(
                self._mailbox,
                key,
                timeout_s=DECISION_WAIT_S,
                awaited=f"rank 0's decision about the snapshot due at step {due}",
                stop=lambda: self._failure is not None or self._mailbox.peek("ended/0") is not None,
            )
        except UnavailableError:
            if self._failure is not None:
                raise self._failure from None
            ended = self._mailbox.peek("ended/0")
            decision = self._mailbox.peek(key)  # rank 0 posts it before its end
            if decision is not None or ended is None:
                if decision is None:
                    raise
                return decision
            self._post_end(completed)
            # Raises ConflictError if the two ended at different boundaries.
            boundary_for({0: Ack(int(ended), True), self._mailbox.rank: Ack(completed, True)})
            raise

    def _post_end(self, completed: int) -> None:
        with self._changed:
            self._completed = completed
            self._ended = True
        self._mailbox.post(f"ended/{self._mailbox.rank}", str(completed).encode())

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
                        f"rank={self._mailbox.rank} completed={completed} "
                        f"timeout_s={DECISION_WAIT_S:g}; a rank is dead or far behind: look at its "
                        "log"
                    )
            if self._failure is not None:
                raise self._failure
            return self._due_requests(completed)

    def _due_requests(self, completed: int) -> list[SnapshotRequest]:
        """What was decided for this boundary, or for an earlier one if the loop counts several
        steps at once.
        """
        reached = sorted(boundary for boundary in self._placed if boundary <= completed)
        return [request for boundary in reached for request in self._placed.pop(boundary)]

    def _forget_passed(self) -> None:
        """On rank 0: free the messages about due boundaries that every rank has passed."""
        passed = self._passed()
        for due in [due for due in self._announced if due <= passed]:
            self._announced.remove(due)
            self._mailbox.forget(f"due/{due}")

    def _run(self) -> None:
        try:
            self._follow()
        except CkptError as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001  a thread ends here: the loop raises it at its next boundary
            lost = UnavailableError(
                f"the ranks' message store is gone. rank={self._mailbox.rank} cause={error!r}"
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
            if self._mailbox.rank == 0:
                served = self._propose(n, served)
            body = self._mailbox.peek(f"proposal/{n}")
            if body is not None:
                self._answer(n, msgspec.json.decode(body, type=_Proposal))
                n += 1
                pause_s = POLL_FIRST_S
                continue
            closing = self._mailbox.peek("closed") if self._ended else None
            if closing is not None:
                self._check(msgspec.json.decode(closing, type=_Decision))
                with self._changed:
                    self._closed = True
                    self._changed.notify_all()
                return
            self._stop.wait(pause_s)
            pause_s = min(pause_s * 1.5, self._pause_s_max)

    def _propose(self, n: int, served: int) -> int:
        """On rank 0: make proposal ``n`` of the new requests, or close the decisions once every
        loop has ended.
        """
        asked = self._mailbox.count("requests")
        if asked == served:
            ends = self._ends() if self._ended else None
            # Counted again after the ends were read: a request made before its rank's end is
            # counted now, if not before.
            if ends is not None and self._mailbox.count("requests") == served:
                self._mailbox.post("closed", msgspec.json.encode(_decide_boundary_of(ends)))
            return served
        requests = [
            msgspec.json.decode(self._wait(f"request/{k}", "a rank's request"), type=_Proposal)
            for k in range(served + 1, asked + 1)
        ]
        merged = merge_requests([request.request() for request in requests])
        if not (merged.forced or self._ended) and isinstance(self._decide(len(self._placed)), Skip):
            return (
                served  # all slots are in use: a request by time waits for one, training does not
            )
        for k in range(served + 1, asked + 1):
            self._mailbox.forget(f"request/{k}")
        with self._changed:
            self._deciding = 1
        self._mailbox.post(f"proposal/{n}", msgspec.json.encode(_Proposal.of(merged)))
        return asked

    def _answer(self, n: int, proposal: _Proposal) -> None:
        with self._changed:
            ack = Ack(self._completed, self._ended)
            # The promise of the answer: pass at most one more boundary before the decision is
            # known.
            if not self._ended:
                self._hold_at = self._completed + 1
        self._mailbox.post(
            f"ack/{n}/{self._mailbox.rank}", msgspec.json.encode([ack.completed, ack.ended])
        )
        if self._mailbox.rank == 0:
            self._mailbox.post(f"decision/{n}", msgspec.json.encode(self._decide_boundary(n)))
        decision = msgspec.json.decode(
            self._wait(f"decision/{n}", "rank 0's decision"), type=_Decision
        )
        self._check(decision)
        with self._changed:
            self._placed.setdefault(decision.boundary, []).append(proposal.request())
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
            for rank in range(self._mailbox.size)
        }
        if n > 0:
            # Every rank answered this proposal, so it has read the decision about the last one.
            for key in (
                f"proposal/{n - 1}",
                f"decision/{n - 1}",
                *(f"ack/{n - 1}/{rank}" for rank in acks),
            ):
                self._mailbox.forget(key)
        return _decide_boundary_of(acks)

    def _ends(self) -> dict[int, Ack] | None:
        """Where every rank's loop ended, or None while one still runs."""
        ends = {}
        for rank in range(self._mailbox.size):
            end = self._mailbox.peek(f"ended/{rank}")
            if end is None:
                return None
            ends[rank] = Ack(int(end), True)
        return ends

    @staticmethod
    def _check(decision: _Decision) -> None:
        if decision.error:
            raise ConflictError(decision.error)

    def _wait(self, key: str, awaited: str) -> bytes:
        return wait_for_message(
            self._mailbox, key, timeout_s=DECISION_WAIT_S, awaited=awaited, stop=self._stop.is_set
        )


def _decide_boundary_of(acks: Mapping[int, Ack]) -> _Decision:
    try:
        return _Decision(boundary_for(acks))
    except ConflictError as error:
        return _Decision(0, str(error))


prepare_decoders(_Proposal, _Decision)
