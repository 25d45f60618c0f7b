"""One background thread that does calls in order, and never keeps a process alive for ever.

A pool of the standard library is joined at the interpreter's exit without a limit, so one hung
store would make every exit endless. This thread is a daemon; at exit it gets a bounded time to
finish what it was given.
"""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

# Daemon threads whose outcome is a future. A pool of the standard library would be joined at
# exit, however long that takes.

T = TypeVar("T")


def run_into_future(future: Future[T], call: Callable[[], T]) -> None:
    """Do ``call`` now, unless ``future`` was cancelled, and let ``future`` have what it returns or
    raises."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:  # noqa: BLE001  a thread's border: the future raises it where it is asked
        future.set_exception(error)
    else:
        future.set_result(result)


def start_thread(call: Callable[[], T], *, name: str) -> Future[T]:
    """Do ``call`` in a thread of its own; in this one where the interpreter is ending and starts no
    thread any more."""
    future: Future[T] = Future()
    thread = threading.Thread(target=run_into_future, args=(future, call), name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        run_into_future(future, call)
    return future


EXIT_WAIT_S = 600.0
"""How long an interpreter's exit waits for calls that were never closed."""


class CallQueue:
    """Calls, done one after the other by a thread of their own. Thread-safe."""

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
        """Whether the thread is gone."""
        return not self._thread.is_alive()

    def close(self, *, cancel: bool = False, timeout_s: float | None = None) -> bool:
        """Let the queue run empty (``cancel``: drop what has not begun) and end the thread.

        Waits ``timeout_s`` seconds at most, for ever where None; returns whether the thread ended.
        One that did not goes on behind and holds up no exit.
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
            del entry  # or it would keep its slot alive until the next call


@dataclass(frozen=True, slots=True)
class _Call:
    cancel: Callable[[], object]
    run: Callable[[], None]
