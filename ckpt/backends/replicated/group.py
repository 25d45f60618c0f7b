"""The stores behind one replicated backend.

``StoreReplica`` is one store with its threads and health, ``RepairBacklog`` what each store misses,
``StoreGroup`` all stores with the quorum.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ckpt.backends.base import Backend
from ckpt.backends.replicated import ledger as ledgers
from ckpt.backends.replicated import policy as speeds
from ckpt.backends.replicated.buffers import ReplicaMemory, TakenBackError, borrower_of
from ckpt.backends.replicated.ledger import RepairNeed
from ckpt.backends.replicated.policy import (
    Circuit,
    CircuitEvent,
    Quorum,
    ReadCandidate,
    ReplicationLimits,
    StoreSpeed,
    advance,
    probe_now,
    stall_s,
    with_lower_bound,
    with_measurement,
)
from ckpt.backends.replicated.store_threads import StoreThreads
from ckpt.errors import CkptError, StoreDeniedError, StoreFullError, UnavailableError
from ckpt.events import Emit, Event
from ckpt.format.keys import shared_key

# ---- Answers: from the threads of stores to the one thread that asked them.

T = TypeVar("T")


class AnswerQueue(Generic[T]):
    """Filled by the threads of stores, emptied by the one thread that asked them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._items: queue.SimpleQueue[T] = queue.SimpleQueue()
        self._closed = False

    def closed(self) -> bool:
        """Whether the asking thread has stopped waiting; jobs not yet begun can be skipped."""
        return self._closed

    def put(self, item: T) -> bool:
        """Deliver ``item``; False if the asking thread has stopped waiting.

        Then the sender keeps what ``item`` owns, such as memory.
        """
        with self._lock:
            # Under the lock, or an item could arrive after close() has returned the rest, and its
            # memory would never be released.
            if not self._closed:
                self._items.put(item)
            return not self._closed

    def get(self, timeout_s: float) -> T | None:
        """The next item, or None after ``timeout_s``."""
        try:
            return self._items.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            return None

    def close(self) -> list[T]:
        """Stop waiting; returns the items that were delivered and not taken. Idempotent."""
        with self._lock:
            self._closed = True
        items = []
        while not self._items.empty():
            items.append(self._items.get_nowait())
        return items


# ---- One store: its threads, its health and speed, and its calls in flight.


READS_MAX, WRITES_MAX = 16, 8
"""Threads per store for reads and for writes; as many as filled the measured links."""

QUEUED_MAX = 256
"""Calls waiting for a thread; beyond that the store counts as not answering."""


@dataclass(slots=True)
class ReplicaSide:
    """Reads or writes of one store. Separate circuits, because a full store still serves reads."""

    threads: StoreThreads
    circuit: Circuit = field(default_factory=Circuit)
    speed: StoreSpeed = field(default_factory=StoreSpeed)
    calls: dict[int, RunningCall] = field(default_factory=dict)
    asked_s: float = 0.0


@dataclass(slots=True)
class RunningCall:
    """A call in flight. ``stalled``: it already counts as hung."""

    start_s: float
    size_bytes: int
    stalled: bool = False


