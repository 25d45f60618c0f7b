"""Bring each store what it is known to miss, and look whether one that was left alone answers
again, beside all else.

One thread that starts when there is something to do and ends when there is nothing. It calls no
store itself: each store's own threads do, one object at a time, in order with other writes of the
same key.
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

# One object brought to one store: look at all copies, decide, copy.

PIECE_BYTES = 16 << 20
"""Bytes asked for at once when a whole object is read: a request that any store serves well."""


@dataclass(frozen=True, slots=True)
class RepairDone:
    """The copy is as the others."""


@dataclass(frozen=True, slots=True)
class ObjectRepair:
    """One object brought to one store."""

    group: StoreGroup
    member: StoreReplica
    key: str
    need: RepairNeed

    def run(self) -> CopyIntact | RepairLater | LeaveToScrub | RepairDone:
        """Look at all copies, decide, copy. Raises CkptError where the store itself fails."""
        plan = self._plan()
        if not isinstance(plan, RepairCopy):
            return plan
        all_known = plan.all_answered
        for place in sorted(plan.sources, key=self.group.read_order(plan.size_bytes).index):
            source = self.group.replicas[place]
            region = _read_whole(self.group, source, self.member.index, self.key, plan.size_bytes)
            if region is None:
                all_known = False
                continue
            try:
                if not self._proven(region.view):
                    continue
                end = self._replace(region.view, plan)
            finally:
                self.group.memory.free(self.member.index, plan.size_bytes)
                self.group.memory.recycle(region)
            return end
        return no_verified_source(all_answered=all_known)

    def _plan(self) -> RepairCopy | CopyIntact | RepairLater | LeaveToScrub:
        group, key = self.group, self.key
        answers = group.ask(
            range(len(group.replicas)), lambda m: m.read(0, lambda: m.store.stat(key))
        )
        told = {
            place: answer for place, answer in answers.items() if not isinstance(answer, CkptError)
        }
        sizes = {
            place: None if answer is None else answer.size_bytes for place, answer in told.items()
        }
        plan = plan_repair(self.need, self.member.index, sizes, group.quorum)
        if isinstance(plan, RepairCopy):
            for place, size in sizes.items():
                if size is None and place != self.member.index:
                    group.note_need(
                        place,
                        key,
                        RepairNeed(CopyFault.MISSING, self.need.verified),
                        reason="not there",
                        alarm=True,
                    )
        return plan

    def _proven(self, data: memoryview) -> bool:
        proof = self.need.verified
        return proof is None or digest(data[proof.offset_bytes : proof.end_bytes]) == proof.digest

    def _replace(
        self, data: memoryview, plan: RepairCopy
    ) -> CopyIntact | LeaveToScrub | RepairDone:
        if plan.compare:
            end = self._compared(data)
            if end is not None:
                return end
        member = self.member
        # Deleted while it was copied: then it must not come back.
        if self.group.ledger.needs[member.index].get(self.key) is None:
            return CopyIntact()
        member.write(len(data), lambda: member.store.put(self.key, [data]))
        return RepairDone()

    def _compared(self, data: memoryview) -> CopyIntact | LeaveToScrub | None:
        """Read the copy that was found bad, piece by piece; None where it may be replaced by
        ``data``."""
        member, proof = self.member, self.need.verified
        stat = member.read(0, lambda: member.store.stat(self.key))
        mine_bytes = 0 if stat is None else min(stat.size_bytes, len(data))
        piece = memoryview(bytearray(min(PIECE_BYTES, mine_bytes)))
        for at in range(0, mine_bytes, PIECE_BYTES):
            part = piece[: min(PIECE_BYTES, mine_bytes - at)]
            _read(member, self.key, part, at)
            if not equal_outside(part, data[at : at + len(part)], at, self.need):
                return LeaveToScrub("two copies differ outside the range that is known to be right")
        if proof is not None and mine_bytes == len(data) and _matches(member, self.key, proof):
            return CopyIntact()  # it was read wrongly once, and is right where it lies
        return None


def _matches(member: StoreReplica, key: str, proof: VerifiedRange) -> bool:
    mine = memoryview(bytearray(proof.size_bytes))
    _read(member, key, mine, proof.offset_bytes)
    return digest(mine) == proof.digest


def _read(member: StoreReplica, key: str, out: memoryview, offset_bytes: int) -> None:
    member.read(len(out), lambda: member.store.read_into(key, out, offset_bytes=offset_bytes))


def _read_whole(
    group: StoreGroup, source: StoreReplica, target: int, key: str, size_bytes: int
) -> PooledBuffer | None:
    """The whole object of one store; None where it doesn't give it. The memory is charged to
    ``target``, and then to be freed.

    A source that hangs is given up, and what it still holds is charged to it.
    """
    mailbox: AnswerQueue[tuple[PooledBuffer | None]] = AnswerQueue()
    until_s = time.monotonic() + stall_s(group.limits, size_bytes)
    if not group.memory.claim(target, size_bytes, until_s=until_s):
        return None
    region = group.memory.buffer(size_bytes)

    def job() -> None:
        answer: PooledBuffer | None = region
        try:
            for at in range(0, max(1, size_bytes), PIECE_BYTES):
                if mailbox.closed():
                    break
                _read(source, key, region.view[at : at + PIECE_BYTES], at)
        except CkptError:
            answer = None
        if not mailbox.put((answer,)):
            group.memory.free(source.index, size_bytes)

    if not source.reading.threads.submit(job):
        group.memory.free(target, size_bytes)
        return None
    got = mailbox.get(until_s - time.monotonic())
    if got is None:
        group.memory.charge(source.index, size_bytes)
        group.memory.free(target, size_bytes)
        late = mailbox.close()
        if late:
            group.memory.free(source.index, size_bytes)
        return None
    if got[0] is None:
        group.memory.free(target, size_bytes)
    return got[0]


POLL_S = 1.0
"""Longest pause between two looks while something is missing somewhere."""

STUCK_S = 600.0
"""After this long another object is mended beside one whose call may never come back."""

PROBE_KEY = "ckpt.json"
"""A key that may be asked for: whether it is there doesn't matter."""


