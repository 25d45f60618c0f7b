"""Daemon threads whose results are futures; none can block the interpreter's exit forever.

A pool of the standard library is joined at exit without a limit, so one hung store would block
every exit. These threads are daemons; at exit a ``CallQueue`` gets a bounded time to finish.
"""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


def run_into_future(future: Future[T], call: Callable[[], T]) -> None:
    """Run ``call`` now, unless ``future`` was cancelled, and set its result or exception."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:  # noqa: BLE001  a thread's border: the future raises it
        future.set_exception(error)
    else:
        future.set_result(result)


def start_thread(call: Callable[[], T], *, name: str) -> Future[T]:
    """Run ``call`` in a thread of its own.

    While the interpreter exits no thread can be started; ``call`` then runs in this one.
    """
    future: Future[T] = Future()
    thread = threading.Thread(target=run_into_future, args=(future, call), name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        run_into_future(future, call)
    return future


EXIT_WAIT_S = 600.0
"""How long the interpreter's exit waits for a queue that was never closed."""


class CallQueue:
    """Calls that one background thread runs in order. Thread-safe."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()
        atexit.register(self._at_exit)

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Queue ``call``; the future gives what it returns or raises."""
        future: Future[T] = Future()
        self._calls.put(_Call(future.cancel, lambda: run_into_future(future, call)))
        return future

    @property
    def ended(self) -> bool:
        """Whether the thread has ended."""
        return not self._thread.is_alive()

    def close(self, *, cancel: bool = False, timeout_s: float | None = None) -> bool:
        """Let the queue run empty and end the thread. ``cancel`` drops calls that have not started.

        Waits at most ``timeout_s`` seconds (None: no limit) and returns whether the thread ended.
        If not, the thread continues in the background and blocks no exit.
        """
        atexit.unregister(self._at_exit)
        if cancel:
            self._cancel()
        self._calls.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _cancel(self) -> None:
        while True:
            try:
                entry = self._calls.get_nowait()
            except queue.Empty:
                return
            if entry is not None:
                entry.cancel()

    def _at_exit(self) -> None:
        self._calls.put(None)
        self._thread.join(EXIT_WAIT_S)

    def _work(self) -> None:
        while (entry := self._calls.get()) is not None:
            entry.run()
            del entry  # it may hold a slot, which would stay in use until the next call


@dataclass(frozen=True, slots=True)
class _Call:
    cancel: Callable[[], object]
    run: Callable[[], None]
