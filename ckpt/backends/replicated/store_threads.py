"""Threads that call one store.

A call that hangs keeps its thread and nothing else: neither its caller nor the exit waits for it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

IDLE_S = 20.0
"""An idle thread ends after this long."""

LOST_THREADS_MAX = 32
"""Extra threads for hung calls that never return, besides the working ones."""

Job = Callable[[], None]
"""Must not raise."""


class StoreThreads:
    """Up to ``threads_max`` daemon threads, started on demand, and a queue of ``jobs_max`` jobs.

    Jobs with the same key run one after the other in the order of their submission, so that an old
    put never completes after a newer delete. Thread-safe.
    """

    def __init__(self, name: str, *, threads_max: int, jobs_max: int) -> None:
        self._name = name
        self._threads_max = threads_max
        self._jobs_max = jobs_max
        self._change = threading.Condition()
        self._ready: deque[_QueuedJob] = deque()
        self._behind: dict[str, deque[_QueuedJob]] = {}
        self._jobs = 0
        self._threads = 0
        self._idle = 0
        self._lost = 0
        self._closed = False

    @property
    def has_room(self) -> bool:
        """Whether the queue accepts another job."""
        return self._jobs < self._jobs_max

    def submit(self, job: Job, *, key: str | None = None) -> bool:
        """Run ``job`` in a thread; False, with nothing done, if the queue is full or closed.

        During the interpreter's exit, when no thread can start, the job runs in the calling thread.
        """
        with self._change:
            if self._closed or self._jobs >= self._jobs_max:
                return False
            # Counts jobs that run too: hung calls fill the queue, and the store then counts as
            # busy.
            self._jobs += 1
            entry = _QueuedJob(job, key)
            if key is not None:
                # An earlier job with this key is queued or runs: this one becomes ready when that
                # one ends.
                if key in self._behind:
                    self._behind[key].append(entry)
                    return True
                self._behind[key] = deque()
            self._ready.append(entry)
            # Enough idle threads for all ready jobs. Otherwise start one; at the thread limit a
            # working thread takes the job later.
            if len(self._ready) <= self._idle:
                self._change.notify()
                return True
            if self._threads >= self._allowed() or self._start():
                return True
            self._ready.remove(entry)
        self._do(entry)
        return True

    def thread_lost(self) -> None:
        """A job hangs: its thread no longer counts.

        Other jobs get a thread in its place.
        """
        with self._change:
            self._lost += 1
            if len(self._ready) > self._idle and self._threads < self._allowed():
                self._start()

    def thread_back(self) -> None:
        """A job that counted as hung returned."""
        with self._change:
            self._lost -= 1

    def close(self, timeout_s: float) -> bool:
        """Accept no more jobs, and wait for the accepted ones. Idempotent.

        Returns whether all ended in time.
        """
        until_s = time.monotonic() + timeout_s
        with self._change:
            self._closed = True
            self._change.notify_all()
            return self._change.wait_for(lambda: not self._jobs, until_s - time.monotonic())

    def _allowed(self) -> int:
        return self._threads_max + min(self._lost, LOST_THREADS_MAX)

    def _start(self) -> bool:
        thread = threading.Thread(target=self._work, name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            # The interpreter exits. A thread that still runs takes the job; without one, submit()
            # runs it.
            return self._threads > 0
        self._threads += 1
        return True

    def _work(self) -> None:
        while (entry := self._next()) is not None:
            self._do(entry)
            del entry  # it would keep the job's buffers alive until the next job

    def _next(self) -> _QueuedJob | None:
        with self._change:
            # A hung call came back: there is one thread too many, and this one ends.
            spare = self._threads > self._allowed()
            if not spare:
                self._idle += 1
                self._change.wait_for(lambda: self._ready or self._closed, IDLE_S)
                self._idle -= 1
            if self._ready and not spare:
                return self._ready.popleft()
            self._threads -= 1
            return None

    def _do(self, entry: _QueuedJob) -> None:
        try:
            entry.job()
        finally:
            with self._change:
                self._jobs -= 1
                if entry.key is not None:
                    self._queue_next(entry.key)
                if self._closed:
                    self._change.notify_all()

    def _queue_next(self, key: str) -> None:
        if self._behind[key]:
            self._ready.append(self._behind[key].popleft())
            self._change.notify()
        else:
            del self._behind[key]


@dataclass(frozen=True, slots=True)
class _QueuedJob:
    job: Job
    key: str | None
