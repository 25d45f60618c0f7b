"""Bring each store what it is known to miss, and look whether one that was left alone answers again, beside all else.

One thread that starts when there is something to do and ends when there is nothing. It calls no store itself: each store's
own threads do, one object at a time, in order with other writes of the same key.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from ckpt.backends.replicated.buffers import PooledBuffer
from ckpt.backends.replicated.group import Group, Mailbox, Member, Side
from ckpt.backends.replicated.ledger import (
    Copy,
    Later,
    Leave,
    Need,
    Proof,
    Well,
    Why,
    agree_outside,
    next_need,
    plan_mend,
    unproven,
)
from ckpt.backends.replicated.policy import Phase, Sign, probe_due, stall_s
from ckpt.errors import CkptError
from ckpt.format.canonical import digest

# One object brought to one store: look at all copies, decide, copy.

PIECE_BYTES = 16 << 20
"""Bytes asked for at once when a whole object is read: a request that any store serves well."""


@dataclass(frozen=True, slots=True)
class Mended:
    """The copy is as the others."""


@dataclass(frozen=True, slots=True)
class Mending:
    """One object brought to one store."""

    group: Group
    member: Member
    key: str
    need: Need

    def run(self) -> Well | Later | Leave | Mended:
        """Look at all copies, decide, copy. Raises CkptError where the store itself fails."""
        plan = self._plan()
        if not isinstance(plan, Copy):
            return plan
        all_known = plan.all_known
        for place in sorted(plan.sources, key=self.group.nearest(plan.size_bytes).index):
            source = self.group.members[place]
            region = _read_whole(self.group, source, self.member.place, self.key, plan.size_bytes)
            if region is None:
                all_known = False
                continue
            try:
                if not self._proven(region.view):
                    continue
                end = self._replace(region.view, plan)
            finally:
                self.group.memory.free(self.member.place, plan.size_bytes)
                self.group.memory.reuse(region)
            return end
        return unproven(all_known=all_known)

    def _plan(self) -> Copy | Well | Later | Leave:
        group, key = self.group, self.key
        answers = group.ask(range(len(group.members)), lambda m: m.read(0, lambda: m.store.stat(key)))
        told = {place: answer for place, answer in answers.items() if not isinstance(answer, CkptError)}
        sizes = {place: None if answer is None else answer.size_bytes for place, answer in told.items()}
        plan = plan_mend(self.need, self.member.place, sizes, group.quorum)
        if isinstance(plan, Copy):
            for place, size in sizes.items():
                if size is None and place != self.member.place:
                    group.note(place, key, Need(Why.MISSING, self.need.proof), why="not there", alarm=True)
        return plan

    def _proven(self, data: memoryview) -> bool:
        proof = self.need.proof
        return proof is None or digest(data[proof.offset_bytes : proof.end_bytes]) == proof.digest

    def _replace(self, data: memoryview, plan: Copy) -> Well | Leave | Mended:
        if plan.compare:
            end = self._compared(data)
            if end is not None:
                return end
        member = self.member
        # Deleted while it was copied: then it must not come back.
        if self.group.ledger.needs[member.place].get(self.key) is None:
            return Well()
        member.write(len(data), lambda: member.store.put(self.key, [data]))
        return Mended()

    def _compared(self, data: memoryview) -> Well | Leave | None:
        """Read the copy that was found bad, piece by piece; None where it may be replaced by ``data``."""
        member, proof = self.member, self.need.proof
        stat = member.read(0, lambda: member.store.stat(self.key))
        mine_bytes = 0 if stat is None else min(stat.size_bytes, len(data))
        piece = memoryview(bytearray(min(PIECE_BYTES, mine_bytes)))
        for at in range(0, mine_bytes, PIECE_BYTES):
            part = piece[: min(PIECE_BYTES, mine_bytes - at)]
            _read(member, self.key, part, at)
            if not agree_outside(part, data[at : at + len(part)], at, self.need):
                return Leave("two copies differ outside the range that is known to be right")
        if proof is not None and mine_bytes == len(data) and _matches(member, self.key, proof):
            return Well()  # it was read wrongly once, and is right where it lies
        return None


def _matches(member: Member, key: str, proof: Proof) -> bool:
    mine = memoryview(bytearray(proof.size_bytes))
    _read(member, key, mine, proof.offset_bytes)
    return digest(mine) == proof.digest


def _read(member: Member, key: str, out: memoryview, offset_bytes: int) -> None:
    member.read(len(out), lambda: member.store.read_into(key, out, offset_bytes=offset_bytes))


def _read_whole(group: Group, source: Member, target: int, key: str, size_bytes: int) -> PooledBuffer | None:
    """The whole object of one store; None where it doesn't give it. The memory is charged to ``target``, and then to be freed.

    A source that hangs is given up, and what it still holds is charged to it.
    """
    mailbox: Mailbox[tuple[PooledBuffer | None]] = Mailbox()
    until_s = time.monotonic() + stall_s(group.pace, size_bytes)
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
            group.memory.free(source.place, size_bytes)

    if not source.reading.lane.submit(job):
        group.memory.free(target, size_bytes)
        return None
    got = mailbox.get(until_s - time.monotonic())
    if got is None:
        group.memory.charge(source.place, size_bytes)
        group.memory.free(target, size_bytes)
        late = mailbox.close()
        if late:
            group.memory.free(source.place, size_bytes)
        return None
    if got[0] is None:
        group.memory.free(target, size_bytes)
    return got[0]


LOOK_S = 1.0
"""Longest pause between two looks while something is missing somewhere."""

PATIENCE_S = 600.0
"""After this long another object is mended beside one whose call may never come back."""

PROBE_KEY = "ckpt.json"
"""A key that may be asked for: whether it is there doesn't matter."""


