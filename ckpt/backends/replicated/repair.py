"""The background repair of copies, and the probes of stores that failed.

One thread per group, which starts when there is something to do and ends when there is nothing. It
calls no store itself: each store's own threads do, one object at a time, in order with other writes
of the same key.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from ckpt.backends.replicated.buffers import PooledBuffer
from ckpt.backends.replicated.group import AnswerQueue, ReplicaSide, StoreGroup, StoreReplica
from ckpt.backends.replicated.ledger import (
    CopyFault,
    CopyIntact,
    LeaveToScrub,
    RepairCopy,
    RepairLater,
    RepairNeed,
    VerifiedRange,
    equal_outside,
    next_need,
    no_verified_source,
    plan_repair,
)
from ckpt.backends.replicated.policy import CircuitEvent, CircuitState, probe_due, stall_s
from ckpt.errors import CkptError
from ckpt.format.canonical import digest

# ---- One object repaired in one store: stat all copies, plan, copy.

PIECE_BYTES = 16 << 20
"""Bytes per request when a whole object is read: a size that any store serves well."""


@dataclass(frozen=True, slots=True)
class RepairDone:
    """The copy now equals the others."""


@dataclass(frozen=True, slots=True)
class ObjectRepair:
    """The repair of one object in one store."""

    group: StoreGroup
    replica: StoreReplica
    key: str
    need: RepairNeed

    def run(self) -> CopyIntact | RepairLater | LeaveToScrub | RepairDone:
        """Stat all copies, plan, copy. Raises CkptError if the store itself fails."""
        plan = self._plan()
        if not isinstance(plan, RepairCopy):
            return plan
        all_answered = plan.all_answered
        for index in sorted(plan.sources, key=self.group.read_order(plan.size_bytes).index):
            source = self.group.replicas[index]
            whole = _read_whole(self.group, source, self.replica.index, self.key, plan.size_bytes)
            if whole is None:
                # This source may have had the verified bytes, so the need is postponed, not left.
                all_answered = False
                continue
            try:
                if not self._proven(whole.view):
                    continue
                outcome = self._replace(whole.view, plan)
            finally:
                self.group.memory.free(self.replica.index, plan.size_bytes)
                self.group.memory.recycle(whole)
            return outcome
        return no_verified_source(all_answered=all_answered)

    def _plan(self) -> RepairCopy | CopyIntact | RepairLater | LeaveToScrub:
        group, key = self.group, self.key
        answers = group.ask(
            range(len(group.replicas)), lambda other: other.read(0, lambda: other.store.stat(key))
        )
        stats = {
            index: answer for index, answer in answers.items() if not isinstance(answer, CkptError)
        }
        sizes = {
            index: None if answer is None else answer.size_bytes for index, answer in stats.items()
        }
        plan = plan_repair(self.need, self.replica.index, sizes, group.quorum)
        if isinstance(plan, RepairCopy):
            for index, size in sizes.items():
                if size is None and index != self.replica.index:
                    group.backlog.note(
                        index,
                        key,
                        RepairNeed(CopyFault.MISSING, self.need.verified),
                        reason="not there",
                        alarm=True,
                    )
        return plan

    def _proven(self, data: memoryview) -> bool:
        verified = self.need.verified
        return (
            verified is None
            or digest(data[verified.offset_bytes : verified.end_bytes]) == verified.digest
        )

    def _replace(
        self, data: memoryview, plan: RepairCopy
    ) -> CopyIntact | LeaveToScrub | RepairDone:
        if plan.compare:
            outcome = self._compared(data)
            if outcome is not None:
                return outcome
        replica = self.replica
        # Deleted while it was copied: then writing it would bring it back.
        if self.group.backlog.ledger.needs[replica.index].get(self.key) is None:
            return CopyIntact()
        replica.write(len(data), lambda: replica.store.put(self.key, [data]))
        return RepairDone()

    def _compared(self, data: memoryview) -> CopyIntact | LeaveToScrub | None:
        """Compare ``data`` with the damaged copy; None if ``data`` may replace it."""
        replica, verified = self.replica, self.need.verified
        stat = replica.read(0, lambda: replica.store.stat(self.key))
        mine_bytes = 0 if stat is None else min(stat.size_bytes, len(data))
        piece = memoryview(bytearray(min(PIECE_BYTES, mine_bytes)))
        for at in range(0, mine_bytes, PIECE_BYTES):
            part = piece[: min(PIECE_BYTES, mine_bytes - at)]
            _read(replica, self.key, part, at)
            if not equal_outside(part, data[at : at + len(part)], at, self.need):
                return LeaveToScrub("two copies differ outside the range that was found right")
        # Read the verified range again: a read that went wrong once must not cause a write.
        if (
            verified is not None
            and mine_bytes == len(data)
            and _matches(replica, self.key, verified)
        ):
            return CopyIntact()  # the stored bytes are right: an earlier read went wrong
        return None


def _matches(replica: StoreReplica, key: str, verified: VerifiedRange) -> bool:
    stored = memoryview(bytearray(verified.size_bytes))
    _read(replica, key, stored, verified.offset_bytes)
    return digest(stored) == verified.digest


def _read(replica: StoreReplica, key: str, out: memoryview, offset_bytes: int) -> None:
    replica.read(len(out), lambda: replica.store.read_into(key, out, offset_bytes=offset_bytes))


def _read_whole(
    group: StoreGroup, source: StoreReplica, target: int, key: str, size_bytes: int
) -> PooledBuffer | None:
    """The whole object of one store; None if the store does not give it.

    The memory is charged to ``target``, and the caller must free it. A source that hangs is given
    up, and what it still holds is charged to it.
    """
    answer_queue: AnswerQueue[tuple[PooledBuffer | None]] = AnswerQueue()
    until_s = time.monotonic() + stall_s(group.limits, size_bytes)
    if not group.memory.claim(target, size_bytes, until_s=until_s):
        return None
    whole = group.memory.buffer(size_bytes)

    def job() -> None:
        answer: PooledBuffer | None = whole
        try:
            for at in range(0, max(1, size_bytes), PIECE_BYTES):
                if answer_queue.closed():
                    break
                _read(source, key, whole.view[at : at + PIECE_BYTES], at)
        except CkptError:
            answer = None
        if not answer_queue.put((answer,)):
            group.memory.free(source.index, size_bytes)

    # Reads run in the source's threads: this thread belongs to the target.
    if not source.reading.threads.submit(job):
        group.memory.free(target, size_bytes)
        return None
    answer = answer_queue.get(until_s - time.monotonic())
    if answer is None:
        # The hung call may still write into the buffer: its memory is never reused, and charged to
        # the source until the call returns. The queue is closed after the charge, so that a call
        # which returns now finds a charge to free.
        group.memory.charge(source.index, size_bytes)
        group.memory.free(target, size_bytes)
        late = answer_queue.close()
        if late:
            group.memory.free(source.index, size_bytes)
        return None
    if answer[0] is None:
        group.memory.free(target, size_bytes)
    return answer[0]


POLL_S = 1.0
"""Longest pause between two checks while something is missing."""

STUCK_S = 600.0
"""After this long another object is repaired beside one whose call may never return."""

PROBE_KEY = "ckpt.json"
"""A key for probes; whether the object exists does not matter."""


class RepairThread:
    """The thread that repairs and probes for one group. Thread-safe."""

    def __init__(self, group: StoreGroup) -> None:
        self._group = group
        self._change = threading.Condition()
        self._running = False
        self._wake_requested = False
        self._closed = False
        self._repair_started_s: dict[int, float] = {}
        self._repaired_count = [0] * len(group.replicas)
        group.wake = self.wake

    def wake(self) -> None:
        """Check for work now; starts the thread if needed."""
        with self._change:
            self._wake_requested = True
            self._change.notify_all()
            if self._running or self._closed:
                return
            thread = threading.Thread(target=self._work, name="ckpt-mend", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                return  # the interpreter exits; a scrub repairs what is missing
            self._running = True

    def repair_now(self) -> None:
        """Probe and repair at once, without the pauses."""
        for replica in self._group.replicas:
            replica.probe_now()
        self._group.backlog.make_all_due()

    def close(self, timeout_s: float) -> None:
        """Begin no more repairs, and wait for the thread."""
        with self._change:
            self._closed = True
            self._change.notify_all()
            self._change.wait_for(lambda: not self._running, timeout_s)

    def _work(self) -> None:
        while True:
            with self._change:
                # Cleared before the check: a wake() during the check makes another round.
                self._wake_requested = False
            pause_s = self._start_due()
            with self._change:
                if self._closed or (pause_s is None and not self._wake_requested):
                    self._running = False
                    self._change.notify_all()
                    return
                self._change.wait_for(lambda: self._wake_requested or self._closed, pause_s)

    def _start_due(self) -> float | None:
        """Start what is due; returns the pause until the next check, None if there is no work."""
        group = self._group
        group.detect_stalls()
        now_s = time.monotonic()
        pauses = []
        for replica in group.replicas:
            if not replica.healthy:
                self._probe(replica, now_s)
                pauses.append(POLL_S)
            entry = next_need(group.backlog.ledger, replica.index)
            if entry is None:
                continue
            key, need = entry
            with self._change:
                # One repair per store at a time, but a hung one must not block the others for ever.
                free = now_s - self._repair_started_s.get(replica.index, -STUCK_S) >= STUCK_S
            if (
                free
                and now_s >= need.due_s
                and replica.writing.circuit.state is not CircuitState.OPEN
            ):
                self._start(replica, key)
            pauses.append(min(POLL_S, max(0.01, need.due_s - now_s)) if free else POLL_S)
        if (
            not pauses
            and group.replicas
            and any(other.reading.calls or other.writing.calls for other in group.replicas)
        ):
            return POLL_S  # to detect a call that hangs while there are no other calls
        return min(pauses, default=None)

    def _probe(self, replica: StoreReplica, now_s: float) -> None:
        """Ask a store with an open circuit for anything; its answer closes the circuit."""
        for side in (replica.reading, replica.writing):
            if not probe_due(side.circuit, now_s):
                continue
            replica.observe(side, CircuitEvent.PROBED, "")
            # If the store lacks an object, its repair is the probe of the writing side.
            if (
                next_need(self._group.backlog.ledger, replica.index) is None
                or side is replica.reading
            ):
                side.threads.submit(_probing(replica, side))

    def _start(self, replica: StoreReplica, key: str) -> None:
        with self._change:
            self._repair_started_s[replica.index] = time.monotonic()
        if not replica.writing.threads.submit(lambda: self._repair(replica, key), key=key):
            self._ended(replica)
            self._group.backlog.postpone(replica.index, key)

    def _repair(self, replica: StoreReplica, key: str) -> None:
        """Runs in a thread of the store that lacks ``key``."""
        group = self._group
        need = group.backlog.ledger.needs[replica.index].get(key)
        try:
            if need is not None and not self._closed:
                self._finish(replica, key, need, ObjectRepair(group, replica, key, need).run())
        except CkptError:
            # The circuit has registered the failure; the need stays in the ledger.
            group.backlog.postpone(replica.index, key)
        finally:
            self._ended(replica)

    def _finish(
        self,
        replica: StoreReplica,
        key: str,
        need: RepairNeed,
        outcome: CopyIntact | RepairLater | LeaveToScrub | RepairDone,
    ) -> None:
        group = self._group
        match outcome:
            case RepairLater():
                group.backlog.postpone(replica.index, key)
                return
            case LeaveToScrub(reason):
                group.backlog.leave_to_scrub(replica.index, key, reason)
                return
            case CopyIntact():
                group.backlog.settle(replica.index, key)
            case RepairDone():
                self._repaired_count[replica.index] += 1
                group.backlog.settle(replica.index, key)
        count = self._repaired_count[replica.index]
        if count and (
            need.fault is CopyFault.DAMAGED or not group.backlog.ledger.needs[replica.index]
        ):
            self._repaired_count[replica.index] = 0
            text = f"{count} object(s) were copied to {replica.url} from other stores"
            group.emit("copy-mended", text, store=replica.url, objects=count, key=key)

    def _ended(self, replica: StoreReplica) -> None:
        with self._change:
            self._repair_started_s.pop(replica.index, None)
        self.wake()


def _probing(replica: StoreReplica, side: ReplicaSide) -> Callable[[], None]:
    def job() -> None:
        act = replica.read if side is replica.reading else replica.write
        with contextlib.suppress(CkptError):  # the circuit registers the failure
            act(0, lambda: replica.store.stat(PROBE_KEY))

    return job
