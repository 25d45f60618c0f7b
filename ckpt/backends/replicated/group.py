"""What the operations on several stores share: the stores, the quorum, what is known to be missing
where, and who is told."""

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

# Where answers of stores arrive, until nobody waits for them any more.

T = TypeVar("T")


class AnswerQueue(Generic[T]):
    """Filled by the threads of stores, emptied by the one thread that asked them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._items: queue.SimpleQueue[T] = queue.SimpleQueue()
        self._closed = False

    def closed(self) -> bool:
        """Whether nobody waits any more; what has not begun need not begin."""
        return self._closed

    def put(self, item: T) -> bool:
        """Deliver; False where nobody waits any more, and whatever comes with ``item`` stays the
        sender's."""
        with self._lock:
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
        """Wait no longer; returns what was delivered and not taken. Idempotent."""
        with self._lock:
            self._closed = True
        items = []
        while not self._items.empty():
            items.append(self._items.get_nowait())
        return items


# One store of a group: its threads, how well and how quick it is, and what is under way.


READS_MAX, WRITES_MAX = 16, 8
"""Threads for reading from and for writing to one store: what fills the links measured."""

QUEUED_MAX = 256
"""Calls that wait for a thread; beyond it a store counts as not answering."""


@dataclass(slots=True)
class ReplicaSide:
    """Reading or writing: a store that is full still serves reads."""

    threads: StoreThreads
    circuit: Circuit = field(default_factory=Circuit)
    speed: StoreSpeed = field(default_factory=StoreSpeed)
    calls: dict[int, RunningCall] = field(default_factory=dict)
    asked_s: float = 0.0


@dataclass(slots=True)
class RunningCall:
    """A call under way, and whether it was already counted as hung."""

    start_s: float
    size_bytes: int
    stalled: bool = False


