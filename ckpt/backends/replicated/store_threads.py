"""Threads that call one store. A call that hangs keeps its thread, and nothing else: not its
caller, not the exit."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

IDLE_S = 20.0
"""A thread with nothing to do ends after this long."""

LOST_THREADS_MAX = 32
"""Threads that calls which never come back may keep, beside those that work."""

Job = Callable[[], None]
"""Must not raise."""


class StoreThreads:
    """Up to ``threads_max`` daemon threads, started when needed, and a queue of ``jobs_max`` jobs.
    Thread-safe.

    Jobs with the same key are done one after the other in the order they came, so that an old put
    never lands after a newer delete.
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
        """Whether a job would begin at once, or soon."""
        return self._jobs < self._jobs_max

    def submit(self, job: Job, *, key: str | None = None) -> bool:
        """Do ``job`` in a thread; False, with nothing done, where the queue is full or closed.

        At the interpreter's end, when no thread starts any more, it is done in this one.
        """
        with self._change:
            if self._closed or self._jobs >= self._jobs_max:
                return False
            self._jobs += 1
            entry = _QueuedJob(job, key)
            if key is not None:
                if key in self._behind:
                    self._behind[key].append(entry)
                    return True
                self._behind[key] = deque()
            self._ready.append(entry)
            if len(self._ready) <= self._idle:
                self._change.notify()
                return True
            if self._threads >= self._allowed() or self._start():
                return True
            self._ready.remove(entry)
        self._do(entry)
        return True

    def thread_lost(self) -> None:
        """A job hangs: its thread no longer counts, so that others don't wait for it."""
        with self._change:
            self._lost += 1
            if len(self._ready) > self._idle and self._threads < self._allowed():
                self._start()

    def thread_back(self) -> None:
        """A job that was counted as lost came back."""
        with self._change:
            self._lost -= 1

    def close(self, timeout_s: float) -> bool:
        """Take no more jobs, and wait for those that were taken; returns whether all ended in time.
        Idempotent."""
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
            return self._threads > 0
        self._threads += 1
        return True

    def _work(self) -> None:
        while (entry := self._next()) is not None:
            self._do(entry)
            del entry  # or it would keep its memory alive until the next job

    def _next(self) -> _QueuedJob | None:
        with self._change:
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
                    self._follow(entry.key)
                if self._closed:
                    self._change.notify_all()

    def _follow(self, key: str) -> None:
        if self._behind[key]:
            self._ready.append(self._behind[key].popleft())
            self._change.notify()
        else:
            del self._behind[key]


@dataclass(frozen=True, slots=True)
class _QueuedJob:
    job: Job
    key: str | None
