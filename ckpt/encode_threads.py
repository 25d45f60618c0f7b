"""Daemon threads whose outcome is a future. A pool of the standard library would be joined at exit, however long that takes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def run_into(future: Future[T], call: Callable[[], T]) -> None:
    """Do ``call`` now, unless ``future`` was cancelled, and let ``future`` have what it returns or raises."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:  # noqa: BLE001  a thread's border: the future raises it where it is asked
        future.set_exception(error)
    else:
        future.set_result(result)


def start(call: Callable[[], T], *, name: str) -> Future[T]:
    """Do ``call`` in a thread of its own; in this one where the interpreter is ending and starts no thread any more."""
    future: Future[T] = Future()
    thread = threading.Thread(target=run_into, args=(future, call), name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        run_into(future, call)
    return future