class StoreReplica:
    """The store at ``place``. ``changed`` is told after each change of a circuit, with the side's
    name. Thread-safe."""

    def __init__(
        self,
        place: int,
        store: Backend,
        *,
        limits: ReplicationLimits,
        jitter: Callable[[], float],
        changed: Callable[[StoreReplica, str, str], None],
    ) -> None:
        self.index = place
        self.store = store
        self.borrower = borrower_of(store)
        self.reading = ReplicaSide(
            StoreThreads(f"ckpt-read-{place}", threads_max=READS_MAX, jobs_max=QUEUED_MAX)
        )
        self.writing = ReplicaSide(
            StoreThreads(f"ckpt-write-{place}", threads_max=WRITES_MAX, jobs_max=QUEUED_MAX)
        )
        self._pace = limits
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
        """Whether it is asked as usual, for reading and for writing."""
        return self.reading.circuit.usable and self.writing.circuit.usable

    def read(self, size_bytes: int, call: Callable[[], T]) -> T:
        """Do ``call``, which reads ``size_bytes``, in this thread, and learn from it. Raises
        CkptError only."""
        return self._do(self.reading, size_bytes, call)

    def write(self, size_bytes: int, call: Callable[[], T]) -> T:
        """Do ``call``, which writes ``size_bytes``, in this thread, and learn from it. Raises
        CkptError only."""
        return self._do(self.writing, size_bytes, call)

    def observe(self, side: ReplicaSide, sign: CircuitEvent, why: str) -> None:
        """Something was seen of the store."""
        with self._lock:
            before = side.circuit
            if sign is CircuitEvent.ANSWERED and before == _FRESH:
                return
            side.circuit = advance(
                before, sign, time.monotonic(), limits=self._pace, jitter=self._jitter()
            )
            changed = side.circuit.usable != before.usable
        if changed:
            self._changed(self, "reading" if side is self.reading else "writing", why)

    def probe_now(self) -> None:
        """Be looked at now where it is left alone."""
        with self._lock:
            for side in (self.reading, self.writing):
                side.circuit = probe_now(side.circuit, time.monotonic())

    def mark_asked(self, side: ReplicaSide) -> float:
        """The store is about to be asked; how long it was not."""
        now_s = time.monotonic()
        idle_s, side.asked_s = now_s - side.asked_s, now_s
        return idle_s

    def detect_stalls(self) -> None:
        """Count calls that take far too long as hung."""
        now_s = time.monotonic()
        for side in (self.reading, self.writing):
            if not side.calls:
                continue
            with self._lock:
                hung = [
                    call
                    for call in side.calls.values()
                    if not call.stalled
                    and now_s - call.start_s > stall_s(self._pace, call.size_bytes)
                ]
                for call in hung:
                    call.stalled = True
                    side.speed = with_lower_bound(side.speed, call.size_bytes, now_s - call.start_s)
            for call in hung:
                side.threads.thread_lost()
                self.observe(
                    side,
                    CircuitEvent.STALLED,
                    f"a call has not come back for {now_s - call.start_s:.0f} s",
                )

    def cut_off(self, size_bytes: int, waited_s: float) -> None:
        """A put was given up: it would have taken longer than ``waited_s``."""
        with self._lock:
            self.writing.speed = with_lower_bound(self.writing.speed, size_bytes, waited_s)

    def _do(self, side: ReplicaSide, size_bytes: int, call: Callable[[], T]) -> T:
        start_s = time.monotonic()
        under_way = RunningCall(start_s, size_bytes)
        with self._lock:
            self._calls += 1
            number = self._calls
            side.calls[number] = under_way
        sign, why, counts = CircuitEvent.ANSWERED, "it answers", False
        try:
            result = call()
            counts = True
        except TakenBackError:
            sign = CircuitEvent.PROBED  # says nothing of the store
            raise
        except (StoreFullError, StoreDeniedError) as error:
            sign, why = CircuitEvent.REFUSED, str(error)
            raise
        except UnavailableError as error:
            sign, why = CircuitEvent.FAILED, str(error)
            raise
        except CkptError:
            raise
        except Exception as error:
            sign, why = CircuitEvent.FAILED, f"{type(error).__name__}: {error}"
            raise UnavailableError(
                f"the store's code failed. store={self.url} error={why}; repeat, and report it to "
                "who wrote the store"
            ) from error
        finally:
            took_s = time.monotonic() - start_s
            with self._lock:
                del side.calls[number]
                if counts:
                    side.speed = with_measurement(side.speed, size_bytes, took_s)
            if under_way.stalled:
                side.threads.thread_back()
            if sign is not CircuitEvent.PROBED:
                self.observe(side, sign, why)
        return result


_FRESH = Circuit()