class Caretaker:
    """The thread that mends and probes for one group. Thread-safe."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._change = threading.Condition()
        self._running = False
        self._woken = False
        self._closed = False
        self._busy: dict[int, float] = {}
        self._mended = [0] * len(group.members)
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

    def hasten(self) -> None:
        """Probe and mend at once, not after the pauses."""
        for member in self._group.members:
            member.hasten()
        self._group.hasten()

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
        group.look_for_stalls()
        now_s = time.monotonic()
        pauses = []
        for member in group.members:
            if not member.well:
                self._probe(member, now_s)
                pauses.append(LOOK_S)
            entry = next_need(group.ledger, member.place)
            if entry is None:
                continue
            key, need = entry
            with self._change:
                free = now_s - self._busy.get(member.place, -PATIENCE_S) >= PATIENCE_S
            if free and now_s >= need.due_s and member.writing.circuit.phase is not Phase.OPEN:
                self._start(member, key)
            pauses.append(min(LOOK_S, max(0.01, need.due_s - now_s)) if free else LOOK_S)
        if not pauses and group.members and any(m.reading.calls or m.writing.calls for m in group.members):
            return LOOK_S  # a call that hangs is to be seen though nobody else calls
        return min(pauses, default=None)

    def _probe(self, member: Member, now_s: float) -> None:
        """Ask a store that was left alone for anything; its answer closes the circuit."""
        for side in (member.reading, member.writing):
            if not probe_due(side.circuit, now_s):
                continue
            member.sign(side, Sign.PROBED, "")
            if next_need(self._group.ledger, member.place) is None or side is member.reading:
                side.lane.submit(_probing(member, side))

    def _start(self, member: Member, key: str) -> None:
        with self._change:
            self._busy[member.place] = time.monotonic()
        if not member.writing.lane.submit(lambda: self._mend(member, key), key=key):
            self._ended(member)
            self._group.put_off(member.place, key)

    def _mend(self, member: Member, key: str) -> None:
        """In a thread of the store that misses ``key``."""
        group = self._group
        need = group.ledger.needs[member.place].get(key)
        try:
            if need is not None and not self._closed:
                self._finish(member, key, need, Mending(group, member, key, need).run())
        except CkptError:
            # The store's circuit has heard of it; what is missing stays noted.
            group.put_off(member.place, key)
        finally:
            self._ended(member)

    def _finish(self, member: Member, key: str, need: Need, end: Well | Later | Leave | Mended) -> None:
        group = self._group
        match end:
            case Later():
                group.put_off(member.place, key)
                return
            case Leave(why):
                group.leave(member.place, key, why)
                return
            case Well():
                group.settle(member.place, key)
            case Mended():
                self._mended[member.place] += 1
                group.settle(member.place, key)
        count = self._mended[member.place]
        if count and (need.why is Why.DAMAGED or not group.ledger.needs[member.place]):
            self._mended[member.place] = 0
            text = f"{count} object(s) were brought to {member.url} from other stores"
            group.tell("copy-mended", text, store=member.url, objects=count, key=key)

    def _ended(self, member: Member) -> None:
        with self._change:
            self._busy.pop(member.place, None)
        self.wake()


def _probing(member: Member, side: Side) -> Callable[[], None]:
    def job() -> None:
        act = member.read if side is member.reading else member.write
        with contextlib.suppress(CkptError):  # the circuit has heard of it
            act(0, lambda: member.store.stat(PROBE_KEY))

    return job