class RepairThread:
    """The thread that mends and probes for one group. Thread-safe."""

    def __init__(self, group: StoreGroup) -> None:
        self._group = group
        self._change = threading.Condition()
        self._running = False
        self._woken = False
        self._closed = False
        self._busy: dict[int, float] = {}
        self._mended = [0] * len(group.replicas)
        group.wake = self.wake

    def wake(self) -> None:
        """There may be something to do."""
        with self._change:
            self._woken = True
            self._change.notify_all()
            if self._running or self._closed:
                return
            thread = threading.Thread(target=self._work, name="ckpt-mend", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                return  # the interpreter ends: what is missing is left to a scrub
            self._running = True

    def repair_now(self) -> None:
        """Probe and mend at once, not after the pauses."""
        for member in self._group.replicas:
            member.probe_now()
        self._group.repair_now()

    def close(self, timeout_s: float) -> None:
        """Begin nothing more, and wait for the thread."""
        with self._change:
            self._closed = True
            self._change.notify_all()
            self._change.wait_for(lambda: not self._running, timeout_s)

    def _work(self) -> None:
        while True:
            with self._change:
                self._woken = False
            pause_s = self._look()
            with self._change:
                if self._closed or (pause_s is None and not self._woken):
                    self._running = False
                    self._change.notify_all()
                    return
                self._change.wait_for(lambda: self._woken or self._closed, pause_s)

    def _look(self) -> float | None:
        """Start what is due; how long nothing else will be, None where all is well."""
        group = self._group
        group.detect_stalls()
        now_s = time.monotonic()
        pauses = []
        for member in group.replicas:
            if not member.healthy:
                self._probe(member, now_s)
                pauses.append(POLL_S)
            entry = next_need(group.ledger, member.index)
            if entry is None:
                continue
            key, need = entry
            with self._change:
                free = now_s - self._busy.get(member.index, -STUCK_S) >= STUCK_S
            if (
                free
                and now_s >= need.due_s
                and member.writing.circuit.phase is not CircuitState.OPEN
            ):
                self._start(member, key)
            pauses.append(min(POLL_S, max(0.01, need.due_s - now_s)) if free else POLL_S)
        if (
            not pauses
            and group.replicas
            and any(m.reading.calls or m.writing.calls for m in group.replicas)
        ):
            return POLL_S  # a call that hangs is to be seen though nobody else calls
        return min(pauses, default=None)

    def _probe(self, member: StoreReplica, now_s: float) -> None:
        """Ask a store that was left alone for anything; its answer closes the circuit."""
        for side in (member.reading, member.writing):
            if not probe_due(side.circuit, now_s):
                continue
            member.observe(side, CircuitEvent.PROBED, "")
            if next_need(self._group.ledger, member.index) is None or side is member.reading:
                side.threads.submit(_probing(member, side))

    def _start(self, member: StoreReplica, key: str) -> None:
        with self._change:
            self._busy[member.index] = time.monotonic()
        if not member.writing.threads.submit(lambda: self._mend(member, key), key=key):
            self._ended(member)
            self._group.postpone(member.index, key)

    def _mend(self, member: StoreReplica, key: str) -> None:
        """In a thread of the store that misses ``key``."""
        group = self._group
        need = group.ledger.needs[member.index].get(key)
        try:
            if need is not None and not self._closed:
                self._finish(member, key, need, ObjectRepair(group, member, key, need).run())
        except CkptError:
            # The store's circuit has heard of it; what is missing stays noted.
            group.postpone(member.index, key)
        finally:
            self._ended(member)

    def _finish(
        self,
        member: StoreReplica,
        key: str,
        need: RepairNeed,
        end: CopyIntact | RepairLater | LeaveToScrub | RepairDone,
    ) -> None:
        group = self._group
        match end:
            case RepairLater():
                group.postpone(member.index, key)
                return
            case LeaveToScrub(why):
                group.leave_to_scrub(member.index, key, why)
                return
            case CopyIntact():
                group.settle_need(member.index, key)
            case RepairDone():
                self._mended[member.index] += 1
                group.settle_need(member.index, key)
        count = self._mended[member.index]
        if count and (need.fault is CopyFault.DAMAGED or not group.ledger.needs[member.index]):
            self._mended[member.index] = 0
            text = f"{count} object(s) were brought to {member.url} from other stores"
            group.emit("copy-mended", text, store=member.url, objects=count, key=key)

    def _ended(self, member: StoreReplica) -> None:
        with self._change:
            self._busy.pop(member.index, None)
        self.wake()


def _probing(member: StoreReplica, side: ReplicaSide) -> Callable[[], None]:
    def job() -> None:
        act = member.read if side is member.reading else member.write
        with contextlib.suppress(CkptError):  # the circuit has heard of it
            act(0, lambda: member.store.stat(PROBE_KEY))

    return job