def _never(answers: Mapping[int, object]) -> bool:
    return False


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
        self._dice = random.Random(seed)
        self._tell = emit
        self.change = threading.Condition()
        self._ledger = ledgers.empty_ledger(len(stores))
        self._aside: tuple[dict[str, RepairNeed], ...] = tuple({} for _ in stores)
        self._on_the_way: dict[tuple[int, str], int] = {}
        self._alarmed: set[int] = set()
        self.wake: Callable[[], None] = lambda: None
        self.replicas = tuple(
            StoreReplica(
                place, store, limits=limits, jitter=self.jitter, changed=self._circuit_changed
            )
            for place, store in enumerate(stores)
        )

    def jitter(self) -> float:
        """A random number in [0, 1)."""
        return self._dice.random()

    def emit(self, kind: str, text: str, *, alarm: bool = False, **facts: str | int) -> None:
        """Say what happened."""
        self._tell(Event(kind, text, facts, alarm))

    def read_order(self, size_bytes: int) -> tuple[int, ...]:
        """The places in the order in which to read ``size_bytes`` from them."""
        now_s = time.monotonic()
        candidates = [
            ReadCandidate(
                member.index,
                member.reading.circuit.usable,
                speeds.expected_s(member.reading.speed, size_bytes),
                now_s - member.reading.asked_s,
            )
            for member in self.replicas
        ]
        return speeds.read_order(candidates, prefer=self._prefer)

    def usable(self) -> frozenset[int]:
        """The places that can be read from as usual."""
        return frozenset(member.index for member in self.replicas if member.reading.circuit.usable)

    def detect_stalls(self) -> None:
        """Count calls that take far too long as hung."""
        for member in self.replicas:
            member.detect_stalls()

    def count_only(self, quorum: Quorum) -> None:
        """From now on ``quorum`` says which stores count. What one missed shortly before it did is
        brought to it.

        It was filled, or answered again, while objects were on their way to the others, whose
        records came later.
        """
        with self.change:
            again = quorum.voters - self.quorum.voters
            self.quorum = quorum
            missed = [(place, self._aside[place].copy()) for place in sorted(again)]
            for place in again:
                self._aside[place].clear()
        for place, needs in missed:
            for key, need in needs.items():
                self.note_need(
                    place, key, need, reason="written while the store did not count", alarm=False
                )

    # What is missing where.

    @property
    def ledger(self) -> ledgers.RepairLedger:
        """What is known to be missing now."""
        return self._ledger

    def note_need(
        self, place: int, key: str, need: RepairNeed, *, reason: str, alarm: bool
    ) -> None:
        """``key`` is not as it should be at ``place``. The first of a store is told; ``alarm``:
        loudly.

        For a store that doesn't count it is put aside until it does, the newest of it: the rest it
        is filled with.
        """
        with self.change:
            if place not in self.quorum.voters:
                aside = self._aside[place]
                aside[key] = need
                if len(aside) > self.limits.keys_max:
                    del aside[next(iter(aside))]
                return
            scrub = self._ledger.scrub[place]
            self._ledger = ledgers.with_need(
                self._ledger, place, key, need, keys_max=self.limits.keys_max
            )
            first = place not in self._alarmed
            overflows = self._ledger.scrub[place] and not scrub
            if alarm or overflows:
                self._alarmed.add(place)
        if (alarm and first) or overflows:
            self.emit(
                "under-replicated",
                f"objects are missing or damaged in {self.replicas[place].url} and will be mended "
                "from other stores"
                + ("; more than are remembered: run `ckpt scrub`" if overflows else ""),
                alarm=True,
                store=self.replicas[place].url,
                key=key,
                need=need.fault.value,
                why=reason,
            )
        self.wake()

    def settle_need(self, place: int, key: str) -> None:
        """``key`` is as it should be at ``place``."""
        self._turn(lambda ledger: ledgers.without_need(ledger, place, key))

    def forget(self, key: str) -> None:
        """``key`` is deleted, and nowhere missing any more."""
        with self.change:
            for aside in self._aside:
                aside.pop(key, None)
        self._turn(lambda ledger: ledgers.without_key(ledger, key))

    def postpone(self, place: int, key: str) -> None:
        """``key`` could not be mended at ``place`` now."""
        now_s, jitter = time.monotonic(), self.jitter()
        self._turn(
            lambda ledger: ledgers.postponed(
                ledger, place, key, now_s, limits=self.limits, jitter=jitter
            )
        )

    def leave_to_scrub(self, place: int, key: str, why: str) -> None:
        """``key`` can only be mended by a scrub."""
        self._turn(lambda ledger: ledgers.left_to_scrub(ledger, place, key))
        url = self.replicas[place].url
        text = f"a copy in {url} can't be mended without looking at every chunk: {why}; run `ckpt scrub`"
        self.emit("under-replicated", text, alarm=True, store=url, key=key, why=why)

    def scrubbed(self, place: int) -> None:
        """A scrub has been through the store."""
        self._turn(lambda ledger: ledgers.scrubbed(ledger, place))

    def repair_now(self) -> None:
        """Mend and probe without pauses."""
        self._turn(ledgers.all_due)
        self.wake()

    def _turn(self, turn: Callable[[ledgers.RepairLedger], ledgers.RepairLedger]) -> None:
        with self.change:
            self._ledger = turn(self._ledger)
            self._alarmed = {
                place
                for place in self._alarmed
                if self._ledger.needs[place] or self._ledger.scrub[place]
            }
            self.change.notify_all()

    # What a put that has returned still writes in the background.

    def background_put_started(self, place: int, key: str) -> None:
        """A put of ``key`` goes on at ``place`` after its caller was told that it is done."""
        with self.change:
            self._on_the_way[place, key] = self._on_the_way.get((place, key), 0) + 1

    def background_put_ended(self, place: int, key: str) -> None:
        """It ended."""
        with self.change:
            left = self._on_the_way.pop((place, key)) - 1
            if left:
                self._on_the_way[place, key] = left
            self.change.notify_all()

    def behind(self, place: int) -> int:
        """How many keys the store is known to miss, those on their way included."""
        with self.change:
            away = {key for at, key in self._on_the_way if at == place}
            return len(away | self._ledger.needs[place].keys())

    def caught_up(self) -> bool:
        """Whether nothing is known to be missing anywhere."""
        with self.change:
            return (
                not self._on_the_way and not any(self._ledger.needs) and not any(self._ledger.scrub)
            )

    # Small calls to several stores at once.

    def ask(
        self,
        places: Iterable[int],
        call: Callable[[StoreReplica], T],
        *,
        side: Callable[[StoreReplica], ReplicaSide] | None = None,
        key: str | None = None,
        enough: Callable[[Mapping[int, T | CkptError]], bool] = _never,
        nearly: Callable[[Mapping[int, T | CkptError]], bool] = _never,
    ) -> dict[int, T | CkptError]:
        """What ``call`` gives for each of ``places``, asked at once.

        ``enough`` says when no more answers are needed, ``nearly`` when the others need not be
        waited for as long as that. A store that does not answer within ``Pace.call_s`` gives
        UnavailableError. Calls go through the reading side by default; ``key`` keeps them in order
        with other writes of that key. Thread-safe.
        """
        mailbox: AnswerQueue[tuple[int, T | CkptError]] = AnswerQueue()
        answers: dict[int, T | CkptError] = {}
        waiting = set()
        for place in places:
            member = self.replicas[place]
            lane = (side(member) if side else member.reading).threads
            if lane.submit(_asking(member, call, mailbox), key=key):
                waiting.add(place)
            else:
                answers[place] = busy_error(member)
        until_s = time.monotonic() + self.limits.call_s
        hurried = False
        while waiting and not enough(answers):
            if not hurried and nearly(answers):
                hurried, until_s = True, min(until_s, time.monotonic() + self.limits.hedge_s_first)
            got = mailbox.get(until_s - time.monotonic())
            if got is None:
                break
            answers[got[0]] = got[1]
            waiting.discard(got[0])
        mailbox.close()
        if waiting:
            self.wake()  # to see it if one of them hangs
        if not enough(answers):
            answers |= {
                place: silent_error(self.replicas[place], self.limits.call_s) for place in waiting
            }
        return answers

    def _circuit_changed(self, member: StoreReplica, side: str, why: str) -> None:
        store, behind = member.url, self.behind(member.index)
        circuit = member.reading.circuit if side == "reading" else member.writing.circuit
        if circuit.usable:
            if member.healthy:
                self.emit(
                    "store-back",
                    f"{member.url} answers again, and gets what it missed",
                    store=store,
                    behind=behind,
                )
        elif circuit.openings == 1:
            text = f"{member.url} is left alone for {side}: {why}; it is looked at again by and by"
            self.emit("store-down", text, alarm=True, side=side, store=store, behind=behind)
        self.wake()


def busy_error(member: StoreReplica) -> UnavailableError:
    """The store's queue is full: as good as not answering."""
    return UnavailableError(
        f"too many calls wait for the store already. store={member.url}; repeat later"
    )


def silent_error(member: StoreReplica, waited_s: float) -> UnavailableError:
    """The store did not answer in time."""
    return UnavailableError(
        f"the store does not answer. store={member.url} waited_s={waited_s:.1f}; repeat later"
    )


def _asking(
    member: StoreReplica,
    call: Callable[[StoreReplica], T],
    mailbox: AnswerQueue[tuple[int, T | CkptError]],
) -> Callable[[], None]:
    def job() -> None:
        answer: T | CkptError
        try:
            answer = call(member)
        except CkptError as error:
            answer = error
        mailbox.put((member.index, answer))

    return job
