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

    async def announced() -> T:
        try:
            return await work
        finally:
            over.set()

    future = asyncio.run_coroutine_threadsafe(announced(), loop)
    try:
        return future.result()
    except BaseException:
        if future.cancel():
            over.wait()
        raise
