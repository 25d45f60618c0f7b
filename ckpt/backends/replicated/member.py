"""One store of a group: its threads, how well and how quick it is, and what is under way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from ckpt.backends.base import Backend
from ckpt.backends.replicated.health import Circuit, Sign, hastened, step
from ckpt.backends.replicated.lanes import Lane
from ckpt.backends.replicated.loans import TakenBackError, borrower_of
from ckpt.backends.replicated.pace import Pace, stall_s
from ckpt.backends.replicated.policy import Speed, at_least, measured
from ckpt.errors import CkptError, StoreDeniedError, StoreFullError, UnavailableError

T = TypeVar("T")

READS_MAX, WRITES_MAX = 16, 8
"""Threads for reading from and for writing to one store: what fills the links measured."""

QUEUED_MAX = 256
"""Calls that wait for a thread; beyond it a store counts as not answering."""


@dataclass(slots=True)
class Side:
    """Reading or writing: a store that is full still serves reads."""

    lane: Lane
    circuit: Circuit = field(default_factory=Circuit)
    speed: Speed = field(default_factory=Speed)
    calls: dict[int, Call] = field(default_factory=dict)
    asked_s: float = 0.0


@dataclass(slots=True)
class Call:
    """A call under way, and whether it was already counted as hung."""

    start_s: float
    size_bytes: int
    stalled: bool = False


class Member:
    """The store at ``place``. ``changed`` is told after each change of a circuit, with the side's name. Thread-safe."""

    def __init__(
        self, place: int, store: Backend, *, pace: Pace, jitter: Callable[[], float],
        changed: Callable[[Member, str, str], None],
    ) -> None:  # fmt: skip
        self.place = place
        self.store = store
        self.borrower = borrower_of(store)
        self.reading = Side(Lane(f"ckpt-read-{place}", threads_max=READS_MAX, jobs_max=QUEUED_MAX))
        self.writing = Side(Lane(f"ckpt-write-{place}", threads_max=WRITES_MAX, jobs_max=QUEUED_MAX))
        self._pace = pace
        self._jitter = jitter
        self._changed = changed
        self._lock = threading.Lock()
        self._calls = 0

    @property
    def url(self) -> str:
        """The store's address, for messages."""
        return self.store.url

    @property
    def well(self) -> bool:
        """Whether it is asked as usual, for reading and for writing."""
        return self.reading.circuit.usable and self.writing.circuit.usable

    def read(self, size_bytes: int, call: Callable[[], T]) -> T:
        """Do ``call``, which reads ``size_bytes``, in this thread, and learn from it. Raises CkptError only."""
        return self._do(self.reading, size_bytes, call)

    def write(self, size_bytes: int, call: Callable[[], T]) -> T:
        """Do ``call``, which writes ``size_bytes``, in this thread, and learn from it. Raises CkptError only."""
        return self._do(self.writing, size_bytes, call)

    def sign(self, side: Side, sign: Sign, why: str) -> None:
        """Something was seen of the store."""
        with self._lock:
            before = side.circuit
            if sign is Sign.ANSWERED and before == _FRESH:
                return
            side.circuit = step(before, sign, time.monotonic(), pace=self._pace, jitter=self._jitter())
            changed = side.circuit.usable != before.usable
        if changed:
            self._changed(self, "reading" if side is self.reading else "writing", why)

    def hasten(self) -> None:
        """Be looked at now where it is left alone."""
        with self._lock:
            for side in (self.reading, self.writing):
                side.circuit = hastened(side.circuit, time.monotonic())

    def asked(self, side: Side) -> float:
        """The store is about to be asked; how long it was not."""
        now_s = time.monotonic()
        idle_s, side.asked_s = now_s - side.asked_s, now_s
        return idle_s

    def look_for_stalls(self) -> None:
        """Count calls that take far too long as hung."""
        now_s = time.monotonic()
        for side in (self.reading, self.writing):
            if not side.calls:
                continue
            with self._lock:
                hung = [
                    call
                    for call in side.calls.values()
                    if not call.stalled and now_s - call.start_s > stall_s(self._pace, call.size_bytes)
                ]
                for call in hung:
                    call.stalled = True
                    side.speed = at_least(side.speed, call.size_bytes, now_s - call.start_s)
            for call in hung:
                side.lane.lost()
                self.sign(side, Sign.STALLED, f"a call has not come back for {now_s - call.start_s:.0f} s")

    def cut_off(self, size_bytes: int, waited_s: float) -> None:
        """A put was given up: it would have taken longer than ``waited_s``."""
        with self._lock:
            self.writing.speed = at_least(self.writing.speed, size_bytes, waited_s)

    def _do(self, side: Side, size_bytes: int, call: Callable[[], T]) -> T:
        start_s = time.monotonic()
        under_way = Call(start_s, size_bytes)
        with self._lock:
            self._calls += 1
            number = self._calls
            side.calls[number] = under_way
        sign, why, counts = Sign.ANSWERED, "it answers", False
        try:
            result = call()
            counts = True
        except TakenBackError:
            sign = Sign.PROBED  # says nothing of the store
            raise
        except (StoreFullError, StoreDeniedError) as error:
            sign, why = Sign.REFUSED, str(error)
            raise
        except UnavailableError as error:
            sign, why = Sign.FAILED, str(error)
            raise
        except CkptError:
            raise
        except Exception as error:
            sign, why = Sign.FAILED, f"{type(error).__name__}: {error}"
            raise UnavailableError(
                f"the store's code failed. store={self.url} error={why}; repeat, and report it to who wrote the store"
            ) from error
        finally:
            took_s = time.monotonic() - start_s
            with self._lock:
                del side.calls[number]
                if counts:
                    side.speed = measured(side.speed, size_bytes, took_s)
            if under_way.stalled:
                side.lane.found()
            if sign is not Sign.PROBED:
                self.sign(side, sign, why)
        return result


_FRESH = Circuit()