class StoreReplica:
    """The store ``index`` of a group. Thread-safe.

    ``changed`` is called when a circuit opens or closes, with the name of the side and the reason.
    """

    def __init__(
        self,
        index: int,
        store: Backend,
        *,
        limits: ReplicationLimits,
        jitter: Callable[[], float],
        changed: Callable[[StoreReplica, str, str], None],
    ) -> None:
        self.index = index
        self.store = store
        self.borrower = borrower_of(store)
        self.reading = ReplicaSide(
            StoreThreads(f"ckpt-read-{index}", threads_max=READS_MAX, jobs_max=QUEUED_MAX)
        )
        self.writing = ReplicaSide(
            StoreThreads(f"ckpt-write-{index}", threads_max=WRITES_MAX, jobs_max=QUEUED_MAX)
        )
        self._limits = limits
        self._jitter = jitter
        self._changed = changed
        self._lock = threading.Lock()
        self._calls = 0

    @property
    def url(self) -> str:
        """The store's address, for messages."""
        return self.store.url

    @property
    def healthy(self) -> bool:
        """Whether it is asked as usual, for reads and for writes."""
        return self.reading.circuit.usable and self.writing.circuit.usable

    def read(self, size_bytes: int, call: Callable[[], T]) -> T:
        """Do ``call``, which reads ``size_bytes``, in this thread, and update health and speed.

        Raises only CkptError.
        """
        return self._do(self.reading, size_bytes, call)

    def write(self, size_bytes: int, call: Callable[[], T]) -> T:
        """Do ``call``, which writes ``size_bytes``, in this thread, and update health and speed.

        Raises only CkptError.
        """
        return self._do(self.writing, size_bytes, call)

    def observe(self, side: ReplicaSide, event: CircuitEvent, reason: str) -> None:
        """Update the circuit after ``event``."""
        with self._lock:
            # Two calls of one store may end at once: read and replace the circuit under the lock.
            before = side.circuit
            # The common case: a healthy store answered, and nothing changes.
            if event is CircuitEvent.ANSWERED and before == _FRESH:
                return
            side.circuit = advance(
                before, event, time.monotonic(), limits=self._limits, jitter=self._jitter()
            )
            changed = side.circuit.usable != before.usable
        if changed:
            self._changed(self, "reading" if side is self.reading else "writing", reason)

    def probe_now(self) -> None:
        """Make the next probe of open circuits due now."""
        with self._lock:
            for side in (self.reading, self.writing):
                side.circuit = probe_now(side.circuit, time.monotonic())

    def mark_asked(self, side: ReplicaSide) -> float:
        """Note that the store is asked now; returns how long it was idle."""
        now_s = time.monotonic()
        idle_s, side.asked_s = now_s - side.asked_s, now_s
        return idle_s

    def detect_stalls(self) -> None:
        """Count calls that take far too long as hung, once each."""
        now_s = time.monotonic()
        for side in (self.reading, self.writing):
            if not side.calls:
                continue
            with self._lock:
                hung = [
                    call
                    for call in side.calls.values()
                    if not call.stalled
                    and now_s - call.start_s > stall_s(self._limits, call.size_bytes)
                ]
                for call in hung:
                    # Marked under the lock, so that the call is counted once, and its thread comes
                    # back once.
                    call.stalled = True
                    side.speed = with_lower_bound(side.speed, call.size_bytes, now_s - call.start_s)
            for call in hung:
                # Outside the lock: observe() takes it, and may emit an event.
                side.threads.thread_lost()
                self.observe(
                    side,
                    CircuitEvent.STALLED,
                    f"a call has not returned for {now_s - call.start_s:.0f} s",
                )

    def cut_off(self, size_bytes: int, waited_s: float) -> None:
        """Learn from a put that was given up: it would have taken longer than ``waited_s``."""
        with self._lock:
            self.writing.speed = with_lower_bound(self.writing.speed, size_bytes, waited_s)

    def _do(self, side: ReplicaSide, size_bytes: int, call: Callable[[], T]) -> T:
        start_s = time.monotonic()
        under_way = RunningCall(start_s, size_bytes)
        with self._lock:
            self._calls += 1
            number = self._calls
            side.calls[number] = under_way
        # An error that is a clear answer, such as NotFoundError, leaves the event at ANSWERED.
        # PROBED stands for no observation at all.
        event, reason, counts = CircuitEvent.ANSWERED, "it answers", False
        try:
            result = call()
            counts = True
        except TakenBackError:
            event = CircuitEvent.PROBED  # the caller's doing: no information about the store
            raise
        except (StoreFullError, StoreDeniedError) as error:
            event, reason = CircuitEvent.REFUSED, str(error)
            raise
        except UnavailableError as error:
            event, reason = CircuitEvent.FAILED, str(error)
            raise
        except CkptError:
            raise
        except Exception as error:
            event, reason = CircuitEvent.FAILED, f"{type(error).__name__}: {error}"
            raise UnavailableError(
                f"the store's implementation failed. store={self.url} error={reason}; repeat, and "
                "report it to the author of the store"
            ) from error
        finally:
            took_s = time.monotonic() - start_s
            with self._lock:
                del side.calls[number]
                if counts:
                    side.speed = with_measurement(side.speed, size_bytes, took_s)
            # detect_stalls() gave the hung call's thread away; take it back exactly once.
            if under_way.stalled:
                side.threads.thread_back()
            if event is not CircuitEvent.PROBED:
                self.observe(side, event, reason)
        return result


_FRESH = Circuit()


def _never(answers: Mapping[int, object]) -> bool:
    return False


