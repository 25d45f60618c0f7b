"""Bring each store what it is known to miss, and look whether one that was left alone answers again, beside all else.

One thread that starts when there is something to do and ends when there is nothing. It calls no store itself: each store's
own threads do, one object at a time, in order with other writes of the same key.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

from ckpt.backends.replicated.group import Group
from ckpt.backends.replicated.health import Phase, Sign, probe_due
from ckpt.backends.replicated.ledger import Later, Leave, Well
from ckpt.backends.replicated.member import Member, Side
from ckpt.backends.replicated.mending import Mended, Mending
from ckpt.backends.replicated.replicate_ledger import Need, Why, next_need
from ckpt.errors import CkptError

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
