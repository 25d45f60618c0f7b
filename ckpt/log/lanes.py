"""Asking several stores at once, without waiting for one that is slow once enough have answered.

Each store has a lane: what it is asked waits in order, so that a store that is only slow gets every record in the end. A store
whose lane has not moved for a while is not waited for at all where the others are enough.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Protocol, TypeVar

from ckpt.encode_threads import run_into, start

T = TypeVar("T")

GRACE_S_MIN = 0.1
GRACE_S_MAX = 2.0
"""How long the rest is waited for after enough have answered: as long again as those took, within these limits."""

STUCK_S = 5.0
"""A call that takes longer than this keeps its lane from being waited for."""

WAITING_MAX = 4096
"""How many calls may wait in one lane: what a store that hangs misses beyond them, a scrub brings it later."""

Enough = Callable[[Mapping[int, T]], bool]
"""Whether the answers of some stores, by number, are enough."""


class Lanes(Protocol):
    """How stores are asked together."""

    def ask(self, calls: Mapping[int, Callable[[], T]], enough: Enough[T]) -> dict[int, T]:
        """Make each call for the store of its number; the answers there were when it was time to go on.

        A call that raises is raised. What did not answer in time is left out, and goes on behind.
        """
        ...


class ThreadLanes:
    """A thread for each store that has something to do; it ends with its work, and holds up no exit."""

    def __init__(self) -> None:
        self._lanes: dict[int, _Lane] = {}
        self._changed = threading.Condition()

    def ask(self, calls: Mapping[int, Callable[[], T]], enough: Enough[T]) -> dict[int, T]:
        """See Lanes."""
        began_s = time.monotonic()
        futures: dict[int, Future[T]] = {}
        for number, call in calls.items():
            future = self._lane(number).submit(call)
            if future is not None:
                futures[number] = future
                future.add_done_callback(self._wake)
        enough_s: float | None = None
        while True:
            with self._changed:
                done = {number: future for number, future in futures.items() if future.done()}
                now_s = time.monotonic()
                if enough_s is None and enough({number: future.result() for number, future in done.items()}):
                    enough_s = now_s
                left_s = self._left_s(futures, enough_s, now_s, began_s)
                if left_s is None or left_s <= 0:
                    return {number: future.result() for number, future in done.items()}
                self._changed.wait(left_s)

    def _left_s(
        self, futures: Mapping[int, Future[T]], enough_s: float | None, now_s: float, began_s: float
    ) -> float | None:
        """How long to wait for more answers; None: not at all."""
        waiting = [number for number, future in futures.items() if not future.done()]
        if not waiting:
            return None
        if enough_s is None:
            return GRACE_S_MAX  # as long as it takes: backends give up by themselves; look again whether one is done
        if all(self._lanes[number].stuck(now_s) for number in waiting):
            return None
        grace_s = min(max(enough_s - began_s, GRACE_S_MIN), GRACE_S_MAX)
        return enough_s + grace_s - now_s

    def _lane(self, number: int) -> _Lane:
        return self._lanes.setdefault(number, _Lane(f"ckpt-log-{number}"))

    def _wake(self, _: object) -> None:
        with self._changed:
            self._changed.notify_all()


class _Lane:
    """Calls to one store, one at a time, in order."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._waiting: deque[Callable[[], None]] = deque()
        self._since_s: float | None = None

    def stuck(self, now_s: float) -> bool:
        """Whether the call that is being made has taken too long."""
        since_s = self._since_s
        return since_s is not None and now_s - since_s > STUCK_S

    def submit(self, call: Callable[[], T]) -> Future[T] | None:
        """Queue ``call``; None where too many wait already."""
        future: Future[T] = Future()

        with self._lock:
            if len(self._waiting) >= WAITING_MAX:
                return None
            self._waiting.append(lambda: run_into(future, call))
            idle, self._since_s = self._since_s is None, self._since_s or time.monotonic()
        if idle:
            start(self._work, name=self._name)
        return future

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._since_s = None
                    return
                run = self._waiting.popleft()
                self._since_s = time.monotonic()
            run()
            del run  # or it would keep what it holds alive until the next call