# ---- Backlog: what each store is known to miss.


class RepairBacklog:
    """What each store of a group is known to miss. Thread-safe.

    Ledger, needs set aside, background puts and the set of voters change under one lock,
    ``change``, which also announces every change. Needs of a store that does not count are set
    aside, and go into the ledger when it starts to count. ``wake`` is called when there may be
    something to repair.
    """

    def __init__(
        self,
        stores: Sequence[Backend],
        voters: frozenset[int],
        *,
        limits: ReplicationLimits,
        jitter: Callable[[], float],
        emit: Emit,
        wake: Callable[[], None],
    ) -> None:
        self.change = threading.Condition()
        self._urls = tuple(store.url for store in stores)
        self._voters = voters
        self._limits = limits
        self._jitter = jitter
        self._emit = emit
        self._wake = wake
        self._ledger = ledgers.empty_ledger(len(stores))
        self._set_aside: tuple[dict[str, RepairNeed], ...] = tuple({} for _ in stores)
        self._writes_in_flight: dict[tuple[int, str], int] = {}
        self._alarmed: set[int] = set()

    @property
    def ledger(self) -> ledgers.RepairLedger:
        """The repair ledger now."""
        return self._ledger

    def set_voters(self, voters: frozenset[int]) -> Sequence[tuple[int, str, RepairNeed]]:
        """Count only ``voters`` from now on.

        Returns the needs that were set aside for stores that start to count: store, key and need.
        The caller notes them again.
        """
        with self.change:
            # Under the lock with note(): a need of a store that starts to count goes either aside
            # before this, and is returned here, or into the ledger after it.
            started = sorted(voters - self._voters)
            self._voters = voters
            missed = [
                (index, key, need)
                for index in started
                for key, need in self._set_aside[index].items()
            ]
            for index in started:
                self._set_aside[index].clear()
            return missed

    def note(self, index: int, key: str, need: RepairNeed, *, reason: str, alarm: bool) -> None:
        """Note that ``key`` is not as it should be in store ``index``.

        With ``alarm``, the first need of a store is reported as an alarm. For a store that does not
        count the need is put aside until it does, the newest ``keys_max`` of them; a fill covers
        the rest. A key at which each store has an object of its own is left as it is.
        """
        shared = shared_key(key)
        if shared is None:
            return  # its "copies" may be rivals' votes: only who knows the log may write them
        with self.change:
            if index not in self._voters:
                aside = self._set_aside[index]
                aside[key] = need
                if len(aside) > self._limits.keys_max:
                    del aside[next(iter(aside))]
                return
            scrub = self._ledger.scrub[index]
            self._ledger = ledgers.with_need(
                self._ledger, index, shared, need, keys_max=self._limits.keys_max
            )
            # One alarm per store until all its needs are met, not one per object.
            first = index not in self._alarmed
            overflows = self._ledger.scrub[index] and not scrub
            if alarm or overflows:
                self._alarmed.add(index)
        if (alarm and first) or overflows:
            text = (
                f"objects are missing or damaged in {self._urls[index]} and will be repaired from "
                "other stores"
                + ("; more than are remembered: run `ckpt scrub`" if overflows else "")
            )
            facts = {"key": key, "need": need.fault.value, "why": reason}
            self._emit_alarm(index, text, facts)
        self._wake()

    def settle(self, index: int, key: str) -> None:
        """``key`` is as it should be in store ``index``."""
        self._update_ledger(lambda ledger: ledgers.without_need(ledger, index, key))

    def forget(self, key: str) -> None:
        """``key`` is deleted, so no store lacks it any more."""
        with self.change:
            # A deleted object must not be repaired when its store starts to count.
            for aside in self._set_aside:
                aside.pop(key, None)
        self._update_ledger(lambda ledger: ledgers.without_key(ledger, key))

    def postpone(self, index: int, key: str) -> None:
        """``key`` could not be repaired in store ``index`` now."""
        now_s, jitter = time.monotonic(), self._jitter()
        self._update_ledger(
            lambda ledger: ledgers.postponed(
                ledger, index, key, now_s, limits=self._limits, jitter=jitter
            )
        )

    def leave_to_scrub(self, index: int, key: str, reason: str) -> None:
        """Only a scrub can repair ``key`` in store ``index``."""
        self._update_ledger(lambda ledger: ledgers.left_to_scrub(ledger, index, key))
        url = self._urls[index]
        text = (
            f"a copy in {url} can't be repaired without reading every chunk: {reason}; run `ckpt "
            "scrub`"
        )
        self._emit_alarm(index, text, {"key": key, "why": reason})

    def scrubbed(self, index: int) -> None:
        """A scrub of store ``index`` has finished."""
        self._update_ledger(lambda ledger: ledgers.scrubbed(ledger, index))

    def make_all_due(self) -> None:
        """Make every need due now."""
        self._update_ledger(ledgers.all_due)
        self._wake()

    def _emit_alarm(self, index: int, text: str, facts: Mapping[str, str]) -> None:
        facts = {"store": self._urls[index], **facts}
        self._emit(Event("under-replicated", text, facts, alarm=True))

    def _update_ledger(
        self, update: Callable[[ledgers.RepairLedger], ledgers.RepairLedger]
    ) -> None:
        with self.change:
            self._ledger = update(self._ledger)
            self._alarmed = {
                index
                for index in self._alarmed
                if self._ledger.needs[index] or self._ledger.scrub[index]
            }
            self.change.notify_all()

    # ---- Puts that still write to slow stores after they returned.

    def background_put_started(self, index: int, key: str) -> None:
        """A put of ``key`` continues in store ``index`` after its caller returned."""
        with self.change:
            self._writes_in_flight[index, key] = self._writes_in_flight.get((index, key), 0) + 1

    def background_put_ended(self, index: int, key: str) -> None:
        """Such a put has ended."""
        with self.change:
            left = self._writes_in_flight.pop((index, key)) - 1
            if left:
                self._writes_in_flight[index, key] = left
            self.change.notify_all()

    def behind(self, index: int) -> int:
        """How many keys the store is known to miss, including those still being written."""
        with self.change:
            # A key may be both in the ledger and in flight: a union, not a sum.
            in_flight = {key for at, key in self._writes_in_flight if at == index}
            return len(in_flight | self._ledger.needs[index].keys())

    def whole(self, indexes: frozenset[int]) -> frozenset[int]:
        """Those of the stores ``indexes`` in which nothing is known to be missing."""
        with self.change:
            writing = {at for at, _ in self._writes_in_flight}
            return frozenset(
                at
                for at in indexes - writing
                if not self._ledger.needs[at] and not self._ledger.scrub[at]
            )


