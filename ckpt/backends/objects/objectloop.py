"""Work in fsspec's event loop thread, waited for from any other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import TypeVar

T = TypeVar("T")


def wait_for(work: Coroutine[object, object, T], loop: asyncio.AbstractEventLoop) -> T:
    """The result of ``work``, done in the thread of ``loop``.

    Where the wait is interrupted, the work is ended first: it touches no memory of the caller's any more.
    """
    over = threading.Event()
    tasks: list[asyncio.Task[T]] = []

    def begin() -> None:
        tasks.append(loop.create_task(work))
        tasks[0].add_done_callback(finish)

    def finish(task: asyncio.Task[T]) -> None:
        if not task.cancelled():
            task.exception()  # or the loop would report one that an interrupted wait leaves unasked
        over.set()

    def end() -> None:
        # The loop does what it is handed in order, so a work without a task was never handed over.
        if tasks:
            tasks[0].cancel()
        else:
            work.close()
            over.set()

    try:
        loop.call_soon_threadsafe(begin)
        over.wait()
    except BaseException:
        loop.call_soon_threadsafe(end)
        over.wait()
        raise
    return tasks[0].result()