class StoreGroup:
    """The stores behind one replicated backend, in one process. Thread-safe."""

    def __init__(
        self,
        stores: Sequence[Backend],
        quorum: Quorum,
        *,
        prefer: Sequence[int],
        limits: ReplicationLimits,
        budget_bytes: int,
        seed: int | None,
        emit: Emit,
    ) -> None:
        self.quorum = quorum
        self.limits = limits
        self.memory = ReplicaMemory(len(stores), budget_bytes=budget_bytes)
        self._prefer = tuple(prefer)
        self._random = random.Random(seed)
        self._emit = emit
        self.wake: Callable[[], None] = lambda: None
        self.backlog = RepairBacklog(
            stores,
            quorum.voters,
            limits=limits,
            jitter=self.jitter,
            emit=emit,
            wake=lambda: self.wake(),  # noqa: PLW0108  RepairThread replaces ``wake`` later
        )
        self.replicas = tuple(
            StoreReplica(
                index, store, limits=limits, jitter=self.jitter, changed=self._circuit_changed
            )
            for index, store in enumerate(stores)
        )

    def jitter(self) -> float:
        """A random number in [0, 1)."""
        return self._random.random()

    def emit(self, kind: str, text: str, *, alarm: bool = False, **facts: str | int) -> None:
        """Emit an event."""
        self._emit(Event(kind, text, facts, alarm))

    def read_order(self, size_bytes: int) -> tuple[int, ...]:
        """The stores in the order in which to read ``size_bytes`` from them."""
        now_s = time.monotonic()
        candidates = [
            ReadCandidate(
                replica.index,
                replica.reading.circuit.usable,
                speeds.expected_s(replica.reading.speed, size_bytes),
                now_s - replica.reading.asked_s,
            )
            for replica in self.replicas
        ]
        return speeds.read_order(candidates, prefer=self._prefer)

    def usable(self) -> frozenset[int]:
        """The stores that are read from as usual."""
        return frozenset(
            replica.index for replica in self.replicas if replica.reading.circuit.usable
        )

    def detect_stalls(self) -> None:
        """Count calls that take far too long as hung."""
        for replica in self.replicas:
            replica.detect_stalls()

    def count_only(self, quorum: Quorum) -> None:
        """Use ``quorum`` from now on, and repair what a store missed shortly before it counted.

        The store was filled, or answered again, while objects were being written to the others
        whose records came later; the fill cannot have seen those.
        """
        with self.backlog.change:
            self.quorum = quorum
            missed = self.backlog.set_voters(quorum.voters)
        for index, key, need in missed:
            self.backlog.note(
                index, key, need, reason="written while the store did not count", alarm=False
            )

    # ---- Small calls to several stores at once.

    def ask(
        self,
        indexes: Iterable[int],
        call: Callable[[StoreReplica], T],
        *,
        side: Callable[[StoreReplica], ReplicaSide] | None = None,
        key: str | None = None,
        enough: Callable[[Mapping[int, T | CkptError]], bool] = _never,
        nearly: Callable[[Mapping[int, T | CkptError]], bool] = _never,
    ) -> dict[int, T | CkptError]:
        """The results of ``call`` for each of ``indexes``, asked at once. Thread-safe.

        Returns early when ``enough`` accepts the answers; once ``nearly`` accepts them, the others
        are awaited only for ``hedge_s_first``. A store that does not answer within ``call_s`` gives
        UnavailableError. Calls use the reading side by default. ``key`` orders them with other
        writes of that key.
        """
        answer_queue: AnswerQueue[tuple[int, T | CkptError]] = AnswerQueue()
        answers: dict[int, T | CkptError] = {}
        waiting = set()
        for index in indexes:
            replica = self.replicas[index]
            chosen = side(replica) if side else replica.reading
            if chosen.threads.submit(_asking(replica, call, answer_queue), key=key):
                waiting.add(index)
            else:
                answers[index] = busy_error(replica)
        # A store without an answer keeps its thread, and this call does not wait for it.
        until_s = time.monotonic() + self.limits.call_s
        hurried = False
        while waiting and not enough(answers):
            # The answers so far decide in most cases: give the others only a moment to differ.
            if not hurried and nearly(answers):
                hurried, until_s = True, min(until_s, time.monotonic() + self.limits.hedge_s_first)
            entry = answer_queue.get(until_s - time.monotonic())
            if entry is None:
                break
            index, answer = entry
            answers[index] = answer
            waiting.discard(index)
        answer_queue.close()
        if waiting:
            self.wake()  # the repair thread detects it if one of them hangs
        if not enough(answers):
            # Only if they matter: a store that was not waited for did nothing wrong.
            answers |= {
                index: silent_error(self.replicas[index], self.limits.call_s) for index in waiting
            }
        return answers

    def _circuit_changed(self, replica: StoreReplica, side: str, reason: str) -> None:
        store, behind = replica.url, self.backlog.behind(replica.index)
        circuit = replica.reading.circuit if side == "reading" else replica.writing.circuit
        if circuit.usable:
            if replica.healthy:
                self.emit(
                    "store-back",
                    f"{replica.url} answers again and gets what it missed",
                    store=store,
                    behind=behind,
                )
        elif circuit.openings == 1:
            # Once per outage: a failed probe opens the circuit again, but is no news.
            text = f"{replica.url} is not used for {side}: {reason}; it is probed from time to time"
            self.emit("store-down", text, alarm=True, side=side, store=store, behind=behind)
        self.wake()


def busy_error(replica: StoreReplica) -> UnavailableError:
    """The store's queue is full, which counts as not answering."""
    return UnavailableError(
        f"too many calls are waiting for the store. store={replica.url}; repeat later"
    )


def silent_error(replica: StoreReplica, waited_s: float) -> UnavailableError:
    """The store did not answer in time."""
    return UnavailableError(
        f"the store does not answer. store={replica.url} waited_s={waited_s:.1f}; repeat later"
    )


def _asking(
    replica: StoreReplica,
    call: Callable[[StoreReplica], T],
    answer_queue: AnswerQueue[tuple[int, T | CkptError]],
) -> Callable[[], None]:
    def job() -> None:
        answer: T | CkptError
        try:
            answer = call(replica)
        except CkptError as error:
            answer = error
        answer_queue.put((replica.index, answer))

    return job
